"""Lists that other systems and programs wrote."""

import os
import unicodedata

import pytest

import lists
import reader
import spelling
from utility import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("birds/1.jpg", "birds/2.jpg", "鸟/一.jpg", "Möwe/a b.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def listed(folder, content, name="list.txt", need_labels=True):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return reader.read_list(str(folder / name), need_labels=need_labels)


def names(samples, folder):
    return [os.path.relpath(path, folder) for path in samples.paths]


def test_backslashes_are_read_and_said_once(folder, capsys):
    samples = listed(folder, "birds\\1.jpg 0\r\n.\\birds\\2.jpg 1\r\nbirds/1.jpg 0\r\nbirds\\none.jpg 0\r\n")
    assert names(samples, folder) == ["birds/1.jpg", "birds/2.jpg", "birds/1.jpg", "birds/none.jpg"]
    assert samples.labels.tolist() == [0, 1, 0, 0]
    said = f"note: {folder}/list.txt: paths are read with slashes for backslashes\n"
    assert capsys.readouterr().out == said
    assert names(listed(folder, "birds\\1.jpg\n", need_labels=False), folder) == ["birds/1.jpg"]
    samples = listed(folder, "birds\\none.jpg 0\nbirds\\1.jpg 0\n")  # the first is not there under any name
    assert names(samples, folder) == ["birds/none.jpg", "birds/1.jpg"]
    capsys.readouterr()
    (folder / "birds\\1.jpg").write_bytes(b"")  # a name that has one
    assert names(listed(folder, "birds\\1.jpg 0\n"), folder) == ["birds\\1.jpg"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("encoding", ["gb18030", "shift_jis", "big5"])
def test_lists_in_other_encodings(folder, capsys, encoding):
    (folder / "表鳥").mkdir()  # the first has a backslash for its second byte in Shift-JIS
    (folder / "表鳥" / "1.jpg").write_bytes(b"")
    samples = listed(folder, "表鳥\\1.jpg 7\r\nbirds\\2.jpg 8\r\n".encode(encoding))
    assert names(samples, folder) == ["表鳥/1.jpg", "birds/2.jpg"] and samples.labels.tolist() == [7, 8]
    assert f"paths are read in {encoding} and with slashes for backslashes" in capsys.readouterr().out
    samples = listed(folder, "表鳥/1.jpg 7\nbirds/2.jpg 8\n".encode(encoding))
    assert names(samples, folder) == ["表鳥/1.jpg", "birds/2.jpg"]
    assert f"paths are read in {encoding}\n" in capsys.readouterr().out


def test_names_in_another_encoding_on_the_disk(folder, capsys):
    """A list and a disk that agree are read as they are, whatever the bytes mean."""
    name = "鸟.jpg".encode("gbk")
    with open(os.path.join(os.fsencode(folder), name), "wb"):
        pass
    lists.check_files(listed(folder, name + b" 1\n"))
    assert capsys.readouterr().out == ""
    assert "the disk has it in gb18030, not in UTF-8" in missing(folder, "鸟.jpg 1\n")


def missing(folder, content, **options):
    with pytest.raises(UserError) as error:
        lists.check_files(listed(folder, content, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("row", "there", "why"),
    [
        ("birds/1.JPG", "birds/1.jpg", "upper and lower case differ"),
        ("Birds/1.jpg", "birds/1.jpg", "upper and lower case differ"),
        ("birds/1.jpeg", "birds/1.jpg", "another suffix"),
        ("birds/1", "birds/1.jpg", "another suffix"),
        ("birds/\u200b1.jpg", "birds/1.jpg", "the list has U+200B"),
        ("birds/\N{FULLWIDTH DIGIT ONE}.jpg", "birds/1.jpg", "the list has U+FF11"),
        ("Möwe/a\u00a0b.jpg", "Möwe/a b.jpg", "the list has U+00A0"),
        ("Möwe/a  b.jpg", "Möwe/a b.jpg", "white space differs"),
        (unicodedata.normalize("NFD", "Möwe/a b.jpg"), "Möwe/a b.jpg", "another Unicode form (the list has NFD)"),
        ('"birds/1.jpg"', "birds/1.jpg", "the list has quotes around paths"),
        ("birds/1.jpg,", "birds/1.jpg", "the list has a comma"),
        ("M%C3%B6we/a%20b.jpg", "Möwe/a b.jpg", "the list has the escapes of a URL"),
        ("birds/1.jpg 4", "birds/1.jpg", "more than a path and a label"),
        ("Mowe/a b.jpg", "Möwe/a b.jpg", "the list has U+006F, the disk has U+00F6"),
        ("BIRDS\\1.JPG", "birds/1.jpg", "the list has backslashes, upper and lower case differ"),
    ],
)
def test_what_differs_is_said(folder, row, there, why):
    said = missing(folder, f"birds/2.jpg 0\n{row} 1\n")
    assert f"list.txt:2: {folder}/" in said and f": no such image; {folder}/{there} is there: " in said
    assert why in said, said


def test_paths_that_count_from_elsewhere(folder):
    (folder / "lists").mkdir()
    said = missing(folder, "birds/1.jpg 0\nbirds/2.jpg 0\n", name="lists/a.txt")
    where = f"birds/1.jpg is there in {folder}: do the list's paths count from it (--data_dir)? (2 of 2 such images)"
    assert where in said
    assert f"in/birds/1.jpg is there in {folder.parent}" in missing(folder, "in/in/birds/1.jpg 0\n")
    there = f"birds/1.jpg is there in {folder}: paths in the list that begin with"
    gone = missing(folder, "/home/somebody/birds/1.jpg 0\n", name="b.txt")
    assert f"{there} /, or --data_dir, lead nowhere here" in gone
    assert f"{there} C:\\ lead nowhere here" in missing(folder, "C:\\somebody\\birds\\1.jpg 0\n")
    assert f"{there} https:// lead nowhere here" in missing(folder, "https://example.org/birds/1.jpg 0\n")
    said = missing(folder, f"file://{folder}/birds/1.jpg 0\n")
    assert f"{folder}/birds/1.jpg is there: the list has file:// in front" in said
    assert f"is there in {folder.parent}:" in missing(folder.parent, "lists/in/birds/1.jpg 0\n")


def test_nothing_alike(folder):
    assert missing(folder, "dogs/rex.jpg 0\n").endswith("no such image; is --data_dir right?")
    (folder / "birds" / "A.jpg").write_bytes(b"")
    (folder / "birds" / "a.JPG").write_bytes(b"")  # two that are alike: neither
    assert missing(folder, "birds/A.Jpg 0\n").endswith("no such image; is --data_dir right?")


def test_labels_that_are_none(folder):
    for content, wanted in (
        ("birds/1.jpg,3\n", "expected '<path> <label>', found 'birds/1.jpg,3'; white space parts them, not a comma"),
        ("path,label\nbirds/1.jpg,3\n", "white space parts them, not a comma"),
        ("birds/1.jpg robin\n", "the label 'robin' is no integer; expected '<path> <label>' with numbered classes"),
    ):
        with pytest.raises(UserError, match=r"list\.txt:1: ") as error:
            listed(folder, content)
        assert wanted in str(error.value)


def test_unlabelled_lists_whose_names_end_in_a_number(folder, capsys):
    (folder / "photo 1").write_bytes(b"")
    samples = listed(folder, "photo 1\nbirds/1.jpg\n", need_labels=False)
    assert samples.labels is None and names(samples, folder) == ["photo 1", "birds/1.jpg"]
    assert listed(folder, "birds/1.jpg 1\nbirds/2.jpg 2\n", need_labels=False).labels.tolist() == [1, 2]
    with pytest.raises(UserError, match=r"list\.txt:2: no label on this line"):
        listed(folder, "birds/1.jpg 1\nbirds/2.jpg\n", need_labels=False)


def test_nothing_is_followed_for_ever(folder):
    (folder / "loop").symlink_to("loop")
    assert spelling.what_differs(f"{folder}/loop/x.jpg") == ""
    assert spelling.what_differs("/".join(["a"] * 5000) + "/x.jpg") == ""
    assert spelling.what_differs("a" * 5000) == "" and spelling.what_differs("") == ""
