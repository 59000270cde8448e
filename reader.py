"""List files -> Samples -> batches of uint8 pictures, read ahead in threads.

No paddle here: a batch is NumPy, and the network normalises it. Nothing is copied between processes, and what is drawn
at random never depends on the timing of threads.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import os
import re
import sys
import threading
import warnings

import cv2
import numpy as np
from PIL import Image

import files
import models
import pictures
import sampler
import spelling
import transforms
from runtime import parallel
from runtime.process import cpu_count
from transforms import MAX_PIXELS, TEST_TRANSFORMS, BadImage
from utility import UserError, boolean, number, parse_row, plain

# paths: list of str. labels: int64 [N], or None where there are none. source, lines: the list file and, for each
# picture, its line there (None, None for pictures named on the command line). Samples joined from several inputs have
# no source, and for each picture "<list>:<line>" or None as its line.
Samples = collections.namedtuple("Samples", "paths labels source lines")
# image: uint8 RGB [B, H, W, 3]; label: int64 [B] (class index or list label, as handed to read_batches) or None;
# index: int64 [B], the pictures' positions in the list; bad: (index, reason) of each bad picture that was met for the
# first time. B is 0 where a batch has no good picture.
Batch = collections.namedtuple("Batch", "image label index bad", defaults=[()])

VAL_LIST = "data/CUB200_val.txt"  # where nobody names one
MOST_LINE = 2**16  # characters of a line in a list
# `<path> <label> <id>`, as PaddleClas has it: the id is of the image or, for vehicles, the camera.
THIRD = re.compile(r"(.*\S)(\s+[+-]?[0-9]+)\s+[0-9]+(\|[0-9]+)?")
CROPS = re.compile(r"boxes(_margin_[0-9.e+-]+)?(_context|_mean)?")  # data.boxes.Crop.folder
MOST_ASKED = 100  # lines that are looked at for whether a list is one with such ids


@dataclasses.dataclass(frozen=True)
class Reading:
    """How pictures are read, in the flags' words."""

    image_shape: list  # 3, height, width
    test_transform: str = "center_crop"
    num_workers: int = None
    on_bad_image: str = "fail"
    max_pixels: int = MAX_PIXELS
    quiet: bool = False  # no progress bar

    @property
    def shape(self):
        """(height, width)"""
        return tuple(self.image_shape[1:])


# ---------------------------------------------------------------- list files


def read_list(path, data_dir=None, need_labels=True):
    """Reads a list file: on each line a path, white space, and an integer label. Paths may contain spaces.

    PaddleClas' third column, an id behind the label, is passed over where `_has_ids` finds one.

    Args:
        data_dir: put before relative paths; None: the list file's own folder.
        need_labels: False also takes a list of paths alone; its labels are None.

    Raises: UserError naming file and line for a missing or empty list, and for a line without an integer label.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: a folder, not a list file: data/split.py writes lists for a folder of images")
    try:
        check_text(path)
        rows = [(line, row) for line, row in _rows(path) if row]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot read this list file: {why} (data/split.py writes one for a folder of images; "
            "data/download_cub200.sh fetches CUB-200, data/make_sample.py draws a small sample)"
        ) from None
    if not rows:
        raise UserError(f"{path}: the list is empty")
    folder = os.path.dirname(path) if data_dir is None else data_dir
    lines, rows = [line for line, _ in rows], [row for _, row in rows]
    if _has_ids(rows, folder):
        rows = [_without_id(path, line, row) for line, row in zip(lines, rows)]
        if parallel.is_first():
            print(f"note: {plain(path, 1000)}: the third column, of image or camera numbers, is passed over")
    labels = None
    if need_labels or _is_labelled(rows, folder):
        fields = [_parse(path, line, row) for line, row in zip(lines, rows)]
        rows, labels = [name for name, _ in fields], np.array([label for _, label in fields], np.int64)
    rows, how = spelling.respell(rows, folder)
    if how and parallel.is_first():
        print(f"note: {plain(path, 1000)}: paths are read {how}")
    return Samples([os.path.join(folder, row) for row in rows], labels, path, lines)


def check_text(path):
    """Raises a UserError where a file is something else that people have beside their lists; OSError, ValueError."""
    start = pictures.read_start(path)
    if is_utf_16(start):
        raise UserError(f"{path}: is in UTF-16, as PowerShell writes it: save it as UTF-8")
    found = pictures.format_of(start)
    if found:
        raise UserError(f"{path}: a picture ({found}), not a list file: a list has '<path> <label>' on each line")
    for begin, what in ((b"PK\3\4", "an .npz or another zip archive"), (b"\x80", "a pickle, such as .pdparams")):
        if start.startswith(begin):
            raise UserError(f"{path}: {what}, not a list file: a list has '<path> <label>' on each line")


def _has_ids(rows, folder):
    """Whether the lines of a list are `<path> <label> <id>` rather than `<path> <label>` with a path that ends in a
    number.

    The first line says it whose image is there under one of these readings; if under both, it has no id. Where no image
    is there, the suffix of the first path does: `a.jpg 1 2` has an id, `a 1 2` has none. `3|1` is an id and no label.
    """
    if not THIRD.fullmatch(rows[0]):
        return False
    for row in rows[:MOST_ASKED]:
        found = THIRD.fullmatch(row)
        if not found:
            continue
        path, label, camera = found.groups()
        others = (row,) if camera else (row, path + label)
        if any(os.path.isfile(os.path.join(folder, name)) for name in others):
            return False
        if camera or os.path.isfile(os.path.join(folder, path)):
            return True
    path, _, _ = THIRD.fullmatch(rows[0]).groups()
    return path.lower().endswith(pictures.SUFFIXES)


def _without_id(path, line, row):
    """A row of a list without its third column. Raises: UserError naming file and line where it has none."""
    found = THIRD.fullmatch(row)
    if not found:
        what = f"expected '<path> <label> <id>' as on the first line, found '{plain(row)}'"
        raise UserError(f"{path}:{line}: {what}")
    return found[1] + found[2]


def _is_labelled(rows, folder):
    """Whether a list that need not have labels has them: names may end in a number, too."""
    ends = next((row for row in rows if re.search(r"\s[+-]?[0-9]+$", row)), None)
    return ends is not None and not os.path.isfile(os.path.join(folder, ends))


def _parse(path, line, row):
    """(path, label) of a row of a list. Raises: UserError naming file and line."""
    fields = parse_row(row)
    if len(fields) < 2:
        comma = "; white space parts them, not a comma" if "," in row else ""
        message = f"no label on this line: expected '<path> <label>', found '{plain(row)}'{comma}"
        raise UserError(f"{path}:{line}: {message}")
    if not re.fullmatch(r"[+-]?[0-9]{1,1000}", fields[1]):  # int() would take 1_0, too
        how = "expected '<path> <label>' with numbered classes, as data/split.py writes it for class folders"
        raise UserError(f"{path}:{line}: the label '{plain(fields[1])}' is no integer; {how}")
    label = int(fields[1])
    if not -(2**63) <= label < 2**63:
        raise UserError(f"{path}:{line}: the label {plain(label, 50)} does not fit into 64 bits")
    return fields[0], label


def read_class_names(path):
    """{label: name} of the classes of a list: from <name>_classes.txt beside <name>_train.txt, lines `<label> <name>`.

    Empty where there is no such file, which data/split.py writes, or where it can't be read as one.
    """
    base, _, _ = os.path.splitext(path)[0].rpartition("_")
    try:
        rows = [row.split(None, 1) for _, row in _rows(f"{base}_classes.txt") if row]
        return {int(label): name for label, name in rows}
    except (OSError, ValueError, UserError):
        return {}


def _rows(path):
    """Yields (number, text without white space around it) of each line of a list file.

    Raises: OSError, ValueError; UserError where a line shows that it is no list: before what may be endless is read.
    """
    # utf-8-sig: editors on Windows begin files with a byte order mark.
    with io.TextIOWrapper(files.open_file(path), encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in itertools.count(1):
            row = file.readline(MOST_LINE)
            if not row:
                return
            if "\0" in row:
                raise UserError(f"{path}:{line}: a zero byte: this is no text, and no list file")
            if len(row) == MOST_LINE:
                raise UserError(f"{path}:{line}: more than {MOST_LINE} characters: this is no list file")
            yield line, row.strip()


def find_images(inputs):
    """Samples without labels from paths of images and of folders (searched recursively, in sorted order).

    What is a picture in a folder, and what is left out, is said in pictures.py; a file that is named is taken.
    """
    paths, left_out = [], pictures.LeftOut()
    for path in inputs:
        if os.path.isdir(path):
            found = [os.path.join(folder, name) for folder, names in pictures.find(path, left_out) for name in names]
            if not found:
                raise UserError(f"{path}: no images in this folder" + (f" ({left_out})" if left_out.found else ""))
            paths += sorted(found)
        elif os.path.isfile(path):
            paths.append(path)
        else:
            what = "neither a file nor a folder" if os.path.exists(path) else "no such file or folder"
            what = "a link that leads nowhere" if os.path.islink(path) and not os.path.exists(path) else what
            raise UserError(f"{path}: {what}")
    if parallel.is_first():
        left_out.report()
    return Samples(paths, None, None, None)


def with_folder_labels(samples):
    """Samples of a folder, labelled by its class folders where it has some, as data/split.py labels them."""
    names = pictures.class_folders(samples.paths)
    if not names:
        return samples
    try:
        labels = pictures.label_classes(os.path.commonpath(names), set(names.values()))
    except UserError:  # two folders with one number: whatever they are, they are no classes
        return samples
    found = [labels[names[os.path.dirname(path)]] for path in samples.paths]
    return samples._replace(labels=np.array(found, np.int64))


def is_utf_16(start):
    """Whether a file that starts so is text in UTF-16: by its mark, or by the zero bytes of plain letters."""
    words = len(start) // 2
    zeros = max(start[1::2].count(0), start[::2].count(0))
    return start.startswith((b"\xff\xfe", b"\xfe\xff")) or (
        words > 3 and zeros > words / 2 and start.count(0) < 1.2 * words
    )


def is_binary(path):
    """Whether a file is a picture, or meant as one or no text at all, rather than a list of pictures."""
    try:
        start = pictures.read_start(path)
    except (OSError, ValueError):
        return False
    if pictures.format_of(start) is not None or path.lower().endswith(pictures.SUFFIXES):
        return True
    return b"\0" in start and not is_utf_16(start)  # of which read_list says so


def where(samples, index):
    """How a message names a picture: `<list>:<line>: <path>`."""
    line = samples.lines[index] if samples.lines else None
    place = line if samples.source is None else f"{samples.source}:{line}"
    path = plain(samples.paths[index], 1000)
    return path if place is None else f"{plain(place, 1000)}: {path}"


DIGESTS = 2  # that `fingerprint` is as it is now, in the description of a checkpoint


def fingerprint(samples, components=2, crops=True):
    """A digest of a list in its order: labels, and of each path the last components; the folders above may move.

    Args:
        components: 2, since names repeat in every class folder (0.jpg, 1.jpg, ...).
        crops: whether the name of a folder of crops (data/boxes.py) counts, too: in it pictures are called as the whole
            ones are.
    """

    def name(path):
        parts = os.path.normpath(path).split(os.sep)
        above = filter(CROPS.fullmatch, parts[:-components]) if crops else ()
        return "/".join([*above, *parts[-components:]])

    rows = (f"{name(path)} {label}\n" for path, label in zip(samples.paths, samples.labels))
    return hashlib.sha256("".join(rows).encode(errors="surrogateescape")).hexdigest()


def is_fingerprint(digest, samples, early=True):
    """Whether `digest` is that of the Samples; `early`: or what it was in checkpoints without DIGESTS."""
    if digest == fingerprint(samples):
        return True
    return early and digest in [fingerprint(samples, components, crops=False) for components in (2, 1)]


def report_bad_images(samples, bad):
    """Says on stderr how many pictures were skipped, and the first of them."""
    if bad:
        index, reason = bad[0]
        print(
            f"warning: skipped {len(bad)} bad images; the first: {where(samples, index)}: {plain(reason)}",
            file=sys.stderr,
        )


def list_bad_images(samples, bad, name="bad_images"):
    """{name: [[path, reason]]} of all that were skipped, for a file of JSON; {} where there are none."""
    return {name: [[samples.paths[index], reason] for index, reason in bad]} if bad else {}


# ---------------------------------------------------------------- batches


def read_batches(
    samples,
    batches,
    transform,
    shape,
    num_workers=None,
    skip_bad=False,
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
        num_workers: threads; None: one a CPU.
        skip_bad: False: a bad picture is a UserError. True: it is left out, and in the batch's `bad` once.
        replace: True puts another picture in the place of a bad one (see sampler.substitutes), so that a batch is only
            smaller where there is no good picture left. False: a batch gets smaller.
        position: of the first picture.
        share: function number of pictures -> slice of those of each batch that are read; default: all. Positions
            and replacements are those of the whole batch.
        max_pixels: a picture with more is a bad one.

    A worker's error is raised here. Closing the generator ends the workers.
    """
    workers = num_workers or max(1, cpu_count() // parallel.local_world_size())
    cv2.setNumThreads(1)  # the threads here are enough; OpenCV's own would fight with them and with the network's
    Image.MAX_IMAGE_PIXELS = None  # max_pixels is in its place
    warnings.filterwarnings("ignore", module="PIL")  # on odd EXIF data, palettes, and sizes that are still accepted
    loader = _Loader(samples, transform, shape, skip_bad, replace, max_pixels)
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    begun, batches = collections.deque(), iter(batches)
    try:
        while True:
            # Two batches beyond the one handed out: one to take next, one being made.
            while len(begun) < 3 and (index := next(batches, None)) is not None:
                whole = np.array(index, np.int64)
                own = slice(0, len(whole)) if share is None else share(len(whole))
                begun.append(loader.begin(pool, workers, whole, own, position))
                position += len(whole)
            if not begun:
                return
            images, index, bad = loader.finish(begun.popleft())
            yield Batch(images, None if samples.labels is None else samples.labels[index], index, bad)
    finally:
        loader.closing.set()
        pool.shutdown(cancel_futures=True)


# A batch that is being read: images uint8 [B, H, W, 3] and index int64 [B] of this process's share; whole: int64, the
# whole batch as it was drawn; first, start: the positions of the first picture of the share and of the whole.
_Begun = collections.namedtuple("_Begun", "images index whole first start futures")


class _Loader:
    """Reads the pictures of batches, and puts others in the place of bad ones; see `read_batches`."""

    def __init__(self, samples, transform, shape, skip_bad, replace, max_pixels):
        self.samples, self.transform, self.shape = samples, transform, shape
        self.skip_bad, self.replace, self.max_pixels = skip_bad, replace, max_pixels
        self.closing = threading.Event()
        self.known_bad = set()

    def begin(self, pool, workers, whole, own, start):
        """Has the workers of `pool` read the pictures whole[own]; -> _Begun."""
        index = whole[own].copy()
        images = np.empty((len(index), *self.shape, 3), np.uint8)
        parts = [part.tolist() for part in np.array_split(np.arange(len(index)), workers)]
        first = start + own.start
        futures = [pool.submit(self.read, images, index, part, first) for part in parts if part]
        return _Begun(images, index, whole, first, start, futures)

    def read(self, images, index, rows, first):
        """Reads the pictures index[rows] into images[rows]; -> {row: reason} of the bad ones."""
        bad = {}
        for row in rows:
            if self.closing.is_set():
                break
            try:
                picture = transforms.load(self.samples.paths[index[row]], self.max_pixels)
                images[row] = self.transform(picture, first + row)
            except BadImage as error:
                bad[row] = str(error)
                if not self.skip_bad:
                    place = where(self.samples, index[row])
                    raise UserError(f"{place}: {error} (--on_bad_image=skip goes on without)") from None
        return bad

    def finish(self, begun):
        """Waits for the pictures and mends the batch; -> images, index, [(index, reason)] of bad ones met first here.

        Not in the workers: what is chosen must depend on the whole batch and not on who comes first.
        """
        bad = {row: reason for future in begun.futures for row, reason in future.result().items()}
        if not bad:
            return begun.images, begun.index, []
        met = []
        good = np.ones(len(begun.index), bool)
        for row, reason in bad.items():
            good[row] = False
            self.note(begun.index[row], reason, met)
        if self.replace:
            for row in bad:
                good[row] = self.put_another(begun, row, met)
        return begun.images[good], begun.index[good], met

    def note(self, index, reason, met):
        if index not in self.known_bad:
            self.known_bad.add(index)
            met.append((int(index), reason))

    def put_another(self, begun, row, met):
        """Reads another picture into `row`; -> whether there is one that is good."""
        place = begun.first - begun.start + row  # in the whole batch
        for index in sampler.substitutes(self.samples.labels, begun.whole, begun.start, place):
            if index in self.known_bad:
                continue
            begun.index[row] = index
            bad = self.read(begun.images, begun.index, [row], begun.first)
            if not bad:
                return True
            self.note(index, bad[row], met)
        return False


def read_in_order(samples, reading, batch_size):
    """Batches of all pictures of `samples` in their order, under the test transform; of several processes each gets
    every n-th.

    Args:
        reading: Reading.
    """
    transform = TEST_TRANSFORMS[reading.test_transform]
    # Whole batches, so that a picture's feature comes out of the same one whatever the number of processes.
    batches = sampler.sequential_batches(len(samples.paths), batch_size)
    return read_batches(
        samples,
        itertools.islice(batches, parallel.rank(), None, parallel.world_size()),
        lambda image, position: transform(image, reading.shape),
        reading.shape,
        num_workers=reading.num_workers,
        max_pixels=reading.max_pixels,
        skip_bad=reading.on_bad_image == "skip",
    )


# ---------------------------------------------------------------- for the scripts


def add_data_arguments(parser, training=True):
    """Adds the flags that describe lists and pictures, alike in all scripts.

    Args:
        training: whether the script trains, and what is left open is not taken from a checkpoint.
    """
    group = parser.add_argument_group("data")
    if training:
        train_list, seed = "data/CUB200_train.txt", "fixes every random draw (default: drawn and logged)"
        group.add_argument("--train_list", default=train_list, help="list of the training images: path label")
        group.add_argument("--val_list", default=VAL_LIST, help="list of the images that recall is computed on")
    else:
        what = "list of the training images; eval.py counts those of --val_list that are among them"
        group.add_argument("--train_list", help=f"{what} (default: that of the checkpoint's run, where it is there)")
        where = f"(default: that of the checkpoint's run, else {VAL_LIST})"
        group.add_argument("--val_list", help=f"list of the images to look at: path label {where}")
        seed = "of the random weights, where there is no --pretrained_model (default: drawn)"
    group.add_argument("--data_dir", help="put before relative paths in a list (default: the list file's own folder)")
    models.add_picture_arguments(group)
    group.add_argument("--num_workers", type=number(int, low=1), help="threads that read images (default: one a CPU)")
    group.add_argument(
        "--on_bad_image",
        choices=("fail", "skip"),
        default="fail",
        help="what a missing or broken image does: end the run, or be counted and left out"
        + (", where another of its class takes its place" if training else ""),
    )
    group.add_argument(
        "--max_pixels",
        type=number(int, low=1, high=2**30),
        default=MAX_PIXELS,
        help="an image with more counts as a broken one; "
        "each worker may need 6 bytes (JPEG) to 23 (JPEG 2000) for each pixel of the largest",
    )
    group.add_argument("--seed", type=number(int, low=0, high=2**31 - 1), help=seed)
    gpu = "False: stay on the CPU even where there is a GPU (default: a GPU where there is one)"
    group.add_argument("--use_gpu", type=boolean, help=gpu)
    group.add_argument(
        "--quiet",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        help="no configuration, no progress, no lines for batches: figures, warnings and errors alone",
    )
    return group
