"""List files -> decoded, augmented, class-balanced batches of uint8 pictures.

No paddle here: a batch is NumPy, and the network normalises it. Decoding and resizing release Python's interpreter
lock in OpenCV and Pillow, so worker threads keep all cores busy and nothing is copied between processes. What is drawn
at random depends on the seed, the epoch and the position in it alone, never on the timing of threads.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import math
import os
import re
import sys
import threading
import warnings

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from parallel import local_world_size, rank, world_size
from utility import UserError, boolean, cpu_count, number

# paths: list of str. labels: int64 [N], or None where there are none. source, lines: the list file and, for each
# picture, its line there (None, None for pictures named on the command line). Several inputs in one have no source, and
# for each picture "<list>:<line>" or None as its line.
Samples = collections.namedtuple("Samples", "paths labels source lines")
# image: uint8 RGB [B, H, W, 3]; label: int64 [B] (class index or list label, as handed to read_batches) or None;
# index: int64 [B], the pictures' positions in the list.
Batch = collections.namedtuple("Batch", "image label index")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MAX_PIXELS = 200_000_000  # 600 MB decoded; the largest telephones take so many


class BadImage(Exception):
    """A picture that is missing, broken, or no picture; the message says which of these."""


# ---------------------------------------------------------------- list files


def read_list(path, data_dir=None, need_labels=True):
    """Reads a list file: on each line a path, white space, and an integer label. Paths may contain spaces.

    Args:
        data_dir: put before relative paths; None: the list file's own folder.
        need_labels: False also takes a list of paths alone; its labels are None.

    Raises: UserError naming file and line for a missing or empty list, and for a line without an integer label.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: a folder, not a list file: data/split.py writes lists for a folder of images")
    try:
        # utf-8-sig: editors on Windows begin files with a byte order mark.
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read()
        if text[:2] in ("\udcff\udcfe", "\udcfe\udcff"):
            raise UserError(f"{path}: is in UTF-16, as PowerShell writes it: save it as UTF-8")
        rows = [(line, row.strip()) for line, row in enumerate(text.split("\n"), 1) if row.strip()]
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this list file: {error.strerror} (data/split.py writes one for a folder of images; "
            "data/download_cub200.sh fetches CUB-200, data/make_sample.py draws a small sample)"
        ) from None
    if not rows:
        raise UserError(f"{path}: the list is empty")
    folder = os.path.dirname(path) if data_dir is None else data_dir
    lines = [line for line, _ in rows]
    if not need_labels and not any(re.search(r"\s[+-]?[0-9]+$", row) for _, row in rows):
        return Samples([os.path.join(folder, row) for _, row in rows], None, path, lines)
    paths, labels = [], []
    for line, row in rows:
        fields = row.rsplit(None, 1)
        if len(fields) < 2:
            raise UserError(f"{path}:{line}: no label on this line: expected '<path> <label>', found {row!r}")
        if not re.fullmatch(r"[+-]?[0-9]{1,1000}", fields[1]):  # int() would take 1_0, too
            raise UserError(f"{path}:{line}: the label {fields[1]!r} is no integer")
        label = int(fields[1])
        if not -(2**63) <= label < 2**63:
            raise UserError(f"{path}:{line}: the label {label} does not fit into 64 bits")
        paths.append(os.path.join(folder, fields[0]))
        labels.append(label)
    return Samples(paths, np.array(labels, np.int64), path, lines)


def find_images(inputs):
    """Samples without labels from paths of images and of folders (searched recursively, in sorted order)."""
    paths = []
    for path in inputs:
        if os.path.isdir(path):
            found = []
            for folder, _, names in os.walk(path):
                found += [
                    os.path.join(folder, n)
                    for n in names
                    if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")
                ]
            if not found:
                raise UserError(f"{path}: no images in this folder (looked for {', '.join(IMAGE_SUFFIXES)})")
            paths += sorted(found)
        elif os.path.isfile(path):
            paths.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return Samples(paths, None, None, None)


def is_binary(path):
    """Whether a file is no text: a picture, whatever its name, rather than a list of pictures."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError:
        return False
    return b"\0" in start or (not start and path.lower().endswith(IMAGE_SUFFIXES))


def where(samples, index):
    """How a message names a picture: `<list>:<line>: <path>`."""
    line = samples.lines[index] if samples.lines else None
    place = line if samples.source is None else f"{samples.source}:{line}"
    return samples.paths[index] if place is None else f"{place}: {samples.paths[index]}"


def fingerprint(samples, components=2):
    """A digest of a list in its order: labels, and of each path the last components; the folders above may move.

    Args:
        components: 2, since names repeat in every class folder (0.jpg, 1.jpg, ...); older checkpoints have 1.
    """
    names = ("/".join(os.path.normpath(path).split(os.sep)[-components:]) for path in samples.paths)
    rows = (f"{name} {label}\n" for name, label in zip(names, samples.labels))
    return hashlib.sha256("".join(rows).encode(errors="surrogateescape")).hexdigest()


def check_files(samples):
    """Raises a UserError that names the first missing picture, before hours are spent on the others.

    Looks into each folder once rather than at each file; at a file itself only where the folder does not show it, as a
    file system that takes a.JPG for a.jpg or a folder that may be entered but not listed.
    """
    folders, missing = {}, []
    for index, path in enumerate(samples.paths):
        folder, name = os.path.split(path)
        if folder not in folders:
            try:
                with os.scandir(folder or ".") as entries:
                    folders[folder] = {entry.name for entry in entries if not entry.is_dir()}
            except (OSError, ValueError):
                folders[folder] = set()
        if name not in folders[folder] and not os.path.isfile(path):
            missing.append(index)
    if missing:
        more = f"; {len(missing)} of {len(samples.paths)} are missing: is --data_dir right?" if len(missing) > 1 else ""
        raise UserError(f"{where(samples, missing[0])}: no such image{more}")


def report_repeated(samples):
    """Says on stderr which pictures are more than once in a list, and where with different labels.

    A picture that is there twice is its own nearest neighbour, and one of two classes is wrong in one of them.
    """
    first, repeated, contrary = {}, [], []
    for index, path in enumerate(samples.paths):
        before = first.setdefault(os.path.normpath(path), index)
        if before != index:
            same = samples.labels is None or samples.labels[before] == samples.labels[index]
            (repeated if same else contrary).append((before, index))
    for found, what in ((repeated, ""), (contrary, " with another label")):
        if found:
            before, index = found[0]
            more = f" ({len(found)} such lines)" if len(found) > 1 else ""
            line = f"line {samples.lines[before]}"
            print(f"warning: {where(samples, index)}: is on {line}{what}, too{more}", file=sys.stderr)


# ---------------------------------------------------------------- pictures


def decode(data, max_pixels=MAX_PIXELS):
    """The bytes of a JPEG, PNG, BMP, WebP (or what else Pillow reads) -> upright RGB, uint8 [H, W, 3].

    Grey, palette, CMYK and 16-bit pictures are converted. An alpha channel is dropped, as torchvision, PaddleClas and
    OpenCV do: what is transparent shows the colour stored there. Of an animation, the first picture is taken.

    Raises: BadImage where the data is empty, truncated, or no picture, or where its header promises more than
        `max_pixels`: a few hundred bytes can ask for any amount of memory.
    """
    if not data:
        raise BadImage("an empty file")
    # OpenCV is the faster decoder, but takes a JPEG that ends early for a good one with a grey rest. One that ends with
    # its end marker is whole; any other goes to Pillow, which tells a truncated file from one with a trailer.
    if data[:3] == b"\xff\xd8\xff" and data[-2:] == b"\xff\xd9" and 0 < _jpeg_pixels(data) <= max_pixels:
        with contextlib.suppress(cv2.error):  # more pixels than OpenCV takes: Pillow finds the words for it
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if image is not None:
                if _has_gray_corner(image) and _stops_early(data):
                    raise BadImage("a truncated JPEG")
                return image
    try:
        return _decode_with_pillow(data, max_pixels)
    except UnidentifiedImageError:
        raise BadImage("not an image, or in no format that is known here") from None
    except BadImage:
        raise
    except Exception as error:  # a broken file makes Pillow's plugins raise nearly anything
        raise BadImage(f"not readable as an image ({' '.join(str(error).split())})") from None


def _decode_with_pillow(data, max_pixels):
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > max_pixels:
            raise BadImage(f"{image.width} x {image.height} pixels, more than --max_pixels={max_pixels}")
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block does not make a broken picture
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip rather than scale
            gray = (np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)
            return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _jpeg_pixels(data):
    """Pixels that a JPEG's header promises; 0 where the header is not one that is quickly read."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 9 <= len(data):
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame header, and not a table
            return int.from_bytes(data[at + 5 : at + 7], "big") * int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _has_gray_corner(image):
    """Whether a corner has the grey that libjpeg gives to what is missing (EXIF data decides which corner is last)."""
    return bool((image[[0, 0, -1, -1], [0, -1, 0, -1]] == 128).all(axis=1).any())


def _stops_early(data):
    """Whether the coded data of a JPEG ends before its picture does, although an end marker follows.

    Bytes put before the end marker change the picture only where something is missing. Other damage can't be seen: a
    JPEG has no checksum, and a progressive one may end after any of its scans.
    """

    def preview(data):
        with Image.open(io.BytesIO(data)) as image:
            image.draft("L", (1, 1))  # an eighth of the size: quick, and as telling
            return image.tobytes()

    try:
        return preview(data) != preview(data[:-2] + bytes(range(1, 255)) + data[-2:])
    except Exception:  # Pillow refuses what OpenCV took: the doubt that brought us here was right
        return True


def load(path, max_pixels=MAX_PIXELS):
    """`decode` of a file. Raises: BadImage."""
    try:
        with open(path, "rb") as file:
            return decode(file.read(), max_pixels)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    except ValueError as error:  # a zero byte in the path
        raise BadImage(str(error)) from None


def _resize(image, height, width):
    """Averages along a side that shrinks (so do Pillow and torchvision), interpolates along one that grows."""
    small = (min(width, image.shape[1]), min(height, image.shape[0]))
    if small != (image.shape[1], image.shape[0]):
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    if small != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def _resize_quickly(image, height, width):
    """Halves a side until it is less than twice as long as wanted, then interpolates linearly: each pixel has a share.

    For training: `_resize` takes three to ten times as long where it shrinks, which is a fifth of all that a picture of
    500 x 375 costs. The results differ by one grey value in 255 on average.
    """
    while image.shape[0] >= 2 * height or image.shape[1] >= 2 * width:
        y, x = 1 + (image.shape[0] >= 2 * height), 1 + (image.shape[1] >= 2 * width)
        half = (image.shape[0] // y, image.shape[1] // x)
        # Without an odd last row or column: only whole factors are quick.
        image = cv2.resize(image[: half[0] * y, : half[1] * x], half[::-1], interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def random_resized_crop(image, shape, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random part of the picture, at `shape` (height, width), mirrored half of the time: the original's training.

    Args:
        scale: range of the part's share of the area, drawn uniformly.
        ratio: range of its width / height, drawn log-uniformly.
        rng: np.random.Generator.

    Where ten draws don't fit into the picture, the largest centred part within `ratio` is taken.
    """
    full_height, full_width = image.shape[:2]
    for _ in range(10):
        # All numbers of a try at once: a call for each takes five times as long.
        area, aspect, top, left, mirror = rng.random(5).tolist()
        area = full_height * full_width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            top, left = int(top * (full_height - height + 1)), int(left * (full_width - width + 1))
            break
    else:
        aspect = min(max(full_width / full_height, ratio[0]), ratio[1])
        width = min(full_width, max(1, round(full_height * aspect)))
        height = min(full_height, max(1, round(full_width / aspect)))
        top, left = (full_height - height) // 2, (full_width - width) // 2
    part = _resize_quickly(image[top : top + height, left : left + width], *shape)
    return cv2.flip(part, 1) if mirror < 0.5 else part


def center_crop(image, shape):
    """The original's test transform: the short side becomes 256/224 of the crop's, then the centre is cut out."""
    height, width = shape
    scale = max(height / image.shape[0], width / image.shape[1]) * 256 / 224
    # A picture far longer than the crop is cut first: all of a 10 x 10000 one would grow to hundreds of megabytes.
    y, x = (max(0, int(full - 4 * side / scale) // 2) for full, side in zip(image.shape, shape))
    image = image[y : image.shape[0] - y, x : image.shape[1] - x]
    image = _resize(image, max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale)))
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def resize(image, shape):
    """The whole picture at `shape` (height, width), its aspect ratio not kept."""
    return _resize(image, *shape)


TEST_TRANSFORMS = {"center_crop": center_crop, "resize": resize}


# ---------------------------------------------------------------- batches


def class_balanced_batches(labels, batch_size, samples_each_class, seed, epoch, num_batches):
    """Yields `num_batches` index arrays [batch_size]: K images of each of batch_size/K classes.

    The classes of a batch are distinct, and so are a class's K images where it has K; smaller classes are drawn with
    replacement. Over an epoch every image comes about once, so that large classes come more often than small ones.

    Args:
        labels: int64 [N].
        samples_each_class: K; must divide batch_size.
        seed, epoch: all that the draw depends on.

    Raises: UserError for an impossible combination.
    """
    k = samples_each_class
    check_balance(len(np.unique(labels)), batch_size, k)
    rng = np.random.default_rng([seed, epoch])
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.unique(labels[order], return_index=True)[1][1:])
    queues = [[] for _ in members]

    def refill(c):
        images = rng.permutation(members[c])
        if len(images) < k:
            queues[c].append(np.concatenate([images, rng.choice(images, k - len(images))]))
            return
        groups = [images[i : i + k] for i in range(0, len(images) - k + 1, k)]
        rest = images[len(groups) * k :]
        if len(rest):
            groups.append(np.concatenate([rest, rng.choice(images[: len(groups) * k], k - len(rest), replace=False)]))
        queues[c].extend(groups)

    num_classes = batch_size // k
    left = np.zeros(len(members), np.int64)  # groups that wait in each class's queue
    for _ in range(num_batches):
        first, others = np.zeros(0, np.int64), np.flatnonzero(left)
        if len(others) < num_classes:  # a new round; what is left of the old one comes first
            first, others = others, np.flatnonzero(left == 0)
            for c in others:
                refill(c)
                left[c] = len(queues[c])
        weight = left[others] / left[others].sum()
        chosen = np.concatenate([first, rng.choice(others, num_classes - len(first), replace=False, p=weight)])
        left[chosen] -= 1
        yield np.concatenate([queues[c].pop() for c in chosen])


def check_balance(num_classes, batch_size, samples_each_class):
    """Raises a UserError where batches of K images of batch_size/K classes can't be made."""
    k = samples_each_class
    if batch_size % k:
        nearest = max(k, round(batch_size / k) * k)
        raise UserError(
            f"a batch of {batch_size} is not divisible by --samples_each_class={k}; the nearest that is: {nearest}"
        )
    if num_classes < 2:
        raise UserError("the list has one class: a metric loss needs images of at least two")
    if batch_size == k:
        raise UserError(f"a batch of {batch_size} with --samples_each_class={k} has one class: it takes at least two")
    if num_classes < batch_size // k:
        raise UserError(
            f"a batch of {batch_size} with --samples_each_class={k} needs {batch_size // k} classes, the list has "
            f"{num_classes}: take --train_batch_size={num_classes * k} or less, or a larger --samples_each_class"
        )


def shuffled_batches(count, batch_size, seed, epoch, num_batches):
    """Yields `num_batches` index arrays [min(batch_size, count)] from one shuffling of 0..count-1 after the other."""
    rng = np.random.default_rng([seed, epoch])
    batch_size = min(batch_size, count)
    waiting = np.zeros(0, np.int64)
    for _ in range(num_batches):
        if len(waiting) < batch_size:
            fresh = rng.permutation(count)
            # No image twice in a batch that spans two shufflings.
            fresh = np.concatenate([fresh[~np.isin(fresh, waiting)], fresh[np.isin(fresh, waiting)]])
            waiting = np.concatenate([waiting, fresh])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def sequential_batches(count, batch_size):
    """Yields index arrays that cover 0..count-1 in order; the last one may be smaller."""
    for start in range(0, count, batch_size):
        yield np.arange(start, min(start + batch_size, count))


def substitutes(labels, batch, start, row):
    """Yields the pictures that may take the place of the bad one in `row` of a batch, the best first.

    First others of its class, those that are not in the batch before those that are; then pictures of a class that is
    not in the batch, the same one for all of a class's bad pictures; then any.

    The rows of a class have their turns at its pictures, so that no two take the same one, although nothing is known
    here of the other rows: in another process, they may be bad or not.

    Args:
        labels: int64 [N], of the list.
        batch: int64 [B], as it was drawn; start: its position. They and `row` are all that the draw depends on.
    """
    label = labels[batch[row]]
    rows = np.flatnonzero(labels[batch] == label)
    turn = np.searchsorted(rows, row)
    rng = np.random.default_rng([start, np.searchsorted(np.unique(labels), label)])

    def in_turns(pictures):
        pictures = rng.permutation(pictures)
        return np.concatenate([pictures[turn :: len(rows)], pictures])

    own = np.flatnonzero(labels == label)
    own = own[own != batch[row]]
    used = np.isin(own, batch)
    yield from in_turns(own[~used])
    yield from in_turns(own[used])
    for other in rng.permutation(np.setdiff1d(labels, labels[batch])):
        yield from in_turns(np.flatnonzero(labels == other))
    yield from in_turns(np.arange(len(labels)))


def read_batches(
    samples,
    batches,
    transform,
    shape,
    labels=None,
    num_workers=None,
    bad_images=None,
    replace=False,
    position=0,
    share=None,
    max_pixels=MAX_PIXELS,
):
    """Reads pictures in worker threads, a few batches ahead, and yields `Batch`es in the order of `batches`.

    Args:
        samples: Samples.
        batches: iterable of index arrays.
        transform: function (image, position) -> uint8 [H, W, 3]; `position` counts the pictures drawn so far, so that
            a random transform can depend on it and not on the thread that runs it.
        shape: (H, W).
        labels: int64 [N] for the batches' `label`; default: those of the samples.
        num_workers: threads; None: one a CPU.
        bad_images: None: a bad picture is a UserError. A list: it is left out, and (index, reason) appended here once.
        replace: True puts another picture in the place of a bad one (see `substitutes`), so that a batch is only
            smaller where there is no good picture left. False: a batch gets smaller.
        position: of the first picture.
        share: function number of pictures -> slice of those of each batch that are read; default: all. Positions
            and replacements are those of the whole batch.
        max_pixels: a picture with more is a bad one.

    A worker's error is raised here. Closing the generator ends the workers.
    """
    workers = num_workers or max(1, cpu_count() // local_world_size())
    cv2.setNumThreads(1)  # the threads here are enough; OpenCV's own would fight with them and with the network's
    Image.MAX_IMAGE_PIXELS = None  # max_pixels is in its place
    warnings.filterwarnings("ignore", module="PIL")  # on odd EXIF data, palettes, and sizes that are still accepted
    labels = samples.labels if labels is None else labels
    closing = threading.Event()
    known_bad = {}

    def read(images, index, rows, position):
        """Reads the pictures index[rows] into images[rows]; -> {row: reason} of the bad ones."""
        bad = {}
        for row in rows:
            if closing.is_set():
                break
            try:
                images[row] = transform(load(samples.paths[index[row]], max_pixels), position + row)
            except BadImage as error:
                bad[row] = str(error)
                if bad_images is None:
                    message = f"{where(samples, index[row])}: {error} (--on_bad_image=skip goes on without)"
                    raise UserError(message) from None
        return bad

    def note(index, reason):
        if index not in known_bad:
            known_bad[index] = reason
            bad_images.append((int(index), reason))

    def mend(images, index, bad, position, whole, start):
        """Puts other pictures in the place of the bad ones; -> the rows that are good then.

        Not in the workers: what is chosen must depend on the whole batch and not on who comes first.
        """
        good = np.ones(len(index), bool)
        for row, reason in bad.items():
            good[row] = False
            note(index[row], reason)
        for row in bad if replace else ():
            for i in substitutes(samples.labels, whole, start, position - start + row):
                if i not in known_bad:
                    index[row] = i
                    again = read(images, index, [row], position)
                    if not again:
                        good[row] = True
                        break
                    note(i, again[row])
        return good

    pool = concurrent.futures.ThreadPoolExecutor(workers)
    queue, batches = collections.deque(), iter(batches)
    try:
        while True:
            # Two batches beyond the one handed out: one to take next, one being made.
            while len(queue) < 3 and (index := next(batches, None)) is not None:
                whole = np.array(index, np.int64)
                own = slice(0, len(whole)) if share is None else share(len(whole))
                index = whole[own].copy()
                images = np.empty((len(index), *shape, 3), np.uint8)
                parts = [part.tolist() for part in np.array_split(np.arange(len(index)), workers)]
                futures = [pool.submit(read, images, index, part, position + own.start) for part in parts if part]
                queue.append((images, index, position + own.start, whole, position, futures))
                position += len(whole)
            if not queue:
                return
            images, index, *where_it_was, futures = queue.popleft()
            bad = {row: reason for future in futures for row, reason in future.result().items()}
            if bad:
                good = mend(images, index, bad, *where_it_was)
                if not good.all():
                    images, index = images[good], index[good]
            if len(index):
                yield Batch(images, None if labels is None else labels[index], index)
    finally:
        closing.set()
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- for the scripts


def training_transform(shape, seed, epoch, min_area=0.08):
    """`random_resized_crop` whose draw depends on seed, epoch and position alone."""

    def transform(image, position):
        return random_resized_crop(image, shape, np.random.default_rng([seed, epoch, position]), (min_area, 1.0))

    return transform


def read_in_order(samples, args, batch_size, bad_images):
    """Batches of all pictures of `samples` in their order, under the test transform; of several processes each gets
    every so many-th.

    Args:
        args: what `add_data_arguments` defines.
        bad_images: with --on_bad_image=skip, (index, reason) of each bad picture is appended here.
    """
    shape = args.image_shape[1:]
    transform = TEST_TRANSFORMS[args.test_transform]
    # Whole batches, so that a picture's feature comes out of the same one whatever the number of processes.
    batches = itertools.islice(sequential_batches(len(samples.paths), batch_size), rank(), None, world_size())
    return read_batches(
        samples,
        batches,
        lambda image, position: transform(image, shape),
        shape,
        num_workers=args.num_workers,
        max_pixels=args.max_pixels,
        bad_images=bad_images if args.on_bad_image == "skip" else None,
    )


def report_bad_images(samples, bad):
    """Says on stderr how many pictures were skipped, and the first of them."""
    if bad:
        index, reason = bad[0]
        print(f"warning: skipped {len(bad)} bad images; the first: {where(samples, index)}: {reason}", file=sys.stderr)


def image_shape(text):
    """The type of --image_shape: 3,height,width."""
    try:
        channels, height, width = (int(part) for part in text.split(","))
        if channels != 3 or not 8 <= min(height, width) <= max(height, width) <= 4096:
            raise ValueError
    except ValueError:
        message = f"expected 3,height,width with 8 to 4096 pixels each way, such as 3,224,224, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return [channels, height, width]


def add_data_arguments(parser):
    """Adds the flags that describe lists and pictures, alike in all scripts."""
    group = parser.add_argument_group("data")
    group.add_argument("--train_list", default="data/CUB200_train.txt", help="list of the training images: path label")
    group.add_argument(
        "--val_list", default="data/CUB200_val.txt", help="list of the images that recall is computed on"
    )
    group.add_argument("--data_dir", help="put before relative paths in a list (default: the list file's own folder)")
    group.add_argument(
        "--image_shape", type=image_shape, help="3,height,width (default: the checkpoint's, else 3,224,224)"
    )
    group.add_argument(
        "--test_transform",
        choices=list(TEST_TRANSFORMS),
        help="center_crop: short side to 256/224 of the crop, then its centre, the original; resize: the whole "
        "picture, for images that are cut to the object already (default: the checkpoint's, else center_crop)",
    )
    group.add_argument("--num_workers", type=number(int, low=1), help="threads that read images (default: one a CPU)")
    group.add_argument(
        "--on_bad_image",
        choices=("fail", "skip"),
        default="fail",
        help="what a missing or broken image does: end the run, or be counted and left out (in training, another of "
        "its class takes its place)",
    )
    group.add_argument(
        "--max_pixels", type=number(int, low=1), default=MAX_PIXELS, help="an image with more counts as a broken one"
    )
    group.add_argument(
        "--seed", type=number(int, low=0, high=2**31 - 1), help="fixes every random draw (default: drawn and logged)"
    )
    group.add_argument("--use_gpu", type=boolean, default=True, help="False: stay on the CPU even where there is a GPU")
    return group
