"""Exact retrieval metrics, computed in blocks: never more than a few rows of the similarity matrix at once."""

import math

import numpy as np

from utility import UserError

# Cosines of float32 vectors carry errors of some 1e-7, and equal pictures must come out as equal: similarities closer
# than this are ties.
TIE = 1e-6
BLOCK_VALUES = 2**24


def retrieval_metrics(features, labels, recall_at=(1, 2, 4, 8), gallery_features=None, gallery_labels=None, full=True,
                      own=None):  # fmt: skip
    """How well the nearest neighbours of each query, by cosine, share its class.

    Every image is a query against all others of the list (itself excluded by its index, so that duplicates of it are
    fair neighbours), or against the whole gallery where one is given. A tied negative counts as closer: embeddings
    that are all equal find nothing. A query whose class has no other image counts as a miss.

    Args:
        features: float [N, D], any length; labels: int [N].
        recall_at: the k of recall@k.
        gallery_features, gallery_labels: [M, D], [M]; None: the queries themselves.
        full: False leaves out MAP@R and R-precision, which need every positive's rank.
        own: for each query the gallery's indices that are its own picture, as a sequence of int arrays [0 or more]: no
            neighbours of it. None: the gallery has no picture of the queries.

    Returns: a dict of
        "recall@k": share of queries with a positive among their k nearest neighbours;
        "MAP@R": mean over queries of 1/R sum_{i<=R} precision@i [i-th neighbour is positive], R = the query's number
            of positives (Musgrave et al., arXiv 2003.08505);
        "R-precision": mean share of positives among the R nearest neighbours;
        "queries", and "queries_without_positive" where there are any: counts.

    Raises: UserError for features that are NaN or infinite; ValueError where there are none, or as many labels not.

    Memory beyond the features: one normalised float32 copy of them (two with a gallery) and about 150 MB.
    """
    for some, of_some in ((features, labels), (gallery_features, gallery_labels)):
        if some is not None and not 0 < len(some) == len(of_some):
            raise ValueError(f"{len(some)} features and {len(of_some)} labels")
    order = np.argsort(labels, kind="stable")
    query, query_labels = _unit(features, order), np.asarray(labels)[order]
    if gallery_features is None:
        gallery, gallery_labels = query, query_labels
    else:
        gallery_order = np.argsort(gallery_labels, kind="stable")
        gallery, gallery_labels = _unit(gallery_features, gallery_order), np.asarray(gallery_labels)[gallery_order]
        if own is not None:
            place = np.argsort(gallery_order)  # of each picture, in the sorted gallery
            own = [place[own[i]] for i in order]
    # Sorted by class, the positives of a query are one slice of its row.
    first = np.searchsorted(gallery_labels, query_labels, "left")
    last = np.searchsorted(gallery_labels, query_labels, "right")

    if full or gallery is not query:
        positives, closer, average_precision, r_precision = _rank_rows(query, gallery, first, last, full, own)
    else:
        positives, closer = last - first - 1, _count_closer(query, first, last)
    result = {f"recall@{k}": float((closer < k)[positives > 0].sum() / len(query)) for k in recall_at}
    if full:
        result.update({"MAP@R": float(average_precision.mean()), "R-precision": float(r_precision.mean())})
    result["queries"] = len(query)
    lone = int(np.count_nonzero(positives == 0))
    return {**result, "queries_without_positive": lone} if lone else result


def remarks(features, labels, result, gallery_labels=None):
    """What a reader of the figures should know of the list or the network, a list of sentences.

    Args:
        features, labels, gallery_labels: as of `retrieval_metrics`; result: what it returned.
    """
    found = []
    lone, count = result.get("queries_without_positive", 0), result["queries"]
    if lone:
        where = "in the list" if gallery_labels is None else "in the gallery"
        found.append(f"{lone} of {count} queries have no other image of their class {where}: each counts as a miss")
    others = labels if gallery_labels is None else gallery_labels
    if len(np.unique(others)) == 1:
        found.append("all images to be found are of one class: recall says nothing of the network")
    if len(features) > 1 and _are_equal(features):
        found.append(
            "all embeddings are equal: the network tells no image from another (it has collapsed: a smaller --lr, or a "
            "--warmup_epochs, may keep it from that)"
        )
    return found


def _are_equal(features):
    """Whether the cosines of all features to the first are 1; of zeros, too."""
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))
    if not lengths.any():
        return True
    return bool((features @ features[0] >= (1 - TIE) * lengths * lengths[0]).all() and lengths.all())


# In the following: query [N, D], gallery [M, D]: of length 1, sorted by label; those that share the class of query i
# are gallery[first[i] : last[i]]. Where query and gallery are one array, an image is no neighbour of itself.


def _count_closer(features, first, last):
    """Negatives that are closer than (or as close as) each query's closest positive, int64 [N].

    Every similarity is computed once and looked at from both sides, which halves the work of `_rank_rows`, and counting
    needs no sorting. A query without a positive gets a number without meaning.
    """
    threshold = _best_positive(features, first, last) - np.float32(TIE)
    closer = np.zeros(len(features), np.int64)
    side = max(1, math.isqrt(BLOCK_VALUES) // 4)  # 1024: what is counted is still in the processor's cache
    # One memory for all blocks: to get it anew from the system takes longer than to count.
    similarity, at_least = np.empty((side, side), np.float32), np.empty((side, side), bool)
    for top in range(0, len(features), side):
        rows = slice(top, min(top + side, len(features)))
        for left in range(top, len(features), side):
            columns = slice(left, min(left + side, len(features)))
            shape = np.s_[: rows.stop - top, : columns.stop - left]
            block = np.matmul(features[rows], features[columns].T, out=similarity[shape])
            _forget_own_class(block, rows, columns, first, last)
            found = np.greater_equal(block, threshold[rows, None], out=at_least[shape])
            closer[rows] += [np.count_nonzero(row) for row in found]  # many times faster than with axis=1
            if left > top:
                found = np.greater_equal(block, threshold[columns], out=at_least[shape]).view(np.uint8)
                for start in range(0, len(found), 255):  # as many as a byte can count
                    closer[columns] += np.add.reduce(found[start : start + 255], axis=0, dtype=np.uint8)
    return closer


def _forget_own_class(block, rows, columns, first, last):
    """Sets to -inf the similarities of one class in the block [rows, columns] of the queries with themselves."""
    row = rows.start
    while row < rows.stop and first[row] < columns.stop:  # sorted: all later classes lie to the right of the block
        start, stop = max(first[row], columns.start), min(last[row], columns.stop)
        if start < stop:
            block[row - rows.start : last[row] - rows.start, start - columns.start : stop - columns.start] = -np.inf
        row = last[row]


def _best_positive(features, first, last):
    """Similarity of each query's closest positive, float32 [N]; -inf where it has none."""
    best = np.full(len(features), -np.inf, np.float32)
    # A band along the diagonal rather than a product for each class: small products keep no processor busy.
    rows = max(1, min(256, BLOCK_VALUES // len(features)))
    for top in range(0, len(features), rows):
        stop = min(top + rows, len(features))
        left = first[top]
        for i, row in enumerate(features[top:stop] @ features[left : last[stop - 1]].T, top):
            row[i - left] = -np.inf  # the image itself
            best[i] = row[first[i] - left : last[i] - left].max()
    return best


def _rank_rows(query, gallery, first, last, full, own=None):
    """Goes through the similarities by whole rows.

    Returns: the number of each query's positives and of the negatives that are closer than (or as close as) the closest
        of them, int64 [N]; average precision at R and R-precision, float64 [N], which stay 0 without `full`
    """
    positives, closer = np.zeros(len(query), np.int64), np.zeros(len(query), np.int64)
    average_precision, r_precision = np.zeros(len(query)), np.zeros(len(query))
    rows = max(1, BLOCK_VALUES // len(gallery))
    similarity = np.empty((min(rows, len(query)), len(gallery)), np.float32)
    for start in range(0, len(query), rows):
        part = query[start : start + rows]
        for i, row in enumerate(np.matmul(part, gallery.T, out=similarity[: len(part)]), start):
            if gallery is query:
                row[i] = -np.inf
            elif own is not None:
                row[own[i]] = -np.inf
            positive = row[first[i] : last[i]]
            positive = positive[positive > -np.inf]
            row[first[i] : last[i]] = -np.inf  # leaves the negatives
            if not len(positive):
                continue
            positive[::-1].sort()
            positives[i] = len(positive)
            closer[i] = np.count_nonzero(row >= positive[0] - np.float32(TIE))
            if full and closer[i] < len(positive):
                ranks = _ranks(positive, row)
                average_precision[i] = (np.arange(1, len(ranks) + 1) / ranks).sum() / len(positive)
                r_precision[i] = len(ranks) / len(positive)
    return positives, closer, average_precision, r_precision


def _ranks(positive, row):
    """Ranks, from 1, of those positives that are among the R = len(positive) nearest neighbours; at least one is.

    Args:
        positive: similarities of a query's positives, falling.
        row: similarities of all others.
    """
    threshold = positive - np.float32(TIE)
    # The rank of the i-th positive is i + the negatives that are closer, and both grow with i: the last one that counts
    # is found by halving, and only the few negatives in front of it need sorting.
    low, high = 1, len(positive)
    while low < high:
        middle = (low + high + 1) // 2
        if middle + np.count_nonzero(row >= threshold[middle - 1]) <= len(positive):
            low = middle
        else:
            high = middle - 1
    negative = np.sort(row[np.flatnonzero(row >= threshold[low - 1])])
    return np.arange(1, low + 1) + len(negative) - np.searchsorted(negative, threshold[:low], "left")


def _unit(features, order):
    """features[order] as float32 vectors of length 1; zeros stay zeros."""
    rows = features[order]
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float32)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    broken = order[~np.isfinite(largest)]
    if len(broken):
        raise UserError(
            f"{len(broken)} of {len(features)} embeddings are NaN or infinite (the first: number {broken.min()} of the "
            "list): the network has diverged or its weights are broken"
        )
    # By a power of two, which rounds nothing, to values near 1: the square of any other may leave float32.
    most = np.finfo(rows.dtype).maxexp - 2
    rows *= np.ldexp(1.0, np.clip(-np.frexp(largest)[1], -most, most)).astype(rows.dtype)[:, None]
    unit = rows.astype(np.float32, copy=False)
    length = np.sqrt(np.einsum("nd,nd->n", unit, unit, dtype=np.float64))
    unit /= np.where(length > 0, length, 1)[:, None].astype(np.float32)
    return unit
