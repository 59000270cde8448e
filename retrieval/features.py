"""Files of features: written and read in blocks, so that a million pictures need no second copy in memory.

    *.npz      features float32 [N, D] (as they come out of the network: not brought to length 1), paths [N], labels
               int64 [N] where there are labels; classes, texts "<label> <name>"; made_by, texts as of `made_by`;
               folder, the one that relative paths count from
    *.csv      a line a picture: path, label, f0, f1 ...
    *.parquet  path, label, vector, neighbours {ids: rows of the file, distances: 1 - cosine}; with pyarrow

An .npz is read as somebody else's: no pickle, nothing compressed, and no more of it at once than a block.
"""

import collections
import contextlib
import csv
import io
import math
import os
import re
import struct
import sys
import zipfile

import numpy as np

import files
from retrieval import exported_run
from utility import UserError, plain
from weights.raw import hash_of_arrays

SUFFIXES = (".npz", ".csv", ".parquet")
BLOCK_BYTES = 2**24  # that are read or written at once
MOST_SIZE = 2**20  # values of a feature that is read
MOST_PATH = 2**16  # characters of a path that is read
MOST_TABLE = 2**17  # bytes of the table of what a .npz holds
MOST_MADE_BY = 2**16  # bytes
PARQUET_MARK = b"infer.py --feature_file"

# What reading an .npz raises that is damaged, or somebody else's.
BROKEN = (OSError, ValueError, KeyError, EOFError, MemoryError, NotImplementedError, struct.error, zipfile.BadZipFile)

# Features with the pictures they are of. features: [N, D], paths: [N], labels: [N] or None: NumPy arrays, or Stored
# ones; classes: [C], texts "<label> <name>", or None; made_by: texts as of `made_by`, or None; source: what messages
# call it.
Gallery = collections.namedtuple("Gallery", "features paths labels classes made_by source")


def gather(samples, found, classes, made_by, source):
    """The Gallery of extraction.Features of reader.Samples.

    Args:
        classes: {label: name}, or None.
    """
    paths = np.array([samples.paths[index] for index in found.index], object)
    labels = None if samples.labels is None else samples.labels[found.index]
    texts = [f"{label} {name}" for label, name in sorted((classes or {}).items())]
    return Gallery(found.features, paths, labels, np.array(texts, object), made_by, source)


def class_names(gallery, labels):
    """{label: name} of those of the labels (a set) whose classes have names in the gallery."""
    names = {}
    for _, texts in blocks(gallery.classes) if gallery.classes is not None else ():
        for text in texts:
            label, _, name = str(text).partition(" ")
            if name and re.fullmatch("-?[0-9]{1,19}", label) and int(label) in labels:
                names[int(label)] = name
    return names


def blocks(array):
    """Yields (first row, rows) of a NumPy array or a Stored one."""
    row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    rows = max(1, BLOCK_BYTES // max(row_bytes, 64))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


# ---------------------------------------------------------------- what made them


def made_by(opened, refinement, whitening, precision):
    """Which weights and settings decide a feature: texts "name=value", the first of the weights.

    An exported model has the texts of the network that it was made of.

    Args:
        opened: extraction.Opened.
        refinement: refine.Refinement; whitening: refine.Whitening or None.
        precision: float32, bf16 or float16.
    """
    if opened.made_by:
        return list(opened.made_by)
    settings = opened.settings
    values = {
        "weights": hash_of_arrays(_tensors(opened.network))[:32],
        **{name: getattr(settings, name) for name in ("model", "pooling", "embedding_norm", "embedding_size")},
        "last_stride": settings.last_stride,
        "image_shape": ",".join(map(str, settings.image_shape)),
        "test_transform": settings.test_transform,
        "view": refinement.views or "the picture",
        "whitening": hash_of_arrays(enumerate(whitening[:2]))[:32] if whitening else "none",
        "precision": precision,
    }
    return [f"{name}={value}" for name, value in values.items()]


def _tensors(network):
    """(name, array) of all that decides a feature in a network's weights: all but the head."""
    for name, value in sorted(network.state_dict().items()):
        if not name.startswith("head."):
            yield name, value.numpy()


def check_made_by(source, there, here, way_out=None):
    """Raises a UserError where the features of a file can't be compared with those of the network in use.

    What can, but not to the last digit, or is not known, is noted.

    Args:
        source: what messages call the file; there: its texts as of `made_by`, or None; here: those of the network.
        way_out: what to do about it; None: of a gallery.
    """
    there = dict(text.partition("=")[::2] for text in there or ())
    here = dict(text.partition("=")[::2] for text in here)
    source = plain(source, 1000)
    for name in [name for name in here if name in there and name not in ("weights", "precision")]:
        if there[name] != here[name]:
            values = f"{plain(there[name], 100)} there, {plain(here[name], 100)} here"
            way_out = way_out or (_WHITEN_ONCE if name == "whitening" else _WAY_OUT)
            raise UserError(f"{source}: its features are of another {name}: {values}: {way_out}")
    if there.get("weights", here["weights"]) != here["weights"]:
        raise UserError(f"{source}: its features are of other weights than those in use: {way_out or _WAY_OUT}")
    if "weights" not in there:
        print(f"note: {source} does not say of which weights its features are: taken as these")
    elif there.get("precision", here.get("precision")) != here.get("precision"):
        values = f"{plain(there['precision'], 50)} there, {here.get('precision')} here"
        print(f"note: {source}: another precision ({values}): cosines are off by about 0.001")


_WAY_OUT = "index its pictures anew with these weights and flags, or give those of the gallery"
_WHITEN_ONCE = "learn it once: --save_whiten=whiten.npz for the gallery, --whiten=whiten.npz for the search"


def check_size(gallery, size):
    """Raises a UserError where a gallery's features have another size than those of the queries."""
    if gallery.features.shape[1] != size:
        sizes = f"{gallery.features.shape[1]} there, {size} here"
        raise UserError(f"{gallery.source}: its features are of another size: {sizes}: {_WAY_OUT}")


# ---------------------------------------------------------------- write


def check_feature_file(path):
    """Raises a UserError where --feature_file can't be written."""
    if not path.endswith(SUFFIXES):
        raise UserError(f"--feature_file={path}: must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.endswith(".parquet"):
        import_pyarrow()
    files.check_output(path, is_feature_file, "a feature file of infer.py")


def is_feature_file(path):
    """Whether a file is one that --feature_file has written before."""
    try:
        if path.endswith(".csv"):
            with files.open_file(path) as file:
                return bool(re.match(b"path,(label,)?f0[,\n]", file.readline(100)))
        if path.endswith(".parquet"):
            return _is_parquet_of_ours(path)
        return exported_run.is_feature_file(path)
    except OSError:
        return False


def write(path, gallery, neighbours=None):
    """Writes a Gallery to a file of the kind that its name ends in.

    Args:
        neighbours: neighbours.Neighbours of its own rows, for a .parquet; or None.
    """
    if path.endswith(".csv"):
        _write_csv(path, gallery)
    elif path.endswith(".parquet"):
        _write_parquet(path, gallery, neighbours)
    else:
        _write_npz(path, gallery)
    count, size = gallery.features.shape
    print(f"wrote {count} features of size {size} to {plain(path, 1000)}")


def _write_npz(path, gallery):
    folder = np.array([os.getcwd()], object)
    arrays = {"features": gallery.features, "paths": gallery.paths, "labels": gallery.labels, "folder": folder}
    if gallery.made_by:
        arrays["made_by"] = np.array(gallery.made_by)
    if gallery.labels is not None and gallery.classes is not None and len(gallery.classes):
        arrays["classes"] = gallery.classes
    with files.atomic_write(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            if array is None:
                continue
            dtype = array.dtype
            if dtype.hasobject:  # texts
                dtype = np.dtype(f"<U{max(1, max(map(len, array), default=1))}")
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": array.shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for _, rows in blocks(array):
                    member.write(rows.astype(dtype, copy=False).tobytes())


def _write_csv(path, gallery):
    names = [f"f{n}" for n in range(gallery.features.shape[1])]
    with files.atomic_write(path, "wb") as file, text_file(file) as text:
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["path", *(["label"] if gallery.labels is not None else []), *names])
        for index, name in enumerate(gallery.paths):
            label = [] if gallery.labels is None else [gallery.labels[index]]
            rows.writerow([name, *label, *(np.format_float_positional(x, trim="0") for x in gallery.features[index])])


@contextlib.contextmanager
def text_file(file):
    """A file that is open for bytes, to write text to: UTF-8, in which names of other encodings stay what they are."""
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    try:
        yield text
    finally:
        text.detach()  # which flushes, and leaves the file open


def import_pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("a .parquet file needs pyarrow: pip install pyarrow") from None
    return pyarrow


def _write_parquet(path, gallery, neighbours):
    pa = import_pyarrow()
    kinds = {"path": pa.string(), "label": pa.int64(), "vector": pa.list_(pa.float32())}
    ranks = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float64()))])
    kinds = {**kinds, "neighbours": ranks}
    if gallery.labels is None:
        del kinds["label"]
    if neighbours is None:
        del kinds["neighbours"]
    about = {b"written_by": PARQUET_MARK, b"made_by": "\n".join(gallery.made_by or ()).encode()}
    schema = pa.schema(list(kinds.items()), metadata=about)
    with files.atomic_write(path, "wb") as file, pa.parquet.ParquetWriter(file, schema) as writer:
        for start, vectors in blocks(gallery.features):
            rows = slice(start, start + len(vectors))
            columns = {
                "path": pa.array([_utf8(text) for text in gallery.paths[rows]], kinds["path"]),
                "vector": _lists(pa, vectors.astype(np.float32, copy=False)),
            }
            if "label" in kinds:
                columns["label"] = pa.array(gallery.labels[rows], kinds["label"])
            if neighbours is not None:
                columns["neighbours"] = pa.array(_ranks(neighbours, rows), ranks)
            writer.write_table(pa.table({name: columns[name] for name in kinds}, schema=schema))


def _utf8(text):
    """A path as UTF-8 can have it."""
    return text.encode(errors="backslashreplace").decode()


def _lists(pa, rows):
    """Rows of a matrix as a column of lists."""
    ends = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.ascontiguousarray(rows).ravel()))


def _ranks(neighbours, rows):
    """What a viewer takes as neighbours, for each of the rows."""
    found = []
    for index, cosine in zip(neighbours.index[rows], neighbours.cosine[rows]):
        there = index >= 0
        found.append({"ids": index[there].tolist(), "distances": (1 - cosine[there]).tolist()})
    return found


def _is_parquet_of_ours(path):
    with files.open_file(path) as file:
        length = os.fstat(file.fileno()).st_size
        if length < 12 or file.read(4) != b"PAR1":
            return False
        file.seek(length - 8)
        footer = struct.unpack("<I4s", file.read(8))[0]
        file.seek(max(0, length - 8 - min(footer, 2**24)))
        return PARQUET_MARK in file.read(min(footer, 2**24))


# ---------------------------------------------------------------- read


class Stored:
    """An array in a file, of which rows are read as they are asked for: by a slice or by an array of row numbers."""

    def __init__(self, file, offset, dtype, shape, source):
        self.file, self.offset, self.dtype, self.shape, self.source = file, offset, dtype, shape, source
        self.row_bytes = dtype.itemsize * math.prod(shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._read(start, max(0, stop - start))
        parts = [self._read(int(row), 1) for row in rows]
        return np.concatenate(parts) if parts else np.zeros((0, *self.shape[1:]), self.dtype)

    def _read(self, start, count):
        try:
            self.file.seek(self.offset + start * self.row_bytes)
            data = self.file.read(count * self.row_bytes)
        except OSError as error:
            raise UserError(f"{self.source}: cannot read: {error.strerror}") from None
        if len(data) < count * self.row_bytes:
            raise UserError(f"{self.source}: has become shorter while it was read")
        if self.dtype.kind == "U" and (np.frombuffer(data, self.dtype.byteorder + "u4") > sys.maxunicode).any():
            raise UserError(f"{self.source}: damaged: text that is none")
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


class Reached:
    """Stored paths, of which relative ones count from `folder`, as they are reached from this process's folder.

    What is there from here stays as it is: pictures and file may have moved together.
    """

    def __init__(self, stored, folder):
        self.stored, self.folder = stored, folder

    def __len__(self):
        return len(self.stored)

    def __getitem__(self, rows):
        return np.array([self._reach(path) for path in self.stored[rows].tolist()], object)

    def _reach(self, path):
        with contextlib.suppress(ValueError):  # a name that no file can have
            if not os.path.isabs(path) and not os.path.exists(path):
                return os.path.relpath(os.path.join(self.folder, path))
        return path


def reached(paths, folder):
    """Stored paths that count from `folder`: as they are where that is this process's, or is not there."""
    return paths if folder == os.getcwd() or not os.path.isdir(folder) else Reached(paths, folder)


class _Limited:
    """A file of which zipfile, that reads the table of an archive as a whole, gets no more than MOST_TABLE at once."""

    def __init__(self, file):
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, count=-1):
        data = self._file.read(MOST_TABLE + 1 if count < 0 else min(count, MOST_TABLE + 1))
        if len(data) > MOST_TABLE:
            raise ValueError("holds too many arrays")
        return data


def open_features(path, need=("features", "paths")):
    """The Gallery in an .npz file that --feature_file or an export's run.py has written; it stays open.

    Args:
        need: the names of the arrays that it must have.

    Raises: UserError where it is none, or damaged.
    """
    try:
        file = files.open_file(path)
        arrays = _stored_arrays(file, path, need)
        made = arrays.get("made_by")
        if made is not None and len(made) * made.row_bytes > MOST_MADE_BY:
            raise ValueError("made_by is too long")
        if "paths" in arrays and "folder" in arrays:
            arrays["paths"] = reached(arrays["paths"], "".join(arrays["folder"][:1]))
        return Gallery(
            *(arrays.get(name) for name in ("features", "paths", "labels", "classes")),
            None if made is None else made[:].tolist(),
            path,
        )
    except BROKEN as error:
        why = plain(getattr(error, "strerror", None) or error, 200)
        raise UserError(
            f"{path}: no features that can be used: {why} (infer.py --input <pictures> --feature_file=... writes them)"
        ) from None


# What an .npz of features may hold: kinds of type and dimensions.
_TEXTS = dict.fromkeys(("paths", "classes", "made_by", "folder"), ("U", 1))
_ARRAYS = {"features": ("f", 2), "labels": ("iu", 1), **_TEXTS}


def _stored_arrays(file, source, need):
    """{name: Stored} of an .npz of features. Raises: ValueError and whatever zipfile makes of a damaged one."""
    arrays = {}
    table = {info.filename: info for info in zipfile.ZipFile(_Limited(file)).infolist()}
    for name, (kinds, dimensions) in _ARRAYS.items():
        if f"{name}.npy" not in table:
            continue
        array = _stored_array(file, table[f"{name}.npy"], source)
        most = MOST_SIZE if name == "features" else MOST_PATH
        width = math.prod(array.shape[1:]) if name == "features" else array.dtype.itemsize // 4
        if array.dtype.kind not in kinds or len(array.shape) != dimensions or not 0 < width <= most:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        arrays[name] = array
    missing = [name for name in need if name not in arrays]
    if missing:
        raise ValueError(f"no {missing[0]} in it")
    lengths = [len(arrays[name]) for name in ("features", "paths", "labels") if name in arrays]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(f"{lengths[0]} features and {lengths[-1]} others")
    return arrays


def _stored_array(file, info, source):
    """The Stored array of a member of an .npz. Raises: ValueError where it is compressed, or another than it says."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise ValueError(f"{info.filename} is compressed")
    file.seek(info.header_offset)
    signature, name_length, more = struct.unpack("<4s22xHH", file.read(30))
    start = info.header_offset + 30 + name_length + more
    if signature != b"PK\3\4" or start + info.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{info.filename} is cut off")
    file.seek(start)
    head = io.BytesIO(file.read(min(info.file_size, 2**14)))
    version = np.lib.format.read_magic(head)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{info.filename} is of version {version}")
    shape, by_columns, dtype = read_header[version](head)
    plain_type = not (dtype.hasobject or dtype.names or dtype.subdtype) and dtype.itemsize
    if not plain_type or (by_columns and len(shape) > 1) or min(shape, default=0) < 0:
        raise ValueError(f"{info.filename} is {dtype} {list(shape)}, which is not read")
    if math.prod(shape) * dtype.itemsize != info.file_size - head.tell():
        raise ValueError(f"{info.filename} has another length than it says")
    return Stored(file, start + head.tell(), dtype, shape, source)
