"""The nearest rows of a gallery to each query, exactly, in blocks.

Similarity is the cosine, of features in float32; neighbours of equal cosine come in the order of the gallery.
"""

import collections

import numpy as np

from utility import UserError

# index: int64 [Q, K], rows of the gallery, the nearest first, -1 where there are no more; cosine: float64 [Q, K], -inf
# where there is none.
Neighbours = collections.namedtuple("Neighbours", "index cosine")

BLOCK_VALUES = 2**22  # of features or of similarities that are in memory at once
# Cosines that a product of matrices gives are off by some 1e-7, by where in the matrix a row stands, too. So they only
# say which rows may be among the nearest; the cosines of these are computed in float64, alike for equal rows.
SLACK = 1e-5


def nearest(queries, gallery, k, own=None, source="--gallery"):
    """The k nearest rows of a gallery to each query, by cosine; of equal ones those that come first.

    Args:
        queries: float [Q, D]; gallery: float [M, D], of any length; arrays, or features.Stored, read in blocks.
        own: for each query the gallery's rows that are itself, as a sequence of int arrays; None: it has none of them.
        source: the gallery's name, for messages.

    Returns: Neighbours of min(k, M) columns.
    Raises: UserError for features that are NaN or infinite.

    Memory beyond both: some blocks of 16 to 32 MB.
    """
    (count, size), k = gallery.shape, min(k, len(gallery))
    found = Neighbours(np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf))
    rows = max(1, min(2**14, BLOCK_VALUES // size))
    height = max(1, min(BLOCK_VALUES // rows, BLOCK_VALUES // size))
    for start in range(0, count if len(queries) else 0, rows):
        block = unit(gallery[start : start + rows], source, start)
        for top in range(0, len(queries), height):
            here = slice(top, top + height)
            hidden = _hidden(own[here], start, len(block)) if own is not None else ()
            _search_block(
                Neighbours(found.index[here], found.cosine[here]), unit(queries[here], "--input", top),
                block, start, hidden,
            )  # fmt: skip
    return found


def unit(rows, source="", first=0):
    """rows float [N, D] as float32 of length 1, a copy; zeros stay zeros.

    Args:
        source, first: what they are rows of, and the first of them, for the UserError where one is NaN or infinite.
    """
    with np.errstate(over="ignore"):
        rows = np.array(rows, np.float32)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    broken = np.flatnonzero(~np.isfinite(largest))
    if len(broken):
        raise UserError(f"{source}: the features of picture {first + broken[0] + 1} are NaN or infinite")
    rows /= np.where(largest > 0, largest, 1)[:, None]  # the square of a value may leave float32
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    rows /= np.where(length > 0, length, 1)[:, None].astype(np.float32)
    return rows


def _hidden(own, start, count):
    """(queries, columns) of the own rows that lie in the block of `count` rows from `start`."""
    pairs = [(query, row - start) for query, rows in enumerate(own) for row in rows if start <= row < start + count]
    return tuple(np.array(pairs, np.int64).reshape(-1, 2).T)


def _search_block(found, queries, block, start, hidden):
    """Takes those of a block's rows into `found` that are nearer than what is there.

    Args:
        found: Neighbours of the queries, changed in place.
        queries: [Q, D]; block: [B, D], the gallery's rows from `start` on; both of length 1.
        hidden: (queries, columns) that are none, or ().
    """
    k = found.index.shape[1]
    similarity = queries @ block.T
    if len(hidden):
        similarity[hidden] = -np.inf
    least = found.cosine[:, -1]
    if k <= len(block) and np.isinf(least).any():
        least = np.maximum(least, np.partition(similarity, -k, axis=1)[:, -k])
    least = np.maximum(least - SLACK, -2)
    rows, columns = np.nonzero(similarity >= least[:, None].astype(np.float32))
    pairs = max(1, BLOCK_VALUES // block.shape[1])
    for first in range(0, len(rows), pairs):
        row, column = rows[first : first + pairs], columns[first : first + pairs]
        _merge(found, row, start + column, cosines(queries[row], block[column]))


def cosines(some, others):
    """The dot products of rows with rows, in float64; equal rows give equal ones, wherever they stand."""
    return np.multiply(some, others, dtype=np.float64).sum(axis=1)


def _merge(found, row, index, cosine):
    """Puts candidates in among the k nearest of their queries.

    Args:
        found: Neighbours, changed in place.
        row, index, cosine: of each candidate the query's row in `found`, its own in the gallery, and their cosine.
    """
    k = found.index.shape[1]
    touched = np.unique(row)
    row = np.concatenate([np.repeat(touched, k), row])
    index = np.concatenate([found.index[touched].ravel(), index])
    cosine = np.concatenate([found.cosine[touched].ravel(), cosine])
    order = np.lexsort((index, -cosine, row))
    row, index, cosine = row[order], index[order], cosine[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    keep = rank < k
    found.index[row[keep], rank[keep]] = index[keep]
    found.cosine[row[keep], rank[keep]] = cosine[keep]
