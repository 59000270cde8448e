"""data/ILSVRC2012/download_imagenet2012.sh, run by the shells that are here, and the functions behind it."""

import hashlib
import os
import struct
import sys
import tarfile
import types
import zlib

import pytest
from archives import IMAGENET, SHELLS, link, needs_shell, picture, sh, tar
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "data"))

import imagenet2012
import matlab
from utility import UserError

pytestmark = needs_shell


def element(kind, content):
    """An element of a MATLAB 5 file, in its short form where that holds it."""
    if len(content) <= 4:
        return struct.pack("<HH", kind, len(content)) + content.ljust(4, b"\0")
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def matrix(array_class, rows, columns, *content):
    flags = element(6, struct.pack("<II", array_class, 0))
    return element(14, flags + element(5, struct.pack("<ii", rows, columns)) + element(1, b"") + b"".join(content))


def meta_mat(rows, compressed=True):
    """A devkit's meta.mat: the struct array `synsets` of (ILSVRC2012_ID, WNID, words, num_children, children)."""
    names = ["ILSVRC2012_ID", "WNID", "words", "num_children", "children"]
    fields = [element(5, struct.pack("<i", 32)), element(1, b"".join(name.encode().ljust(32, b"\0") for name in names))]
    for number, wnid, words, children in rows:
        fields += [
            matrix(6, 1, 1, element(2, bytes([number]))),
            matrix(4, 1, len(wnid), element(4, wnid.encode("utf-16-le"))),
            matrix(4, 1, len(words), element(16, words.encode())),
            matrix(6, 1, 1, element(9, struct.pack("<d", len(children)))),
            matrix(6, 1, len(children), element(2, bytes(children))),
        ]
    content = matrix(2, len(rows), 1, *fields)
    if compressed:
        packed = zlib.compress(content)
        content = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H2s", 0x0100, b"IM") + content


# Three classes, whose WordNet ids have another order than their numbers, and the group above two of them.
ROWS = [(1, "n03", "kit fox", []), (2, "n01", "tench, Tinca", []), (3, "n02", "crane", []), (4, "n00", "all", [1, 2])]
TRUTH = [2, 1, 3, 1, 2]
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": picture(i) for i in (3, 1, 5, 2, 4)}
TRAIN = {
    f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": picture(f"{wnid}{i}") for i in (2, 10)}, "w")
    for wnid in ("n02", "n03", "n01")
}


@pytest.fixture
def tars(tmp_path):
    """A folder with the three files, and the environment that describes them."""
    folder = tmp_path / "tars"
    folder.mkdir()
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta_mat(ROWS),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in TRUTH).encode(),
    }
    environment = {"IMAGENET_CLASSES": 3}
    for part, name, content in (
        ("DEVKIT", "ILSVRC2012_devkit_t12.tar.gz", tar(devkit)),
        ("VAL", "ILSVRC2012_img_val.tar", tar(VAL, "w")),
        ("TRAIN", "ILSVRC2012_img_train.tar", tar(TRAIN, "w")),
    ):
        (folder / name).write_bytes(content)
        environment[f"IMAGENET_{part}_SIZE"] = len(content)
        environment[f"IMAGENET_{part}_MD5"] = hashlib.md5(content).hexdigest()
    return types.SimpleNamespace(folder=folder, environment=environment)


def check_imagenet(folder):
    assert (folder / "train_list.txt").read_text() == "".join(
        f"train/{wnid}/{wnid}_{i}.JPEG {label}\n" for label, wnid in enumerate(("n01", "n02", "n03")) for i in (10, 2)
    )
    # n01 is 0, n02 1, n03 2; by number: 2 is n01, 3 is n02, 1 is n03.
    assert (folder / "val_list.txt").read_text() == "".join(
        f"val/ILSVRC2012_val_{i:08d}.JPEG {label}\n" for i, label in enumerate((0, 2, 1, 2, 0), 1)
    )
    rows = [row.split() for name in ("train", "val") for row in (folder / f"{name}_list.txt").read_text().splitlines()]
    content = {**VAL, **{f"{w}_{i}.JPEG": picture(f"{w}{i}") for w in ("n01", "n02", "n03") for i in (2, 10)}}
    assert all((folder / path).read_bytes() == content[os.path.basename(path)] for path, _ in rows)
    assert not [path for path in folder.rglob("*") if path.suffix.startswith((".part", ".tmp"))]


@pytest.mark.parametrize("shell", SHELLS)
def test_imagenet_from_a_folder_of_tars(home, tars, shell):
    """As the original page says: from the script's own folder."""
    folder = home / "data" / "ILSVRC2012"
    out = sh(home, "download_imagenet2012.sh", tars.folder, shell=shell, cwd=folder, **tars.environment).stdout
    check_imagenet(folder)
    assert "6 images, labels 0-2" in out and "5 images, labels 0-2" in out
    # The large files may go; the lists are written again.
    for part in ("train", "val"):
        (tars.folder / f"ILSVRC2012_img_{part}.tar").unlink()
        (folder / f"{part}_list.txt").unlink()
    sh(home, IMAGENET, tars.folder, shell=shell, **tars.environment)
    check_imagenet(folder)


def test_imagenet_goes_on_where_it_was(home, tars, tmp_path):
    """A whole class and a whole picture stay as they are, a cut one is written again."""
    output = tmp_path / "out put"
    (output / "train.part" / "n01").mkdir(parents=True)
    (output / "train.part" / "n03.part").mkdir()
    for i in (2, 10):
        (output / "train.part" / "n01" / f"n01_{i}.JPEG").write_bytes(picture(f"n01{i}"))
    (output / "train.part" / "n03.part" / "n03_2.JPEG").write_bytes(b"\xff\xd8")
    os.utime(output / "train.part" / "n01", (1, 1))
    sh(home, IMAGENET, f"--output_dir={output}", tars.folder, **tars.environment)
    check_imagenet(output)
    assert (output / "train" / "n01").stat().st_mtime == 1


def test_imagenet_from_a_url_with_a_password(server, home, tars):
    server.files = {f"/a/{path.name}": path.read_bytes() for path in tars.folder.iterdir()}
    server.password = True
    folder = home / "data" / "ILSVRC2012"
    (folder / "ILSVRC2012_img_train.tar.part1").write_bytes(server.files["/a/ILSVRC2012_img_train.tar"][:3000])
    url = server.url.replace("//", "//me:s3cr%5Cet@") + "/a/"
    result = sh(home, IMAGENET, IMAGENET_URL=url, **tars.environment)
    check_imagenet(folder)
    assert ("/a/ILSVRC2012_img_train.tar", "bytes=3000-") in [seen[:2] for seen in server.seen]
    assert "s3cr" not in result.stdout + result.stderr
    assert not any(b"s3cr" in path.read_bytes() for path in home.rglob("*") if path.is_file())


def test_imagenet_mistakes(home, tars):
    error = sh(home, IMAGENET, status=2).stderr
    assert (
        "not in data/ILSVRC2012: ILSVRC2012_devkit_t12.tar.gz ILSVRC2012_img_val.tar ILSVRC2012_img_train.tar" in error
    )
    assert "image-net.org" in error and "IMAGENET_URL" in error
    assert "no such folder" in sh(home, IMAGENET, "absent", status=2).stderr
    assert "what is '--tars'" in sh(home, IMAGENET, "--tars", status=2).stderr
    wrong = {**tars.environment, "IMAGENET_VAL_MD5": "0" * 32}
    error = sh(home, IMAGENET, tars.folder, status=2, **wrong).stderr
    assert "ILSVRC2012_img_val.tar is not ImageNet's ILSVRC2012_img_val.tar: its md5 is" in error
    assert os.listdir(home / "data" / "ILSVRC2012") == ["download_imagenet2012.sh"]


def test_imagenet_classes_that_do_not_fit(home, tars):
    folder = home / "data" / "ILSVRC2012"
    error = sh(home, IMAGENET, tars.folder, status=2, **{**tars.environment, "IMAGENET_CLASSES": 1000}).stderr
    assert "3 classes instead of 1000" in error
    os.rename(folder / "train" / "n02", folder / "train" / "n77")
    error = sh(home, IMAGENET, tars.folder, status=2, **tars.environment).stderr
    assert "train/n02 is missing: move" in error
    os.rename(folder / "train" / "n77", folder / "train" / "n02")
    (folder / "val" / "ILSVRC2012_val_00000004.JPEG").unlink()
    error = sh(home, IMAGENET, tars.folder, status=2, **tars.environment).stderr
    assert "ILSVRC2012_val_00000004.JPEG is missing" in error
    assert not list(folder.glob("*_list.txt"))


@pytest.mark.parametrize(
    "mat", [meta_mat(ROWS, compressed=False), meta_mat(ROWS)[:200], meta_mat(ROWS)[:128], b"\x89HDF" * 99, b""],
    ids=["uncompressed", "cut", "empty table", "other format", "empty"],
)  # fmt: skip
def test_imagenet_reads_either_form_of_the_class_table_and_no_broken_one(home, tars, mat):
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat,
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2 1 3 1 2",
    }
    content = tar(devkit)
    (tars.folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(content)
    environment = {**tars.environment, "IMAGENET_DEVKIT_MD5": hashlib.md5(content).hexdigest()}
    good = mat == meta_mat(ROWS, compressed=False)
    result = sh(home, IMAGENET, tars.folder, status=0 if good else 2, **environment)
    if good:
        check_imagenet(home / "data" / "ILSVRC2012")
    else:
        assert "ILSVRC2012_devkit_t12.tar.gz: cannot read the classes" in result.stderr


# ---------------------------------------------------------------- the functions


def test_the_class_table_of_a_hostile_file(monkeypatch):
    assert imagenet2012.read_classes(meta_mat(ROWS)) == {1: "n03", 2: "n01", 3: "n02"}
    monkeypatch.setattr(matlab, "LIMIT", 100)
    with pytest.raises(ValueError, match="too large"):
        imagenet2012.read_classes(meta_mat(ROWS))
    with pytest.raises(ValueError, match="cut off"):
        matlab.inflate(zlib.compress(bytes(50))[:-2])


def packed(content):
    """A compressed element."""
    content = zlib.compress(content)
    return struct.pack("<II", 15, len(content)) + content


def nested(depth):
    content = matrix(2, 1, 1)
    for _ in range(depth):
        content = packed(content)
    return content


START = meta_mat([])[:128]
NAME = element(5, struct.pack("<i", 32))
MATS = {
    "bomb": START + packed(struct.pack("<II", 14, 1 << 26) + bytes(1 << 26)),
    "bombs": START + packed(struct.pack("<II", 14, 1 << 20) + bytes(1 << 20)) * 2000,
    "nested": START + nested(2000),
    "no element": START + packed(b""),
    "many columns": START + matrix(2, 1, 1, element(5, struct.pack("<i", 1)), element(1, b"a" * (1 << 22))),
    "negative columns": START + matrix(2, 1, 1, element(5, struct.pack("<i", -1)), element(1, b"a" * 320)),
    "no columns": START + matrix(2, 1, 1, NAME, element(1, b"")),
    "one name twice": meta_mat([*ROWS, (5, "n01", "crane", [])]),
    "names that are none": meta_mat([(n, "", "", []) for n in (1, 2, 3)]),
}


@pytest.mark.parametrize("name", [*MATS, "truth of words", "truth of digits", "no file", "folder", "holes"])
def test_a_devkit_that_is_none(tmp_path, name):
    folder, path = "ILSVRC2012_devkit_t12/data/", tmp_path / imagenet2012.DEVKIT
    truth = {"truth of words": b"one", "truth of digits": b"9" * 5000}.get(name, b"1 2 3")
    mat = MATS.get(name, meta_mat(ROWS))
    if name == "holes":
        mat = tarfile.TarInfo(folder + "meta.mat")
        mat.type, mat.size = tarfile.GNUTYPE_SPARSE, 1 << 40
    members = {folder + "meta.mat": mat, folder + "ILSVRC2012_validation_ground_truth.txt": truth}
    if name == "folder":
        members = {folder + member: link(folder + member, tarfile.DIRTYPE) for member in ("meta.mat", "x")}
    path.write_bytes(tar(members))
    if name == "no file":
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(UserError, match=r"cannot read the classes: .") as error:
        imagenet2012.read_devkit(str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_class_that_a_list_cannot_hold(tmp_path):
    for wnid in ("n01\nval 0\nn01", "n\u2028", "n\x85"):
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / "a.JPEG").write_bytes(b"")
        with pytest.raises(UserError, match="a list cannot hold this name") as error:
            imagenet2012.train_rows(str(tmp_path), {wnid: 0})
        assert len(str(error.value).splitlines()) == 1
        os.rename(tmp_path / "train", tmp_path / ascii(wnid))


def test_lists_of_the_functions(tmp_path):
    for path in ("train/n01/b.JPEG", "train/n01/a.JPEG", "train/n01/.x", "train/n02/c.JPEG"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    label = {"n01": 0, "n02": 1}
    assert imagenet2012.train_rows(str(tmp_path), label) == [
        "train/n01/a.JPEG 0\n",
        "train/n01/b.JPEG 0\n",
        "train/n02/c.JPEG 1\n",
    ]
    with pytest.raises(UserError, match="n02 is no class of the devkit"):
        imagenet2012.train_rows(str(tmp_path), {"n01": 0})
    (tmp_path / "train" / "n02" / "line\nbreak").write_bytes(b"")
    with pytest.raises(UserError, match="a list cannot hold this name"):
        imagenet2012.train_rows(str(tmp_path), label)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    assert imagenet2012.val_rows(str(tmp_path), [7]) == ["val/ILSVRC2012_val_00000001.JPEG 7\n"]


def test_what_is_missing_is_said_before_anything_is_fetched(tmp_path):
    (tmp_path / imagenet2012.DEVKIT).write_bytes(b"wrong")
    with pytest.raises(UserError, match=r"not in .*: ILSVRC2012_img_val\.tar; get it from"):
        imagenet2012.fetch_files(str(tmp_path), ["val"])
