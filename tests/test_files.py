"""What is created and replaced."""

import errno
import os

import pytest

import files
from utility import UserError


def test_make_directory(tmp_path):
    files.make_directory(str(tmp_path / "a" / "b"))
    files.make_directory(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match=f"{path}: cannot write into this directory: "):
            files.make_directory(str(path))


def test_make_directory_without_permission(tmp_path, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("builtins.open", denied)  # root may write anywhere
    with pytest.raises(UserError, match="cannot write into this directory: Permission denied"):
        files.make_directory(str(tmp_path / "a"))


def test_atomic_write(tmp_path):
    path = tmp_path / "result.json"
    with files.atomic_write(str(path)) as file:
        file.write("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with files.atomic_write(str(path), "wb") as file:
        file.write(b"two")
        file.flush()
        assert path.read_text() == "one"
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), UserError("a mistake")])
def test_atomic_write_leaves_nothing_of_what_failed(tmp_path, error):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(type(error)), files.atomic_write(str(path)) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]


def test_atomic_write_where_it_cannot(tmp_path):
    for path in (tmp_path / "none" / "result.json", tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot write: "), files.atomic_write(str(path)):
            pass
    for error, wanted in ((OSError(errno.ENOSPC, "No space left"), "No space left"), (OSError("odd"), "odd")):
        with pytest.raises(UserError, match=wanted), files.atomic_write(str(tmp_path / "a")):
            raise error
    assert os.listdir(tmp_path) == []
