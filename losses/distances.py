"""Masks and pairwise distances that the metric losses share.

Distances come from a matrix product, in float64: |a|^2 + |b|^2 - 2ab loses the small distances in float32 (an error of
10 between features of norm 1e4, and 3e-4 between equal ones of norm 1), and subtracting every pair would need an
N x N x D tensor. A batch is small enough that the wider product costs next to nothing beside the backbone.
"""

import paddle


def pair_masks(label):
    """label int64 [N] -> positive, negative: bool [N, N], for each anchor (row) who shares its class and who does not.

    An image is no positive of itself.
    """
    same = label.unsqueeze(1) == label.unsqueeze(0)
    itself = paddle.eye(label.shape[0]).astype("bool")
    return paddle.logical_and(same, paddle.logical_not(itself)), paddle.logical_not(same)


def normalize(embedding):
    """embedding [N, D] of any float type -> float64 [N, D] of length 1; a zero vector stays 0 and gets no gradient."""
    x = embedding.astype("float64")
    square = (x * x).sum(axis=1, keepdim=True)
    inverse = square.clip(min=1e-40).rsqrt()
    return x * paddle.where(square > 1e-40, inverse, paddle.zeros_like(inverse))


def squared_distances(x):
    """x float64 [N, D] -> squared Euclidean distances, float64 [N, N], at least 0."""
    square = (x * x).sum(axis=1)
    product = paddle.matmul(x, x, transpose_y=True)
    return (square.unsqueeze(1) + square.unsqueeze(0) - 2 * product).clip(min=0.0)


def distances(x):
    """x float64 [N, D] -> Euclidean distances, float64 [N, N], at least 1e-6.

    Below that the square root's slope would grow without bound; duplicate images get no gradient instead.
    """
    return squared_distances(x).clip(min=1e-12).sqrt()
