"""Other neighbours from the same features, by what the pictures of the test say of each other.

    similar = k_reciprocal(features)                      for metrics.rank(..., similar=similar)
    expanded = expand_queries(features, gallery, own, 5)  for metrics.rank(expanded, ...)

Both look at other pictures of the test than the two that are compared: their figures stand beside those without, never
in their place. Neither ever holds the similarities of all pairs.
"""

import os

import numpy as np

from retrieval.metrics import BLOCK_VALUES, TIE
from utility import UserError

K1, K2, KEPT = 20, 6, 0.3  # of k_reciprocal, as in the paper
POWER = 3  # of the weights of expand_queries, as in the paper
MOST_BYTES = 32 * 2**10  # of memory that k_reciprocal takes for each picture; on features of birds it is a tenth


def check_memory(count):
    """Raises a UserError where k_reciprocal of `count` pictures could need more than three quarters of the memory."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system says
        return
    if count * MOST_BYTES > 0.75 * memory:
        raise UserError(
            f"--rerank=k-reciprocal: {count} pictures may need {count * MOST_BYTES / 2**30:.0f} GB of memory, of "
            f"{memory / 2**30:.0f} GB here: leave it out, or take a shorter list"
        )


def expand_queries(features, gallery=None, own=None, count=5):
    """Each query plus its nearest neighbours, weighted by the power POWER of their cosine: float [N, D].

    Radenovic et al., "Fine-tuning CNN image retrieval with no human annotation", TPAMI 2019 (arXiv 1711.02512).

    Args:
        features: float [N, D]; gallery: [M, D], None: the queries, each but itself. All of length 1 (or 0).
        own: as of metrics.rank.
        count: how many neighbours; negative cosines weigh nothing.
    """
    others = features if gallery is None else gallery
    expanded = np.empty_like(features)
    rows = max(1, BLOCK_VALUES // len(others))
    for start in range(0, len(features), rows):
        part = features[start : start + rows]
        for i, row in enumerate(part @ others.T, start):
            if gallery is None:
                row[i] = 0
            elif own is not None:
                row[own[i]] = 0
            near = _highest(row, count)
            weight = np.maximum(row[near], 0) ** POWER
            expanded[i] = features[i] + weight @ others[near]
    return expanded


def k_reciprocal(features, gallery=None, own=None, k1=K1, k2=K2):
    """Neighbours that also have each other as neighbours come first.

    Zhong et al., "Re-ranking person re-identification with k-reciprocal encoding", CVPR 2017 (arXiv 1701.08398). With
    D_ij the squared distance, divided by the largest of picture i, and R(i, k) the pictures among the k nearest of i
    that have i among theirs (i itself is its nearest):

        R*(i) = R(i, k1) and all R(j, k1/2), j in R(i, k1), of which more than two thirds lie in R(i, k1)
        V_i = exp(-D_ij) for j in R*(i), divided by their sum; then the mean of V over the k2 nearest of i
        distance = (1 - kept) (1 - sum min(V_i, V_j) / sum max(V_i, V_j)) + kept D_ij

    over queries and gallery together; a query whose own picture is in the gallery is that one.

    Args:
        features: float [N, D]; gallery: [M, D], None: the queries. For cosines, of length 1.
        own: as of metrics.rank.

    Returns: function(index) -> float [B, M], minus the distances of the queries of these indices to the gallery.

    Memory: at most MOST_BYTES for each picture, and about 150 MB. Raises: UserError where it does not suffice.
    """
    if gallery is None:
        items, place = features, np.arange(len(features))
    else:
        rest = [i for i in range(len(features)) if own is None or not len(own[i])]
        place = np.array([own[i][0] if own is not None and len(own[i]) else 0 for i in range(len(features))], np.int64)
        place[rest] = len(gallery) + np.arange(len(rest))
        items = np.concatenate([gallery, features[rest]])
    others = features if gallery is None else gallery
    try:
        ranks, largest = _nearest(items, max(k1 + 1, k2))
        starts, columns, values = _encode(items, ranks, largest, k1, k2)
    except MemoryError:
        raise UserError("--rerank=k-reciprocal: not enough memory: leave it out, or take a shorter list") from None
    order = np.argsort(columns, kind="stable")
    holders = np.repeat(np.arange(len(items)), np.diff(starts))[order]  # of each column, the rows that have it
    held = values[order]
    bounds = np.searchsorted(columns[order], np.arange(len(items) + 1))

    def similar(index):
        distance = KEPT * _distances(items[place[index]], others) / largest[place[index], None]
        for row, item in zip(distance, place[index]):
            common = np.zeros(len(items), items.dtype)
            for entry in range(starts[item], starts[item + 1]):
                column = slice(bounds[columns[entry]], bounds[columns[entry] + 1])
                common[holders[column]] += np.minimum(held[column], values[entry])
            common = common[: len(others)]
            row += (1 - KEPT) * (1 - common / (2 - common))
        return -distance

    return similar


def _highest(row, count):
    """Indices of the `count` highest values, from the highest; of all where there are fewer."""
    near = np.argpartition(-row, count)[:count] if count < len(row) else np.arange(len(row))
    return near[np.argsort(-row[near], kind="stable")]


def _distances(a, b):
    """Squared distances [A, B]; what rounding leaves of 0 is 0."""
    lengths = [np.einsum("nd,nd->n", x, x) for x in (a, b)]
    distances = lengths[0][:, None] + lengths[1] - 2 * (a @ b.T)
    distances[distances < 2 * TIE] = 0
    return distances


def _nearest(items, count):
    """Each item's nearest, itself first: int32 [N, count]; and the largest of its squared distances: float [N].

    One that is equal to all others has no nearest but itself, and a largest distance of 1: a collapsed network, whose
    ties would be broken by chance, gains nothing.
    """
    ranks = np.empty((len(items), min(count, len(items))), np.int32)
    largest = np.empty(len(items), items.dtype)
    rows = max(1, BLOCK_VALUES // 2 // len(items))
    for start in range(0, len(items), rows):
        for i, row in enumerate(_distances(items[start : start + rows], items), start):
            largest[i] = row.max() or 1
            apart = row.any()
            row[i] = -1
            ranks[i] = _highest(-row, count) if apart else i
    return ranks, largest


def _reciprocal(ranks):
    """Of each item, those among its nearest that have it among theirs, too: list of frozenset of int."""
    found = []
    for start in range(0, len(ranks), 1024):
        part = ranks[start : start + 1024]
        own = np.arange(start, start + len(part))[:, None, None]
        mutual = (ranks[part] == own).any(axis=2)
        found += [frozenset(row[both].tolist()) for row, both in zip(part, mutual)]
    return found


def _encode(items, ranks, largest, k1, k2):
    """V of `k_reciprocal`, row after row: starts int64 [N + 1]; columns int64, ascending in a row, and values float."""
    near, nearer = _reciprocal(ranks[:, : k1 + 1]), _reciprocal(ranks[:, : round(k1 / 2) + 1])
    encoded = []
    for i, members in enumerate(near):
        more = [nearer[j] for j in members if 3 * len(nearer[j] & members) > 2 * len(nearer[j])]
        columns = np.array(sorted(members.union(*more)), np.int32)
        weight = np.exp(-_distances(items[i : i + 1], items[columns])[0] / largest[i])
        encoded.append((columns, weight / weight.sum()))
    if k2 > 1:
        encoded = [_mean([encoded[j] for j in row]) for row in ranks[:, :k2]]
    starts = np.concatenate([[0], np.cumsum([len(columns) for columns, _ in encoded])])
    return starts, np.concatenate([row for row, _ in encoded]), np.concatenate([row for _, row in encoded])


def _mean(rows):
    """The mean of sparse rows (columns, values)."""
    columns, place = np.unique(np.concatenate([columns for columns, _ in rows]), return_inverse=True)
    values = np.concatenate([values for _, values in rows])
    return columns, (np.bincount(place, values) / len(rows)).astype(values.dtype)
