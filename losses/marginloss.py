"""Margin loss with distance-weighted negatives. Wu, Manmatha, Smola, Krahenbuhl, arXiv 1706.07567.

    sum over pairs (a, p) of max(0, d(a, p) - beta + margin) + max(0, beta - d(a, n) + margin),  by the terms above 0

d is the Euclidean distance of normalised embeddings, beta a learned boundary that starts at 1.2; n is drawn for each
pair so that all distances are about equally likely (see losses/tripletloss.py).
"""

import paddle
import paddle.nn.functional as F
from paddle import nn

from losses.distances import distances, pair_masks
from losses.tripletloss import draw_by_distance


class MarginLoss(nn.Layer):
    """Margin loss on the images of one batch.

    Args:
        margin: distance on either side of beta, 0..2.
    """

    def __init__(self, margin=0.2):
        super().__init__()
        self.margin = margin
        self.beta = self.create_parameter([1], default_initializer=nn.initializer.Constant(1.2))

    def forward(self, embedding, label, other=None, other_label=None):
        """embedding float [N, D], label int64 [N] -> float32 scalar; 0 where there is no triplet.

        Args:
            other: float [M, D], other_label int64 [M]: see losses/distances.py.
        """
        with paddle.amp.auto_cast(enable=False):
            d = distances(embedding, other)
            positive, negative = pair_masks(label, other_label)
            pairs = paddle.logical_and(positive, negative.any(axis=1, keepdim=True)).astype(d.dtype)
            with paddle.no_grad():
                chosen = draw_by_distance(d, negative, embedding.shape[1])
            beta = self.beta.astype(d.dtype)
            pull = F.relu(d - beta + self.margin) * pairs
            push = F.relu(beta - paddle.take_along_axis(d, chosen, axis=1) + self.margin) * pairs
            # A term that rounding alone lifts above 0 does not count.
            terms = ((pull > 1e-8).astype(d.dtype) + (push > 1e-8).astype(d.dtype)).sum()
            return ((pull + push).sum() / terms.clip(min=1.0)).astype("float32")
