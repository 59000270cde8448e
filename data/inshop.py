"""Lists In-shop Clothes Retrieval (DeepFashion): inshop_train.txt, inshop_query.txt, inshop_gallery.txt and
inshop_classes.txt, in the folder of the data set.

    python data/inshop.py "In-shop Clothes Retrieval Benchmark"
    python data/inshop.py . --crop_boxes --box_margin=0.1

The folder has Eval/list_eval_partition.txt (or that file itself) and Img/img.zip, img.zip or what they were unpacked
to, img/; img_highres where there is no img. By that file 25,882 pictures of 3,997 items train, and 14,218 queries look
for their items, 3,985, among the 12,612 of the gallery, in which they are not themselves. A label is the item's number.

With --crop_boxes, by Anno/list_bbox_inshop.txt, whose boxes are those of the pictures in img.zip, of 256 x 256 pixels:
the rule is in data/boxes.py.
"""

import os
import re

import download
import published
from utility import UserError, say

PARTITION, BOXES = "list_eval_partition.txt", "list_bbox_inshop.txt"
SIZE = (256, 256)


def find(folder):
    """What there is of it in a folder: a published.Found, or None. Raises: UserError."""
    partition = published.first_of(folder, f"Eval/{PARTITION}", PARTITION, f"Anno/{PARTITION}")
    if not partition:
        return None
    kinds = ("img", "img_highres")
    images = published.first_of(folder, *(f"{above}{kind}" for kind in kinds for above in ("", "Img/", f"{kind}/")))
    if not images:
        raise UserError(f"{folder}: {partition}, but no pictures: neither img nor Img/img, nor img.zip in one of them")
    if os.path.isdir(os.path.join(folder, images, "img")):
        images += "/img"
    say(f"pictures: {os.path.join(folder, images)}")
    high = "highres" in images
    listed, names = read_partition(os.path.join(folder, partition), images)
    what = "pictures of high resolution" if high else "pictures of img.zip"
    return published.Found(what, [images], listed, names, lambda: read_boxes(folder, images), SIZE)


def body(path, columns):
    """The rows of a file whose first two lines are a count and the names of the columns. Raises: UserError."""
    rows = published.read_rows(path)
    if len(rows) < 2 or len(rows[0][1]) != 1 or rows[1][1] != columns:
        raise UserError(
            f"{path}: its second line is not {' '.join(columns)!r}: not a file of In-shop Clothes Retrieval"
        )
    with published.reading_row(path, 1):
        count = published.whole(rows[0][1][0])
    if count != len(rows) - 2:
        raise UserError(f"{path}: {len(rows) - 2} rows instead of the {count} that its first line says: it is cut off")
    return rows[2:]


def as_here(image, images):
    """Where a picture that the files call img/... is."""
    top, _, rest = image.partition("/")
    if top != "img" or not rest:
        raise ValueError(image)
    return f"{images}/{rest}"


def read_partition(path, images):
    """-> {list: [(path, label)]}, {label: name}. Raises: UserError.

    Args:
        images: the folder that holds what the file calls img/.
    """
    listed, names = {"train": [], "query": [], "gallery": []}, {}
    for number, fields in body(path, ["image_name", "item_id", "evaluation_status"]):
        with published.reading_row(path, number):
            image, item, part = fields
            label = int(re.fullmatch("id_([0-9]{1,9})", item).group(1))
            listed[part].append((as_here(image, images), label))
        names.setdefault(label, os.path.dirname(image.partition("/")[2]))
    return listed, names


def read_boxes(folder, images):
    """{path: (left, top, right, bottom)}. Raises: UserError."""
    name = published.first_of(folder, f"Anno/{BOXES}", BOXES)
    if not name:
        raise UserError(f"{folder}: --crop_boxes needs Anno/{BOXES}, which is not there")
    path, boxes = os.path.join(folder, name), {}
    for number, fields in body(path, ["image_name", "clothes_type", "pose_type", "x_1", "y_1", "x_2", "y_2"]):
        with published.reading_row(path, number):
            left, top, right, bottom = map(float, fields[3:])
            boxes[as_here(fields[0], images)] = (left, top, right, bottom)
    return boxes


INSHOP = published.DataSet(
    name="In-shop Clothes Retrieval",
    prefix="inshop",
    counts={"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)},
    archives={
        "img.zip": published.Archive("img"),
        "img_highres.zip": published.Archive("img_highres", spare_for="img"),
    },
    expected=f"it has Eval/{PARTITION} and Img/img.zip, which its authors give by agreement: "
    "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
    find=find,
    subfolders=("Img",),
)


if __name__ == "__main__":
    download.run_script(lambda: published.run(__doc__, INSHOP))
