"""Splits a folder of images by class: the first classes train, all others are kept for recall on unseen classes.

    python data/split.py                                 data/images/NNN.Name/*.jpg, where download_cub200.sh puts them
    python data/split.py data/CUB_200_2011               the other edition of CUB
    python data/split.py ~/shoes --train_classes=0.8     any collection with one folder a class

It writes <name>_train.txt and <name>_val.txt, a line `<path> <label>` for each image, and <name>_classes.txt, a line
`<label> <folder>` for each class. The name is CUB200 for CUB, else that of the folder: shoes_train.txt. A path is
relative to the list's own folder. A label is the NNN where all folders are named NNN.Name; other class folders are
numbered 1, 2, ... in sorted order.
"""

import argparse
import collections
import contextlib
import math
import os
import re
import shlex
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import files
from runtime import process
from utility import UserError, parse_row, say

EDITIONS = {6033: "CUB-200 (2010)", 11788: "CUB-200-2011"}


def is_image(path):
    """Whether the file starts as a JPEG, PNG, BMP or WebP does (those that reader.py takes), whatever its name."""
    try:
        with files.open_file(path) as file:  # a pipe would be waited for
            head = file.read(16)
    except OSError:
        return False
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return webp or head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"))


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


def encode(text):
    """Text as the lists hold it: in UTF-8, with those bytes of names that are none."""
    return text.encode("utf-8", "surrogateescape")


def visible_folders(folder):
    """Names of the folders in a folder, sorted by their bytes; hidden ones left out."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    return sorted((name for name in names if os.path.isdir(os.path.join(folder, name))), key=os.fsencode)


def images_in(folder, listed, skipped):
    """Names of the images directly in a class folder, sorted by their bytes.

    Args:
        listed: the folder's path as a list has it.
        skipped: dict reason -> list of paths; what is left out is appended.
    """
    found = []
    for name in sorted(os.listdir(folder), key=os.fsencode):
        path = os.path.join(folder, name)
        if name.startswith("."):
            reason = "hidden files (._* are macOS leftovers)"
        elif os.path.isdir(path):
            reason = "folders inside a class folder: only files directly in it are taken"
        elif not fits_a_list(os.path.join(listed, name)):
            reason = "names that a list cannot hold (a line break, white space at an end, a mark of UTF-16)"
        elif not is_image(path):
            reason = "files that are no JPEG, PNG, BMP or WebP, or cannot be read"
        else:
            found.append(name)
            continue
        skipped[reason].append(path)
    return found


def find_images_folder(root):
    """ROOT/images, ROOT/CUB_200_2011/images, or ROOT itself where its folders hold images. Raises: UserError."""
    inside = [os.path.join(root, "images"), os.path.join(root, "CUB_200_2011", "images")]
    found = [folder for folder in inside if os.path.isdir(folder)]
    if len(found) == 2:
        say(f"taking {found[0]}; for {found[1]} name its folder: {os.path.dirname(found[1])}")
    if found:
        return found[0]
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder")
    if any(images_in(os.path.join(root, name), "", collections.defaultdict(list)) for name in visible_folders(root)):
        return root
    raise UserError(
        f"{root}: no images folder: neither {inside[0]} nor {inside[1]} nor class folders with images in {root} itself "
        "(download_cub200.sh fetches CUB-200)"
    )


def find_classes(folder, output_dir, prefix=""):
    """-> list of (label, class folder, image names), sorted; dict of what was skipped. Raises: UserError.

    Args:
        prefix: see `list_prefix`.
    """
    skipped = collections.defaultdict(list)
    names = visible_folders(folder)
    for name in names:
        if not fits_a_list(name):  # by itself, as the list of the classes has it
            raise UserError(f"{os.path.join(folder, name)!r}: a list cannot hold this folder's name: rename it")
    images = {name: images_in(os.path.join(folder, name), os.path.join(prefix, name), skipped) for name in names}
    for name in names:
        path = os.path.join(folder, name)
        if not images[name] and os.path.realpath(path) == os.path.realpath(output_dir):
            del images[name]  # the lists of an earlier run, not a class
        elif not images[name]:
            raise UserError(f"{path}: no images in this class folder: complete it or remove it")
    names = list(images)
    if len(names) < 2:
        raise UserError(f"{folder}: {len(names)} class folders, at least 2 are needed: one to train, one to test on")
    labels = range(1, len(names) + 1)
    if all(re.match(r"[0-9]{3}\.", name) for name in names):
        labels = [int(name[:3]) for name in names]
        for one, other in zip(names, names[1:]):
            if one[:3] == other[:3]:
                raise UserError(f"{folder}: {one!r} and {other!r} have the same number: rename or merge them")
    return list(zip(labels, names, images.values())), skipped


def is_cub(classes):
    """Whether these are CUB's class folders: 200 of them, labelled by their own names."""
    return len(classes) == 200 and all(name.startswith(f"{label:03d}.") for label, name, _ in classes)


def name_of(root, classes):
    """How the lists' names begin where nobody says: CUB200 for CUB, else as the folder is called."""
    if is_cub(classes):
        return "CUB200"
    # What a shell would need quotes for is replaced; the end of a long name makes room for the part and `.txt`.
    name = re.sub(r"[^\w.+-]+", "_", os.path.basename(os.path.abspath(root)))
    return name[:60].strip("._-") or "images"


def count_of(text, classes):
    """How many classes train. `text`: a count, a fraction such as 0.5, or None. Raises: UserError."""
    total = len(classes)
    if text is None:
        return total // 2
    try:
        count = math.floor(float(text) * total + 0.5) if "." in text else int(text)
    except (ValueError, OverflowError):
        raise UserError(f"--train_classes={text}: expected a count of classes or a fraction such as 0.5") from None
    if not 1 <= count < total:
        raise UserError(
            f"--train_classes={text}: {count} of the {total} classes would train: it must be 1 to {total - 1}, so that "
            "some train and some are left to test on"
        )
    return count


def holdout_count(share, count):
    """How many of `count` training classes a share holds out. Raises: UserError where that leaves too few."""
    held = math.floor(share * count + 0.5) if 0 < share < 1 else 0
    if not 1 <= held < count:
        raise UserError(f"--holdout={share:g}: {held} of the {count} training classes: it must be 1 to {count - 1}")
    return held


def list_prefix(folder, output_dir, absolute):
    """What stands before `<class>/<image>` in a list that lies in output_dir."""
    if absolute:
        return os.path.abspath(folder)
    prefix = os.path.relpath(folder, output_dir)
    if prefix.startswith(os.pardir):  # `..` leads elsewhere from a folder that is a link: resolve links first
        prefix = os.path.relpath(os.path.realpath(folder), os.path.realpath(output_dir))
    return "" if prefix == os.curdir else prefix


def write_lists(texts):
    """Writes dict path -> text, all or none; an existing file with another text is kept. Raises: UserError."""
    texts = {path: encode(text) for path, text in texts.items()}
    texts = {path: text for path, text in texts.items() if not files.holds(path, text)}
    with contextlib.ExitStack() as stack:  # at whose end all get their names
        for path, text in texts.items():
            files.check_output(path, os.path.exists, "a list")
            stack.enter_context(files.atomic_write(path, "wb")).write(text)
        for path in texts:
            if os.path.lexists(path):
                files.keep(path)


def split(root, output_dir, name, train_classes, absolute, holdout=None):
    """Writes the lists and the class names, prints what was found.

    Args:
        holdout: share of the training classes, from the last on, that stand in for the test while settings are chosen:
            writes `<name>_fit.txt` without them and `<name>_holdout.txt`; None: neither.
        name: how the lists' names begin; None to have it found (see `name_of`).
        train_classes: see `count_of`.

    Raises: UserError, OSError
    """
    # Paths in a list are relative to its folder, which is output_dir.
    if name is not None and os.path.basename(name) != name:
        raise UserError(f"--name={name}: it must not name a folder: that is --output_dir")
    folder = find_images_folder(root)
    prefix = list_prefix(folder, output_dir, absolute)
    if not fits_a_list(os.path.join(prefix, "x")):
        raise UserError(f"{folder!r}: a list cannot hold this path: {prefix!r}: rename its folders")
    classes, skipped = find_classes(folder, output_dir, prefix)
    count = count_of(train_classes, classes)
    name = name_of(root, classes) if name is None else name
    texts, totals, paths = {}, [], {}
    parts = {"train": classes[:count], "val": classes[count:]}
    if holdout is not None:
        held = holdout_count(holdout, count)
        parts.update(fit=classes[: count - held], holdout=classes[count - held : count])
    for part, members in parts.items():
        rows = [(os.path.join(prefix, sub, image), label) for label, sub, images in members for image in images]
        paths[part] = os.path.join(output_dir, f"{name}_{part}.txt")
        texts[paths[part]] = "".join(f"{path} {label}\n" for path, label in rows)
        labels = f"{members[0][0]}" + (f"-{members[-1][0]}" if len(members) > 1 else "")
        totals.append(f"{part}: {len(rows)} images of {len(members)} classes (labels {labels}) in {paths[part]}")
    names = os.path.join(output_dir, f"{name}_classes.txt")
    texts[names] = "".join(f"{label} {sub}\n" for label, sub, _ in classes)
    write_lists(texts)

    total = sum(len(images) for _, _, images in classes)
    edition = EDITIONS.get(total) if is_cub(classes) else "a collection of your own"
    say(f"found {edition or 'CUB, of no known edition'}: {total} images of {len(classes)} classes in {folder}")
    for reason, left_out in skipped.items():
        say(f"skipped {len(left_out)} {reason}; the first: {left_out[0]!r}")
    for line in (*totals, f"labels and folders: {names}"):
        say(line)
    train, val = (paths["train"], paths["val"]) if holdout is None else (paths["fit"], paths["holdout"])
    say("next: " + shlex.join(["python", "train.py", f"--train_list={train}", f"--val_list={val}"]))
    if edition is None:
        known = ", ".join(f"{edition} {images}" for images, edition in EDITIONS.items())
        print(
            f"warning: these are CUB's 200 classes, but {total} images belong to no edition ({known}): an incomplete "
            "download, or files added or removed?",
            file=sys.stderr,
        )


def bad_usage(message):
    raise UserError(f"{message} (see --help)")


def main():
    here = os.path.relpath(os.path.dirname(os.path.abspath(__file__)))
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = bad_usage
    parser.add_argument(
        "root",
        nargs="?",
        default=here,
        help="the folder with images/<class>/*.jpg or CUB_200_2011/images/<class>/*.jpg in it, or the one that holds "
        "the class folders itself (default: the script's own folder)",
    )
    parser.add_argument("--output_dir", help="where the lists go (default: ROOT)")
    parser.add_argument("--name", help="how the lists' names begin (default: CUB200 for CUB, else the name of ROOT)")
    parser.add_argument(
        "--train_classes",
        help="how many of the first classes train: a count such as 100, or a fraction such as 0.5 (default: half: 100 "
        "for CUB's 200)",
    )
    parser.add_argument(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="also write <name>_fit.txt and <name>_holdout.txt: the training classes without the last SHARE of them, "
        "and these, such as 0.2. Choose settings and epoch by training on the first and validating on the second; then "
        "train on all training classes and look at the test once",
    )
    parser.add_argument("--absolute", action="store_true", help="absolute paths: the lists may then be moved")
    args = parser.parse_args()
    output_dir = args.root if args.output_dir is None else args.output_dir
    try:
        split(args.root, output_dir, args.name, args.train_classes, args.absolute, args.holdout)
    except OSError as error:
        if error.filename is None:  # of the output, not of a folder
            raise
        raise UserError(f"{error.filename}: cannot read: {error.strerror}") from None


if __name__ == "__main__":
    process.run_script(main)
