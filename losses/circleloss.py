"""Circle loss. Sun et al., arXiv 2002.10857.

    mean over anchors of  softplus(ln sum_n exp(scale w_n (s_n - m)) + ln sum_p exp(-scale w_p (s_p - 1 + m)))
    w_n = max(0, s_n + m),  w_p = max(0, 1 + m - s_p)

s is the cosine, m the margin. The weights w get no gradient. Each anchor has its own sums.
"""

import paddle
import paddle.nn.functional as F
from paddle import nn

from losses.distances import log_sum_exp, mean_where, pair_masks, similarities


class CircleLoss(nn.Layer):
    """Circle loss on the images of one batch.

    Args:
        margin: how far from 0 and from 1 the cosines of negatives and positives may stay.
        scale: sharpness, above 0.
    """

    def __init__(self, margin=0.4, scale=80.0):
        super().__init__()
        self.margin, self.scale = margin, scale

    def forward(self, embedding, label, other=None, other_label=None):
        """embedding float [N, D], label int64 [N] -> float32 scalar.

        Anchors without a positive or without a negative are left out; 0 where that leaves none.

        Args:
            other: float [M, D], other_label int64 [M]: see losses/distances.py.
        """
        m = self.margin
        with paddle.amp.auto_cast(enable=False):
            s = similarities(embedding, other)
            positive, negative = pair_masks(label, other_label)
            push = log_sum_exp(self.scale * F.relu(s.detach() + m) * (s - m), negative)
            pull = log_sum_exp(-self.scale * F.relu(1 + m - s.detach()) * (s - 1 + m), positive)
            anchors = paddle.logical_and(positive.any(axis=1), negative.any(axis=1))
            return mean_where(anchors, F.softplus(push + pull)).astype("float32")
