"""Which files of a folder are pictures: one rule for all scripts, by what is in a file and not by its name.

A picture is what transforms.load would try to decode: its first bytes are those of one of its formats. Nothing here
needs a package, so that data/split.py runs with any Python.
"""

import errno
import importlib.util
import os
import re
import sys

import files
from utility import UserError, number_of, plain

MOST = 1024  # bytes of a file that are looked at
# By these names people mean pictures. They count only where a file was named itself: a damaged one is no list.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2",
            ".avif", ".heic", ".heif")  # fmt: skip
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])"
# BMP, GIF and PPM begin with letters as a list does whose first folder is BMW/ or P1/: more of their headers is asked.
_FORMATS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a.*?[\0-\x08]",
    "WebP": rb"RIFF.{4}WEBPVP8[ LX]",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]|MM\*\0|II\0\*",
    "PPM": rb"P(?:[1-6f]|0CMYK|yP|yRGBA|yCMYK)\s" + _GAP + rb"*[0-9]+" + _GAP + rb"+[0-9]+\s",
    "JPEG 2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
    "AVIF": rb".{4}ftyp(?:avi[fs]|(?:mif1|msf1).{0,64}?avi[fs])",
    "HEIC": rb".{4}ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)",
}
_FORMATS = {name: re.compile(pattern, re.DOTALL) for name, pattern in _FORMATS.items()}

HIDDEN, NO_PICTURE, EMPTY, UNREADABLE = "hidden", "no pictures", "empty", "unreadable"
NO_HEIC = "in HEIC, which is read where pillow-heif is installed"
TWICE = "reached before by another name"
UNREADABLE_FOLDER = "not to be opened"
_COPIES = ("__MACOSX", "@eaDir")  # folders that systems put beside ours, full of what looks like pictures or is none


def read_start(path):
    """The first bytes of a file. Raises: OSError, also for what is no file; ValueError."""
    with files.open_file(path, buffering=0) as file:  # a pipe would be waited for
        return file.read(MOST)


def format_of(start):
    """The format of a picture that begins with these bytes, or None where they begin none that is read."""
    return next((name for name, pattern in _FORMATS.items() if pattern.match(start)), None)


def reason_against(path):
    """-> (why a file is no picture or None where it is one, what the system says of it or "")"""
    try:
        start = read_start(path)
    except (OSError, ValueError) as error:
        return UNREADABLE, getattr(error, "strerror", None) or str(error)
    if not start:
        return EMPTY, ""
    found = format_of(start)
    if found == "HEIC" and not importlib.util.find_spec("pillow_heif"):
        return NO_HEIC, ""
    return (None if found else NO_PICTURE), ""


class LeftOut:
    """What is left out of folders, counted by reason, for one line.

    Args:
        expected: a compiled pattern of the names that nobody needs to hear of, or None.
    """

    def __init__(self, expected=None):
        self.expected = expected
        self.found = {}  # reason: [count, the first of them]
        self.folders = False  # whether there are folders among it

    def add(self, reason, path, why="", count=1, folder=False):
        """Counts something. `why`: what the system says of it."""
        if self.expected and self.expected.fullmatch(os.path.basename(path)):
            return
        counted = self.found.setdefault(reason, [0, f"{path}: {why}" if why else path])
        counted[0] += count
        self.folders |= folder

    def __str__(self):
        total = sum(count for count, _ in self.found.values())
        one, more = ("folder", "files and folders") if self.folders else ("file", "files")
        reasons = (f"{n} {reason} (first: {plain(first, 1000)})" for reason, (n, first) in self.found.items())
        return f"left out {number_of(total, one, more)}: {', '.join(reasons)}"

    def report(self):
        """Says it on stderr, if there is anything to say."""
        if self.found:
            print(self, file=sys.stderr)


def find(root, left_out):
    """The folders below `root`, itself included, and the pictures in each: [(folder, names)], sorted by their bytes.

    Links are followed. A folder that is met again by another name is left out, and so are hidden ones and those that
    cannot be read; `left_out`, a LeftOut, counts them and the files that are no pictures.

    Raises: UserError that names a link to a folder in which it lies itself.
    """
    found, seen = [], set()
    levels, above = [[root]], []  # the folders still to come in each level; the real paths of those we are in
    while levels:
        if not levels[-1]:
            levels.pop()
            del above[-1:]
            continue
        folder = levels[-1].pop(0)
        if above and not os.path.islink(folder):
            real = os.path.join(above[-1], os.path.basename(folder))
        else:
            real = os.path.realpath(folder)
        if any(one == real or one.startswith(os.path.join(real, "")) for one in above):
            raise UserError(f"{folder}: a link to {real}, in which it lies itself: remove it")
        if real in seen:
            left_out.add(TWICE, folder, folder=True)
            continue
        seen.add(real)
        inside = _look_into(folder, left_out)
        if inside:
            folders, names = inside
            found.append((folder, names))
            levels.append(folders)
            above.append(real)
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def _look_into(folder, left_out):
    """-> the paths of the folders in a folder, links last, and the names of the pictures in it; None: can't be read."""
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        left_out.add(UNREADABLE_FOLDER, folder, error.strerror, folder=True)
        return None
    folders, names = [], []
    for entry in entries:
        is_folder = _is_folder(entry)
        if entry.name.startswith(".") or (is_folder and entry.name in _COPIES):
            left_out.add(HIDDEN, entry.path, folder=is_folder)
        elif is_folder:
            folders.append(entry)
        else:
            reason, why = reason_against(entry.path)
            if reason:
                left_out.add(reason, entry.path, why)
            else:
                names.append(entry.name)
    folders.sort(key=lambda entry: entry.is_symlink())  # a stable sort
    return [entry.path for entry in folders], names


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{entry.path}: a link that leads to itself: remove it") from None
        return False


# ---------------------------------------------------------------- class folders

# What the folders of a collection that is split already are called: {name: the list that it becomes}.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("query", "gallery"), ""),  # named, but of two such lists none can be the one to validate on
}


def label_classes(folder, names):
    """{class: label}: the NNN where all are named NNN.Name, else 1, 2, ... in sorted order. Raises: UserError."""
    names = sorted(names, key=os.fsencode)
    if not all(re.match(r"[0-9]{3}\.", name) and os.sep not in name for name in names):
        return {name: label for label, name in enumerate(names, 1)}
    for one, other in zip(names, names[1:]):
        if one[:3] == other[:3]:
            raise UserError(f"{folder}: {one!r} and {other!r} have the same number: rename or merge them")
    return {name: int(name[:3]) for name in names}


def class_folders(paths):
    """{folder: its name as a class} of pictures that lie in class folders, two or more, and none beside these; or {}.

    The name is the path from the folder that all of them are in; where that is split into train/, test/ and so on, from
    these: a class in two of them is one.
    """
    folders = {folder: os.path.normpath(folder) for folder in map(os.path.dirname, paths)}
    top = os.path.normpath(os.path.commonpath(folders.values())) if folders else ""
    if len(set(folders.values())) < 2 or top in folders.values():
        return {}
    names = {folder: os.path.relpath(normal, top) for folder, normal in folders.items()}
    below = {folder: name.partition(os.sep)[::2] for folder, name in names.items()}
    if all(part.lower() in PARTS and rest for part, rest in below.values()):
        return {folder: rest for folder, (_, rest) in below.items()}
    return names
