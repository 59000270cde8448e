"""Prepares ImageNet (ILSVRC2012) from its official files: unpacks the images to train/ and val/ and writes
train_list.txt and val_list.txt, a line `<path> <label>` for each image. A label is the rank, 0 to 999, of the class's
WordNet id.

    sh download_imagenet2012.sh                   the three files lie beside this script, in data/ILSVRC2012
    sh download_imagenet2012.sh /mnt/tars         they lie there
    IMAGENET_URL=https://name:password@host/folder sh download_imagenet2012.sh
                                                  those that are missing are downloaded from there

    ILSVRC2012_img_train.tar        138 GB    images to train on
    ILSVRC2012_img_val.tar          6.7 GB    images to test on
    ILSVRC2012_devkit_t12.tar.gz    2.5 MB    their labels

ImageNet gives them to registered users: https://image-net.org/download-images. The script keeps no password. It needs
as much free space as the files take again; their inner archives are unpacked in passing. Interrupted, it goes on where
it was when you run it again. Once train/ and val/ are there, the two large files are no longer needed.

Environment:
  PYTHON              interpreter that the shell script takes (default: python3)
  IMAGENET_URL        the folder URL of the three files
  IMAGENET_TRAIN_SIZE, IMAGENET_TRAIN_MD5, IMAGENET_VAL_SIZE, IMAGENET_VAL_MD5, IMAGENET_DEVKIT_MD5, IMAGENET_CLASSES
                      bytes and MD5 of the files and the number of classes, for another pack
  https_proxy, http_proxy, no_proxy
                      as everywhere
"""

import os
import shlex
import sys

import download
import files
import listing
import matlab
import unpack
import utility
from utility import UserError, say

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TARS = {"val": "ILSVRC2012_img_val.tar", "train": "ILSVRC2012_img_train.tar"}
SIZES = {"val": 6744924160, "train": 147897477120}
MD5 = {
    "devkit": "fa75699e90414af021442c21a62c3abf",
    "val": "29b22e2961454d5413ddabcf34fc5622",
    "train": "1d675b47d978889d74fa0da5fadfb00e",
}

# ---------------------------------------------------------------- the devkit's table of classes


def read_classes(mat):
    """-> dict ILSVRC2012_ID -> WordNet id of the classes proper; meta.mat also has the groups above them."""
    table = next((table for table in map(matlab.columns, matlab.arrays(mat)) if table), None)
    if not table:
        raise UserError("no table of classes in it")
    rows = zip(table["ILSVRC2012_ID"], table["WNID"], table["num_children"])
    value = matlab.value
    classes = {value(number): value(wnid) for number, wnid, children in rows if value(children) == 0}
    kinds = {(type(number), type(wnid)) for number, wnid in classes.items()}
    if not kinds <= {(int, str)} or len(set(classes.values())) < len(classes):
        raise ValueError("its classes are not numbers, each with a name of its own")
    return classes


def read_devkit(path):
    """-> dict ILSVRC2012_ID -> WordNet id; list of the ILSVRC2012_ID of each validation image. Raises: UserError."""
    folder = "ILSVRC2012_devkit_t12/data/"
    try:
        with files.open_file(path) as file, unpack.Archive.open(fileobj=file) as archive:
            mat = archive.extractfile(folder + "meta.mat").read(matlab.LIMIT)
            truth = archive.extractfile(folder + "ILSVRC2012_validation_ground_truth.txt").read(matlab.LIMIT)
        classes, truth = read_classes(mat), [int(line) for line in truth.split()]
    except (UserError, unpack.Refused, AttributeError, *matlab.BROKEN) as error:
        raise UserError(f"{path}: cannot read the classes: {unpack.first_line(error)}") from None
    if not set(truth) <= set(classes):
        raise UserError(f"{path}: its validation images have classes that it does not name")
    return classes, truth


# ---------------------------------------------------------------- lists


def train_rows(root, label):
    """The lines of train_list.txt for root/train. Raises: UserError where it has other classes, OSError.

    Args:
        label: dict WordNet id -> label.
    """
    folder = os.path.join(root, "train")
    odd = set(label) ^ {name for name in os.listdir(folder) if not name.startswith(".")}
    if odd:
        problem = "missing" if min(odd) in label else "no class of the devkit"
        raise UserError(f"{os.path.join(folder, min(odd))} is {problem}: move {folder} away and run this again")
    rows = []
    for wnid in sorted(label):
        names = sorted(name for name in os.listdir(os.path.join(folder, wnid)) if not name.startswith("."))
        for name in names:
            path = f"train/{wnid}/{name}"
            if not listing.fits_a_list(path):
                raise UserError(f"{os.path.join(root, path)!r}: a list cannot hold this name: rename it")
            rows.append(f"{path} {label[wnid]}\n")
    return rows


def val_rows(root, labels):
    """The lines of val_list.txt for root/val, which must hold all images. Raises: UserError, OSError.

    Args:
        labels: the label of each image, the first being of ILSVRC2012_val_00000001.JPEG.
    """
    folder = os.path.join(root, "val")
    names, rows = set(os.listdir(folder)), []
    for number, label in enumerate(labels, 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        if name not in names:
            raise UserError(f"{os.path.join(folder, name)} is missing: move {folder} away and run this again")
        rows.append(f"val/{name} {label}\n")
    return rows


def write_lists(devkit, root, expected):
    """Writes root/train_list.txt and val_list.txt for the images in root/train and root/val.

    Args:
        devkit: path of the archive that names the classes.
        expected: how many classes it must name.

    Returns: the paths of the lists. Raises: UserError, OSError.
    """
    classes, truth = read_devkit(devkit)
    if len(classes) != expected:
        raise UserError(f"{devkit}: {len(classes)} classes instead of {expected} (IMAGENET_CLASSES)")
    label = {wnid: rank for rank, wnid in enumerate(sorted(classes.values()))}
    train, val = train_rows(root, label), val_rows(root, [label[classes[identity]] for identity in truth])
    lists = {os.path.join(root, "train_list.txt"): train, os.path.join(root, "val_list.txt"): val}
    listing.write_lists({path: "".join(rows) for path, rows in lists.items()})
    for path, rows in lists.items():
        say(f"{path}: {len(rows)} images, labels 0-{len(label) - 1}")
    if len(classes) == 1000 and len(train) != 1281167:
        print(f"warning: {len(train)} training images instead of 1281167: files added or removed?", file=sys.stderr)
    return list(lists)


# ---------------------------------------------------------------- all of it


def fetch_files(tars, parts, url=None):
    """The devkit and the tars of `parts` are in the folder `tars` and right. Raises: UserError.

    What is missing is said at once, not after hours of unpacking.

    Args:
        url: of the folder that missing files are downloaded from.
    """
    names = {"devkit": DEVKIT, **{part: TARS[part] for part in parts}}
    missing = [name for name in names.values() if not os.path.exists(os.path.join(tars, name))]
    home = "https://image-net.org/download-images"
    where = f"get it from {home} (for registered users), put it into {tars}, run this again"
    if missing and not url:
        raise UserError(f"not in {tars}: {' '.join(missing)}; {where}, or set IMAGENET_URL (see --help)")
    for part, name in names.items():
        md5 = download.from_environment(f"IMAGENET_{part.upper()}_MD5", MD5[part])
        size = None
        if part in SIZES:
            size = download.number_from_environment(f"IMAGENET_{part.upper()}_SIZE", SIZES[part])
        wanted = download.Wanted(f"ImageNet's {name}", os.path.join(tars, name), size, f"md5:{md5}", where)
        download.fetch(wanted, [f"{url.rstrip('/')}/{name}"] if url else [])


def prepare(tars, output, url=None):
    """Unpacks the images from the tars to `output`, unless they are there, and writes their lists.

    Raises: UserError, OSError
    """
    if not os.path.isdir(tars):
        raise UserError(f"{tars}: no such folder")
    expected = download.number_from_environment("IMAGENET_CLASSES", 1000)
    try:
        os.makedirs(output, exist_ok=True)
    except OSError:
        raise UserError(f"{output}: cannot make this folder") from None
    parts = []
    for part in TARS:
        if os.path.isdir(os.path.join(output, part)):
            say(f"{os.path.join(output, part)} is here already")
        else:
            parts.append(part)
    fetch_files(tars, parts, url)
    for part in parts:
        unpack.unpack(os.path.join(tars, TARS[part]), os.path.join(output, part))
    train_list, val_list = write_lists(os.path.join(tars, DEVKIT), output, expected)
    flags = [f"--train_list={train_list}", f"--val_list={val_list}", f"--class_dim={expected}"]
    say("next: " + shlex.join(["python", "train.py", *flags]))


def main():
    here = download.script_folder(__file__, "ILSVRC2012")
    parser = utility.make_parser(__doc__)
    parser.add_argument("tars", nargs="?", default=here, help="the folder of the three files")
    parser.add_argument("--output_dir", default=here, help="where train/, val/ and the lists go")
    args, unknown = parser.parse_known_args()
    if unknown:
        raise UserError(f"what is {unknown[0]!r}? (see --help)")
    prepare(args.tars, args.output_dir, os.environ.get("IMAGENET_URL"))


if __name__ == "__main__":
    download.run_script(main)
