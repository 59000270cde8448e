"""Whether the pictures of lists are there, and whether one is where it must not be."""

import os
import pathlib
import shutil

import numpy as np
import pytest

import lists
import reader
from utility import UserError


def listed(folder, *names, name="list.txt", label=1):
    (folder / name).write_text("".join(f"{row} {label}\n" for row in names))
    return reader.read_list(str(folder / name))


def test_check_files(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"")
    check = lambda *names: lists.check_files(listed(tmp_path, *names))  # noqa: E731
    check("a/1.jpg", "a/../a/1.jpg", f"{tmp_path}/a/1.jpg", "a/1.jpg")
    for name in ("a/none.jpg", "b/none.jpg"):
        with pytest.raises(UserError) as error:
            check("a/1.jpg", name)
        wanted = f"{tmp_path}/list.txt:2: {tmp_path}/{name}: no such image; is --data_dir right?"
        assert str(error.value) == wanted
    with pytest.raises(UserError, match=r"list\.txt:2: .*right\? \(2 of 3 such images\)"):
        check("a/1.jpg", "b.jpg", "c.jpg")

    def denied(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(os, "scandir", denied)
    check("a/1.jpg")  # a folder may be entered but not listed


def test_the_check_is_as_strong_as_the_read(tmp_path, monkeypatch):
    """What is in the folder under a picture's name, but can't be opened as a file, would end a run after an epoch."""
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "link.jpg").symlink_to("1.jpg")
    (tmp_path / "chain.jpg").symlink_to("dangling.jpg")
    (tmp_path / "dangling.jpg").symlink_to("gone/1.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "to_folder.jpg").symlink_to("folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    lists.check_files(listed(tmp_path, "1.jpg", "link.jpg"))
    for name, why in (
        ("dangling.jpg", "a link to gone/1.jpg, which is not there"),
        ("chain.jpg", "a link to dangling.jpg, which is not there"),
        ("self.jpg", "a link to self.jpg, which leads to itself"),
        ("folder.jpg", "no such image: a folder"),
        ("to_folder.jpg", "no such image: a folder"),
        ("pipe.jpg", "a pipe, not a file"),
        ("1.jpg/", "no such image"),
    ):
        with pytest.raises(UserError, match=rf"list\.txt:2: .*{name}: ({why})"):
            lists.check_files(listed(tmp_path, "link.jpg", name))
    # Root may read all, so that a mode of 000 shows nothing there.
    opened = reader.files.open_file

    def closed(path, *more, **options):
        if path.endswith("/1.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *more, **options)

    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("/1.jpg"))
    monkeypatch.setattr(lists.files, "open_file", closed)
    with pytest.raises(UserError, match=r"list\.txt:1: .*1\.jpg: Permission denied"):
        lists.check_files(listed(tmp_path, "1.jpg", "link.jpg"))


def report_repeated(samples):
    lists.report_repeated(samples, *lists.identify(samples))


def test_repeated_pictures_are_reported(tmp_path, capsys):
    path = tmp_path / "list.txt"
    path.write_text("a.jpg 1\nb.jpg 2\nx/../b.jpg 2\na.jpg 3\n./b.jpg 2\n")
    report_repeated(reader.read_list(str(path)))
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path}:3: {tmp_path}/x/../b.jpg: is on line 2, too (2 such lines)",
        f"warning: {path}:4: {tmp_path}/a.jpg: is on line 1 with another label, too",
    ]
    for name, content in (("a", b"picture"), ("b", b"another"), ("c", b"picture"), ("d", b""), ("e", b"")):
        (tmp_path / f"{name}.jpg").write_bytes(content)
    report_repeated(listed(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"))  # empty files are no pictures
    said = f"warning: {path}:3: {tmp_path}/c.jpg: is on line 1 under another name, too\n"
    assert capsys.readouterr().err == said
    report_repeated(listed(tmp_path, "a.jpg", "b.jpg"))
    assert capsys.readouterr().err == ""


def test_the_same_picture_is_found_by_place_and_by_content(tmp_path, monkeypatch):
    """Against a comparison of each with each, with files that agree in size, in their ends, and as a whole."""
    rng = np.random.default_rng(0)
    tail = rng.bytes(2 * lists.END)
    contents = [b"", b"x", b"y", b"a" + tail, b"b" + tail, b"c" + tail + b"d", rng.bytes(100)]
    names = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for number, content in enumerate(contents[rng.integers(7)] for _ in range(20)):
            (tmp_path / folder / f"{number}.jpg").write_bytes(content)
            names.append(f"{folder}/{number}.jpg")
    (tmp_path / "linked").symlink_to("one")
    (tmp_path / "one" / "link.jpg").symlink_to("../two/3.jpg")
    names += ["linked/0.jpg", "one/link.jpg", "two/missing.jpg", "one/../one/1.jpg"]
    order = rng.permutation(names).tolist()
    one, other = listed(tmp_path, *order[:22], name="a.txt"), listed(tmp_path, *order[22:], name="b.txt")
    paths = one.paths + other.paths
    found = lists.identify(one, other)
    place = np.concatenate([identity.place for identity in found])
    content = np.concatenate([identity.content for identity in found])
    assert [len(identity.place) for identity in found] == [22, 22]
    for i, first in enumerate(paths):
        for j, second in enumerate(paths):
            same = os.path.realpath(first) == os.path.realpath(second)
            assert (place[i] == place[j]) == same
            equal = same
            if os.path.exists(first) and os.path.exists(second):
                bytes_1, bytes_2 = (pathlib.Path(path).read_bytes() for path in (first, second))
                equal = same or bytes_1 == bytes_2 != b""
            assert (content[i] == content[j]) == equal
    monkeypatch.setattr(lists, "MOST_CONTENTS", 3)
    assert all(identity.content is None for identity in lists.identify(one, other))


def test_only_what_may_be_equal_is_read(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(bytes(lists.END) + bytes([number]) * (number + 1))
    shutil.copy(tmp_path / "3.jpg", tmp_path / "copy.jpg")
    read, digest = [], lists._digest
    monkeypatch.setattr(lists, "_digest", lambda path, most=None: read.append((path, most)) or digest(path, most))
    lists.identify(listed(tmp_path, "copy.jpg", *(f"{number}.jpg" for number in range(20))))
    pair = {str(tmp_path / "3.jpg"), str(tmp_path / "copy.jpg")}
    assert sorted(read, key=str) == sorted([(path, most) for path in pair for most in (lists.END, None)], key=str)


def test_pictures_shared_by_two_lists(tmp_path, capsys):
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode() * 9)
    (tmp_path / "copy.jpg").write_bytes(b"a" * 9)
    (tmp_path / "link.jpg").symlink_to("b.jpg")
    one = listed(tmp_path, "d.jpg", "copy.jpg", "link.jpg", name="one.txt")
    other = listed(tmp_path, "a.jpg", "b.jpg", "c.jpg", name="other.txt")
    lists.report_shared(one, *lists.identify(one, other), "training images, too")
    said = "warning: 2 of 3 images are training images, too, 1 under another name; the first: "
    assert capsys.readouterr().err == f"{said}{tmp_path}/one.txt:2: {tmp_path}/copy.jpg\n"
    one = listed(tmp_path, "d.jpg", name="one.txt")
    lists.report_shared(one, *lists.identify(one, other), "training images, too")
    assert capsys.readouterr().err == ""
