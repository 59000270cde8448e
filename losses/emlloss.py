"""Ensemble metric learning loss (EML). Huang, Zhu, Yu, arXiv 1212.6094.

    L_i = softplus(ln b + logmeanexp over positives p of d(i, p) + logmeanexp over negatives n of -d(i, n)) / ln(1 + b)
    L = mean of L_i over all anchors i

d is the squared Euclidean distance of the raw embeddings (not normalised), b = 100000. The mean over p and n of
exp(d(i, p) - d(i, n)), times b, inside a logarithm: farthest positives and closest negatives count most.
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

from losses.distances import log_sum_exp, mean_where, pair_masks, squared_distances


class EmlLoss(nn.Layer):
    """Ensemble metric learning loss on the images of one batch.

    Args:
        b: weight of the exponent's mean in the logarithm.
    """

    def __init__(self, b=100000.0):
        super().__init__()
        self.b = b

    def forward(self, embedding, label):
        """embedding float [N, D], label int64 [N] -> float32 scalar.

        Anchors without a positive or without a negative are left out; 0 where that leaves none.
        """
        with paddle.amp.auto_cast(enable=False):
            d = squared_distances(embedding.astype("float64"))
            positive, negative = pair_masks(label)
            exponent = math.log(self.b) + log_mean_exp(d, positive) + log_mean_exp(-d, negative)
            loss = F.softplus(exponent) / math.log1p(self.b)
            anchors = paddle.logical_and(positive.any(axis=1), negative.any(axis=1))
            return mean_where(anchors, loss).astype("float32")


def log_mean_exp(x, mask):
    """ln of the mean of exp(x) over each row's elements in `mask`: float64 [N, N], bool [N, N] -> float64 [N]."""
    count = mask.astype(x.dtype).sum(axis=1).clip(min=1.0)
    return log_sum_exp(x, mask) - count.log()
