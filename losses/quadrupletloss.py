"""Margin sample mining loss (MSML), which the original page calls "quadruplet".

    max(0, max over positive pairs d(i, j) - min over negative pairs d(k, l) + margin)

The one farthest pair of a class and the one closest pair of two classes in the whole batch; they need not share an
image. d is the Euclidean distance of normalised embeddings. Xiao, Luo, Zhang, arXiv 1710.00478. (Not the quadruplet
loss with two margins of Chen et al.)
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

from losses.distances import distances, pair_masks


class QuadrupletLoss(nn.Layer):
    """Margin sample mining loss on the images of one batch.

    Args:
        margin: in the unit of the distance, 0..2.
    """

    def __init__(self, margin=0.1):
        super().__init__()
        self.margin = margin

    def forward(self, embedding, label):
        """embedding float [N, D], label int64 [N] -> float32 scalar; 0 without a positive or a negative pair."""
        with paddle.amp.auto_cast(enable=False):
            d = distances(embedding)
            positive, negative = pair_masks(label)
            # By index, so that one pair gets the gradient once: max() gives all of it to (i, j) and again to (j, i).
            farthest = paddle.where(positive, d, paddle.full_like(d, -math.inf)).argmax()
            closest = paddle.where(negative, d, paddle.full_like(d, math.inf)).argmin()
            far, close = paddle.index_select(d.flatten(), paddle.stack([farthest, closest])).unbind()
            both = paddle.logical_and(positive.any(), negative.any())
            return (F.relu(far - close + self.margin) * both.astype(d.dtype)).astype("float32")
