"""data/sop.py, inshop.py and copies for cub200.py, run as a user does on small copies of exactly their layouts."""

import os
import random
import stat
import zipfile

import data_sets
import pytest
from archives import link, tar
from conftest import listing, read_rows
from data_sets import prepare, zipped

import cars196
import cub200
import inshop
import published
import sop
import unpack
from utility import UserError

ANY = "--any_counts"


def lists(folder, prefix, *parts):
    return [read_rows(os.path.join(folder, f"{prefix}_{part}.txt")) for part in parts]


def check_paths(folder, prefix, *parts):
    for rows in lists(folder, prefix, *parts):
        assert rows and all(os.path.isfile(os.path.join(folder, row.rpartition(" ")[0])) for row in rows)


# ---------------------------------------------------------------- Stanford Online Products


def test_sop_from_its_archive_to_the_lists(tmp_path):
    members = {f"Stanford_Online_Products/{name}": content for name, content in data_sets.sop().items()}
    members["__MACOSX/Stanford_Online_Products/._Ebay_info.txt"] = b"mac"
    (tmp_path / "Stanford_Online_Products.zip").write_bytes(zipped(members))
    result = prepare("sop.py", tmp_path / "Stanford_Online_Products.zip", ANY)
    home = tmp_path / "Stanford_Online_Products"
    assert "Stanford_Online_Products.zip is not the published file: it has " in result.stderr
    assert "train: 8 images of 4 classes instead of 59551 of 11318; val: 8 images of 4 classes" in result.stderr
    assert f"found Stanford Online Products, by its published lists: 16 images of 8 classes in {home}" in result.stdout
    assert "--loss_name=proxyanchorloss" in result.stdout and f"--train_list={home}/SOP_train.txt" in result.stdout
    train, val, classes = lists(home, "SOP", "train", "val", "classes")
    assert train[0] == "coffee_maker_final/111001_0.JPG 1" and val[-1] == "bicycle_final/122322_1.JPG 11322"
    assert classes[0] == "1 coffee_maker 111001" and len(classes) == 8
    check_paths(home, "SOP", "train", "val")
    assert not list(home.rglob("._*"))
    # The folder that it became, or the one above: nothing is unpacked again, and nothing changes.
    before = listing(home)
    for path in (home, tmp_path):
        assert "unpacking" not in prepare("sop.py", path, ANY).stdout
        assert listing(home) == before


def test_an_archive_of_another_name(tmp_path):
    members = {f"Stanford_Online_Products/{name}": content for name, content in data_sets.sop().items()}
    (tmp_path / "mine.zip").write_bytes(zipped(members))
    prepare("sop.py", "mine.zip", ANY, cwd=tmp_path)
    check_paths(tmp_path / "Stanford_Online_Products", "SOP", "train", "val")
    (tmp_path / "flat.tgz").write_bytes(
        tar({k: v.encode() if isinstance(v, str) else v for k, v in data_sets.sop().items()})
    )
    prepare("sop.py", tmp_path / "flat.tgz", ANY, f"--output_dir={tmp_path}/lists")
    check_paths(tmp_path / "lists", "SOP", "train", "val")


def test_the_published_counts_are_taken_without_a_word(tmp_path, capsys):
    """120,053 rows, each class of the sizes that make the published sums."""
    rng, number = random.Random(0), 0
    for name, first, pictures, classes in (("train", 1, 59551, 11318), ("test", 11319, 60502, 11316)):
        labels = [first + n % classes for n in range(pictures)]
        rng.shuffle(labels)
        rows = [f"{number + n} {label} 1 bicycle_final/{label}_{n}.JPG" for n, label in enumerate(labels, 1)]
        (tmp_path / f"Ebay_{name}.txt").write_text("\n".join(["image_id class_id super_class_id path", *rows, ""]))
    found = sop.find(str(tmp_path))
    published.check_counts("x", sop.SOP, found.listed, False)
    with pytest.raises(UserError, match=r"train: 59550 images of 11318 classes instead of 59551 of 11318: complete it"):
        published.check_counts("x", sop.SOP, {**found.listed, "train": found.listed["train"][1:]}, False)
    assert capsys.readouterr() == ("", "")


def test_missing_empty_and_superfluous_pictures(tmp_path):
    files = data_sets.sop()
    files["coffee_maker_final/111001_0.JPG"] = b""
    files["bicycle_final/111002_1.JPG"] = b"<html>not found</html>"
    del files["coffee_maker_final/111003_0.JPG"]
    files["bicycle_final/extra.JPG"] = data_sets.jpeg(9)
    data_sets.write(tmp_path, files)
    before = listing(tmp_path)
    error = prepare("sop.py", tmp_path, status=2).stderr
    assert f"3 of 16 pictures are missing or none in {tmp_path} (first: coffee_maker_final/111001_0.JPG, " in error
    assert "bicycle_final/111002_1.JPG, coffee_maker_final/111003_0.JPG): an incomplete copy" in error and ANY in error
    assert "1 empty" in error and "1 no pictures" in error and "1 hidden" in error
    assert listing(tmp_path) == before
    result = prepare("sop.py", tmp_path, ANY)
    assert "3 of 16 pictures are missing" in result.stderr and "they are left out" in result.stderr
    assert "note: 1 picture in no list of the data set (first: bicycle_final/extra.JPG)" in result.stdout
    assert "note: train: 3 classes of one image" in result.stdout
    assert [len(rows) for rows in lists(tmp_path, "SOP", "train", "val")] == [5, 8]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("image_id", "id"), "Ebay_train.txt: not a list of Stanford Online Products"),
        (lambda text: "", "Ebay_train.txt: not a list of Stanford Online Products"),
        (lambda text: text + "99 5 1\n", "Ebay_train.txt:10: not a row of this file"),
        (lambda text: text + "99 five 1 mug_final/1.JPG\n", "Ebay_train.txt:10: not a row of this file"),
        (lambda text: text + "99 5 1 ../../etc/1.JPG\n", "Ebay_train.txt:10: not a row of this file"),
        (lambda text: text + "99 5 1 /etc/1.JPG\n", "Ebay_train.txt:10: not a row of this file"),
        (lambda text: text + "99 " + "9" * 5000 + " 1 mug_final/1.JPG\n", "Ebay_train.txt:10: not a row of this file"),
        (lambda text: text + "9 11319 1 mug_final/1.JPG\n", "1 classes are in both lists (first: 11319)"),
        (lambda text: text + text.splitlines()[1] + "\n", "1 pictures are listed more than once"),
    ],
)
def test_lists_that_are_not_the_published_ones(tmp_path, change, message):
    files = data_sets.sop()
    data_sets.write(tmp_path, {**files, "Ebay_train.txt": change(files["Ebay_train.txt"])})
    assert message in prepare("sop.py", tmp_path, ANY, status=2).stderr
    assert not list(tmp_path.glob("SOP_*"))


def test_the_wrong_folder_is_named_for_what_it_is(tmp_path):
    pictures, files = data_sets.inshop()
    data_sets.write(
        tmp_path / "fashion", {**pictures, "list_eval_partition.txt": files["Eval/list_eval_partition.txt"]}
    )
    error = prepare("sop.py", tmp_path / "fashion", status=2).stderr
    assert (
        "no Stanford Online Products in it or in a folder of it, but list_eval_partition.txt, which data/inshop.py"
        in error
    )
    data_sets.write(tmp_path / "sop", data_sets.sop())
    for script in ("inshop.py", "cars196.py", "cub200.py"):
        assert "but Ebay_train.txt, which data/sop.py reads" in prepare(script, tmp_path / "sop", status=2).stderr
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "archive.zip").write_bytes(zipped({"a": "b"}))
    error = prepare("sop.py", tmp_path / "packed", status=2).stderr
    assert "of archives there are archive.zip: name one; it has Ebay_train.txt" in error and "https://" in error
    assert "no such file or folder" in prepare("sop.py", tmp_path / "absent", status=2).stderr
    assert "unrecognized arguments: --crop_boxes" in prepare("sop.py", tmp_path, "--crop_boxes", status=2).stderr


# ---------------------------------------------------------------- In-shop


@pytest.mark.parametrize("top, images", [("Eval", "Img"), ("", ""), ("Eval", "Img packed")])
def test_inshop_in_the_layouts_that_people_have(tmp_path, top, images):
    home = tmp_path / "In-shop Clothes Retrieval Benchmark"
    pictures, files = data_sets.inshop()
    data_sets.write(home, {f"{top}/list_eval_partition.txt".lstrip("/"): files["Eval/list_eval_partition.txt"]})
    inside = images.partition(" ")[0]
    if "packed" in images:
        data_sets.write(home, {f"{inside}/img.zip": zipped({**pictures, "img/._x.jpg": b"mac"})})
    else:
        data_sets.write(home / inside, pictures)
    out = prepare("inshop.py", tmp_path if images else home, ANY).stdout
    train, query, gallery, classes = lists(home, "inshop", "train", "query", "gallery", "classes")
    assert [len(rows) for rows in (train, query, gallery)] == [8, 6, 6]
    start = f"{inside}/" if inside else ""
    assert train[0] == f"{start}img/WOMEN/Blouses_Shirts/id_00000001/01_1_front.jpg 1" and query[0].endswith(" 5")
    assert classes[0] == "1 WOMEN/Blouses_Shirts/id_00000001"
    check_paths(home, "inshop", "train", "query", "gallery")
    flags = f"'--val_list={home}/inshop_query.txt' '--gallery_list={home}/inshop_gallery.txt'"
    assert f"then: python eval.py {flags} --pretrained_model=output_inshop/ResNet50/best" in out


def test_inshop_in_one_archive_with_another_that_is_not_needed(tmp_path):
    """The archive of all holds img.zip; img_highres.zip beside it is not looked at."""
    pictures, files = data_sets.inshop()
    partition = files["Eval/list_eval_partition.txt"]
    packed = {
        "Img/img.zip": zipped(pictures),
        "Img/img_highres.zip": b"PK no zip",
        "Eval/list_eval_partition.txt": partition,
    }
    (tmp_path / "mine.zip").write_bytes(zipped({f"In-shop/{name}": content for name, content in packed.items()}))
    out = prepare("inshop.py", tmp_path / "mine.zip", ANY).stdout
    assert "img_highres" not in out
    check_paths(tmp_path / "In-shop", "inshop", "train", "query", "gallery")


def test_inshop_files_that_are_cut_off_or_others(tmp_path):
    pictures, files = data_sets.inshop()
    data_sets.write(tmp_path, pictures)
    partition = tmp_path / "list_eval_partition.txt"
    text = files["Eval/list_eval_partition.txt"]
    for content, message in (
        (text.rpartition("img/")[0], "19 rows instead of the 20 that its first line says: it is cut off"),
        (text.replace("gallery", "test"), ".txt:13: not a row of this file"),
        (text.replace("id_00000002", "two"), ".txt:5: not a row of this file"),
        (text.replace("20\n", "many\n", 1), ".txt:1: not a row of this file"),
        (text.partition("\n")[2], "not a file of In-shop Clothes Retrieval"),
        ("", "not a file of In-shop Clothes Retrieval"),
    ):
        partition.write_text(content)
        assert message in prepare("inshop.py", tmp_path, ANY, status=2).stderr
    partition.write_text(text)
    error = prepare("inshop.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    assert "--crop_boxes needs Anno/list_bbox_inshop.txt, which is not there" in error
    os.rename(tmp_path / "img", tmp_path / "pictures")
    assert "neither img nor Img/img, nor img.zip" in prepare("inshop.py", tmp_path, ANY, status=2).stderr
    assert inshop.INSHOP.counts == {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)}


# ---------------------------------------------------------------- copies of CUB


def test_a_copy_of_either_edition(tmp_path):
    early, later = tmp_path / "early", tmp_path / "later"
    early.mkdir()
    (early / "images.tgz").write_bytes(tar(data_sets.birds()))
    out = prepare("cub200.py", early / "images.tgz", ANY).stdout
    assert f"found CUB-200 (2010), by its class folders: 8 images of 4 classes in {early}" in out
    assert lists(early, "CUB200", "val")[0][0] == "images/101.Bird/Bird_101_0.jpg 101"
    data_sets.write(later, data_sets.birds_2011())
    for path, images in ((later, "CUB_200_2011/images"), (later / "CUB_200_2011", "images")):
        out = prepare("cub200.py", path, ANY).stdout
        assert f"found CUB-200-2011, by images.txt: 8 images of 4 classes in {path}" in out
        assert lists(path, "CUB200", "train")[0][0] == f"{images}/001.Bird/Bird_1_0.jpg 1"
    assert "not the CUB-200-2011 that was published: train: 4 images" in prepare("cub200.py", later, status=2).stderr
    os.remove(later / "CUB_200_2011" / "images" / "102.Bird" / "Bird_102_1.jpg")
    error = prepare("cub200.py", later, status=2).stderr
    assert "1 of 8 pictures are missing or none" in error and "102.Bird/Bird_102_1.jpg" in error
    os.rename(early / "images", later / "images")
    assert "both editions are there" in prepare("cub200.py", later, ANY, status=2).stderr


def test_the_lists_of_2010_name_what_must_be_there(tmp_path):
    data_sets.write(tmp_path, data_sets.birds())
    data_sets.write(
        tmp_path, {"lists/train.txt": "001.Bird/Bird_1_0.jpg\n001.Bird/Bird_1_9.jpg\n", "lists/test.txt": ""}
    )
    error = prepare("cub200.py", tmp_path, status=2).stderr
    assert "1 of 9 pictures are missing" in error and "images/001.Bird/Bird_1_9.jpg" in error
    for row in ("../../x.jpg", "001.Bird/../x.jpg", "x"):
        data_sets.write(tmp_path, {"lists/train.txt": f"{row}\n"})
        assert "lists/train.txt:1: not a row" in prepare("cub200.py", tmp_path, status=2).stderr


def test_flags_that_do_not_fit(tmp_path):
    data_sets.write(tmp_path, data_sets.birds())
    assert "--box_margin is of --crop_boxes" in prepare("cub200.py", tmp_path, "--box_margin=0.1", status=2).stderr
    assert "is out of range" in prepare("cub200.py", tmp_path, "--crop_boxes", "--box_margin=-1", status=2).stderr
    assert "--any_counts are for a copy" in prepare("cub200.py", "2010", ANY, status=2).stderr
    error = prepare("cub200.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    assert "--crop_boxes needs annotations.tgz or annotations-mat" in error
    assert {year: sum(n for n, _ in parts.values()) for year, parts in cub200.COUNTS.items()} == {
        year: edition.count for year, edition in cub200.EDITIONS.items()
    }


# ---------------------------------------------------------------- zips


def zip_member(name, mode=0, content="x"):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return {info: content}


def encrypted():
    content = bytearray(zipped({"a/1.jpg": "x"}))
    for start in (content.index(b"PK\3\4") + 6, content.index(b"PK\1\2") + 8):
        content[start] |= 1
    return bytes(content)


def bzipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/1.jpg", "x")
    return (tmp_path / "b.zip").read_bytes()


def with_bad_sum():
    content = bytearray(zipped({"a/1.jpg": random.Random(0).randbytes(2000)}))
    content[500] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    "content, message",
    [
        (zipped(zip_member("a/../../evil")), "outside"),
        (zipped(zip_member("/evil")), "outside"),
        (zipped(zip_member("")), "it is empty"),
        (zipped(zip_member("a/evil", stat.S_IFLNK | 0o777, "/etc/passwd")), "link or device"),
        (zipped(zip_member("a/evil", stat.S_IFIFO | 0o777)), "link or device"),
        (zipped({"a/zeros": bytes(1 << 27)}), "more than"),
        (encrypted(), "it is encrypted: unpack it with the password"),
        (with_bad_sum(), "cannot unpack"),
        (zipped({"a/1.jpg": "x"})[:-10], "cannot unpack"),
        (zipped({}), "it is empty"),
        (b"PK\3\4" + bytes(100), "cannot unpack"),
        (tar({"a/evil": link("a/evil")}), "link or device"),
    ],
    ids=["up", "root", "nameless", "link", "pipe", "bomb", "encrypted", "sum", "cut", "empty", "none", "tar"],
)
def test_zips_that_are_not_unpacked(tmp_path, content, message):
    path = tmp_path / "Stanford_Online_Products.zip"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        unpack.unpack(str(path), str(tmp_path / "out"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path / "out").exists()
    prepare("sop.py", path, status=2)


def test_what_is_as_long_as_no_archive_is_not_read(tmp_path, capsys):
    (tmp_path / "car_ims.tgz").write_bytes(b"\x1f\x8b")
    os.truncate(tmp_path / "car_ims.tgz", 1 << 40)
    with pytest.raises(UserError, match="cannot unpack"):
        published.unpacked(str(tmp_path), cars196.CARS.archives)
    assert f"is not the published file: it has {1 << 40} bytes" in capsys.readouterr().err


def test_zips_with_limits_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    path.write_bytes(bzipped(tmp_path))
    with pytest.raises(UserError, match="compressed in a way that is not read"):
        unpack.unpack(str(path), str(tmp_path / "out"))
    path.write_bytes(zipped({f"a/{n}": "x" for n in range(100)}))
    monkeypatch.setattr(unpack, "ZIP_HEADERS", 1000)
    with pytest.raises(UserError, match="its headers have more than 1000 bytes"):
        unpack.unpack(str(path), str(tmp_path / "out"))
    monkeypatch.undo()
    # An interrupted run goes on: what is whole stays, what is cut is written again.
    data_sets.write(tmp_path / "out.part", {"a/0": "y", "a/1": ""})
    unpack.unpack(str(path), str(tmp_path / "out"))
    assert (tmp_path / "out" / "a" / "0").read_text() == "y" and (tmp_path / "out" / "a" / "1").read_text() == "x"
    assert unpack.top_of(str(path)) == "a" and not (tmp_path / "out.part").exists()
    path.write_bytes(zipped({"a/1": "x", "b": "y"}))
    assert unpack.top_of(str(path)) == ""
