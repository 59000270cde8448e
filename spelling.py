"""Paths as people's lists have them, against what the disk has: separators, encodings, letters that look alike."""

import os
import re
import unicodedata
import urllib.parse

from utility import plain

# What lists of other systems are written in, where they are not in UTF-8; the most common first.
ENCODINGS = ("gb18030", "shift_jis", "big5", "euc_kr", "cp1252")
MOST_NAMES = 100_000  # of a folder that are compared with one that is not there
TRIES = 1000  # paths of a list that are looked for under other spellings before it is left as it is
# How paths begin that lead nowhere here: a drive of Windows, an address.
FOREIGN = re.compile(r"(?:^|(?<=/))(?:[A-Za-z]:[\\/]|[a-z][a-z0-9+]+:/+)")


# ---------------------------------------------------------------- lists of other systems


def respell(rows, folder):
    """Paths of a list as this system writes them, where the list is from one that writes them otherwise.

    A list with backslashes, or in an encoding other than UTF-8, is read so if the first path of that kind that can be
    found is not there as it is written and there under exactly one other spelling.

    Args:
        rows: list of str, paths as read with surrogateescape; folder: what relative ones count from.

    Returns: the rows, and in words how they were read: "" for as they are.
    """
    how = {}  # whether a row is in UTF-8 -> (encoding or None, whether it has backslashes)
    tries = TRIES
    for row in rows:
        if _is_odd(row) and _is_utf_8(row) not in how and tries and not os.path.lexists(os.path.join(folder, row)):
            tries -= 1
            there = {text: how for text, how in _spellings(row) if os.path.isfile(os.path.join(folder, text))}
            if there:
                how[_is_utf_8(row)] = next(iter(there.values())) if len(there) == 1 else (None, False)
    words = [f"in {encoding}" for encoding, _ in how.values() if encoding]
    words += ["with slashes for backslashes"] * any(backslashes for _, backslashes in how.values())
    if not words:
        return rows, ""
    return [_apply(how.get(_is_utf_8(row)), row, folder) for row in rows], " and ".join(words)


def _is_odd(row):
    return (os.sep == "/" and "\\" in row) or not _is_utf_8(row)


def _is_utf_8(text):
    return not any("\udc80" <= letter <= "\udcff" for letter in text)


def _spellings(row):
    """Yields (row under another spelling, (encoding or None, whether its backslashes became slashes))."""
    for encoding in (None,) if _is_utf_8(row) else ENCODINGS:
        text = _decoded(row, encoding) if encoding else row
        if text is not None and encoding:
            yield text, (encoding, False)
        if text is not None and "\\" in text:
            yield text.replace("\\", "/"), (encoding, True)


def _apply(how, row, folder):
    """A row spelled as `how`, of `respell`, says, or as it is where that is there or it can't be."""
    if not how or not _is_odd(row) or os.path.lexists(os.path.join(folder, row)):
        return row
    encoding, backslashes = how
    text = (_decoded(row, encoding) if encoding else row) or row
    return text.replace("\\", "/") if backslashes else text


def _decoded(text, encoding):
    try:
        return text.encode("utf-8", "surrogateescape").decode(encoding)
    except (UnicodeError, LookupError):
        return None


# ---------------------------------------------------------------- what is not there


def what_differs(path, near=os.curdir):
    """What is on the disk in place of a path that is not there, and how that differs; "" where nothing alike is found.

    Looks at the folders along the path, and for the path's last parts in the folders above, in the folder `near`, and
    in the working folder.
    """
    for text, why in _variants(path):
        found, differences = _follow(text)
        if found:
            return f"{plain(found, 1000)} is there: {', '.join(dict.fromkeys(why + differences))}"
    for text, _ in _variants(path):
        found = _elsewhere(text, near)
        if found:
            folder, rest = found
            there = f"{plain(rest, 1000)} is there in {plain(folder, 1000)}"
            foreign = FOREIGN.search(path)
            if foreign:
                return f"{there}: paths in the list that begin with {foreign[0]} lead nowhere here"
            if os.path.isabs(path) and not path.startswith(os.path.join(near, "")):
                return f"{there}: paths in the list that begin with /, or --data_dir, lead nowhere here"
            return f"{there}: do the list's paths count from it (--data_dir)?"
    return ""


def _variants(path):
    """Yields (path, differences): itself, and with what other programs put around and between its parts taken out."""
    yield path, []
    bare = path
    for why, pattern, better in (
        ("the list has backslashes", r"\\", "/"),
        ("the list has quotes around paths", r"[\"']", ""),
        ("the list has a comma", r",(?=\S*$)", ""),
        ("the list has file:// in front", r"^(.*/)?file:/+", "/"),
    ):
        other = re.sub(pattern, better, bare)
        if other != bare:
            bare = other
            yield other, [why]
    if "~" in path:
        yield os.path.expanduser(path[path.index("~") :]), ["a list has no ~ for the home folder"]
    if "%" in path:
        yield urllib.parse.unquote(path), ["the list has the escapes of a URL"]
    label = re.fullmatch(r"(.+?)\s+[+-]?\d+", path)
    if label:
        yield label[1], ["the list has more than a path and a label on the line"]


def _follow(path):
    """The file that a path leads to if names that look alike count as one, and the differences; (None, []) for none."""
    here, differences = "/" if path.startswith("/") else "", []
    parts = [part for part in path.split("/") if part]
    for number, name in enumerate(parts, 1):
        if not os.path.lexists(os.path.join(here, name)):
            name, why = _alike(here, name, last=number == len(parts))
            if name is None:
                return None, []
            differences.append(why)
        here = os.path.join(here, name)
    return (here, differences) if os.path.isfile(here) else (None, [])


def _alike(folder, name, last):
    """A name in `folder` that looks like `name`, and how it differs; (None, "") where there is not exactly one."""
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry, _ in zip(entries, range(MOST_NAMES))]
    except (OSError, ValueError):
        return None, ""
    fits = os.path.isfile if last else os.path.isdir
    for same, why in ((_skeleton, None), *((_stem, "another suffix"),) * last):
        wanted = same(name)
        found = [entry for entry in names if same(entry) == wanted and fits(os.path.join(folder, entry))]
        if len(found) == 1:
            return found[0], why or _difference(name, found[0])
    for encoding in ENCODINGS:
        found = [entry for entry in names if _decoded(entry, encoding) == name]
        found += [entry for entry in names if _decoded(name, encoding) == entry]
        if len(found) == 1 and not (_is_utf_8(name) and _is_utf_8(found[0])):
            where = "the list" if _is_utf_8(found[0]) else "the disk"
            return found[0], f"{where} has it in {encoding}, not in UTF-8"
    return None, ""


def _skeleton(name):
    """What is left of a name when case, accents, forms of a letter, white space and what is not seen are taken away."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", name).casefold())
    return "".join(letter for letter in text if unicodedata.category(letter)[0] not in "CZM" or not _is_utf_8(letter))


def _stem(name):
    return _skeleton(re.sub(r"\.\w{1,5}$", "", name))


def _difference(name, entry):
    """In words, how two names differ that look alike."""
    if name.casefold() == entry.casefold():
        return "upper and lower case differ"
    if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", entry):
        forms = [form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, name)]
        return f"the same letters in another Unicode form (the list has {forms[0] if forms else 'a mixed one'})"
    sides = []
    for where, one, other in (("the list", name, entry), ("the disk", entry, name)):
        letters = [f"U+{ord(letter):04X}" for letter in dict.fromkeys(one) if letter not in other]
        sides += [f"{where} has {' '.join(letters[:3])}"] * bool(letters)
    return ", ".join(sides) or "white space differs"


def _elsewhere(path, near):
    """(folder, rest): a file that ends as `path` does, in a folder above it, `near` or here; None for none."""
    foreign = list(FOREIGN.finditer(path))
    path = path[foreign[-1].end() :] if foreign else path
    parts = [part for part in path.split("/") if part not in ("", ".")]
    above = os.path.dirname(path)
    folders = []
    while above not in ("", "/") and len(folders) < 64:
        folders.append(above)
        above = os.path.dirname(above)
    folders = [folder for folder in folders if os.path.isdir(folder)][:3]
    for start in range(max(0, len(parts) - 16), len(parts)):
        rest = os.path.join(*parts[start:])
        for folder in (*folders, near, os.curdir):
            there = os.path.join(folder, rest)
            if os.path.isfile(there):
                return folder, rest
    return None
