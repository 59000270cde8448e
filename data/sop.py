"""Lists Stanford Online Products: SOP_train.txt, SOP_val.txt and SOP_classes.txt, in the folder of the data set.

    python data/sop.py Stanford_Online_Products.zip     unpacks it beside itself first
    python data/sop.py Stanford_Online_Products         or the folder that it became, or the one above

The split is the published one, by Ebay_train.txt and Ebay_test.txt: 59,551 pictures of the classes 1-11318 train,
60,502 of 11319-22634 measure recall. Classes have 2 to 12 pictures. There are no boxes.
"""

import os
import re

import download
import published
from utility import UserError

HEADER = ["image_id", "class_id", "super_class_id", "path"]


def find(folder):
    """What there is of it in a folder: a published.Found, or None. Raises: UserError."""
    paths = {part: os.path.join(folder, f"Ebay_{name}.txt") for part, name in (("train", "train"), ("val", "test"))}
    if not any(map(os.path.exists, paths.values())):
        return None
    listed, names = {}, {}
    for part, path in paths.items():
        listed[part] = read(path, names)
    both = {label for _, label in listed["train"]} & {label for _, label in listed["val"]}
    if both:
        raise UserError(f"{folder}: {len(both)} classes are in both lists (first: {min(both)}), which share none")
    folders = sorted({row[0].partition("/")[0] for rows in listed.values() for row in rows})
    folders = [name for name in folders if os.path.isdir(os.path.join(folder, name))]
    return published.Found("by its published lists", folders, listed, names)


def read(path, names):
    """[(path, label)] of one of its lists; adds to {label: name}: that of the folder, and of the first picture.

    Raises: UserError
    """
    rows = published.read_rows(path)
    if not rows or rows[0][1] != HEADER:
        raise UserError(f"{path}: not a list of Stanford Online Products: its first line is not {' '.join(HEADER)!r}")
    listed = []
    for number, fields in rows[1:]:
        with published.reading_row(path, number):
            _, label, _, image = fields
            label = published.whole(label)
            kind, name = re.fullmatch(r"(\w+)_final/([^/]+)", image).groups()
        names.setdefault(label, f"{kind} {name.partition('_')[0]}")
        listed.append((image, label))
    return listed


SOP = published.DataSet(
    name="Stanford Online Products",
    prefix="SOP",
    counts={"train": (59551, 11318), "val": (60502, 11316)},
    archives={
        "Stanford_Online_Products.zip": published.Archive(
            "Stanford_Online_Products",
            "sha256:b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
            3083860082,
        )
    },
    expected="it has Ebay_train.txt, Ebay_test.txt and folders such as bicycle_final, in Stanford_Online_Products.zip: "
    "https://drive.google.com/uc?export=download&id=1TclrpQOF_ullUP99wk_gjGN8pKvtErG8",
    find=find,
)


if __name__ == "__main__":
    download.run_script(lambda: published.run(__doc__, SOP, boxes=False))
