"""Multi-similarity loss with its miner. Wang, Han, Huang, Dong, Scott, arXiv 1904.06627.

    mean over anchors of  ln(1 + sum_p exp(-alpha (s(a, p) - base))) / alpha
                          + ln(1 + sum_n exp(scale (s(a, n) - base))) / scale

s is the cosine, alpha = 2, base = 0.5. Of an anchor's pairs count those that the miner keeps: negatives more similar
than its least similar positive less `margin`, and positives less similar than its most similar negative plus `margin`.
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

from losses.distances import log_sum_exp, pair_masks, similarities

ALPHA, BASE = 2.0, 0.5


class MultiSimilarityLoss(nn.Layer):
    """Multi-similarity loss on the images of one batch.

    Args:
        margin: of the miner, a cosine; None: all pairs count.
        scale: sharpness of the negatives (beta in the paper).
    """

    def __init__(self, margin=0.1, scale=50.0):
        super().__init__()
        self.margin, self.scale = margin, scale

    def forward(self, embedding, label, other=None, other_label=None):
        """embedding float [N, D], label int64 [N] -> float32 scalar; 0 where no pair is kept.

        Args:
            other: float [M, D], other_label int64 [M]: see losses/distances.py.
        """
        with paddle.amp.auto_cast(enable=False):
            s = similarities(embedding, other)
            positive, negative = pair_masks(label, other_label)
            if self.margin is not None:
                positive, negative = self.mine(s.detach(), positive, negative)
            pull = F.softplus(log_sum_exp(-ALPHA * (s - BASE), positive)) / ALPHA
            push = F.softplus(log_sum_exp(self.scale * (s - BASE), negative)) / self.scale
            return (pull + push).mean().astype("float32")

    def mine(self, s, positive, negative):
        """The pairs that count: bool [N, M] twice. An anchor keeps some of both or none of either."""
        nearest = paddle.where(negative, s, paddle.full_like(s, -math.inf)).max(axis=1, keepdim=True)
        farthest = paddle.where(positive, s, paddle.full_like(s, math.inf)).min(axis=1, keepdim=True)
        return (
            paddle.logical_and(positive, s - self.margin < nearest),
            paddle.logical_and(negative, s + self.margin > farthest),
        )
