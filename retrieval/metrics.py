"""Exact retrieval metrics, computed in blocks: never more than a few rows of the similarity matrix at once."""

import collections
import concurrent.futures
import math

import numpy as np

from runtime import parallel
from utility import UserError

# Cosines of float32 vectors carry errors of some 1e-7, and equal pictures must come out as equal: similarities closer
# than this are ties.
TIE = 1e-6
BLOCK_VALUES = 2**24
STEPS = 100_000  # of a cosine of 1, in which `Pairs` counts

# What `rank` finds of each query, in their order, all [N]. positives: how many it has, int64; closer: the negatives
# that are closer than (or as close as) the closest of them, int64; map_at_r, r_precision, average_precision,
# inverse_penalty: its part of the means that are called so, float64, 0 without a positive; wrong: index of the closest
# negative in the gallery, -1 where there is none or where a positive is closer; similarity: of that one, float32.
Ranked = collections.namedtuple(
    "Ranked",
    "positives closer map_at_r r_precision average_precision inverse_penalty wrong similarity",
)


def rank(features, labels, gallery_features=None, gallery_labels=None, own=None, pairs=None, similar=None,
         in_place=False):  # fmt: skip
    """Where each query's positives, the pictures of its class, stand among its neighbours by cosine: Ranked.

    Every image is a query against all others of the list (itself excluded by its index, so that duplicates of it are
    fair neighbours), or against the whole gallery where one is given. A tied negative counts as closer: embeddings
    that are all equal find nothing. A query whose class has no other image counts as a miss.

    Args:
        features: float [N, D], any length; labels: int [N].
        gallery_features, gallery_labels: [M, D], [M]; None: the queries themselves.
        own: for each query the gallery's indices that are its own picture, as a sequence of int arrays [0 or more]: no
            neighbours of it. None: the gallery has no picture of the queries.
        pairs: Pairs that take in the similarities; None: they are not counted.
        similar: function(index) -> float32 [B, M], what goes in the place of the cosines of the queries of these
            indices with the gallery; None: the cosines.
        in_place: features (float32, two arrays where there is a gallery) are brought to length 1 where they are, rather
            than copied.

    Raises: UserError for features that are NaN or infinite; ValueError for no features, or another number of labels.

    Memory beyond the features: about 150 MB and, unless in_place, one normalised float32 copy of them (two with a
    gallery).
    """
    parts = _sort(features, labels, gallery_features, gallery_labels, own, in_place)
    found = _rank_rows(parts, pairs, similar)
    _sort_back(parts, in_place)
    wrong = np.where(found.wrong < 0, -1, parts.gallery_order[found.wrong])
    back = np.argsort(parts.order)
    return Ranked(*(values[back] for values in found._replace(wrong=wrong)))


def summarise(ranked, recall_at=(1, 2, 4, 8), means=("MAP@R", "R-precision", "mAP", "mINP")):
    """The figures of Ranked queries, a dict:

    "recall@k": share of queries with a positive among their k nearest neighbours;
    and of these means, where R is the number of a query's positives:
    "MAP@R": 1/R sum_{i<=R} precision@i [i-th neighbour is positive] (Musgrave et al., arXiv 2003.08505);
    "R-precision": share of positives among the R nearest neighbours;
    "mAP": 1/R sum_i i / (rank of the i-th positive);
    "mINP": R / (rank of the last positive) (Ye et al., arXiv 2001.04193);
    "queries", and "queries_without_positive" where there are any: counts.
    """
    has = ranked.positives > 0
    result = {f"recall@{k}": float((ranked.closer < k)[has].sum() / len(has)) for k in recall_at}
    result.update({name: float(getattr(ranked, MEANS[name]).mean()) for name in means})
    result["queries"] = len(has)
    lone = int(np.count_nonzero(~has))
    return {**result, "queries_without_positive": lone} if lone else result


def recall(features, labels, recall_at=(1, 2, 4, 8), in_place=False):
    """recall@k and the counts of `summarise`, of a list against itself, in less than half of the time of `rank`.

    Arguments, errors and memory are those of `rank`.
    """
    parts = _sort(features, labels, None, None, None, in_place)
    positives, closer = parts.last - parts.first - 1, _count_closer(parts.query, parts.first, parts.last)
    _sort_back(parts, in_place)
    return summarise(Ranked(positives, closer, *[None] * 6), recall_at, ())


# The field of Ranked whose mean a figure is.
MEANS = {"MAP@R": "map_at_r", "R-precision": "r_precision", "mAP": "average_precision", "mINP": "inverse_penalty"}


class Pairs:
    """Counts pairs of pictures by their cosine in steps of 1 / STEPS, those of one class and of different ones.

    Of different classes only so many are counted as a share of `most` needs, from the highest: after a while nearly
    all are left out by one comparison.

    Args:
        most: the largest share that `accepted` will be asked for.
    """

    def __init__(self, most=0.01):
        self.most, self.total, self.floor = most, 0, np.float32(-2)  # total: pairs of different classes
        self.same, self.different = (np.zeros(2 * STEPS + 2, np.int64) for _ in range(2))

    def add_same(self, cosines):
        self.same += _bins(cosines)

    def add_different(self, cosines, total):
        """Takes in a block of them, -inf for what is no such pair.

        Args:
            total: how many there are in all.
        """
        self.total = total
        for some in np.array_split(cosines, max(1, cosines.size // 2**19)):
            self.different += _bins(some[some >= self.floor])
            enough = np.flatnonzero(np.cumsum(self.different[::-1]) > self.most * total)
            if len(enough):  # what is lower is never asked for
                self.floor = np.float32((len(self.different) - 1 - enough[0] - 1) / STEPS - 1 - TIE)

    def histograms(self, bins):
        """How many pairs of one class and of different ones have cosines in each of `bins` equal parts of [-1, 1], a
        divisor of 2 * STEPS: int64 [2, bins]. Of different classes all are counted where `most` is 1."""
        counts = np.stack([self.same, self.different])
        counts[:, 2 * STEPS - 1] += counts[:, 2 * STEPS]  # those of 1
        return counts[:, : 2 * STEPS].reshape(2, bins, -1).sum(axis=2)

    def accepted(self, share):
        """The lowest cosine, a multiple of 1 / STEPS, that at most `share` of the pairs of different classes reach.

        Returns: (cosine, share of these pairs that reach it, share of the pairs of one class that do); None where
            there are no pairs of either kind, or where more than that share reach 1.
        """
        if not self.total or not self.same.any():
            return None
        reached = np.cumsum(self.different[::-1])
        place = np.searchsorted(reached, share * self.total, "right") - 1  # the last that is not above
        bin_ = len(reached) - 1 - place
        if bin_ > 2 * STEPS:
            return None
        true = self.same[bin_:].sum() / self.same.sum()
        return float(bin_ / STEPS - 1), float(self.different[bin_:].sum() / self.total), float(true)


def _bins(cosines):
    """How many cosines lie in each step: int64 [2 * STEPS + 2], from -1; what lacks less than TIE of one is in it."""
    places = (cosines.astype(np.float64).ravel() + (1 + TIE)) * STEPS
    return np.bincount(np.clip(places, 0, 2 * STEPS).astype(np.intp), minlength=2 * STEPS + 2)


def remarks(features, labels, result, gallery_labels=None):
    """What a reader of the figures should know of the list or the network, a list of sentences.

    Args:
        features, labels, gallery_labels: as of `rank`; result: of `summarise`.
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


# query [N, D], gallery [M, D]: of length 1, sorted by label, by the indices order and gallery_order; those that share
# the class of query i are gallery[first[i] : last[i]]. Where both are one array, an image is no neighbour of itself.
# own: as of `rank`, sorted, too.
_Sorted = collections.namedtuple("_Sorted", "query gallery first last own order gallery_order")


def _sort(features, labels, gallery_features, gallery_labels, own, in_place=False):
    """_Sorted of the arguments of `rank`."""
    take = _unit_in_place if in_place else unit
    for some, of_some in ((features, labels), (gallery_features, gallery_labels)):
        if some is not None and not 0 < len(some) == len(of_some):
            raise ValueError(f"{len(some)} features and {len(of_some)} labels")
    order = gallery_order = np.argsort(labels, kind="stable")
    query, query_labels = take(features, order), np.asarray(labels)[order]
    if gallery_features is None:
        gallery, gallery_labels, own = query, query_labels, None
    else:
        gallery_order = np.argsort(gallery_labels, kind="stable")
        gallery, gallery_labels = take(gallery_features, gallery_order), np.asarray(gallery_labels)[gallery_order]
        if own is not None:
            place = np.argsort(gallery_order)  # of each picture, in the sorted gallery
            own = [place[own[i]] for i in order]
    # Sorted by class, the positives of a query are one slice of its row.
    first = np.searchsorted(gallery_labels, query_labels, "left")
    last = np.searchsorted(gallery_labels, query_labels, "right")
    return _Sorted(query, gallery, first, last, own, order, gallery_order)


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
            block = _multiply(features[rows], features[columns], similarity[shape])
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


def _rank_rows(parts, pairs=None, similar=None):
    """Goes through the similarities by whole rows; -> Ranked, in the order of `parts`. Arguments as of `rank`."""
    query, gallery, first, last, own, order, gallery_order = parts
    alone, count = gallery is query, len(query)
    found = Ranked(
        *np.zeros((2, count), np.int64), *np.zeros((4, count)), np.full(count, -1),
        np.full(count, -np.inf, np.float32),
    )  # fmt: skip
    different = _different_pairs(parts) if pairs else 0
    rows = max(1, BLOCK_VALUES // len(gallery))
    similarity = np.empty((min(rows, count), len(gallery)), np.float32)
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        if similar:
            block = similar(order[part])[:, gallery_order]
        else:
            block = _multiply(query[part], gallery, similarity[: part.stop - start])
        same = []
        for i, row in enumerate(block, start):
            if alone:
                row[i] = -np.inf
            elif own is not None:
                row[own[i]] = -np.inf
            positive = row[first[i] : last[i]]
            if pairs:
                same.append(row[max(first[i], i + 1) : last[i]].copy() if alone else positive[positive > -np.inf])
            positive = positive[positive > -np.inf]
            row[first[i] : last[i]] = -np.inf  # leaves the negatives
            _rank_row(found, i, positive, row)
            if pairs and alone:
                row[: last[i]] = -np.inf  # leaves those whose pairs with this one are not counted yet
        if pairs:
            pairs.add_same(np.concatenate(same))
            pairs.add_different(block, different)
    return found


def _multiply(rows, columns, out):
    """rows @ columns.T, in `out`, with the processors of all processes on this machine: only the first one measures,
    and its BLAS has threads for its own share alone."""
    count = parallel.local_world_size()
    edges = [len(columns) * part // count for part in range(count + 1)]

    def multiply(part):
        some = slice(edges[part], edges[part + 1])
        np.matmul(rows, columns[some].T, out=out[:, some])

    if count == 1:
        multiply(0)
    else:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            list(pool.map(multiply, range(count)))
    return out


def _different_pairs(parts):
    """How many pairs of different classes there are: in a list alone each once, a query's own pictures left out."""
    if parts.gallery is parts.query:
        return int((len(parts.query) - parts.last).sum())
    negatives = len(parts.gallery) - (parts.last - parts.first)
    for i, own in enumerate(parts.own if parts.own is not None else ()):
        negatives[i] -= len(set(own[(own < parts.first[i]) | (own >= parts.last[i])].tolist()))
    return int(negatives.sum())


def _rank_row(found, i, positive, row):
    """Fills in row i of the Ranked `found`.

    Args:
        positive: similarities of a query's positives; they are sorted here.
        row: those of its negatives; -inf for all others.
    """
    count = len(positive)
    if count:
        positive[::-1].sort()
        found.positives[i] = count
        found.closer[i] = np.count_nonzero(row >= positive[0] - np.float32(TIE))
    if found.closer[i] or not count:
        nearest = row.argmax()
        if row[nearest] > -np.inf:
            found.wrong[i], found.similarity[i] = nearest, row[nearest]
    if not count:
        return
    every = _ranks(positive, row)
    found.average_precision[i] = (np.arange(1, count + 1) / every).sum() / count
    found.inverse_penalty[i] = count / every[-1]
    near = every[every <= count]
    found.map_at_r[i] = (np.arange(1, len(near) + 1) / near).sum() / count
    found.r_precision[i] = len(near) / count


def _ranks(positive, row):
    """Ranks, from 1, of all positives.

    Args:
        positive: similarities of a query's positives, falling.
        row: similarities of all others.
    """
    threshold = positive - np.float32(TIE)
    if len(positive) * 500 <= len(row):  # then to count is faster than to sort
        closer = np.array([np.count_nonzero(row >= value) for value in threshold])
    else:
        negative = np.sort(row[row >= threshold[-1]])
        closer = len(negative) - np.searchsorted(negative, threshold, "left")
    return np.arange(1, len(positive) + 1) + closer


def unit(features, order):
    """features[order] as float32 vectors of length 1; zeros stay zeros."""
    rows = features[order]
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float32)
    return _bring_to_unit(rows, order)


def _unit_in_place(features, order):
    """`unit` without a copy: the rows of `features`, float32, are changed and sorted where they are."""
    if features.dtype != np.float32:
        raise ValueError(f"{features.dtype} can't be changed in place")
    _bring_to_unit(features, np.arange(len(features)))
    _permute(features, order)
    return features


def _sort_back(parts, in_place):
    """Puts the rows of a _Sorted that was made in place back into the order in which they came."""
    if in_place:
        _permute(parts.query, np.argsort(parts.order))
        if parts.gallery is not parts.query:
            _permute(parts.gallery, np.argsort(parts.gallery_order))


def _permute(rows, order):
    """rows[:] = rows[order], with one row in hand rather than a copy of all."""
    done = order == np.arange(len(order))
    for first in np.flatnonzero(~done).tolist():
        if done[first]:
            continue
        held, place = rows[first].copy(), first
        while order[place] != first:
            rows[place] = rows[order[place]]
            done[place], place = True, order[place]
        rows[place], done[place] = held, True


def _bring_to_unit(rows, order):
    """Changes float rows, of the list's pictures `order`, to length 1; -> them as float32."""
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    broken = order[~np.isfinite(largest)]
    if len(broken):
        raise UserError(
            f"{len(broken)} of {len(rows)} embeddings are NaN or infinite (the first: number {broken.min() + 1}): "
            "the network has diverged or its weights are broken"
        )
    # By a power of two, which rounds nothing, to values near 1: the square of any other may leave float32.
    most = np.finfo(rows.dtype).maxexp - 2
    rows *= np.ldexp(1.0, np.clip(-np.frexp(largest)[1], -most, most)).astype(rows.dtype)[:, None]
    unit = rows.astype(np.float32, copy=False)
    length = np.sqrt(np.einsum("nd,nd->n", unit, unit, dtype=np.float64))
    unit /= np.where(length > 0, length, 1)[:, None].astype(np.float32)
    return unit
