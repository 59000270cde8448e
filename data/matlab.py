"""Reads tables of MATLAB 5 files (.mat): ImageNet's classes, and the boxes of Cars196 and CUB-200 (2010).

They may be hostile: what a compressed array may grow to, how many arrays and columns there may be, and how long a text,
is bounded before it is built, which scipy.io does not do. Other kinds of arrays are passed over.
"""

import contextlib
import itertools
import math
import struct
import zlib

import files
import unpack
from utility import UserError

# Data types, and the array classes that are not numbers.
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q", 16: "B", 17: "H", 18: "I"}
COMPRESSED, UTF_8 = 15, 16
CELL, STRUCT, TEXT = 1, 2, 4
LIMIT = 1 << 24  # bytes of a file and of an element; those of our data sets have less than 1 MB
MOST_ARRAYS, MOST_COLUMNS, LONGEST_NAME, LONGEST_TEXT = 100, 100, 64, 10_000  # of the file, of a table, in bytes

# What a broken or hostile file makes this raise.
BROKEN = (LookupError, TypeError, *unpack.BROKEN)


def inflate(content):
    """The bytes of a compressed element. Raises: zlib.error, ValueError where they are too many or too few."""
    inflater = zlib.decompressobj()
    data = inflater.decompress(content, LIMIT)
    if not inflater.eof:
        raise ValueError("an element of it is cut off or too large")
    return data


def elements(data, at=0):
    """Yields (data type, content) of the elements that follow one another in a MATLAB 5 file."""
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # up to 4 bytes: the size is in the upper half of the first word, the content in the second
            yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
            at += 8
            continue
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + size + (0 if kind == COMPRESSED else -size % 8)


def arrays(mat):
    """Yields the content of each array of a MATLAB 5 file, compressed or not."""
    for kind, content in itertools.islice(elements(mat, 128), MOST_ARRAYS):
        if kind == COMPRESSED:
            yield next(elements(inflate(content)), (0, b""))[1]
        else:
            yield content


def numbers(element):
    """The numbers of an element, as a tuple."""
    kind, content = element
    return struct.unpack(f"<{len(content) // struct.calcsize(NUMBERS[kind])}{NUMBERS[kind]}", content)


def _open(array):
    """-> the class of an array; the elements of its content."""
    flags, _dimensions, _name, *content = elements(array)
    return numbers(flags)[0] & 0xFF, content


def value(array):
    """The text or the single number, a whole one or not, of an array. Raises: ValueError, what is in BROKEN."""
    kind, content = _open(array)
    stored, data = content[0]
    if kind == TEXT:
        if len(data) > LONGEST_TEXT:
            raise ValueError(f"a text of {len(data)} bytes in it")
        return data.decode() if stored == UTF_8 else "".join(map(chr, numbers((stored, data))))
    number = numbers((stored, data[:8]))[0]
    if not math.isfinite(number):
        raise ValueError(f"{number} is in it, where a number should be")
    return int(number) if number == int(number) else number


def columns(array):
    """-> dict name -> the arrays of that column of a table, or None where the array is none. Raises: ValueError."""
    kind, content = _open(array)
    if kind != STRUCT:
        return None
    (_, width), (_, names), *fields = content
    width = struct.unpack("<i", width)[0]
    if not 0 < width <= LONGEST_NAME or len(names) > width * MOST_COLUMNS:
        raise ValueError("its columns have no names")
    names = [names[i : i + width].split(b"\0")[0].decode() for i in range(0, len(names), width)]
    return {name: [array for _, array in fields[i :: len(names)]] for i, name in enumerate(names)}


def cells(array):
    """The arrays in a cell array. Raises: ValueError where it is none."""
    kind, content = _open(array)
    if kind != CELL:
        raise ValueError("no list where one should be")
    return [array for _, array in content]


def find(mat, name):
    """The content of the array of that name. Raises: ValueError where there is none."""
    for array in arrays(mat):
        parts = list(itertools.islice(elements(array), 3))
        if len(parts) == 3 and parts[2][1] == name.encode():
            return array
    raise ValueError(f"no array {name!r} in it")


def rows(array, *names):
    """Yields the values of these columns of a table, row by row. Raises: ValueError where one is missing."""
    table = columns(array) or {}
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"no column {missing[0]!r} in its table")
    if len({len(table[name]) for name in names}) > 1:
        raise ValueError("its columns are not equally long")
    return zip(*(map(value, table[name]) for name in names))


@contextlib.contextmanager
def reading(path):
    """Gives the bytes of a MATLAB 5 file; a UserError that names it where they, or what the block reads, are wrong."""
    try:
        with files.open_file(path, LIMIT) as file:
            mat = file.read()
        if mat[:10] == b"MATLAB 7.3" or mat[:4] == b"\x89HDF":
            raise ValueError("a MATLAB 7.3 file: save it with -v7")
        if mat[:6] != b"MATLAB" or mat[126:128] != b"IM":
            raise ValueError("no MATLAB 5 file")
        yield mat
    except BROKEN as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else unpack.first_line(error)
        raise UserError(f"{path}: cannot read it: {why}") from None
