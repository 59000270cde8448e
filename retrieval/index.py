"""Indices of faiss: neighbours of large galleries in less time than exactly, of which some may be missed.

An index holds features of length 1 and gives candidates; their cosines are then computed from the gallery, so that
they are those of the exact search whatever the index keeps. A file of one is what faiss writes, then a line of JSON:
which gallery it is of, how it was made, its SHA-256 and the recall that was measured.
"""

import collections
import hashlib
import importlib.util
import json
import math
import os
import struct
import time
import zlib

import numpy as np

import files
from retrieval import features
from retrieval.neighbours import Neighbours, cosines, nearest, unit
from runtime import gpu
from utility import UserError, plain

LARGE, MANY = 100_000, 5_000  # pictures of a gallery, and queries, from which on an index may pay
MOST_TRAINING = 200_000  # rows that an index is trained on
SAMPLE = 100  # rows that its recall is measured on
EXACT = "exact"
_MAGIC = b"infer.py --index_file\n"
_MOST_ABOUT = 2**16

# index: of faiss; about: {"gallery", "factory", "recall", "k"}.
Index = collections.namedtuple("Index", "index about")


def check_index(search):
    """Raises a UserError where the flags of a search.Search ask for an index that can't be."""
    if search.index_file:
        if search.index == EXACT:
            raise UserError("--index=exact needs no --index_file: leave one of them out")
        if not search.index_file.endswith(".faiss"):
            raise UserError(f"--index_file={search.index_file}: must end in .faiss")
        files.check_output(search.index_file, lambda path: _read_about(path) is not None, "an index that was saved")
    if (search.index_file or search.index not in ("", EXACT)) and not _has_faiss():
        raise UserError("--index and --index_file need faiss: pip install faiss-cpu")


def _has_faiss():
    return importlib.util.find_spec("faiss") is not None


def open_index(search, gallery, queries):
    """The Index of a features.Gallery that the flags mean, loaded or built; None for exact search.

    Args:
        queries: their number.
    """
    count = len(gallery.features)
    if search.index == EXACT or not (search.index or search.index_file or count > LARGE):
        return None
    if not (search.index or search.index_file):
        if not _has_faiss():
            print(f"note: {count} pictures are searched exactly; faiss may be faster: pip install faiss-cpu")
            return None
        if queries < MANY:
            print(f"note: {count} pictures are searched exactly; --index_file=gallery.faiss keeps a faster index")
            return None
    about, asked = {"gallery": _identity(gallery)}, {"factory": search.index} if search.index else {}
    default = {"factory": f"IVF{math.isqrt(count)},Flat"}
    return _load(search, {**about, **asked}) or _build(search, gallery, {**about, **default, **asked})


def _identity(gallery):
    """What tells a gallery from others: its size, and a sum of its features."""
    total = 0
    for _, rows in features.blocks(gallery.features):
        total = zlib.crc32(np.ascontiguousarray(rows, np.float32), total)
    return f"{list(gallery.features.shape)} {total:08x}"


def _load(search, wanted):
    """The Index in --index_file; None where there is none of this gallery, made in this way."""
    path = search.index_file
    about = _read_about(path) if path else None
    if about is None:
        return None
    if any(about.get(name) != value for name, value in wanted.items()):
        print(f"note: {plain(path, 1000)} is of another gallery or kind: built anew")
        return None
    import faiss

    start = time.time()
    try:
        if _digest(path, about["bytes"]) != about["sha256"]:
            raise ValueError("not the file that was written")
        index = faiss.read_index(path)
        if [index.ntotal, index.d] != json.loads(wanted["gallery"].rpartition(" ")[0]):
            raise ValueError("of another size")
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path}: cannot load this index: {plain(error)}: delete it, and it is built anew") from None
    _look_longer(index)
    _say(about, f"loaded from {plain(path, 1000)} in {time.time() - start:.1f} sec")
    return Index(index, about)


def _build(search, gallery, about):
    """Builds an Index, measures its recall, and saves it where asked."""
    import faiss

    start, (count, size) = time.time(), gallery.features.shape
    try:
        index = faiss.index_factory(size, about["factory"], faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            rows = np.sort(np.random.default_rng(0).permutation(count)[:MOST_TRAINING])
            index.train(_sample(gallery, rows))
        for first, rows in features.blocks(gallery.features):
            index.add(unit(rows, gallery.source, first))
        _look_longer(index)
        built, made = time.time() - start, Index(index, about)
        about.update(k=search.top_k, recall=_recall(made, gallery, search.top_k))
    except (RuntimeError, MemoryError) as error:
        why = gpu.first_line(error).rpartition(": ")[2]
        raise UserError(f"--index={about['factory']}: faiss can't build it of {count} x {size}: {plain(why)}") from None
    how = f"built in {built:.1f} sec"
    if search.index_file:
        _save(made, search.index_file)
        how += f" and saved to {plain(search.index_file, 1000)}"
    _say(about, how)
    return made


def _sample(gallery, rows):
    """Some rows of a gallery at length 1. Raises: UserError that names the first one that is NaN or infinite."""
    try:
        return unit(gallery.features[rows], gallery.source)
    except UserError:
        for first, block in features.blocks(gallery.features):  # which the sample does not say
            unit(block, gallery.source, first)
        raise


def _look_longer(index):
    """Has an index of lists or of a graph look at more than its least, by which it would miss half of the nearest."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = max(1, min(ivf.nlist, 8 + ivf.nlist // 32))
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = 128


def _say(about, how):
    found = f"{about['recall']:.1%} of the {about['k']} nearest pictures are found"
    print(f"index {plain(about['factory'])}: {how}; {found} (a sample of the gallery, against exact search)")


def _recall(made, gallery, k):
    """The share of the k nearest that an Index finds, for some of the gallery's own pictures."""
    count = len(gallery.features)
    rows = np.sort(np.random.default_rng(1).permutation(count)[:SAMPLE])
    own = [np.array([row]) for row in rows]
    queries = gallery.features[rows]
    wanted = nearest(queries, gallery.features, k, own, gallery.source).cosine
    found = search(made, queries, gallery, k, own).cosine
    there = np.isfinite(wanted)
    least = np.where(there, wanted, np.inf).min(axis=1, keepdims=True) - 1e-6  # equal ones may stand for each other
    return float((found >= least).sum() / there.sum()) if there.any() else 1.0


def search(made, queries, gallery, k, own=None):
    """neighbours.nearest, but of what an Index finds.

    Args:
        made: Index; gallery: features.Gallery, that it was built of.
    """
    count, size = gallery.features.shape
    k = min(k, count)
    hidden = max((len(rows) for rows in own), default=0) if own is not None else 0
    wanted = min(count, 2 * k + 10 + hidden)  # a rough index has the nearest in a rough order
    found = Neighbours(np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf))
    height = max(1, 2**20 // max(size, wanted))
    for top in range(0, len(queries), height):
        block = unit(queries[top : top + height], "--input", top)
        _, candidates = made.index.search(block, wanted)
        for row, (query, index) in enumerate(zip(block, candidates), top):
            index = np.unique(index[index >= 0])
            if own is not None:
                index = np.setdiff1d(index, own[row])
            cosine = cosines(query[None], unit(gallery.features[index], gallery.source)) if len(index) else index
            best = np.lexsort((index, -cosine))[:k]
            found.index[row, : len(best)], found.cosine[row, : len(best)] = index[best], cosine[best]
    return found


# ---------------------------------------------------------------- the file


def _save(made, path):
    import faiss

    digest, length = hashlib.sha256(), 0
    with files.atomic_write(path, "wb") as file:

        def write(data):
            nonlocal length
            digest.update(data)
            length += len(data)
            return file.write(data)

        faiss.write_index(made.index, faiss.PyCallbackIOWriter(write))
        about = json.dumps({**made.about, "sha256": digest.hexdigest(), "bytes": length}).encode()
        file.write(about + struct.pack("<I", len(about)) + _MAGIC)


def _read_about(path):
    """What a file says of the index in it; None where it is no index of ours."""
    end = 4 + len(_MAGIC)
    try:
        with files.open_file(path) as file:
            length = os.fstat(file.fileno()).st_size
            file.seek(max(0, length - end))
            tail = file.read(end)
            if len(tail) < end or tail[4:] != _MAGIC:
                return None
            size = struct.unpack("<I", tail[:4])[0]
            if size > min(_MOST_ABOUT, length - end):
                return None
            file.seek(length - end - size)
            about = json.loads(file.read(size))
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"gallery": str, "factory": str, "recall": float, "k": int, "sha256": str, "bytes": int}
    if not isinstance(about, dict) or any(type(about.get(name)) is not kind for name, kind in kinds.items()):
        return None
    return about if about["bytes"] == length - end - size else None


def _digest(path, length):
    """The SHA-256 of a file's first bytes."""
    digest = hashlib.sha256()
    with files.open_file(path) as file:
        while length > 0 and (block := file.read(min(length, 2**22))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()
