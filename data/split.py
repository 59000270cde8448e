"""Lists the images of a folder by class: some classes train, the others are kept for recall on unseen classes.

    python data/split.py                                 data/images/NNN.Name/*.jpg, where download_cub200.sh puts them
    python data/split.py data/CUB_200_2011               the other edition of CUB
    python data/split.py ~/shoes --train_classes=0.8     any collection with one folder a class, at any depth
    python data/split.py ~/shoes                         where shoes/ has train/ and test/: a list of each
    python data/split.py ~/shoes/test --train_classes=all       everything in one list
    python data/split.py ~/shoes/df.csv                  a table of Open Metric Learning: oml.py says what is in it

It writes <name>_train.txt and <name>_val.txt, a line `<path> <label>` for each image, and <name>_classes.txt, a line
`<label> <folder>` for each class. The name is CUB200 for CUB, else that of the folder: shoes_train.txt. A path is
relative to the list's own folder. A label is the NNN where all folders are named NNN.Name; other class folders, which
are those that hold images, are numbered 1, 2, ... in sorted order.
"""

import math
import os
import re
import shlex
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import files
import oml
import pictures
from division import ALL, Division
from listing import Class, as_listed, folder_as_listed, list_prefix, list_text, write_lists
from runtime import process
from utility import UserError, make_parser, number, number_of, parse_typed, plain, say

# Lists of an earlier run, which may lie among the pictures.
OWN_LISTS = re.compile(r".+_(train|val|test|fit|holdout|query|gallery|classes)\.txt(\.kept\d+)?")
EDITIONS = {6033: "CUB-200 (2010)", 11788: "CUB-200-2011"}
# train.py's flags in the command to type next: those of recipes/cub200_best.sh, which raise recall on unseen classes
# most of all that was tried (docs/results.md).
BATCH = 60
FINE_TUNING = (
    "--model=ResNet50 --pretrained_model=imagenet --loss_name=proxyanchorloss --embedding_norm=layer --pooling=max "
    "--freeze_bn=True --freeze_stages=2 --optimizer=adamw --lr=1e-4 --weight_decay=4e-4 --lr_strategy=cosine_decay "
    f"--warmup_epochs=1 --warmup_head_epochs=1 --train_batch_size={BATCH} --min_area=0.35 --random_erasing=0.5"
)


# ---------------------------------------------------------------- what is found


def find_images_folder(root):
    """ROOT/images, ROOT/CUB_200_2011/images, or ROOT itself. Raises: UserError."""
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder or table")
    inside = [os.path.join(root, "images"), os.path.join(root, "CUB_200_2011", "images")]
    found = [folder for folder in inside if os.path.isdir(folder)]
    if len(found) == 2:
        say(f"taking {found[0]}; for {found[1]} name its folder: {os.path.dirname(found[1])}")
    return found[0] if found else root


def _is_cut_out(path, images):
    """Whether a folder of these images is the <name>_crops of an earlier run, beside <name>_train.txt."""
    path = os.path.realpath(path)
    name = path.removesuffix("_crops")
    return name != path and os.path.isfile(f"{name}_train.txt") and all(map(oml.OWN_CROP.fullmatch, images))


def part_folders(folder):
    """{"train": its folder, "val": another, and "test" where there are three} if a collection is split already, or {}.

    Raises: UserError where the folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder), key=os.fsencode)
    except OSError as error:
        raise UserError(f"{folder}: cannot read: {error.strerror}") from None
    found = {}
    for name in names:
        path = os.path.join(folder, name)
        if pictures.PARTS.get(name.lower()) and os.path.isdir(path):
            found.setdefault(pictures.PARTS[name.lower()], []).append(path)
    found = {part: paths[0] for part, paths in found.items() if len(paths) == 1}
    if "val" not in found and "test" in found:
        found["val"] = found.pop("test")
    if not {"train", "val"} <= set(found):
        return {}
    return {part: found[part] for part in ("train", "val", "test") if part in found}


def find_classes(folder, output_dir, left_out):
    """The images in the folders below a folder, {path relative to it: names}; those in itself under "".

    Args:
        left_out: pictures.LeftOut.

    Raises: UserError where a folder among class folders has none, unless it is output_dir.
    """
    found = {os.path.relpath(path, folder): names for path, names in pictures.find(folder, left_out)}
    found[""] = found.pop(os.curdir, [])
    classes = {name: names for name, names in found.items() if names}
    beside = {os.path.dirname(name) for name in classes if name} - {name for name in classes if name}
    for name in sorted(set(found) - set(classes) - {os.path.dirname(name) for name in found}):
        path = os.path.join(folder, name)
        if os.path.realpath(path) == os.path.realpath(output_dir):
            continue  # the lists of an earlier run, not a class
        if os.path.dirname(name) in beside:
            raise UserError(f"{path}: no images in this class folder: complete it or remove it")
        left_out.add("without images", path, folder=True)
    for name in [name for name in classes if _is_cut_out(os.path.join(folder, name), classes[name])]:
        left_out.add("crops of an earlier run", os.path.join(folder, name), count=len(classes.pop(name)))
    return classes


def check_level(folder, classes, left_out):
    """Says what was found where `folder` is not the one that the class folders are in. Raises: UserError.

    Args:
        classes: see `find_classes`.
    """
    below = [name for name in classes if name]
    if not below and classes:
        raise UserError(in_itself(folder, classes))
    if not below:
        what = f" ({left_out})" if left_out.found else ""
        raise UserError(f"{folder}: no images in it or below it{what}; download_cub200.sh fetches CUB-200")
    top = os.path.commonpath([os.path.dirname(name) for name in below])
    whole = os.path.join(folder, top) if top else folder
    if top and part_folders(whole):
        names = " and ".join(f"{os.path.basename(path)}/" for path in part_folders(whole).values())
        raise UserError(f"{whole} holds {names}: name it")
    steps = top.split(os.sep)
    for depth, step in enumerate(steps, 1):
        if step.lower() in pictures.PARTS:
            raise UserError(f"{os.path.join(folder, *steps[:depth])}/ holds class folders: name it ({ALL})")
    children = [name[len(top) :].lstrip(os.sep).split(os.sep) for name in below]
    if all(child[0].lower() in pictures.PARTS for child in children):
        holders = sorted({child[0] for child in children if len(child) > 1})
        if not holders:
            raise UserError(in_itself(os.path.join(folder, below[0]), {"": classes[below[0]]}))
        verb = "holds class folders: name it" if len(holders) == 1 else "hold class folders: name one of them"
        raise UserError(f"{', '.join(os.path.join(whole, name) + '/' for name in holders)} {verb} ({ALL})")


def in_itself(folder, classes):
    """What is to be said of pictures that lie in no class folder."""
    count = len(classes[""])
    lie = "picture lies" if count == 1 else "pictures lie"
    return f"{count} {lie} in {folder} itself: each class needs a folder of its own"


def find_parts(folder, parts, output_dir, left_out):
    """{part: its classes as of `find_classes`}, of each of `part_folders`; {"": all} where there are no parts.

    Raises: UserError where the class folders lie elsewhere.
    """
    found = {part: find_classes(path, output_dir, left_out) for part, path in (parts or {"": folder}).items()}
    holders = [f"{path}/" for part, path in parts.items() if any(found[part])]
    for part, classes in found.items():
        path = parts.get(part, folder)
        if parts and holders and path + "/" not in holders:
            what = in_itself(path, classes) if classes else f"{path}: no images in it"
            raise UserError(f"{what}; {holders[0]} holds class folders: name it ({ALL})")
        check_level(path, classes, left_out)
        if own := classes.pop("", None):
            what = f"in {path} itself, in no class folder"
            left_out.add(what, os.path.join(path, own[0]), count=len(own))
    for name in sorted(os.listdir(folder), key=os.fsencode) if parts else ():
        path = os.path.join(folder, name)
        others = os.path.isdir(path) and path not in parts.values() and not name.startswith(".")
        if others and os.path.realpath(path) != os.path.realpath(output_dir):
            left_out.add(f"beside {' and '.join(map(os.path.basename, parts.values()))}", path, folder=True)
    return found


def as_classes(folder, found, label, prefix, left_out):
    """-> list of Class, sorted by their labels. Raises: UserError where a list can't hold the name of a folder.

    Args:
        found: see `find_classes`; label: {class: its label}; prefix: see `list_prefix`.
    """
    if not as_listed(os.path.join(prefix, "x")):
        raise UserError(f"{folder!r}: a list cannot hold this path: {prefix!r}: rename its folders")
    classes = []
    for name in sorted(found, key=os.fsencode):
        inside = os.path.join(prefix, name)
        if not as_listed(os.path.join(inside, "x")) or not folder_as_listed(name):
            raise UserError(f"{os.path.join(folder, name)!r}: a list cannot hold this folder's name: rename it")
        images = [image for image in found[name] if as_listed(os.path.join(inside, image))]
        for image in sorted(set(found[name]) - set(images)):
            left_out.add("with names that a list cannot hold", os.path.join(folder, name, image))
        if not images:
            raise UserError(f"{os.path.join(folder, name)!r}: a list cannot hold the name of any image in it")
        classes.append(Class(label[name], name, inside, images))
    return classes


def is_cub(classes):
    """Whether these are CUB's class folders: 200 of them, labelled by their own names."""
    return len(classes) == 200 and all(one.name.startswith(f"{one.label:03d}.") for one in classes)


def name_of(root, classes):
    """How the lists' names begin where nobody says: CUB200 for CUB, else as the folder is called."""
    if is_cub(classes):
        return "CUB200"
    # What a shell would need quotes for is replaced; the end of a long name makes room for the part and `.txt`.
    name = re.sub(r"[^\w.+-]+", "_", os.path.basename(os.path.abspath(root)))
    return name[:60].strip("._-") or "images"


# ---------------------------------------------------------------- the whole


def split(root, output_dir, name, division, absolute=False, table=None):
    """Writes the lists and the class names, prints what was found.

    Args:
        name: how the lists' names begin; None to have it found (see `name_of`).
        division: Division.
        table: also write the split as a CSV of this name (see oml.py), or None.

    Raises: UserError, OSError
    """
    check_name(name)
    folder, left_out = find_images_folder(root), pictures.LeftOut(expected=OWN_LISTS)
    parts = part_folders(folder)
    division.check(parts)
    found = find_parts(folder, parts, output_dir, left_out)
    label = pictures.label_classes(folder, set().union(*found.values()))
    lists = {}
    for part, classes in found.items():
        path = parts.get(part, folder)
        # Paths in a list are relative to its folder, which is output_dir.
        lists[part] = as_classes(path, classes, label, list_prefix(path, output_dir, absolute), left_out)
    classes = [one for members in lists.values() for one in members]
    lists = division.hold_out(lists) if parts else division.divide(classes)
    name = name_of(root, classes) if name is None else name
    paths = list_paths(output_dir, name, (*lists, "classes"))
    texts = {paths[part]: list_text(members) for part, members in lists.items()}
    texts[paths["classes"]] = "".join(f"{label[one]} {folder_as_listed(one)}\n" for one in sorted(label, key=label.get))
    write_lists(with_table(texts, lists, output_dir, table))

    report(folder, parts, classes, len(label))
    left_out.report()
    say_lists(folder, lists, paths, name, table)


def split_table(path, output_dir, name, division, absolute=False, table=None):
    """Writes the lists that a CSV of Open Metric Learning (see oml.py) describes, and cuts out its boxes.

    Arguments and errors as of `split`; the CSV says itself what trains.
    """
    check_name(name)
    if division.train_classes is not None or division.within_classes is not None:
        raise UserError(f"{path} says itself what trains: no --train_classes or --within_classes beside it")
    if table is not None and os.path.realpath(table) == os.path.realpath(path):
        raise UserError(f"--csv={table}: that is what is read: give another name")
    rows, folder = oml.read(path), os.path.dirname(path) or os.curdir
    name = name_of(os.path.splitext(path)[0], []) if name is None else name
    prefix, cut_out = list_prefix(folder, output_dir, absolute), os.path.join(output_dir, f"{name}_crops")
    listed = {row.line: as_listed(os.path.join(prefix, row.path)) for row in rows}
    if not all(listed.values()):
        raise UserError(f"{folder!r}: a list cannot hold this path: {prefix!r}: rename its folders")
    prefix, boxed = list_prefix(cut_out, output_dir, absolute), [row for row in rows if row.box]
    listed.update((row.line, os.path.join(prefix, oml.crop_name(row))) for row in boxed)

    validation = [row for row in rows if row.query or row.gallery]
    parts = {"train": [row for row in rows if not (row.query or row.gallery)], "val": validation}
    if not all(row.query and row.gallery for row in validation):
        parts["query"] = [row for row in validation if row.query]
        parts["gallery"] = [row for row in validation if row.gallery]
    lists = division.hold_out({part: by_label(members, listed) for part, members in parts.items()})
    paths = list_paths(output_dir, name, lists)
    texts = {paths[part]: list_text(members) for part, members in lists.items()}
    texts = with_table(texts, lists, output_dir, table)
    if boxed:
        for output in texts:  # before the work
            files.check_output(output, os.path.exists, "a list")
        oml.crop(path, boxed, cut_out)
    write_lists(texts)

    say(f"found {number_of(len(rows), 'image')} of {len({row.label for row in rows})} classes in {path}")
    if boxed:
        say(f"boxes: {number_of(len(boxed), 'image')} cut out in {cut_out}")
    say_lists("", lists, paths, name, table, bool(boxed))


def check_name(name):
    """Raises a UserError where --name is no name of a file."""
    if name is not None and os.path.basename(name) != name:
        raise UserError(f"--name={name}: it must not name a folder: that is --output_dir")


def list_paths(output_dir, name, parts):
    """{part: the path of its list}."""
    return {part: os.path.join(output_dir, f"{name}_{part}.txt") for part in parts}


def by_label(rows, listed):
    """list of Class, of oml.Rows. `listed`: {line: path in a list}."""
    found = {}
    for row in rows:
        found.setdefault(row.label, []).append(listed[row.line])
    return [Class(label, f"label {label}", "", images) for label, images in sorted(found.items())]


def with_table(texts, lists, output_dir, table):
    """{path: text} with the CSV of the lists, where one is wanted. Raises: UserError where it would replace another."""
    if table is None:
        return texts
    if os.path.realpath(table) in map(os.path.realpath, texts):
        raise UserError(f"--csv={table}: one of the lists has this name: give another")
    prefix = list_prefix(output_dir, os.path.dirname(table) or os.curdir, False)
    rows = {
        part: [(os.path.join(prefix, one.folder, image), one.label) for one in members for image in one.images]
        for part, members in lists.items()
    }
    return {**texts, table: oml.text_of(rows)}


def say_lists(folder, lists, paths, name, table, cropped=False):
    """Says what was written, what looks like a mistake, and what to type next."""
    for part, members in lists.items():
        say(f"{part}: {summary(members)} in {paths[part]}")
    if "classes" in paths:
        say(f"labels and folders: {paths['classes']}")
    if table is not None:
        left = " (test is left out: such a table has none)" if "test" in lists else ""
        say(f"as a table of Open Metric Learning: {table}{left}")
    warn(folder, lists)
    for part in sorted({"fit", "holdout", "val", "test", "query", "gallery"} - set(lists)):
        path = os.path.join(os.path.dirname(next(iter(paths.values()))), f"{name}_{part}.txt")
        if os.path.exists(path):
            print(f"warning: {path}: of an earlier split, not of this one", file=sys.stderr)
    command = next_command(lists, paths, name, cropped)
    if command:
        say("next: " + shlex.join(command))


def report(folder, parts, classes, count):
    """Says what was found: CUB, or a collection of one's own.

    Args:
        classes: list of Class, of all parts; count: of different ones.
    """
    total = sum(len(one.images) for one in classes)
    edition = EDITIONS.get(total) if is_cub(classes) else "a collection of your own"
    where = " and ".join(parts.values()) or folder
    say(f"found {edition or 'CUB, of no known edition'}: {total} images of {count} classes in {where}")
    if edition is None:
        known = ", ".join(f"{edition} {images}" for images, edition in EDITIONS.items())
        print(
            f"warning: these are CUB's 200 classes, but {total} images belong to no edition ({known}): an incomplete "
            "download, or files added or removed?",
            file=sys.stderr,
        )


def summary(classes):
    """How many images and classes a list has."""
    first, last = classes[0].label, classes[-1].label
    labels = f"{first}-{last}" if last > first else f"{first}"
    images, count = sum(len(one.images) for one in classes), number_of(len(classes), "class", "classes")
    return f"{number_of(images, 'image')} of {count} (label{'s' * (last > first)} {labels})"


def warn(folder, lists):
    """Says on stderr what looks like a mistake, or makes figures mean something else."""

    names = {one.name for members in lists.values() for one in members}
    above = sorted(name for name in names if any(other.startswith(os.path.join(name, "")) for other in names))
    if above:
        first = plain(os.path.join(folder, above[0]), 1000)
        what = f"class folders in {number_of(len(above), 'class folder')} are classes of their own (first: {first})"
        print(f"warning: {what}", file=sys.stderr)
    if len(lists.get("train", ())) == 1:
        what = "a metric loss needs images of at least two (--within_classes=0.2 trains on a part of each class)"
        print(f"warning: one class trains: {what}", file=sys.stderr)
    for part in sorted({"val", "holdout", "test"} & set(lists)):
        if len(lists[part]) == 1:
            print(f"warning: {part}: one class: whatever is found is of it, and recall is 100 %", file=sys.stderr)
    for part, what in (("train", "nothing of their own to be drawn to"), ("val", "nothing to find: each is a miss")):
        single = [one for one in lists.get(part, ()) if len(one.images) == 1]
        if single:
            first = plain(os.path.join(folder, single[0].name), 1000)
            count = number_of(len(single), "class", "classes")
            print(f"warning: {part}: {count} of one image (first: {first}): {what}", file=sys.stderr)
    above = [
        {one.name.split(os.sep)[0] for one in lists.get(part, ()) if os.sep in one.name} for part in ("train", "val")
    ]
    if all(above) and not above[0] & above[1]:
        train, val = (plain(", ".join(sorted(names)), 60) for names in above)
        print(f"note: all that train are of {train}, the others of {val}: --seed=1 draws at random", file=sys.stderr)
    val = {one.label for one in lists.get("val", ())}
    seen = val & {one.label for one in lists.get("train", ())}
    if seen:
        what = f"{len(seen)} of its {len(val)} classes train: recall on it is not that on unseen classes"
        print(f"note: val: {what}", file=sys.stderr)


def next_command(lists, paths, name, cropped=False):
    """What to type next, [word]: fine-tuning from ImageNet weights.

    None where no training is possible. A list of lone pictures is not validated on: each would be a miss. Nothing
    is cut off when pictures that are `cropped` to their objects are measured.
    """
    train, val = ("fit", "holdout") if "fit" in lists else ("train", "val")
    classes = lists.get(train, ())
    if len(classes) < 2 or all(len(one.images) == 1 for one in classes):
        return None
    validates = any(len(one.images) > 1 for one in lists.get(val, ()))
    steps = max(1, sum(len(one.images) for one in classes) // BATCH)
    return [
        *("python", os.path.relpath(os.path.join(ROOT, "train.py"))),
        f"--train_list={paths[train]}",
        f"--val_list={paths[val]}" if validates else "--eval_every=0",
        *FINE_TUNING.split(),
        *(["--test_transform=resize"] if cropped else []),
        f"--num_epochs={min(60, max(10, math.ceil(500 / steps)))}",  # 500 steps, where 60 epochs are as many
        f"--model_save_dir=output_{name}",
    ]


def main():
    here = os.path.relpath(os.path.dirname(os.path.abspath(__file__)))
    parser = make_parser(__doc__)
    parser.usage = "%(prog)s [ROOT] [--flag=value ...]"
    parser.add_argument(
        "root",
        nargs="?",
        default=here,
        metavar="ROOT",
        help="the folder with images/<class>/*.jpg or CUB_200_2011/images/<class>/*.jpg in it, or the one that holds "
        "the class folders itself, or train/ and test/ with class folders",
    )
    parser.add_argument("--output_dir", help="where the lists go (default: ROOT, or the folder of the CSV)")
    parser.add_argument("--name", help="how the lists' names begin (default: CUB200 for CUB, else the name of ROOT)")
    parser.add_argument(
        "--train_classes",
        help="how many of the first classes train: a count such as 100, a fraction such as 0.5 (default: half: 100 for "
        "CUB's 200), or all: then there is no val list",
    )
    parser.add_argument(
        "--within_classes",
        type=number(float),
        metavar="SHARE",
        help="all classes train, and this share of each one's images, such as 0.2, is for val: that measures something "
        "else than recall on unseen classes",
    )
    parser.add_argument(
        "--holdout",
        type=number(float),
        metavar="SHARE",
        help="also write <name>_fit.txt and <name>_holdout.txt: the training classes without the last SHARE of them, "
        "and these, such as 0.2. Choose settings and epoch by training on the first and validating on the second; then "
        "train on all training classes and look at the test once",
    )
    parser.add_argument(
        "--seed",
        type=number(int),
        help="draw at random which classes train, or which images --within_classes takes: the same number gives the "
        "same lists (default: the first ones train)",
    )
    parser.add_argument("--absolute", action="store_true", help="absolute paths: the lists may then be moved")
    parser.add_argument("--csv", metavar="FILE", help="also write train and val as a CSV of Open Metric Learning")
    args, _ = parse_typed(parser)
    for name in ("root", "output_dir", "name", "csv"):
        if getattr(args, name) == "":
            raise UserError(f"{name}: is empty: give a name, or leave it out")
    is_table = os.path.isfile(args.root)
    folder = os.path.dirname(args.root) or os.curdir if is_table else args.root
    output_dir = folder if args.output_dir is None else args.output_dir
    division = Division(args.train_classes, args.holdout, args.within_classes, args.seed)
    write = split_table if is_table else split
    write(args.root, output_dir, args.name, division, args.absolute, args.csv)


if __name__ == "__main__":
    process.run_script(main)
