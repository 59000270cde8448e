"""Cuts pictures to the boxes that data sets have: --crop_boxes of cub200.py, cars196.py and inshop.py.

The rule, from a box (left, top, right, bottom) in pixels from the picture's upper left corner, right and bottom
exclusive:

1. What of the box lies outside of the picture goes; a box without area is an error.
2. It grows by --box_margin times its width to the left and to the right, and times its height upwards and downwards, as
   far as the picture goes, then outwards to whole pixels.
3. --box_padding=none: that is the crop. context: its shorter side grows to the longer one, around the same centre and
   then moved into the picture; where the picture is too small, ImageNet's mean colour fills the square. mean: the crop
   is put into the middle of such a square.

A crop is a JPEG of quality 95 without subsampled colours, at the picture's own resolution: it differs by half a grey
value of 255 on average, and a PNG is four times as large. Grey pictures become RGB.

Crops go to boxes/ (boxes_margin_0.1_context/ and so on, a folder for each rule) in the folder of the lists, under the
paths of the originals. An interrupted run goes on: a crop gets its name when it is complete.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runtime import packages

packages.check(("numpy", "cv2", "PIL"))
import cv2

import files
import transforms
from runtime import process
from transforms import BadImage
from utility import UserError, say

MARK = "boxes.json"  # says that a folder holds crops of ours, and by which rule and boxes
LEFTOVER = re.compile(r".+\.jpe?g\.tmp\w{8}", re.IGNORECASE)  # of files.atomic_write, where it was killed


@dataclasses.dataclass(frozen=True)
class Crop:
    """The rule by which pictures are cut, in the flags' words."""

    margin: float = 0.0
    padding: str = "none"

    @property
    def folder(self):
        """The name of the folder of such crops."""
        margin = f"_margin_{self.margin:g}" if self.margin else ""
        return "boxes" + margin + (f"_{self.padding}" if self.padding != "none" else "")


# ---------------------------------------------------------------- one picture


def region(box, crop, width, height):
    """What to cut out of a picture: (left, top, right, bottom), whole pixels inside of it. Raises: BadImage."""
    sides = []
    for low, high, length in ((box[0], box[2], width), (box[1], box[3], height)):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise BadImage(f"its box {tuple(box)} has no area")
        low, high = max(low, 0), min(high, length)
        if low >= high:
            raise BadImage(f"its box {tuple(box)} is outside of it: {width} x {height} pixels")
        margin = crop.margin * (high - low)
        sides.append((max(math.floor(low - margin), 0), min(math.ceil(high + margin), length)))
    if crop.padding == "context":
        side = max(high - low for low, high in sides)
        sides = [widened(*ends, min(side, length), length) for ends, length in zip(sides, (width, height))]
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def widened(low, high, side, length):
    """(low, high) of a piece `side` long around the centre of another, inside of 0 and `length`."""
    low = min(max((low + high - side) // 2, 0), length - side)
    return low, low + side


def cut(image, box, crop):
    """The crop of a picture, uint8 [H, W, 3] -> uint8 [h, w, 3], by the rule above. Raises: BadImage."""
    left, top, right, bottom = region(box, crop, image.shape[1], image.shape[0])
    part = image[top:bottom, left:right]
    if crop.padding == "none":
        return part
    height, width = part.shape[:2]
    side = max(height, width)
    if side * side > transforms.MAX_PIXELS:
        raise BadImage(f"a square of {side} x {side} pixels around its box is too large")
    above, before = (side - height) // 2, (side - width) // 2
    ends = (above, side - height - above, before, side - width - before)
    return cv2.copyMakeBorder(part, *ends, cv2.BORDER_CONSTANT, value=transforms.MEAN_COLOR)


def write_crop(source, target, box, crop, size):
    """Cuts a file to another one, unless that is there already. Raises: BadImage, UserError.

    Args:
        size: (width, height) that the picture must have, or None.
    """
    if os.path.islink(target):
        raise UserError(f"{target}: a link: what is written here must not reach another file; remove it or rename it")
    if os.path.exists(target):
        return
    image = transforms.load(source)
    if size and (image.shape[1], image.shape[0]) != size:
        found = f"{image.shape[1]} x {image.shape[0]} pixels"
        raise BadImage(f"{found}, but the boxes are those of pictures of {size[0]} x {size[1]}")
    data = jpeg(cut(image, box, crop))
    with files.atomic_write(target, "wb") as file:
        file.write(data)


def jpeg(image):
    """A picture, uint8 [H, W, 3], as the bytes of a JPEG of quality 95 without subsampled colours. Raises: BadImage."""
    flags = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags)
    if not done:
        raise BadImage("its crop can't be written as a JPEG")
    return data.tobytes()


# ---------------------------------------------------------------- all of them


def cut_all(crop, folder, found, listed, output_dir):
    """Cuts the listed pictures to their boxes.

    Args:
        folder: of the data set; found: published.Found; listed: {list: [(path, label)]}; output_dir: where the folder
            of crops goes.

    Returns: the folder of crops; `listed` with the paths in there. Raises: UserError.
    """
    if not found.boxes:
        raise UserError(f"{folder}: no boxes in it: --crop_boxes is not possible")
    boxes = found.boxes()
    paths = [path for rows in listed.values() for path, _ in rows]
    missing = [path for path in paths if path not in boxes]
    if missing:
        what = f"{len(missing)} of {len(paths)} pictures have no box (first: {', '.join(missing[:3])})"
        raise UserError(f"{folder}: {what}: its annotations are incomplete")
    target = os.path.join(output_dir, crop.folder)
    prepare_folder(target, crop, {path: boxes[path] for path in paths})
    names = {path: path if path.lower().endswith((".jpg", ".jpeg")) else f"{path}.jpg" for path in paths}
    for inside in sorted({os.path.dirname(path) for path in paths}):
        os.makedirs(os.path.join(target, inside), exist_ok=True)
    say(f"cutting {len(paths)} pictures to their boxes, into {target}")
    jobs = [(os.path.join(folder, path), os.path.join(target, names[path]), boxes[path]) for path in paths]
    bad = write_all(jobs, crop, found.size)
    if bad:
        path, why = bad[0]
        raise UserError(f"{len(bad)} of {len(paths)} pictures can't be cut to their boxes (first: {path}: {why})")
    return target, {part: [(names[path], label) for path, label in rows] for part, rows in listed.items()}


def write_all(jobs, crop, size):
    """Cuts many files, in threads, and shows how far it is; -> [(path, why)] of those that can't be cut.

    Args:
        jobs: list of (source, target, box).
    """

    def work(job):
        try:
            write_crop(*job, crop, size)
        except BadImage as error:
            return job[0], str(error)
        return None

    bad, said = [], time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(2 * process.cpu_count())  # of which half wait for the disk
    try:
        for done, result in enumerate(pool.map(work, jobs), 1):
            bad += [result] if result else []
            if time.monotonic() > said + 10:
                said = time.monotonic()
                print(f"  {done / len(jobs):.0%} of {len(jobs)} pictures", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return bad


def prepare_folder(path, crop, boxes):
    """Makes the folder of crops, or goes on with one of the same rule and boxes. Raises: UserError for any other."""
    digest = hashlib.sha256(json.dumps(sorted(boxes.items())).encode()).hexdigest()
    mark, about = os.path.join(path, MARK), {**dataclasses.asdict(crop), "pictures": len(boxes), "boxes": digest}
    # An interrupted run may have left the folder without its mark, or half of that.
    if os.path.isdir(path) and any(not name.startswith(f"{MARK}.tmp") for name in os.listdir(path)):
        try:
            same = files.read_json(mark) == about
        except FileNotFoundError:
            raise UserError(f"{path}: is there already, and without {MARK} no folder of crops: rename it") from None
        except (OSError, ValueError):
            same = False
        if not same:
            raise UserError(f"{path}: holds crops of other pictures or boxes: remove it or rename it")
        for top, _, names in os.walk(path):
            for name in filter(LEFTOVER.fullmatch, names):
                os.remove(os.path.join(top, name))
        return
    files.make_directory(path)
    with files.atomic_write(mark) as file:
        json.dump(about, file)
