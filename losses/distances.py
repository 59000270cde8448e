"""Masks, pairwise distances and sums that the metric losses share.

Anchors are the N images of the batch. What they are compared with is the batch itself or, where `other` is given, M
images that begin with the batch: row i of both is the same image, and no positive of itself.

Distances come from a matrix product, in float64: |a|^2 + |b|^2 - 2ab loses the small distances in float32 (an error of
10 between features of norm 1e4, and 3e-4 between equal ones of norm 1), and subtracting every pair would need an
N x N x D tensor. A batch is small enough that the wider product costs next to nothing beside the backbone.
"""

import paddle


def pair_masks(label, other_label=None):
    """label int64 [N], other_label int64 [M] -> positive, negative: bool [N, M], for each anchor (row) who shares its
    class and who does not.
    """
    other_label = label if other_label is None else other_label
    shape = [label.shape[0], other_label.shape[0]]
    # Expanded first: to compare a column with a row, and to add them up, takes a CPU several times as long.
    same = label.unsqueeze(1).expand(shape) == other_label.unsqueeze(0).expand(shape)
    itself = paddle.eye(*shape).astype("bool")
    return paddle.logical_and(same, paddle.logical_not(itself)), paddle.logical_not(same)


def normalize(embedding, dtype="float64"):
    """embedding [N, D] of any float type -> `dtype` [N, D] of length 1; a zero vector stays 0 and gets no gradient."""
    x = embedding.astype(dtype)
    square = (x * x).sum(axis=1, keepdim=True)
    smallest = 1e-40 if dtype == "float64" else 1e-24
    inverse = square.clip(min=smallest).rsqrt()
    return x * paddle.where(square > smallest, inverse, paddle.zeros_like(inverse))


def similarities(embedding, other=None):
    """embedding [N, D], other [M, D] of any float type -> their cosines, float64 [N, M]."""
    x = normalize(embedding)
    return paddle.matmul(x, x if other is None else normalize(other), transpose_y=True)


def squared_distances(x, other=None):
    """x float64 [N, D], other float64 [M, D] -> squared Euclidean distances, float64 [N, M], at least 0."""
    other = x if other is None else other
    square, other_square = ((side * side).sum(axis=1, keepdim=True) for side in (x, other))
    # One product has it all: adding a column and a row to it would take a CPU as long again, and longer backwards.
    rows = paddle.concat([x, square, paddle.ones_like(square)], axis=1)
    columns = paddle.concat([-2 * other, paddle.ones_like(other_square), other_square], axis=1)
    return paddle.matmul(rows, columns, transpose_y=True).clip(min=0.0)


def distances(embedding, other=None):
    """embedding [N, D], other [M, D] -> Euclidean distances at length 1, float64 [N, M], at least 1e-6.

    Below that the square root's slope would grow without bound; duplicate images get no gradient instead.
    """
    other = None if other is None else normalize(other)
    return squared_distances(normalize(embedding), other).clip(min=1e-12).sqrt()


def mean_where(mask, terms):
    """The mean of the elements of `terms` where the bool `mask` is True; 0 where that is nowhere."""
    mask = mask.astype(terms.dtype)
    return (terms * mask).sum() / mask.sum().clip(min=1.0)


def log_sum_exp(x, mask=None):
    """ln of the sum of exp(x) over each row's elements in `mask`: float [N, M], bool [N, M] -> float [N].

    A row with none gives -1e30, of which exp and softplus are 0: infinity would reach the gradient through any mask.

    Args:
        mask: None: all.
    """
    x = x if mask is None else paddle.where(mask, x, paddle.full_like(x, -1e30))
    top = x.detach().max(axis=1, keepdim=True)
    return (x - top).exp().sum(axis=1).log() + top.squeeze(1)  # x.logsumexp takes a CPU twice as long
