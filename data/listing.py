"""Lists of pictures: what a line of one can hold, and how they are written. On the standard library alone."""

import collections
import contextlib
import os

import files
from utility import UserError, parse_row, say

# label: int; name: of its folder, relative to that of all classes; folder: as a list in output_dir has it; images:
# names of the files in it, sorted.
Class = collections.namedtuple("Class", "label name folder images")


def fits_a_list(path):
    """Whether a line `<path> <label>` gives the path back, wherever in a list it stands and whoever reads it.

    That takes a path without white space at its ends, without any character that some reader ends a line at, and with
    no first bytes that would mark a file as UTF-8 or UTF-16.
    """
    row = f"{path} 0"
    try:
        content = encode(row)
        read = content.decode("utf-8-sig", "surrogateescape")
    except UnicodeError:  # half a character of UTF-16
        return False
    utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return not utf_16 and read.splitlines() == [read] and parse_row(read) == [path, "0"]


def as_listed(path):
    """The path as a list can hold it: with ./ before a first character that readers would strip; None where it can't
    be held."""
    return next((form for form in (path, os.path.join(os.curdir, path)) if fits_a_list(form)), None)


def folder_as_listed(name):
    """`as_listed` for a folder, which may also end in white space; then it gets a / there."""
    return as_listed(name) or as_listed(os.path.join(name, ""))


def encode(text):
    """Text as the lists hold it: in UTF-8, with those bytes of names that are none."""
    return text.encode("utf-8", "surrogateescape")


def write_lists(texts):
    """Writes dict path -> text, all or none; an existing file with another text is kept. Raises: UserError.

    Where a path is a link, this is done to what it leads to.
    """
    texts = {os.path.realpath(path) if os.path.islink(path) else path: encode(text) for path, text in texts.items()}
    texts = {path: text for path, text in texts.items() if not files.holds(path, text)}
    kept = {}  # said in the end, for a reader of our output that has gone is no mistake of a list
    try:
        with contextlib.ExitStack() as stack:  # at whose end all get their names
            for path, text in texts.items():
                files.check_output(path, os.path.exists, "a list")
                file = stack.enter_context(files.atomic_write(path, "wb"))
                file.write(text)
                file.flush()  # a disk that is full says so before anything has another name
            for path in texts:
                if os.path.lexists(path):
                    name = files.free_name(path)
                    os.rename(path, name)
                    kept[path] = name
    except (OSError, UserError):
        for path, name in kept.items():
            os.replace(name, path)
        raise
    for path, name in kept.items():
        say(f"note: {path} was in the way and is kept: it is now {name}")


def list_prefix(folder, output_dir, absolute):
    """What stands before `<class>/<image>` in a list that lies in output_dir."""
    if absolute:
        return os.path.abspath(folder)
    prefix = os.path.relpath(folder, output_dir)
    if prefix.startswith(os.pardir):  # `..` leads elsewhere from a folder that is a link: resolve links first
        prefix = os.path.relpath(os.path.realpath(folder), os.path.realpath(output_dir))
    return "" if prefix == os.curdir else prefix


def list_text(classes):
    """The lines of a list with the images of these classes."""
    rows = [(as_listed(os.path.join(one.folder, image)), one.label) for one in classes for image in one.images]
    return "".join(f"{path} {label}\n" for path, label in rows)
