"""Supervised contrastive loss. Khosla et al., arXiv 2004.11362, L_out.

    mean over anchors a of  ln sum_{j != a} exp(scale s(a, j)) - mean over positives p of scale s(a, p)

s is the cosine; scale is one by the temperature.
"""

import paddle
from paddle import nn

from losses.distances import log_sum_exp, mean_where, pair_masks, similarities


class SupConLoss(nn.Layer):
    """Supervised contrastive loss on the images of one batch.

    Args:
        scale: sharpness, above 0.
    """

    def __init__(self, scale=10.0):
        super().__init__()
        self.scale = scale

    def forward(self, embedding, label, other=None, other_label=None):
        """embedding float [N, D], label int64 [N] -> float32 scalar.

        Anchors without a positive or without a negative are left out; 0 where that leaves none.

        Args:
            other: float [M, D], other_label int64 [M]: see losses/distances.py.
        """
        with paddle.amp.auto_cast(enable=False):
            x = self.scale * similarities(embedding, other)
            positive, negative = pair_masks(label, other_label)
            count = positive.astype(x.dtype).sum(axis=1).clip(min=1.0)
            to_positives = (x * positive.astype(x.dtype)).sum(axis=1) / count
            loss = log_sum_exp(x, paddle.logical_or(positive, negative)) - to_positives
            anchors = paddle.logical_and(positive.any(axis=1), negative.any(axis=1))
            return mean_where(anchors, loss).astype("float32")
