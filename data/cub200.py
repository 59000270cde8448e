"""Fetches CUB-200, unpacks it beside this script, and writes CUB200_train.txt (classes 1-100), CUB200_val.txt (101-200)
and CUB200_classes.txt there, which train.py, eval.py and infer.py read by default. Or does so for a copy elsewhere.

    sh data/download_cub200.sh            CUB-200 (2010), the data set of the original page: 6,033 images, 650 MB
    sh data/download_cub200.sh 2011       CUB-200-2011, another data set: 11,788 images, 1.1 GB
    python data/cub200.py 2011            the same
    python data/cub200.py ~/birds         a copy of either, or its archive: nothing is downloaded
    python data/cub200.py 2010 --crop_boxes --box_margin=0.1
                                          each picture cut to its bird, with lists of their own

The lists name the edition asked for last; asking again only rewrites them, nothing is downloaded twice. A broken
download goes on where it ended when you run the script again. Without a network, put the archive beside this script
yourself (images.tgz or CUB_200_2011.tgz) and run it.

A copy is images/ and, for --crop_boxes, annotations.tgz or annotations-mat/ (2010), or CUB_200_2011/ with
bounding_boxes.txt (2011), packed or not. What lists/ (2010) or images.txt (2011) name must be there. The released train
and test lists are another split, of each class's pictures: they are not used. The rule for crops is in data/boxes.py.

Environment:
  PYTHON         interpreter that the shell script takes (default: python3)
  CUB200_URL     as --url
  CUB200_SIZE, CUB200_SHA256, CUB200_IMAGES
                 bytes and SHA-256 of the archive and the number of its .jpg files, for another pack of the same images
  https_proxy, http_proxy, no_proxy
                 as everywhere
"""

import dataclasses
import os
import re

import download
import matlab
import published
import split
import unpack
import utility
from utility import UserError, say


@dataclasses.dataclass(frozen=True)
class Edition:
    """One of the two data sets: its archive, the folder that all of it is in, where its pictures are below that."""

    name: str
    archive: str
    top: str
    images: str
    size: int
    sha256: str
    count: int  # of .jpg files
    homes: tuple


EDITIONS = {
    "2010": Edition(
        name="CUB-200 (2010)",
        archive="images.tgz",
        top="images",
        images="images",
        size=679421896,
        sha256="2a6d2246bbb9778ca03aa94e2e683ccb4f8821a36b7f235c0822e659d60a803e",
        count=6033,
        # The first home often gives no answer; the second asks for confirmation unless told that it is given.
        homes=(
            "http://www.vision.caltech.edu/visipedia-data/CUB-200/images.tgz",
            "https://drive.google.com/uc?export=download&id=1GDr1OkoXdhaXWGA8S3MAq3a522Tak-nx&confirm=t",
        ),
    ),
    "2011": Edition(
        name="CUB-200-2011",
        archive="CUB_200_2011.tgz",
        top="CUB_200_2011",
        images="CUB_200_2011/images",
        size=1150585339,
        sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
        count=11788,
        homes=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
    ),
}


# What belongs to the edition of 2010.
ANNOTATIONS = {
    "annotations.tgz": published.Archive(
        "annotations-mat", "sha256:c17b7841c21a66aa44ba8fe92369cc95dfc998946081828b1d7b8a4b716805c1", 11531634
    ),
    "lists.tgz": published.Archive(
        "lists", "sha256:aeacbd5e3539ae84ea726e8a266a9a119c18f055cd80f3836d5eb4500b005428", 201844
    ),
}
BOX_HOMES = (
    "http://www.vision.caltech.edu/visipedia-data/CUB-200/annotations.tgz",
    "https://drive.google.com/uc?export=download&id=16NsbTpMs5L6hT4hUJAmpW2u7wH326WTR&confirm=t",
)
MATS = ("annotations-mat", "annotations/annotations-mat")  # where people have them
BY_FOLDERS = "by its class folders"
TRAIN = 100  # classes
COUNTS = {
    "2010": {"train": (2990, 100), "val": (3043, 100)},
    "2011": {"train": (5864, 100), "val": (5924, 100)},
}


def described_by_environment(edition):
    """The edition as CUB200_SIZE, CUB200_SHA256 and CUB200_IMAGES describe it. Raises: UserError."""
    return dataclasses.replace(
        edition,
        size=download.number_from_environment("CUB200_SIZE", edition.size),
        sha256=download.from_environment("CUB200_SHA256", edition.sha256),
        count=download.number_from_environment("CUB200_IMAGES", edition.count),
    )


def count_pictures(folder):
    """The number of .jpg files below a folder, without macOS's ._ files."""
    names = (name for _, _, files in os.walk(folder) for name in files)
    return sum(name.endswith(".jpg") and not name.startswith("._") for name in names)


def prepare(folder, edition, url=None):
    """Fetches and unpacks an edition into `folder`, unless it is there, and writes its lists.

    Args:
        url: to fetch it from there, and from nowhere else.

    Raises: UserError, OSError
    """
    archive, top = os.path.join(folder, edition.archive), os.path.join(folder, edition.top)
    if os.path.exists(top):
        say(f"{top} is here already")
    else:
        by_hand = (
            f"download {edition.homes[-1]} in a browser ({edition.size} bytes), put it at {archive} and run this again"
        )
        wanted = download.Wanted(edition.name, archive, edition.size, f"sha256:{edition.sha256}", by_hand)
        download.fetch(wanted, [url] if url else edition.homes)
        unpack.unpack(archive, top, edition.top)
        say(f"{archive} is no longer needed")
    images = os.path.join(folder, *edition.images.split("/"))
    found = count_pictures(images)
    if found != edition.count:
        raise UserError(
            f"{images} holds {found} .jpg files, not the {edition.count} of {edition.name}: other or incomplete "
            f"pictures; move {top} away and run this again"
        )
    split.split(images, folder, "CUB200", split.Division())
    if all(os.path.exists(os.path.join(folder, other.top)) for other in EDITIONS.values()):
        say(f"note: images/ and CUB_200_2011/ are both in {folder}; the lists now name the images of {edition.name}")


# ---------------------------------------------------------------- a copy elsewhere, and crops


def find(folder, year=None):
    """What there is of CUB in a folder: a published.Found, or None. Raises: UserError.

    Args:
        year: "2010" or "2011" of two that are there; None: the folder's only one.
    """
    nested = os.path.isdir(os.path.join(folder, "CUB_200_2011", "images"))
    own = os.path.isfile(os.path.join(folder, "images.txt"))
    images = os.path.isdir(os.path.join(folder, "images")) and bool(class_folders(folder, "images"))
    early = images and not own
    if early and nested and year is None:
        other = os.path.join(folder, "CUB_200_2011")
        raise UserError(f"{folder}: both editions are there, {EDITIONS['2010'].name} and {other}: move one away")
    if year != "2010" and (nested or (images and own)):
        return find_2011(folder, "" if own else "CUB_200_2011/")
    return find_2010(folder) if year != "2011" and early else None


def class_folders(folder, images):
    """The names NNN.Name of the class folders in a folder, sorted."""
    return sorted(name for name in os.listdir(os.path.join(folder, images)) if re.match(r"[0-9]{3}\.", name))


def checked(picture):
    """A picture that a file of CUB names, such as 001.Bird/Bird_1.jpg. Raises: ValueError where it is none."""
    if not re.fullmatch(r"[0-9]{3}\.[^/]+/[^/]+", picture):
        raise ValueError(picture)
    return picture


def as_found(folder, what, images, listed, boxes):
    """The published.Found of an edition.

    Args:
        images: the folder of the class folders; listed: the pictures that files name, as paths in there, which are
            missed if they are not there.
    """
    paths = set(listed)
    for name in class_folders(folder, images):
        there = os.listdir(os.path.join(folder, images, name))
        paths.update(f"{name}/{image}" for image in there if image.endswith(".jpg") and not image.startswith("."))
    rows, names = {"train": [], "val": []}, {}
    for path in sorted(paths):
        label = int(path[:3])
        names.setdefault(label, path.partition("/")[0])
        rows["train" if label <= TRAIN else "val"].append((f"{images}/{path}", label))
    return published.Found(what, [images], rows, names, boxes)


def find_2010(folder):
    """images/, and lists/ and annotations-mat/ where they are."""
    listed = []
    for name in ("train.txt", "test.txt"):
        path = os.path.join(folder, "lists", name)
        for number, fields in published.read_rows(path) if os.path.exists(path) else ():
            with published.reading_row(path, number):
                listed.append(checked(fields[0]))
    return as_found(folder, "by lists/" if listed else BY_FOLDERS, "images", listed, lambda: read_mats(folder))


def find_2011(folder, home):
    """CUB_200_2011/, or its content: `home` is what stands before images/."""
    path, pictures = os.path.join(folder, home, "images.txt"), {}
    if os.path.exists(path):
        for number, fields in published.read_rows(path):
            with published.reading_row(path, number):
                pictures[fields[0]] = checked(fields[1])
    boxes = os.path.join(folder, home, "bounding_boxes.txt")
    what = "by images.txt" if pictures else BY_FOLDERS
    images = f"{home}images"
    return as_found(folder, what, images, pictures.values(), lambda: read_corners(boxes, images, pictures))


def read_mats(folder):
    """{path: (left, top, right, bottom)} of the edition of 2010, whose boxes count pixels from 1. Raises: UserError."""
    mats = published.first_of(folder, *MATS)
    if not mats:
        raise UserError(f"{folder}: --crop_boxes needs annotations.tgz or annotations-mat, which is not there")
    boxes = {}
    for name in class_folders(folder, mats):
        for file in os.listdir(os.path.join(folder, mats, name)):
            if file.startswith(".") or not file.endswith(".mat"):
                continue
            with matlab.reading(os.path.join(folder, mats, name, file)) as mat:
                (row,) = matlab.rows(matlab.find(mat, "bbox"), "left", "top", "right", "bottom")
                left, top, right, bottom = map(float, row)
            boxes[f"images/{name}/{file[: -len('.mat')]}.jpg"] = (left - 1, top - 1, right, bottom)
    return boxes


def read_corners(path, images, pictures):
    """{path: (left, top, right, bottom)} of the edition of 2011, which has corner and size. Raises: UserError.

    Args:
        pictures: {id: path below images}.
    """
    if not pictures:
        raise UserError(f"{path}: --crop_boxes needs images.txt beside it, which is not there")
    boxes = {}
    for number, fields in published.read_rows(path):
        with published.reading_row(path, number):
            left, top, width, height = map(float, fields[1:])
            boxes[f"{images}/{pictures[fields[0]]}"] = (left, top, left + width, top + height)
    return boxes


def data_set(year):
    """The published.DataSet of an edition, or with None of whichever it is."""
    packed = {one.archive: published.Archive(one.top, f"sha256:{one.sha256}", one.size) for one in EDITIONS.values()}
    return published.DataSet(
        name=EDITIONS[year].name if year else "CUB-200",
        prefix="CUB200",
        counts=COUNTS[year] if year else {},
        archives={**packed, **ANNOTATIONS},
        expected="it has images/001.Black_footed_Albatross and so on, or CUB_200_2011: data/download_cub200.sh",
        find=lambda folder: find(folder, year),
    )


def fetch_boxes(folder):
    """annotations-mat, the boxes of the edition of 2010, is in the folder. Raises: UserError."""
    if published.first_of(folder, *MATS):
        return
    path, known = os.path.join(folder, "annotations.tgz"), ANNOTATIONS["annotations.tgz"]
    by_hand = f"download {BOX_HOMES[-1]} in a browser ({known.size} bytes), put it at {path} and run this again"
    download.fetch(download.Wanted("the boxes of CUB-200 (2010)", path, known.size, known.digest, by_hand), BOX_HOMES)
    unpack.unpack(path, os.path.join(folder, known.top), known.top)


def prepare_copy(path, output_dir, any_counts, crop):
    """Lists a copy, of whichever edition. Raises: UserError, OSError."""
    folder, found = published.locate(path, data_set(None))
    year = "2010"
    later = found.folders != ["images"] or os.path.exists(os.path.join(folder, "images.txt"))
    if later or sum(map(len, found.listed.values())) == EDITIONS["2011"].count:  # whose pictures may lie there alone
        year = "2011"
    published.write(folder, found, data_set(year), output_dir, any_counts, crop)


def main():
    parser = utility.make_parser(__doc__)
    parser.add_argument("edition", nargs="?", default="2010", help="2010 or 2011, or the folder or archive of a copy")
    parser.add_argument("--url", help="fetch it from there instead (also file:///absolute/path)")
    published.add_arguments(parser, boxes=True)
    args, unknown = parser.parse_known_args()
    year, crop = args.edition, published.crop_of(vars(args))
    is_copy = year not in EDITIONS and os.path.exists(year)
    for text in ([] if year in EDITIONS or is_copy else [year]) + unknown:
        raise UserError(f"what is {text!r}? Expected 2010 or 2011, or a copy of one of them (see --help)")
    if is_copy:
        if args.url:
            raise UserError("--url is for a download, and a copy was named")
        prepare_copy(year, args.output_dir, args.any_counts, crop)
        return
    if args.output_dir or args.any_counts:
        raise UserError("--output_dir and --any_counts are for a copy: name its folder")
    folder, edition = download.script_folder(__file__), described_by_environment(EDITIONS[year])
    prepare(folder, edition, args.url or os.environ.get("CUB200_URL"))
    if crop:
        if year == "2010":
            fetch_boxes(folder)
        found = find(folder, year)
        if not found:
            raise UserError(
                f"{folder}: no class folders such as 001.Black_footed_Albatross: --crop_boxes is not possible"
            )
        # Another pack, by CUB200_IMAGES, has other counts, which prepare has compared.
        published.write(folder, found, data_set(year), None, edition != EDITIONS[year], crop)


if __name__ == "__main__":
    download.run_script(main)
