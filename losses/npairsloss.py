"""N-pairs loss. Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NIPS 2016.

    mean over pairs i of  -sum_j t_ij log softmax_j(a_i . p_j)  +  0.005 mean |f|^2

Each class's images are taken in twos in the order of the batch, an anchor a and a positive p; a last odd one is left
out. f are raw embeddings, not normalised, which the second term keeps short. t is even over the pairs of i's class.
"""

import paddle
from paddle import nn

from losses.distances import log_sum_exp, mean_where

L2_WEIGHT = 0.01


class NPairsLoss(nn.Layer):
    """N-pairs loss on the images of one batch."""

    def forward(self, embedding, label):
        """embedding float [N, D], label int64 [N] -> float32 scalar; 0 where no class has two images."""
        with paddle.amp.auto_cast(enable=False):
            # The images of a class side by side, in the batch's order; classes in the order of their first image.
            same = label.unsqueeze(1) == label.unsqueeze(0)
            places = paddle.arange(len(label))
            first = paddle.where(same, places.unsqueeze(0), paddle.full_like(same, len(label), "int64")).min(axis=1)
            order = (first * len(label) + places).argsort()
            x, first = embedding.astype("float64").gather(order), first.gather(order)
            start = paddle.searchsorted(first, first)
            following = (places + 1).clip(max=len(label) - 1)
            anchors = paddle.logical_and((places - start) % 2 == 0, first == first.gather(following))
            anchors = paddle.logical_and(anchors, following > places)

            positives = x.gather(following)
            product = paddle.matmul(x, positives, transpose_y=True)
            pairs = anchors.unsqueeze(0).expand_as(product)
            target = paddle.logical_and(first.unsqueeze(1) == first.unsqueeze(0), pairs).astype(x.dtype)
            own = (product * target).sum(axis=1) / target.sum(axis=1).clip(min=1.0)
            square = ((x * x).sum(axis=1) + (positives * positives).sum(axis=1)) / 2
            loss = log_sum_exp(product, pairs) - own + 0.5 * L2_WEIGHT * square
            return mean_where(anchors, loss).astype("float32")
