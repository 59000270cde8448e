"""Which files of a folder are pictures: pictures.py, against what is really decoded."""

import importlib.util
import inspect
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import pictures
import reader
import transforms
from utility import UserError

JPEG = b"\xff\xd8\xff\xe0"


def test_names_of_class_folders():
    """Of a collection that is split already a class in two parts is one, as data/split.py has it."""
    names = lambda *folders: pictures.class_folders([f"in/{folder}/1.jpg" for folder in folders])  # noqa: E731
    assert names("a", "b/c") == {"in/a": "a", "in/b/c": "b/c"}
    assert names("train/a", "Test/a", "Test/b") == {"in/train/a": "a", "in/Test/a": "a", "in/Test/b": "b"}
    assert names("train/a", "other/a") == {"in/train/a": "train/a", "in/other/a": "other/a"}
    assert names("train", "test") == {"in/train": "train", "in/test": "test"}
    for top in (".", "./in", "in/."):
        assert pictures.class_folders([f"{top}/{name}/1.jpg" for name in "ab"]) == {f"{top}/a": "a", f"{top}/b": "b"}
        assert pictures.class_folders([f"{top}/1.jpg", f"{top}/a/1.jpg", f"{top}/b/1.jpg"]) == {}
    paths = [f"in/{folder}/1.jpg" for folder in ("test/a", "test/c", "train/a", "train/b")]
    assert reader.with_folder_labels(reader.Samples(paths, None, None, None)).labels.tolist() == [1, 3, 1, 2]


def saved(kind, mode):
    """A picture in a format of Pillow's; None where it can't be written in this mode."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = Image.fromarray(noise).convert(mode) if mode not in ("F", "I;16") else Image.new(mode, (40, 30), 1)
    file = io.BytesIO()
    try:
        image.save(file, kind)
    except (OSError, KeyError, ValueError, AttributeError):
        return None
    return file.getvalue()


def is_read(data):
    try:
        transforms.decode(data)
    except transforms.BadImage:
        return False
    return True


Image.init()
WRITTEN = sorted(
    set(Image.SAVE) - {"PDF", "HDF5", "GRIB", "BUFR", "WMF", "ICNS", "IM"}
)  # no pictures, slow, or on their way out


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_picture_is_what_is_decoded(kind):
    """Of all that Pillow can write, each format in each mode."""
    contents = [data for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "F", "I;16") if (data := saved(kind, mode))]
    for data in contents:
        assert bool(pictures.format_of(data[: pictures.MOST])) == is_read(data)
    own = {"MPO": "JPEG", "JPEG2000": "JPEG 2000", "WEBP": "WebP"}.get(kind, kind)
    found = {pictures.format_of(data[: pictures.MOST]) for data in contents}
    assert found == ({own} if kind in (*transforms.FORMATS, "MPO") else {None})


@pytest.mark.parametrize(
    "data",
    [
        b"P6\n# made by hand\n2 1\n255\nabcdef",
        b"P3 1 1 255 9 9 9",
        b"GIF87a" + saved("GIF", "L")[6:],
        b"BM" + saved("BMP", "RGB")[2:],
    ],
)
def test_headers_that_begin_like_text(data):
    assert is_read(data) and pictures.format_of(data)


@pytest.mark.parametrize(
    "text",
    ["BMW/1.jpg 3", "BMW/engine and wheels/1.jpg 3", "P1/a.jpg 1", "P5 a.jpg 1", "P6", "GIF89a/1.jpg 1", "RIFF 1"],
)
def test_lists_that_begin_like_headers(text):
    assert pictures.format_of((text + "\n").encode() * 50) is None


@pytest.mark.parametrize("brands", [b"heic", b"mif1\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1avif", b"avif"])
def test_heic_is_a_picture_where_it_can_be_read(tmp_path, brands):
    (tmp_path / "a").write_bytes(b"\0\0\0\x1cftyp" + brands)
    is_avif = b"avif" in brands
    assert pictures.format_of((tmp_path / "a").read_bytes()) == ("AVIF" if is_avif else "HEIC")
    reason, _ = pictures.reason_against(str(tmp_path / "a"))
    readable = is_avif or importlib.util.find_spec("pillow_heif")
    assert reason == (None if readable else pictures.NO_HEIC)


def make(root, *names, content=JPEG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def found_in(root):
    """-> paths of the pictures below root, relative to it; the line about what was left out."""
    left_out = pictures.LeftOut()
    found = pictures.find(str(root), left_out)
    paths = [os.path.relpath(os.path.join(folder, name), root) for folder, names in found for name in names]
    return paths, str(left_out).replace(f"{root}/", "") if left_out.found else ""


def test_links_are_followed_and_a_folder_is_taken_once(tmp_path):
    make(tmp_path / "in", "b/1.jpg", "b/c/2.jpg")
    make(tmp_path / "out", "3.jpg")
    for name, target in {"a": "in/b", "all": "in/b", "out1": "out", "out2": "out"}.items():
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    (tmp_path / "in" / "b" / "4.jpg").symlink_to(tmp_path / "out" / "3.jpg")
    paths, said = found_in(tmp_path / "in")
    assert paths == ["b/1.jpg", "b/4.jpg", "b/c/2.jpg", "out1/3.jpg"]  # not a/1.jpg: a real folder goes before links
    assert said == "left out 3 files and folders: 3 reached before by another name (first: a)"


@pytest.mark.parametrize(
    ("links", "wanted"),
    [
        ({"b/round": "b"}, "b/round: a link to .*/in/b, in which it lies itself"),
        ({"b/c/round": "."}, "b/c/round: a link to .*/in, in"),
        ({"b/c/round": ".."}, "b/c/round: a link to "),  # above what is searched
        ({"b/c/round": "/"}, "b/c/round: a link to /, in"),
        ({"b/x": "d", "d/y": "b"}, "(b/x/y|d/y/x): a link to "),
        ({"b/c/x": "d", "d/y": "b"}, "b/c/x/y: a link to "),
        ({"b/self": "b/self"}, "b/self: a link that leads to itself"),
        ({"b/x": "d/y", "d/y": "b/x"}, "(b/x|d/y): a link that leads to itself"),
    ],
)
def test_a_cycle_is_an_error_that_names_it(tmp_path, links, wanted):
    make(tmp_path / "in", "a/0.jpg", "b/1.jpg", "b/c/2.jpg", "d/3.jpg")
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(os.path.normpath(tmp_path / "in" / target))
    with pytest.raises(UserError, match=wanted):
        found_in(tmp_path / "in")


def test_what_is_left_out_is_counted_by_reason(tmp_path, monkeypatch):
    make(tmp_path, "a/1", "a/._1", ".git/2.jpg", "__MACOSX/a/3.jpg", "@eaDir/4.jpg", "closed/5.jpg")
    make(tmp_path, "a/Thumbs.db", "a/page.jpg", content=b"<html>")
    make(tmp_path, "a/empty.png", content=b"")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere")
    scandir = os.scandir

    def denied(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    paths, said = found_in(tmp_path)
    assert paths == ["a/1"]
    assert said == (
        "left out 10 files and folders: 4 hidden (first: .git), 2 no pictures (first: a/Thumbs.db), 1 empty (first: "
        "a/empty.png), 2 unreadable (first: a/gone.jpg: No such file or directory), 1 not to be opened "
        "(first: closed: Permission denied)"
    )


def test_names_break_no_line(tmp_path):
    make(tmp_path, "a\nerror: b\x1b[31m", content=b"text")
    assert found_in(tmp_path)[1] == r"left out 1 file: 1 no pictures (first: a\nerror: b\x1b[31m)"


def test_deep_folders(tmp_path):
    """No recursion: folders may be deeper than Python's stack is high."""
    make(tmp_path, "a/" * 100 + "1.jpg")
    before, depth = sys.getrecursionlimit(), len(inspect.stack(0))
    sys.setrecursionlimit(depth + 60)
    try:
        found = found_in(tmp_path)[0]
    finally:
        sys.setrecursionlimit(before)
    assert found == ["a/" * 100 + "1.jpg"]


def test_no_package_is_needed(tmp_path):
    make(tmp_path, "a/1", "b/2", "c/3")
    script = os.path.join(ROOT, "data", "split.py")
    done = subprocess.run([sys.executable, "-S", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "3 images of 3 classes" in done.stdout
