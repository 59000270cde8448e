"""Lists Cars196 (Stanford Cars): cars196_train.txt, cars196_val.txt and cars196_classes.txt, in the data set's folder.

    python data/cars196.py ~/cars                   a folder in one of the layouts below, packed or unpacked
    python data/cars196.py archive.zip              the copy on Kaggle: unpacked beside itself first
    python data/cars196.py ~/cars --crop_boxes --box_padding=context

    car_ims.tgz, cars_annos.mat                     car_ims/000001.jpg ... 016185.jpg; also CARS196.zip
    cars_train.tgz, cars_test.tgz, car_devkit.tgz, cars_test_annos_withlabels.mat
                                                    cars_train/, cars_test/ and devkit/ of the challenge
    car_data/car_data/train/<class>/*.jpg, anno_train.csv, anno_test.csv, names.csv
                                                    the copy by class folders

The split of metric learning is by class: the 8,054 pictures of the classes 1-98 train, the 8,131 of 99-196 measure
recall. The released flags train and test mean another one, of each class's pictures: they are not looked at. Some
pictures are grey, and are read as RGB.

With --crop_boxes, by the annotations' boxes, which count pixels from 1 and end on the last one inside; the rule is in
data/boxes.py.
"""

import os

import download
import matlab
import published
from utility import UserError

CLASSES, TRAIN = 196, 98
DEVKIT = ("", "devkit/", "devkit/devkit/", "car_devkit/", "car_devkit/devkit/")  # where people have its files
CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
LABELLED = "cars_test_annos_withlabels.mat"
KNOWN = {
    "cars_annos.mat": published.Archive("", "md5:b407c6086d669747186bd1d764ff9dbc"),
    LABELLED: published.Archive("", "sha256:790f75be8ea34eeded134cc559332baf23e30e91367e9ddca97d26ed9b895f05", 185758),
}


def find(folder):
    """What there is of it in a folder: a published.Found, or None. Raises: UserError."""
    for layout in (find_combined, find_devkit, find_class_folders):
        found = layout(folder)
        if found:
            return found
    # A part of a layout is said here, for another one may have been complete.
    there = published.first_of(folder, "car_ims", "cars_annos.mat", "cars_train", "cars_test", "car_data")
    if not there:
        return None
    other = {"car_ims": "cars_annos.mat", "cars_annos.mat": "car_ims", "car_data": "anno_train.csv and names.csv"}
    lacks = other.get(there, "cars_train and cars_test with devkit/cars_train_annos.mat and cars_meta.mat")
    if published.first_of(folder, *(f"{place}cars_test_annos.mat" for place in DEVKIT)):
        lacks = f"{LABELLED}, as those of the devkit have no classes"
    raise UserError(f"{folder}: {there} of Cars196, but not {lacks}")


def check_names(names, source):
    """Raises a UserError where these are not the names of the classes."""
    if len(names) != CLASSES or {type(name) for name in names} != {str}:
        raise UserError(f"{source}: it does not name {CLASSES} classes")


def as_found(what, folders, rows, names, source):
    """The published.Found of rows (path, class, box as annotated). Raises: UserError."""
    listed, boxes = {"train": [], "val": []}, {}
    for path, label, (left, top, right, bottom) in rows:
        if type(label) is not int or not 1 <= label <= CLASSES:
            raise UserError(f"{source}: {path} is of the class {label!r} instead of one of 1 to {CLASSES}")
        listed["train" if label <= TRAIN else "val"].append((path, label))
        boxes[path] = (left - 1, top - 1, right, bottom)
    return published.Found(what, folders, listed, dict(enumerate(names, 1)), lambda: boxes)


# ---------------------------------------------------------------- layouts


def find_combined(folder):
    """car_ims/ and cars_annos.mat."""
    path = os.path.join(folder, "cars_annos.mat")
    if not (os.path.exists(path) and os.path.isdir(os.path.join(folder, "car_ims"))):
        return None
    with matlab.reading(path) as mat:
        published.check_digest(path, KNOWN["cars_annos.mat"])
        names = [matlab.value(cell) for cell in matlab.cells(matlab.find(mat, "class_names"))]
        check_names(names, path)
        rows = list(annotations(mat, "relative_im_path", ""))
    return as_found("car_ims and cars_annos.mat", ["car_ims"], rows, names, path)


def annotations(mat, field, prefix):
    """Yields (path, class, box) of the rows of an array `annotations`. Raises: what is in matlab.BROKEN."""
    for image, label, *box in matlab.rows(matlab.find(mat, "annotations"), field, "class", *CORNERS):
        if type(image) is not str or any(type(side) is str for side in box):
            raise ValueError("names and numbers have changed places in its table")
        yield prefix + image, label, box


def find_devkit(folder):
    """cars_train/, cars_test/ and the devkit's files."""
    paths = {}
    for name in ("cars_train_annos.mat", LABELLED, "cars_meta.mat"):
        paths[name] = published.first_of(folder, *(place + name for place in DEVKIT))
    images = [published.first_of(folder, f"{name}/{name}", name) for name in ("cars_train", "cars_test")]
    if not all([*paths.values(), *images]):
        return None
    paths = {name: os.path.join(folder, path) for name, path in paths.items()}
    published.check_digest(paths[LABELLED], KNOWN[LABELLED])  # of a known size: others are not read
    with matlab.reading(paths["cars_meta.mat"]) as mat:
        names = [matlab.value(cell) for cell in matlab.cells(matlab.find(mat, "class_names"))]
    check_names(names, paths["cars_meta.mat"])
    rows = []
    for name, place in zip(("cars_train_annos.mat", LABELLED), images):
        with matlab.reading(paths[name]) as mat:
            rows += annotations(mat, "fname", f"{place}/")
    return as_found("cars_train, cars_test and devkit", images, rows, names, paths["cars_meta.mat"])


def find_class_folders(folder):
    """car_data/ with class folders, and the files of commas."""
    home = published.first_of(folder, "car_data/car_data", "car_data")
    source = os.path.join(folder, "names.csv")
    lists = {part: os.path.join(folder, f"anno_{part}.csv") for part in ("train", "test")}
    if not home or not all(map(os.path.exists, (source, *lists.values()))):
        return None
    # The order of the classes is that of the file, which is not the alphabet's.
    names = [",".join(fields).strip('"') for _, fields in published.read_rows(source, ",")]
    check_names(names, source)
    rows = []
    for part, path in lists.items():
        for number, fields in published.read_rows(path, ","):
            with published.reading_row(path, number):
                image, *box, label = fields
                left, top, right, bottom = map(float, box)
                label = published.whole(label)
                inside = names[label - 1].replace("/", "-")  # in names of folders
            rows.append((f"{home}/{part}/{inside}/{image}", label, (left, top, right, bottom)))
    folders = [f"{home}/{part}" for part in lists]
    return as_found("class folders and files of commas", folders, rows, names, source)


CARS = published.DataSet(
    name="Cars196",
    prefix="cars196",
    counts={"train": (8054, TRAIN), "val": (8131, CLASSES - TRAIN)},
    archives={
        "car_ims.tgz": published.Archive("car_ims", "md5:d5c8f0aa497503f355e17dc7886c3f14"),
        "cars_train.tgz": published.Archive(
            "cars_train", "sha256:512b227b30e2f0a8aab9e09485786ab4479582073a144998da74d64b801fd288", 979269282
        ),
        "cars_test.tgz": published.Archive(
            "cars_test", "sha256:bffea656d6f425cba3c91c6d83336e4c5f86c6cffd8975b0f375d3a10da8e243", 977350468
        ),
        "car_devkit.tgz": published.Archive(
            "devkit", "sha256:b97deb463af7d58b6bfaa18b2a4de9829f0f79e8ce663dfa9261bf7810e9accd", 330960
        ),
        "CARS196.zip": published.Archive("cars196"),
    },
    expected="it has car_ims and cars_annos.mat, or another layout of --help; its first home is closed, a copy is "
    "https://www.kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder",
    find=find,
)


if __name__ == "__main__":
    download.run_script(lambda: published.run(__doc__, CARS))
