"""What the scripts of published data sets share: their flags, archives, counts, missing pictures, and lists.

Such a script describes its data set in a DataSet and has a function that looks for it in a folder and says what it
found; `run` does the rest. --crop_boxes is boxes.py's.
"""

import collections
import contextlib
import dataclasses
import os
import re
import shlex
import sys
from typing import Callable, Optional

import download
import files
import listing
import pictures
import split
import unpack
import utility
from utility import UserError, number_of, plain, say

# Of a file with a line for each picture; those of our data sets have less than 8 MB.
MOST_TEXT, MOST_ROWS, MOST_FIELDS = 1 << 26, 1_000_000, 20
MOST_ARCHIVE = 1 << 32  # bytes of an archive that are read for its sum, where its size is not known
SHOWN = 3  # names of many that a message has
# What tells the data sets, for those who name the folder of another one.
SCRIPTS = {
    "Ebay_train.txt": "data/sop.py", "list_eval_partition.txt": "data/inshop.py", "cars_annos.mat": "data/cars196.py",
    "cars_train": "data/cars196.py", "anno_train.csv": "data/cars196.py", "CUB_200_2011": "data/cub200.py",
    "image_class_labels.txt": "data/cub200.py", "annotations-mat": "data/cub200.py",
}  # fmt: skip
PACKED = (".zip", ".tgz", ".tar", ".gz")

# listed: {list: [(path, label)]}, paths relative to the data set's folder, with / in them. names: {label: text}.
# what: the layout or edition, in words. folders: those below it that all pictures are in.
# boxes: function that gives {path: (left, top, right, bottom)}, in pixels from the picture's upper left corner; None
# where the data set has none. size: (width, height) that a picture must have for its box to fit, None: any.
Found = collections.namedtuple("Found", "what folders listed names boxes size", defaults=[None, None])


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file that a data set comes in: the folder that it becomes, size and digest of the published one, if known."""

    top: str
    digest: str = ""
    size: Optional[int] = None
    spare_for: str = ""  # the folder beside which it is not needed


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A published data set. `find(folder)` -> Found, or None where the folder holds something else."""

    name: str
    prefix: str  # of the lists' names
    counts: dict  # {list: (pictures, classes)}
    archives: dict  # {name: Archive}
    expected: str  # what a folder has to hold, and where that is to be had, for messages
    find: Callable
    subfolders: tuple = ()  # where archives may lie, too


# ---------------------------------------------------------------- flags


def add_arguments(parser, boxes):
    """The flags that all data sets have, and with `boxes` those of the crops."""
    parser.add_argument("--output_dir", help="where the lists go, and the crops (default: the data set's folder)")
    parser.add_argument(
        "--any_counts",
        action="store_true",
        help="take a part of the data set, as for a trial: list the pictures that are there, whatever their number",
    )
    if boxes:
        parser.add_argument(
            "--crop_boxes",
            action="store_true",
            help="cut each picture to its box, into a folder of its own, and list the crops",
        )
        parser.add_argument(
            "--box_margin",
            type=utility.number(float, low=0, high=10),
            help="let a box first grow on each side by this share of its width or height (default: 0)",
        )
        parser.add_argument(
            "--box_padding",
            choices=("none", "context", "mean"),
            help="none: a crop has the shape of its box; context: a square, with what is around the box; mean: a "
            "square, with ImageNet's mean colour around the box (default: none)",
        )


def crop_of(flags):
    """The boxes.Crop that {flag: value} asks for, or None. Raises: UserError."""
    if not flags.get("crop_boxes"):
        for flag in ("box_margin", "box_padding"):
            if flags.get(flag) is not None:
                raise UserError(f"--{flag} is of --crop_boxes, which is not given")
        return None
    import boxes  # which needs packages that nothing else here needs

    return boxes.Crop(flags["box_margin"] or 0.0, flags["box_padding"] or "none")


def run(description, data_set, boxes=True):
    """The whole of a script: flags, archives, lists. Raises: UserError, OSError."""
    parser = utility.make_parser(description)
    parser.usage = "%(prog)s PATH [--flag=value ...]"
    parser.add_argument("path", metavar="PATH", help="the folder that holds the data set, or its archive")
    add_arguments(parser, boxes)
    args = vars(parser.parse_args())
    crop = crop_of(args)
    folder, found = locate(args["path"], data_set)
    write(folder, found, data_set, args["output_dir"], args["any_counts"], crop)


# ---------------------------------------------------------------- archives and folders


def unpacked(path, archives, subfolders=()):
    """Unpacks what is still packed; -> the folders in which to look for the data set, the likeliest first.

    Args:
        path: a folder, in which archives of known names are unpacked, or an archive of any name.
        archives: {name: Archive}; subfolders: where these may lie, too.

    Raises: UserError, OSError
    """
    if os.path.isdir(path):
        home, own, places = path, [], [path, *folders_in(path)]
    elif os.path.isfile(path):
        home = os.path.dirname(path) or os.curdir
        own = [] if os.path.basename(path) in archives else [unpack_beside(path)]
        places = [*own, home]
    else:
        raise UserError(f"{path}: no such file or folder")
    for place in [os.path.join(place, name) for place in places for name in ("", *subfolders)]:
        for name, archive in archives.items():
            spare = archive.spare_for and os.path.isdir(os.path.join(place, archive.spare_for))
            if os.path.isfile(os.path.join(place, name)) and not spare:
                unpack_beside(os.path.join(place, name), archive)
    return list(dict.fromkeys([*own, home, *folders_in(home)]))


def folders_in(folder):
    """The paths of the folders in a folder, hidden ones aside, sorted."""
    with os.scandir(folder) as entries:
        return sorted(one.path for one in entries if one.is_dir() and not one.name.startswith("."))


def unpack_beside(path, archive=None):
    """Unpacks an archive beside itself, unless that was done; says whether it is the published one. -> the folder

    The folder is called as the one that all of the archive is in, else as the archive.
    """
    name = os.path.basename(path)
    top = archive.top if archive and (archive.digest or is_there(path, archive)) else unpack.top_of(path)
    folder = os.path.join(
        os.path.dirname(path), archive.top if archive else top or name.partition(".")[0] or "unpacked"
    )
    if os.path.exists(folder):
        say(f"{folder} is here already: {name} is not unpacked again")
        return folder
    if archive and archive.digest:
        check_digest(path, archive)
    unpack.unpack(path, folder, top)
    return folder


def is_there(path, archive):
    """Whether an archive was unpacked before."""
    return os.path.exists(os.path.join(os.path.dirname(path), archive.top))


def check_digest(path, archive):
    """Says whether a file is the published one. Another one is a warning: it may be the same, packed anew."""
    if archive.size is None and os.path.getsize(path) > MOST_ARCHIVE:
        found = f"it has {os.path.getsize(path)} bytes"
    else:
        found = download.wrong_with(path, download.Wanted(path, path, archive.size, archive.digest, ""))
    if found:
        why = f"{plain(path, 1000)} is not the published file: {found}; what is in it is counted below"
        print(f"warning: {why}", file=sys.stderr)
    else:
        say(f"{path}: {archive.digest.partition(':')[0]} as published")


def locate(path, data_set):
    """-> the folder of a data set, and what its function has Found there. Raises: UserError where it is not there."""
    for folder in unpacked(path, data_set.archives, data_set.subfolders):
        found = data_set.find(folder)
        if found:
            return folder, found
    raise UserError(
        f"{path}: no {data_set.name} in it or in a folder of it{instead_of(path, data_set)}; {data_set.expected}"
    )


def instead_of(path, data_set):
    """What is there instead of a data set, for a message."""
    own = f"data/{data_set.prefix.lower()}.py"
    home = path if os.path.isdir(path) else os.path.dirname(path) or os.curdir
    names = sorted(os.listdir(home))
    for folder in (home, *(os.path.join(home, name) for name in names)):
        for name, script in SCRIPTS.items():
            if script != own and os.path.exists(os.path.join(folder, name)):
                return f", but {name}, which {script} reads"
    packed = [name for name in names if name.endswith(PACKED)]
    return f"; of archives there are {', '.join(packed[:SHOWN])}: name one" if packed and path == home else ""


def first_of(folder, *names):
    """The first of some paths below a folder that is there, or None."""
    return next((name for name in names if os.path.exists(os.path.join(folder, name))), None)


def read_rows(path, separator=None):
    """[(number, fields)] of the lines of a text file that are not blank. Raises: UserError where it can't be read.

    Args:
        separator: what parts fields; None: white space.
    """
    try:
        with files.open_file(path, MOST_TEXT) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from None
    if content.count(b"\n") > MOST_ROWS:
        raise UserError(f"{path}: more than {MOST_ROWS} lines: not a file of this data set")
    lines = content.decode("utf-8-sig", "surrogateescape").split("\n")
    return [(n, line.strip().split(separator, MOST_FIELDS)) for n, line in enumerate(lines, 1) if line.strip()]


def whole(text):
    """The number that a label or a count is. Raises: ValueError."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(text)
    return int(text)


@contextlib.contextmanager
def reading_row(path, number):
    """A UserError with file and line where the block can't make sense of a row."""
    try:
        yield
    except (ValueError, LookupError, AttributeError):  # the last of a pattern that does not match
        raise UserError(f"{path}:{number}: not a row of this file as it was published") from None


# ---------------------------------------------------------------- what is there, against what is listed


def find_pictures(folder, names, left_out):
    """The paths of the pictures below these folders of a folder, relative to it, with / in them."""
    there = set()
    for name in names:
        for inside, images in pictures.find(os.path.join(folder, name), left_out):
            prefix = os.path.relpath(inside, folder).replace(os.sep, "/")
            there.update(f"{prefix}/{image}" for image in images)
    return there


def check_pictures(folder, found, any_counts):
    """{list: [(path, label)]} of the pictures that are there. Raises: UserError where some are not.

    With any_counts those are left out, which is said.
    """
    left_out = pictures.LeftOut(split.OWN_LISTS)
    there = find_pictures(folder, found.folders, left_out)
    listed = [path for rows in found.listed.values() for path, _ in rows]
    twice = [path for path, count in collections.Counter(listed).items() if count > 1]
    if twice:
        raise UserError(f"{folder}: {len(twice)} pictures are listed more than once (first: {shown(twice)})")
    left_out.report()
    missing = [path for path in listed if path not in there]
    if missing:
        what = f"{len(missing)} of {len(listed)} pictures are missing or none in {folder} (first: {shown(missing)})"
        if not any_counts or len(missing) == len(listed):
            raise UserError(f"{what}: an incomplete copy; unpack it again, or list those that are there: --any_counts")
        print(f"warning: {plain(what, 2000)}: they are left out (--any_counts)", file=sys.stderr)
    others = sorted(there.difference(listed))
    if others:
        say(f"note: {number_of(len(others), 'picture')} in no list of the data set (first: {shown(others)})")
    lists = {part: [row for row in rows if row[0] in there] for part, rows in found.listed.items()}
    empty = [part for part, rows in lists.items() if not rows]
    if empty:
        raise UserError(f"{folder}: no pictures for the list {empty[0]!r}")
    return lists


def shown(names):
    """The first of many names, for a message."""
    return ", ".join(names[:SHOWN])


def check_counts(folder, data_set, listed, any_counts):
    """Raises a UserError where lists have other counts than the published ones; with any_counts a warning."""
    wrong = []
    for part, rows in listed.items():
        counts = (len(rows), len({label for _, label in rows}))
        if counts != data_set.counts[part]:
            wrong.append(
                "{}: {} images of {} classes instead of {} of {}".format(part, *counts, *data_set.counts[part])
            )
    if not wrong:
        return
    what = f"{folder} is not the {data_set.name} that was published: {'; '.join(wrong)}"
    if not any_counts:
        raise UserError(f"{what}: complete it, or list what is there: --any_counts")
    print(f"warning: {plain(what, 2000)}: no figure on it is one of {data_set.name} (--any_counts)", file=sys.stderr)


# ---------------------------------------------------------------- lists


def as_classes(rows, names, prefix):
    """A list of listing.Class, sorted by label, of rows (path, label). Raises: UserError for what a list can't hold."""
    members = collections.defaultdict(list)
    for path, label in rows:
        if not listing.as_listed(os.path.join(prefix, path)):
            raise UserError(f"{os.path.join(prefix, path)!r}: a list cannot hold this path: rename it")
        members[label].append(path)
    return [listing.Class(label, names[label], prefix, sorted(members[label])) for label in sorted(members)]


def write(folder, found, data_set, output_dir, any_counts, crop):
    """Writes the lists and class names of a data set, and its crops, and says what was found and what to type next.

    Args:
        folder, found: see `locate`; output_dir: None for the folder; crop: boxes.Crop or None.

    Raises: UserError, OSError
    """
    listed = check_pictures(folder, found, any_counts)
    check_counts(folder, data_set, listed, any_counts)
    output_dir = output_dir or folder
    files.make_directory(output_dir)
    total = sum(map(len, listed.values()))
    classes = len({label for rows in listed.values() for _, label in rows})
    say(f"found {data_set.name}, {found.what}: {total} images of {classes} classes in {folder}")
    home, prefix = folder, data_set.prefix
    if crop:
        import boxes

        home, listed = boxes.cut_all(crop, folder, found, listed, output_dir)
        prefix = f"{prefix}_{os.path.basename(home)}"
    lists = {
        part: as_classes(rows, found.names, listing.list_prefix(home, output_dir, False))
        for part, rows in listed.items()
    }
    paths = split.list_paths(output_dir, prefix, (*lists, "classes"))
    texts = {paths[part]: listing.list_text(members) for part, members in lists.items()}
    used = {one.label: one.name for members in lists.values() for one in members}
    texts[paths["classes"]] = "".join(f"{label} {class_name(used[label])}\n" for label in sorted(used))
    listing.write_lists(texts)
    for part, members in lists.items():
        say(f"{part}: {split.summary(members)} in {paths[part]}")
    say(f"labels and names: {paths['classes']}")
    report_next(lists, paths, prefix, bool(crop))


def class_name(name):
    """The name of a class as a line can hold it. Raises: UserError."""
    listed = listing.folder_as_listed(name)
    if not listed:
        raise UserError(f"{name!r}: no name of a class that a list can hold")
    return listed


def report_next(lists, paths, prefix, cropped):
    """Says what trains best alone or not at all, and the commands to type next. Lists: train, and val or query."""
    single = sum(len(one.images) == 1 for one in lists["train"])
    if single:
        say(f"note: train: {number_of(single, 'class', 'classes')} of one image, with nothing to be drawn to")
    val = "val" if "val" in lists else "query"
    command = split.next_command(
        {"train": lists["train"], "val": lists[val]}, {"train": paths["train"], "val": paths[val]}, prefix, cropped
    )
    if not command:
        return
    say("next: " + shlex.join(command))
    if "gallery" in lists:
        script = os.path.join(os.path.dirname(command[1]), "eval.py")
        flags = [f"--val_list={paths['query']}", f"--gallery_list={paths['gallery']}"]
        newest = "latest" if "--eval_every=0" in command else "best"
        say("then: " + shlex.join(["python", script, *flags, f"--pretrained_model=output_{prefix}/ResNet50/{newest}"]))
        say("note: train.py looks for queries among the queries; the figures of the data set are those in its gallery")
