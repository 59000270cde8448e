"""What is looked at in lists before hours are spent on them: that pictures are there, and none where it must not be."""

import collections
import concurrent.futures
import errno
import hashlib
import os
import sys

import numpy as np

import files
import spelling
from reader import where
from utility import UserError, plain

THREADS = 16  # that look at files, most of which wait for a disk or a network
MOST_CONTENTS = 200_000  # pictures of two lists whose contents are compared; of more, only where they lie
END = 4096  # bytes of a picture's end that are compared first

# place: int64 [N], equal for pictures that are one file, links followed; content: the same for those of the same bytes,
# or None where that was not looked at.
Identity = collections.namedtuple("Identity", "place content")


# ---------------------------------------------------------------- are they there


def check_files(samples):
    """Raises a UserError that names the first picture that can't be read, before hours are spent on the others.

    Looks at each folder once, and opens only what is not seen there as a file, such as where a file system takes a.JPG
    for a.jpg or a folder may be entered but not listed.
    """
    folders = collections.defaultdict(list)
    for index, path in enumerate(samples.paths):
        folders[os.path.dirname(path)].append(index)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda item: _unreadable(samples.paths, *item), folders.items())
        missing = {index: error for part in parts for index, error in part}
    if not missing:
        return
    first = min(missing)
    why = _why(samples.paths[first], missing[first], os.path.dirname(samples.source or ""))
    more = f" ({len(missing)} of {len(samples.paths)} such images)" if len(missing) > 1 else ""
    raise UserError(f"{where(samples, first)}: {why}{more}")


def _unreadable(paths, folder, indices):
    """[(index, OSError or ValueError)] of those of a folder's pictures that can't be opened as files."""
    try:
        with os.scandir(folder or ".") as entries:
            there = {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        there = ()
    found = []
    for index in indices:
        if os.path.basename(paths[index]) not in there or not os.access(paths[index], os.R_OK):
            try:
                files.open_file(paths[index]).close()
            except (OSError, ValueError) as error:
                found.append((index, error))
    return found


def _is_loop(error):
    return getattr(error, "errno", None) == errno.ELOOP


def _why(path, error, near):
    """Why a picture can't be opened, in words, and what is there in its place."""
    if os.path.islink(path) and not os.path.exists(path):
        to = plain(os.readlink(path), 1000)
        return f"a link to {to}, which leads to itself" if _is_loop(error) else f"a link to {to}, which is not there"
    if isinstance(error, IsADirectoryError):
        return "no such image: a folder"
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return getattr(error, "strerror", None) or str(error)
    return f"no such image; {spelling.what_differs(path, near or os.curdir) or 'is --data_dir right?'}"


# ---------------------------------------------------------------- is one there twice


def identify(*lists):
    """Which pictures of several Samples are the same: an Identity of each, whose numbers count for all of them.

    Contents are compared up to MOST_CONTENTS pictures: files of one size by their ends, and where these are equal, as a
    whole. What can't be read is equal to nothing.
    """
    places, numbers = {}, []
    for path in real_paths([path for samples in lists for path in samples.paths]):
        numbers.append(places.setdefault(path, len(places)))
    place = np.array(numbers, np.int64)
    content = None
    if len(place) <= MOST_CONTENTS:
        first = np.arange(len(places))
        for group in _equal_contents(list(places)):
            first[group] = group[0]
        content = first[place]
    ends = np.cumsum([len(samples.paths) for samples in lists])[:-1]
    contents = [None] * len(lists) if content is None else np.split(content, ends)
    return [Identity(*pair) for pair in zip(np.split(place, ends), contents)]


def real_paths(paths):
    """os.path.realpath of many, which looks at each folder once."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    found = [os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths]
    return [os.path.realpath(path) if os.path.islink(path) else path for path in found]


def _equal_contents(paths):
    """Lists of positions in `paths`, each of two files or more with the same bytes."""
    groups = [range(len(paths))]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for key in (_size, _end, _content):
            parts = collections.defaultdict(list)
            rows = [(number, row) for number, group in enumerate(groups) for row in group]
            for (number, row), value in zip(rows, pool.map(key, [paths[row] for _, row in rows])):
                if value is not None:
                    parts[number, value].append(row)
            groups = [group for group in parts.values() if len(group) > 1]
    return groups


def _size(path):
    try:
        return os.stat(path).st_size or None  # empty files are no pictures
    except (OSError, ValueError):
        return None


def _end(path):
    return _digest(path, END)


def _content(path):
    return _digest(path)


def _digest(path, most=None):
    """A digest of a file's bytes, or of its last `most`; None where it can't be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with files.open_file(path) as file:
            if most:
                file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            while block := file.read(2**20):
                digest.update(block)
    except (OSError, ValueError):
        return None
    return digest.digest()


def report_repeated(samples, identity):
    """Says on stderr which pictures are more than once in a list, and where with different labels.

    A picture that is there twice is its own nearest neighbour, and one of two classes is wrong in one of them.
    """
    numbers = identity.place if identity.content is None else identity.content
    first, repeated, contrary = {}, [], []
    for index, number in enumerate(numbers.tolist()):
        before = first.setdefault(number, index)
        if before != index:
            same = samples.labels is None or samples.labels[before] == samples.labels[index]
            (repeated if same else contrary).append((before, index))
    for found, what in ((repeated, ""), (contrary, " with another label")):
        if found:
            before, index = found[0]
            name = "" if identity.place[before] == identity.place[index] else " under another name"
            more = f" ({len(found)} such lines)" if len(found) > 1 else ""
            line = f"line {samples.lines[before]}"
            print(f"warning: {where(samples, index)}: is on {line}{name}{what}, too{more}", file=sys.stderr)


def report_shared(samples, identity, other, what):
    """Says on stderr how many pictures of a list are in another one, too, and the first of them.

    Args:
        identity, other: the Identity of the list and of the other one.
        what: what its pictures are then, such as "training images".
    """
    same = np.isin(identity.place, other.place)
    copies = np.zeros(0, bool)
    if identity.content is not None:
        copies = np.isin(identity.content, other.content) & ~same
        same = same | copies
    if same.any():
        under = f", {copies.sum()} under another name" if copies.any() else ""
        first = where(samples, int(np.flatnonzero(same)[0]))
        print(f"warning: {same.sum()} of {len(same)} images are {what}{under}; the first: {first}", file=sys.stderr)
