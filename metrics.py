"""Exact retrieval metrics, computed in blocks: never more than a few rows of the similarity matrix at once."""

import numpy as np

from utility import UserError

# Cosines of float32 vectors carry errors of some 1e-7, and equal pictures must come out as equal: similarities closer
# than this are ties.
TIE = 1e-6
BLOCK_VALUES = 2**24


def retrieval_metrics(features, labels, recall_at=(1, 2, 4, 8), gallery_features=None, gallery_labels=None, full=True):
    """How well the nearest neighbours of each query, by cosine, share its class.

    Every image is a query against all others of the list (itself excluded by its index, so that duplicates of it are
    fair neighbours), or against the whole gallery where one is given. A tied negative counts as closer: embeddings
    that are all equal find nothing. A query whose class has no other image counts as a miss.

    Args:
        features: float [N, D], any length; labels: int [N].
        recall_at: the k of recall@k.
        gallery_features, gallery_labels: [M, D], [M]; None: the queries themselves.
        full: False leaves out MAP@R and R-precision, which need every positive's rank.

    Returns: a dict of
        "recall@k": share of queries with a positive among their k nearest neighbours;
        "MAP@R": mean over queries of 1/R sum_{i<=R} precision@i [i-th neighbour is positive], R = the query's number
            of positives (Musgrave et al., arXiv 2003.08505);
        "R-precision": mean share of positives among the R nearest neighbours;
        "queries", and "queries_without_positive" where there are any: counts.

    Raises: UserError for features that are NaN or infinite.

    Memory beyond the features: one normalised float32 copy of them (two with a gallery) and about 150 MB.
    """
    order = np.argsort(labels, kind="stable")
    query, query_labels = _unit(features, order), np.asarray(labels)[order]
    with_gallery = gallery_features is not None
    if with_gallery:
        order = np.argsort(gallery_labels, kind="stable")
        gallery, gallery_labels = _unit(gallery_features, order), np.asarray(gallery_labels)[order]
    else:
        gallery, gallery_labels = query, query_labels
    # Sorted by class, the positives of a query are one slice of its row.
    first = np.searchsorted(gallery_labels, query_labels, "left")
    last = np.searchsorted(gallery_labels, query_labels, "right")

    closer = np.full(len(query), np.inf)  # negatives closer than (or as close as) the closest positive
    average_precision, r_precision = np.zeros(len(query)), np.zeros(len(query))
    lone = 0
    rows = max(1, BLOCK_VALUES // len(gallery))
    for start in range(0, len(query), rows):
        similarity = query[start : start + rows] @ gallery.T
        for i, row in enumerate(similarity, start):
            positive = row[first[i] : last[i]].copy()
            row[first[i] : last[i]] = -np.inf  # leaves the negatives
            if not with_gallery:
                positive = np.delete(positive, i - first[i])
            if not len(positive):
                lone += 1
                continue
            positive[::-1].sort()
            closer[i] = np.count_nonzero(row >= positive[0] - TIE)
            if full:
                ranks = _ranks(positive, row)
                average_precision[i] = (np.arange(1, len(ranks) + 1) / ranks).sum() / len(positive)
                r_precision[i] = len(ranks) / len(positive)
    result = {f"recall@{k}": float((closer < k).mean()) for k in recall_at}
    if full:
        result.update({"MAP@R": float(average_precision.mean()), "R-precision": float(r_precision.mean())})
    result["queries"] = len(query)
    return {**result, "queries_without_positive": lone} if lone else result


def _ranks(positive, row):
    """Ranks, from 1, of those positives that are among the R = len(positive) nearest neighbours.

    Args:
        positive: similarities of a query's positives, falling.
        row: similarities of all others.
    """
    count = len(positive)
    negative = row[row >= positive[-1] - TIE]
    if len(negative) > count:
        negative = np.partition(negative, len(negative) - count)[-count:]
    negative.sort()
    closer = len(negative) - np.searchsorted(negative, positive - TIE, "left")
    ranks = np.arange(1, count + 1) + closer
    return ranks[ranks <= count]


def _unit(features, order):
    """features[order] as float32 vectors of length 1; zeros stay zeros."""
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{np.count_nonzero(~finite)} of {len(features)} embeddings are NaN or infinite (the first: number "
            f"{np.argmin(finite)} of the list): the network has diverged or its weights are broken"
        )
    unit = features[order].astype(np.float32)
    # float64 for the lengths: squares of large features leave float32.
    length = np.sqrt(np.einsum("nd,nd->n", unit, unit, dtype=np.float64))
    unit /= np.where(length > 0, length, 1)[:, None].astype(np.float32)
    return unit
