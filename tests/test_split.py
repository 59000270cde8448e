"""data/split.py, run as a user runs it."""

import contextlib
import os
import random
import shlex
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, run

sys.path.insert(0, os.path.join(ROOT, "data"))

import listing
import reader
import split
from utility import UserError

JPEG, PNG, WEBP = b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x04\0\0\0WEBPVP8 "
BMP = b"BM" + bytes(12) + b"\x28\0\0\0"
REAL = os.path.join(os.path.dirname(ROOT), "shared", "data", "cub200")


def make(root, files):
    """Writes dict path -> content below root."""
    for path, content in files.items():
        path = os.path.join(root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def make_cub(root, images, classes=200):
    """CUB's folders, with so many files in all, which are all one: thousands take seconds to write."""
    make(root, {"one.jpg": JPEG})
    for c in range(classes):
        folder = os.path.join(root, "images", f"{c + 1:03d}.Bird_{c}")
        os.makedirs(folder)
        for i in range(images // classes + (c < images % classes)):
            os.link(os.path.join(root, "one.jpg"), os.path.join(folder, f"Bird_{i:04d}.jpg"))


def lists(folder, name=None):
    """-> the lines of the train list, the val list and the class list; of the only ones there if not named."""
    if name is None:
        (train,) = (path for path in os.listdir(folder) if path.endswith("_train.txt"))
        name = train[: -len("_train.txt")]
    texts = []
    for part in ("train", "val", "classes"):
        with open(os.path.join(folder, f"{name}_{part}.txt"), encoding="utf-8", newline="") as file:
            texts.append(file.read())
    assert all(text.endswith("\n") and "\r" not in text for text in texts)
    return [text.splitlines() for text in texts]


def fails(*flags):
    """Runs split.py, which must end with one error line and status 2; -> that line."""
    stderr = run("data/split.py", *flags, status=2).stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


SHOES = {f"{name}/{i}.jpg": JPEG for name in ("boot", "Clog", "mule", "pump", "sandal") for i in (1, 2)}


# ---------------------------------------------------------------- what is written


def test_lines_are_the_originals(tmp_path):
    birds = ("097.Oriole", "154.Vireo", "003.Gull")
    make(tmp_path, {f"images/{c}/{c[4:]}_{i}.jpg": JPEG for c in birds for i in (2, 10)})
    out = run("data/split.py", tmp_path, "--train_classes=2", "--name=CUB200").stdout
    train, val, classes = lists(tmp_path, "CUB200")
    assert train == [f"images/{c}/{c[4:]}_{i}.jpg {int(c[:3])}" for c in ("003.Gull", "097.Oriole") for i in (10, 2)]
    assert val == ["images/154.Vireo/Vireo_10.jpg 154", "images/154.Vireo/Vireo_2.jpg 154"]
    assert classes == ["3 003.Gull", "97 097.Oriole", "154 154.Vireo"]
    assert f"train: 4 images of 2 classes (labels 3-97) in {tmp_path}/CUB200_train.txt" in out
    assert "val: 2 images of 1 class (label 154)" in out and "skipped" not in out
    assert sorted(os.listdir(tmp_path)) == ["CUB200_classes.txt", "CUB200_train.txt", "CUB200_val.txt", "images"]


@pytest.mark.parametrize("images, edition", [(6033, "CUB-200 (2010)"), (11788, "CUB-200-2011"), (400, None)])
def test_cub_editions_are_told_apart_by_their_counts(tmp_path, images, edition):
    make_cub(tmp_path, images)
    result = run("data/split.py", tmp_path)
    train, val, _ = lists(tmp_path, "CUB200")  # by themselves
    assert {int(row.split()[-1]) for row in train} == set(range(1, 101))
    assert {int(row.split()[-1]) for row in val} == set(range(101, 201))
    assert len(train) + len(val) == images
    if edition:
        assert f"found {edition}: {images} images of 200 classes" in result.stdout and not result.stderr
    else:
        assert "found CUB, of no known edition: 400 images" in result.stdout
        assert "warning: " in result.stderr and "CUB-200 (2010) 6033, CUB-200-2011 11788" in result.stderr


def test_any_collection_with_a_folder_a_class(tmp_path):
    """Labels 1, 2, ... in the order of bytes; half of the classes train, or as many as asked for."""
    make(tmp_path, SHOES)
    out = run("data/split.py", tmp_path, "--name=shoes").stdout
    assert "found a collection of your own: 10 images of 5 classes" in out
    train, val, classes = lists(tmp_path, "shoes")
    assert classes == ["1 Clog", "2 boot", "3 mule", "4 pump", "5 sandal"]
    assert train == ["Clog/1.jpg 1", "Clog/2.jpg 1", "boot/1.jpg 2", "boot/2.jpg 2"]
    assert [row.split()[-1] for row in val] == ["3", "3", "4", "4", "5", "5"]


@pytest.mark.parametrize(
    "folder, name",
    [
        ("my_images", "my_images"),
        ("my shoes (2)", "my_shoes_2"),
        ("Vögel.v2", "Vögel.v2"),
        ("..hidden-", "hidden"),
        ("$(x)", "x"),
        ("--", "images"),
        ("鳥" * 80, "鳥" * 60),
    ],
)
def test_lists_are_named_after_the_folder(tmp_path, folder, name):
    """And the commands that are printed name them, ready to be pasted."""
    make(tmp_path / folder, {f"images/{path}": content for path, content in SHOES.items()})
    out = run("data/split.py", tmp_path / folder).stdout
    paths = [str(tmp_path / folder / f"{name}_{part}.txt") for part in ("train", "val", "classes")]
    assert sorted(os.listdir(tmp_path / folder)) == sorted(["images", *map(os.path.basename, paths)])
    (command,) = (line for line in out.splitlines() if line.startswith("next: "))
    assert shlex.split(command)[1:5] == ["python", "train.py", f"--train_list={paths[0]}", f"--val_list={paths[1]}"]
    assert lists(tmp_path / folder, name)[2] == ["1 Clog", "2 boot", "3 mule", "4 pump", "5 sandal"]


def test_the_name_of_a_folder_that_is_not_spelled_out(tmp_path, monkeypatch):
    make(tmp_path / "shoes", SHOES)
    monkeypatch.chdir(tmp_path / "shoes")
    assert split.name_of(".", []) == split.name_of("../shoes/", []) == "shoes"
    assert split.name_of("/", []) == "images"
    cub = [split.Class(label, f"{label:03d}.Bird", "", ["a.jpg"]) for label in range(1, 201)]
    assert split.name_of("shoes", cub) == "CUB200" and split.name_of("shoes", cub[:199]) == "shoes"


@pytest.mark.parametrize("text, count", [("1", 1), ("4", 4), ("0.5", 3), ("0.2", 1), ("0.8", 4), (".75", 4)])
def test_train_classes_as_a_count_and_as_a_fraction(tmp_path, text, count):
    make(tmp_path, SHOES)
    run("data/split.py", tmp_path, f"--train_classes={text}")
    assert len({row.split()[-1] for row in lists(tmp_path)[0]}) == count


def test_the_file_systems_order_does_not_matter(tmp_path, monkeypatch, capsys):
    make_cub(tmp_path, 60, classes=12)
    make(tmp_path, {"images/001.Bird_0/._x.jpg": b"mac", "images/002.Bird_1/note.txt": b"text"})
    seen, scandir = [], os.scandir

    def shuffled(path, shuffle):
        with scandir(path) as entries:
            entries = list(entries)
        return contextlib.nullcontext(shuffle(entries, len(entries)))

    for seed in range(3):
        shuffle = random.Random(seed).sample
        monkeypatch.setattr(os, "scandir", lambda path, shuffle=shuffle: shuffled(path, shuffle))
        split.split(str(tmp_path), str(tmp_path), "CUB200", split.Division())
        seen.append((lists(tmp_path), capsys.readouterr().out))
    assert seen[0] == seen[1] == seen[2]


def test_what_is_no_image_is_left_out_and_counted_in_one_line(tmp_path):
    make(tmp_path, SHOES)
    extra = {"boot/._1.jpg": JPEG, "mule/._2.jpg": JPEG, "boot/.DS_Store": b"x", ".git/x.jpg": JPEG, "README.md": b"x"}
    extra.update(
        {"boot/page.jpg": b"<html>", "boot/empty.jpg": b"", "pump/Thumbs.db": b"x", "__MACOSX/boot/1.jpg": b""}
    )
    make(tmp_path, {**extra, "pump/3": PNG, "pump/4.JPEG": WEBP, "pump/5.bmp": BMP})
    result = run("data/split.py", tmp_path)
    assert "13 images of 5 classes" in result.stdout  # judged by content: 3, 4.JPEG and 5.bmp count
    assert result.stderr == (
        f"left out 9 files and folders: 5 hidden (first: {tmp_path}/.git), 3 no pictures (first: "
        f"{tmp_path}/README.md), 1 empty (first: {tmp_path}/boot/empty.jpg)\n"
    )
    listed = lists(tmp_path)[0] + lists(tmp_path)[1]
    assert len(listed) == 13 and not any("._" in row or "page" in row or ".git" in row for row in listed)


def test_names_with_spaces_and_other_letters(tmp_path):
    make(tmp_path, {"my cat/a b.jpg": JPEG, "übung/ß.jpg": JPEG, "übung/line\nbreak.jpg": JPEG, "übung/end ": JPEG})
    for encoding in ("utf-8", "ascii"):
        err = run("data/split.py", tmp_path, PYTHONIOENCODING=encoding).stderr
        assert "2 with names that a list cannot hold" in err
        assert lists(tmp_path)[:2] == [["my cat/a b.jpg 1"], ["übung/ß.jpg 2"]]


BLANKS = [" ", "\t", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"]
MARKS = [b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf"]
ENDS_OF_LINES = ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
ODD = [
    *(blank + "cat" for blank in BLANKS),
    *("cat" + blank for blank in BLANKS),
    *(f"c{end}at" for end in ENDS_OF_LINES),
    *(os.fsdecode(mark + b"cat") for mark in MARKS),
]


def says_what_was_meant(root, output, classes):
    """Checks that reader.py finds in the lists in `output` each class's images, with labels of their own."""
    found = {}
    for part in ("train", "val"):
        samples = reader.read_list(os.path.join(output, f"x_{part}.txt"))
        for path, label in zip(samples.paths, samples.labels):
            assert os.path.isfile(path)
            found.setdefault(int(label), set()).add(os.path.basename(os.path.dirname(path)))
    assert sorted(map(sorted, found.values())) == sorted([name] for name in classes)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_a_class_folder_of_any_name_is_read_back_or_refused(tmp_path, name):
    """What ends a line can't be in a list; other white space, and marks of UTF-8 and UTF-16, can, behind a ./"""
    for inside in ("", "images"):
        root = str(tmp_path / f"root{inside}")
        make(root, {os.path.join(inside, sub, "1.jpg"): JPEG for sub in (name, "dog", "zebra")})
        if any(end in name for end in ENDS_OF_LINES):
            with pytest.raises(UserError, match="a list cannot hold this folder's name: rename it"):
                split.split(root, root, "x", split.Division())
            assert not [path for path in os.listdir(root) if path.endswith(".txt")]
            continue
        split.split(root, root, "x", split.Division())
        says_what_was_meant(root, root, (name, "dog", "zebra"))
        with open(os.path.join(root, "x_classes.txt"), encoding="utf-8", errors="surrogateescape") as file:
            folders = [row.strip().split(" ", 1)[1] for row in file]
        assert all(os.path.isdir(os.path.join(root, inside, folder)) for folder in folders) and len(folders) == 3


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_an_image_that_a_list_cannot_hold_is_left_out(tmp_path, capsys, name):
    """It may begin with anything, for that stands inside the path, and end so, before .jpg."""
    root = str(tmp_path)
    make(root, {f"{sub}/{image}": JPEG for sub in ("cat", "dog", "eel") for image in (name, f"{name}.jpg", "1.jpg")})
    split.split(root, root, "x", split.Division())
    says_what_was_meant(root, root, ("cat", "dog", "eel"))
    said = capsys.readouterr()
    broken = any(end in name for end in ENDS_OF_LINES)
    left_out = 6 if broken else 3 * (name != name.rstrip())
    lines = 4 if broken else 5  # with one image a class there is nothing to train on, and no command
    assert said.out.count("\n") == lines and len(said.out.splitlines()) == lines
    assert (f"{left_out} with names that a list cannot hold" in said.err) == (left_out > 0)
    assert not left_out or said.err.splitlines()[0].startswith(f"left out {left_out} files: ")


@pytest.mark.parametrize("name", [" pics", "a\u2028b", "a\nb", os.fsdecode(b"\xff\xfepics"), "\u3000x"], ids=ascii)
def test_folders_above_that_a_list_cannot_hold(tmp_path, name):
    make(tmp_path / name, SHOES)
    classes = {path.split("/")[0] for path in SHOES}
    if any(end in name for end in ENDS_OF_LINES):
        with pytest.raises(UserError, match="a list cannot hold this path"):
            split.split(str(tmp_path / name), str(tmp_path), "x", split.Division())
    else:
        split.split(str(tmp_path / name), str(tmp_path), "x", split.Division())
        says_what_was_meant(tmp_path / name, tmp_path, classes)
    # Beside the images nothing of the path is in the lists, and in the output no name breaks a line.
    result = run("data/split.py", tmp_path / name, "--name=x")
    says_what_was_meant(tmp_path / name, tmp_path / name, classes)
    assert len(result.stdout.splitlines()) == 5 and result.stdout.splitlines()[-1].startswith("next: python train.py")
    assert "\x1b" not in fails(tmp_path / name / "\x1b[2J\nno error")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    make(tmp_path, SHOES)
    os.mkfifo(tmp_path / "boot" / "pipe.jpg")
    (tmp_path / "boot" / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "boot" / "socket.jpg"))
        err = run("data/split.py", tmp_path).stderr
    assert err == f"left out 3 files: 3 unreadable (first: {tmp_path}/boot/pipe.jpg: a pipe, not a file)\n"


def test_a_closed_pipe_is_no_mistake(tmp_path):
    make(tmp_path, SHOES)
    command = [sys.executable, os.path.join(ROOT, "data", "split.py"), tmp_path, "--name=x"]
    for content in (None, b"other"):  # the second time there is a list to be kept, of which a line is printed, too
        if content:
            (tmp_path / "x_train.txt").write_bytes(content)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert b"error" not in process.stderr.read() and process.wait() == 141
        process.stderr.close()
        assert len(lists(tmp_path, "x")[0]) == 4


# ---------------------------------------------------------------- where it looks, where it writes


def test_paths_lead_from_the_lists_to_the_images(tmp_path):
    make(tmp_path, {f"CUB_200_2011/images/{path}": content for path, content in SHOES.items()})
    run("data/split.py", tmp_path)  # finds the folder of the other edition
    assert lists(tmp_path)[0][0] == "CUB_200_2011/images/Clog/1.jpg 1"
    (tmp_path / "else").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "else" / "deep")
    for output in (tmp_path / "else" / "deep" / "new", tmp_path / "link" / "new", tmp_path / "CUB_200_2011" / "images"):
        run("data/split.py", tmp_path, f"--output_dir={output}")
        for row in lists(output)[0]:
            assert os.path.isfile(os.path.join(output, row.rsplit(" ", 1)[0]))
            assert not os.path.isabs(row)
    run("data/split.py", tmp_path, f"--output_dir={tmp_path}/else", "--absolute")
    assert lists(tmp_path / "else")[0][0] == f"{tmp_path}/CUB_200_2011/images/Clog/1.jpg 1"


def test_both_editions_in_one_folder(tmp_path):
    make(tmp_path, {f"{top}/{path}": JPEG for top in ("images", "CUB_200_2011/images") for path in SHOES})
    out = run("data/split.py", tmp_path).stdout
    assert f"taking {tmp_path}/images; for {tmp_path}/CUB_200_2011/images name its folder" in out
    assert lists(tmp_path)[0][0].startswith("images/")


def test_real_cub_200(tmp_path):
    if not os.path.isdir(REAL):
        pytest.skip("no copy of CUB-200 (2010) beside this checkout")
    out = run("data/split.py", REAL, f"--output_dir={tmp_path}").stdout
    assert "found CUB-200 (2010): 6033 images of 200 classes" in out
    train, val, classes = lists(tmp_path)
    assert (len(train), len(val), len(classes)) == (2990, 3043, 200)
    assert train[0].endswith(" 1") and val[-1].endswith(" 200")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("text", ["0", "5", "-1", "0.0", "1.0", "0.01", "2.5", "half", "nan", "inf.", "1e400.", ""])
def test_train_classes_that_leave_nothing(tmp_path, text):
    make(tmp_path, SHOES)
    assert f"--train_classes={text}: " in fails(tmp_path, f"--train_classes={text}")
    assert sorted(os.listdir(tmp_path)) == sorted({path.split("/")[0] for path in SHOES})


@pytest.mark.parametrize("share", ["nan", "inf", "-inf", "-1", "0", "1", "1e300"])
def test_holdouts_that_leave_nothing(tmp_path, share):
    make(tmp_path, SHOES)
    wanted = "0 of the 2 training classes: it must be 1 to 1" if share[-1].isdigit() else "must be finite"
    assert wanted in fails(tmp_path, f"--holdout={share}")


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no images in it or below it; download_cub200.sh fetches CUB-200"),
        ({"a/b.txt": b"text"}, "no images in it or below it (left out 2 files and folders: 1 no pictures (first: "),
        ({f"{i}.jpg": JPEG for i in range(8)}, "8 pictures lie in {root} itself: each class needs a folder of its own"),
        ({"images/a.jpg": JPEG}, "1 picture lies in {root}/images itself: each class needs a folder of its own"),
        ({"images/one/a.jpg": JPEG}, "1 class folder, at least 2 are needed"),
        ({"images/one/a.jpg": JPEG, "images/two/a.txt": b"text"}, "images/two: no images in this class folder"),
        ({"images/001.A/a.jpg": JPEG, "images/001.B/b.jpg": JPEG}, "'001.A' and '001.B' have the same number"),
        ({"images/a\nb/a.jpg": JPEG, "images/c/b.jpg": JPEG}, "a list cannot hold this folder's name"),
    ],
)
def test_folders_that_cannot_be_split(tmp_path, files, message):
    make(tmp_path, files)
    assert message.format(root=tmp_path) in fails(tmp_path)
    assert not list(tmp_path.glob("*.txt*"))


def test_numbers_need_all_folders(tmp_path):
    """Where only some are named NNN.Name, all are numbered in order."""
    make(tmp_path, {f"images/{name}/a.jpg": JPEG for name in ("007.Bond", "099.Agent", "Q")})
    run("data/split.py", tmp_path)
    assert lists(tmp_path)[2] == ["1 007.Bond", "2 099.Agent", "3 Q"]


def test_other_mistakes(tmp_path):
    assert "absent: no such folder" in fails(tmp_path / "absent")
    make(tmp_path, {**SHOES, "file": b""})
    assert "file: cannot write" in fails(tmp_path, f"--output_dir={tmp_path}/file")
    assert "--output_dir" in fails(tmp_path, "--name=sub/shoes")
    assert "unrecognized arguments: --train (see split.py --help)" in fails(tmp_path, "--train")


def test_lists_in_a_folder_among_the_classes(tmp_path):
    """It is no class, on no run. Where one of the files cannot be written, no other is, and nothing is left behind."""
    make(tmp_path, SHOES)
    output = tmp_path / "a"
    (output / "shoes_val.txt").mkdir(parents=True)
    assert "a directory, not a file to write" in fails(tmp_path, f"--output_dir={output}", "--name=shoes")
    assert os.listdir(output) == ["shoes_val.txt"]
    (output / "shoes_val.txt").rmdir()
    for _ in range(2):
        run("data/split.py", tmp_path, f"--output_dir={output}")
        assert lists(output)[0][0] == "../Clog/1.jpg 1"


def test_a_list_that_is_there_and_another_is_kept(tmp_path):
    make(tmp_path, SHOES)
    run("data/split.py", tmp_path, "--name=shoes")
    written = (tmp_path / "shoes_train.txt").read_bytes()
    assert "kept" not in run("data/split.py", tmp_path, "--name=shoes").stdout  # the same again
    (tmp_path / "shoes_train.txt").write_text("images/Clog/1.jpg 7\n")  # somebody's own
    assert f"it is now {tmp_path}/shoes_train.txt.kept1" in run("data/split.py", tmp_path, "--name=shoes").stdout
    assert (tmp_path / "shoes_train.txt.kept1").read_text() == "images/Clog/1.jpg 7\n"
    assert (tmp_path / "shoes_train.txt").read_bytes() == written


def test_a_list_that_is_a_link_and_another_is_kept_where_it_is(tmp_path):
    """What the link leads to is kept under another name, and the link leads to the new list."""
    make(tmp_path / "shoes", SHOES)
    shared = tmp_path / "shared.txt"
    shared.write_text("images/Clog/1.jpg 7\n")
    for name, text in (("train", True), ("val", False)):  # the second leads nowhere
        (tmp_path / "shoes" / f"shoes_{name}.txt").symlink_to(shared if text else tmp_path / "nowhere.txt")
    run("data/split.py", tmp_path / "shoes")
    assert (tmp_path / "shared.txt.kept1").read_text() == "images/Clog/1.jpg 7\n"
    train, val, _ = lists(tmp_path / "shoes")
    assert train and val and (tmp_path / "shoes" / "shoes_train.txt").is_symlink()
    assert not (tmp_path / "shoes" / "shoes_train.txt.kept1").exists()


def test_all_lists_or_none(tmp_path, monkeypatch):
    """Where the second of two earlier ones can't be renamed, the first has its name again."""
    before = {str(tmp_path / name): f"{name} 1\n" for name in ("a.txt", "b.txt")}
    listing.write_lists(before)
    rename = os.rename

    def fails_of_b(path, name):
        if str(path).endswith("b.txt"):
            raise PermissionError(1, "Operation not permitted")
        rename(path, name)

    monkeypatch.setattr(os, "rename", fails_of_b)
    with pytest.raises(UserError, match="Operation not permitted"):
        listing.write_lists(dict.fromkeys(before, "new 1\n"))
    assert {str(path): path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["shoes_train.txt", "../shoes/shoes_classes.txt"])
def test_a_table_is_none_of_the_lists(tmp_path, name):
    make(tmp_path / "shoes", SHOES)
    assert "one of the lists has this name" in fails(tmp_path / "shoes", f"--csv={tmp_path}/shoes/{name}")
    assert not (tmp_path / "shoes" / "shoes_train.txt").exists()


def test_lists_of_an_earlier_split_are_named(tmp_path):
    make(tmp_path / "shoes", SHOES)
    assert "earlier split" not in run("data/split.py", tmp_path / "shoes", "--holdout=0.34").stderr
    err = run("data/split.py", tmp_path / "shoes", "--seed=2").stderr
    assert err.count("of an earlier split, not of this one") == 2 and "shoes_fit.txt" in err and "holdout" in err


@pytest.mark.parametrize("flag", ["--csv=", "--name=", "--output_dir="])
def test_an_empty_name_is_none(tmp_path, flag):
    make(tmp_path / "shoes", SHOES)
    assert fails(tmp_path / "shoes", flag).startswith(f"error: {flag[2:-1]}: is empty")


def test_a_flag_that_is_given_twice_is_said(tmp_path):
    make(tmp_path / "shoes", SHOES)
    out = run("data/split.py", tmp_path / "shoes", "--train_classes=0.5", "--train_classes=0.6").stdout
    assert "note: --train_classes is given 2 times: the last, 0.6, counts" in out


def test_a_part_of_one_class_is_a_warning(tmp_path):
    make(tmp_path / "shoes", SHOES)
    err = run("data/split.py", tmp_path / "shoes", "--train_classes=4").stderr
    assert "warning: val: one class: whatever is found is of it" in err


def test_crops_of_an_earlier_run_are_no_class(tmp_path):
    make(tmp_path / "shoes", {**SHOES, "df_crops/1_a.jpg": JPEG, "df_crops/22_b.jpg": JPEG, "my_crops/1_a.jpg": JPEG})
    (tmp_path / "shoes" / "df_train.txt").write_text("df_crops/1_a.jpg 1\n")
    result = run("data/split.py", tmp_path / "shoes")
    assert "11 images of 6 classes" in result.stdout and "2 crops of an earlier run" in result.stderr
    result = run("data/split.py", tmp_path / "shoes", f"--output_dir={tmp_path}/elsewhere")
    assert "11 images of 6 classes" in result.stdout and "2 crops of an earlier run" in result.stderr
