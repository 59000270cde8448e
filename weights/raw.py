"""What the readers of weights files share: the bytes of a file, arrays over them, and what a file seems to be that is
none of ours."""

import contextlib
import hashlib
import math
import re

import numpy as np

import files
from utility import UserError, plain


def guess(start):
    """What a file that is none of ours seems to be, by its first bytes: text for a message."""
    if not start:
        return "an empty file: download or copy it again"
    if start[:4] == b"PK\3\4":
        return _guess_zip(start)
    if start[: len(OLD_TORCH)] == OLD_TORCH:
        return TORCH
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"\nsize (\d{1,15})\n", start)
        whole = f" of {int(size[1])} bytes" if size else ""
        return f"a Git LFS pointer, which stands for the file{whole}: git lfs pull fetches it"
    if start[:12] == bytes(12) and start.strip(b"\0"):
        return (
            "one variable of a fluid model, or all of them joined without their names (.pdiparams): give the directory "
            "that save_vars wrote with one file a variable, or the .pdparams that the model was exported from"
        )
    if not start.strip(b"\0"):
        return "zeros: its content never arrived; download or copy it again"
    if start[:4] in (b"\x1f\x8b\x08\0", b"\x1f\x8b\x08\x08") or start[257:262] == b"ustar":
        return "an archive: unpack it first"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<script", b"<!--", b"<?xml")):
        return "a web page, not weights: the download went wrong; fetch the file itself"
    if len(start) < 9:
        return f"{len(start)} bytes, too few for weights: cut off; download or copy it again"
    known = "neither Paddle's .pdparams, safetensors nor Keras' .h5"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        line = plain(text[:60].decode("utf-8", "replace").strip().split("\n")[0], 60)
        return f"a text file ({line} ...), {known}"
    return f"an unknown format, {known}"


# The number with which torch.save began before it wrote zip archives.
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
TORCH = (
    "a file of PyTorch, which is not read here: convert it where PyTorch is, as docs/weights.md says "
    '(safetensors.torch.save_file(torch.load("x.pth"), "x.safetensors")), and give that file'
)


def _guess_zip(start):
    """What a zip archive seems to be, by the name of its first file."""
    name = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    if name.endswith(b".npy"):
        return (
            "an archive of NumPy, which is not read here: convert it "
            '(safetensors.numpy.save_file(dict(numpy.load("x.npz")), "x.safetensors")), and give that file'
        )
    if name in (b"metadata.json", b"config.json", b"model.weights.h5"):
        return "a .keras archive of Keras 3, which is not read here: the .h5 files of keras.applications are"
    if re.fullmatch(rb"[^/]+/(data\.pkl|\.format_version|\.data/.*|byteorder|version|constants\.pkl|code/.*)", name):
        return TORCH
    return f"a zip archive ({plain(name.decode('utf-8', 'replace'), 60)} ...): unpack it first"


def cut_off(path, size, whole=None):
    """The error for a file of `size` bytes that should have had `whole`, or more than there are."""
    there = f"{size} bytes are there" + (f" of {whole}" if whole else "")
    return UserError(f"{path}: cut off: {there}; download or copy it again")


@contextlib.contextmanager
def opened(path):
    """The open file. Raises: UserError where it can't be opened or read."""
    try:
        with files.open_file(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def read(path):
    """All bytes of a file. Raises: UserError where it can't be opened or read."""
    with opened(path) as file:
        return file.read()


def hash_of_arrays(items):
    """SHA-256, in hexadecimal, of (name, array)s: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in items:
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array)
    return digest.hexdigest()


def array_over(data, dtype, shape):
    """An array of `shape` over the bytes `data`, whose number must fit: ValueError."""
    shape = checked_shape(shape)
    # Python's integers don't wrap around.
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise ValueError(f"shape {list(shape)} does not fit {len(data)} bytes of {np.dtype(dtype).name}")
    return np.frombuffer(data, dtype).reshape(shape)


def checked_shape(shape):
    """The lengths of an array's dimensions as a tuple, if they are what NumPy can have: ValueError."""
    if type(shape) not in (tuple, list) or len(shape) > 32:
        raise ValueError("a shape that is no list of at most 32 numbers")
    if not all(type(length) is int and 0 <= length < 2**63 for length in shape):
        raise ValueError("a shape with something other than lengths in it")
    return tuple(shape)
