"""Contrastive loss.

    mean of d(a, p) + mean of max(0, margin - d(a, n)),  each over the pairs whose term is above 0

over the positive pairs (a, p) and the negative pairs (a, n); d is the Euclidean distance of normalised embeddings.
Hadsell, Chopra, LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR 2006, without their squares.
"""

import paddle
import paddle.nn.functional as F
from paddle import nn

from losses.distances import distances, mean_where, pair_masks


class ContrastiveLoss(nn.Layer):
    """Contrastive loss on the images of one batch.

    Args:
        margin: distance beyond which a negative is far enough, 0..2.
    """

    def __init__(self, margin=1.0):
        super().__init__()
        self.margin = margin

    def forward(self, embedding, label, other=None, other_label=None):
        """embedding float [N, D], label int64 [N] -> float32 scalar; 0 where there is no pair.

        Args:
            other: float [M, D], other_label int64 [M]: see losses/distances.py.
        """
        with paddle.amp.auto_cast(enable=False):
            d = distances(embedding, other)
            positive, negative = pair_masks(label, other_label)
            apart = paddle.logical_and(positive, d > 2e-6)  # duplicates have the least distance that there is
            too_close = F.relu(self.margin - d)
            violated = paddle.logical_and(negative, too_close > 0)
            return (mean_where(apart, d) + mean_where(violated, too_close)).astype("float32")
