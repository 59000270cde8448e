"""Triplet margin loss.

    mean over anchor-positive pairs (a, p) of max(0, d(a, p) + margin - d(a, n)),  one negative n for each pair

d is the Euclidean distance of normalised embeddings. Schroff et al., FaceNet, arXiv 1503.03832. What n is:

random      any image of another class, drawn evenly: the original
semihard    the closest one that is farther than p (FaceNet); where there is none, the farthest of all
hard        the closest of all; p is only the farthest positive of each anchor (Hermans et al., arXiv 1703.07737)
distance    drawn so that all distances are about equally likely (Wu et al., arXiv 1706.07567)
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

from losses import MINING
from losses.distances import distances, mean_where, pair_masks

# Wu et al.: closer than the first, a negative's gradient is mostly noise; beyond the second, it gives no loss.
SAMPLED_DISTANCES = (0.5, 1.4)


class TripletLoss(nn.Layer):
    """Triplet margin loss on the images of one batch.

    Args:
        margin: in the unit of the distance, 0..2.
        triplet_mining: which negatives, see the top of this file.
    """

    def __init__(self, margin=0.1, triplet_mining="random"):
        super().__init__()
        if triplet_mining not in MINING:
            raise ValueError(f"unknown mining {triplet_mining!r}; known: {', '.join(MINING)}")
        self.margin = margin
        self.mining = triplet_mining

    def forward(self, embedding, label, other=None, other_label=None):
        """embedding float [N, D], label int64 [N] -> float32 scalar; 0 where there is no triplet.

        Args:
            other: float [M, D], other_label int64 [M]: see losses/distances.py.
        """
        with paddle.amp.auto_cast(enable=False):
            d = distances(embedding, other)
            positive, negative = pair_masks(label, other_label)
            # An anchor without a negative makes no triplet, and one without a positive has no pair.
            pairs = paddle.logical_and(positive, negative.any(axis=1, keepdim=True))
            if self.mining == "hard":
                to_positive = paddle.take_along_axis(d, farthest(d, positive), axis=1)
                pairs = pairs.any(axis=1, keepdim=True)
                to_negative = paddle.take_along_axis(d, closest(d, negative), axis=1)
            else:
                to_positive = d
                with paddle.no_grad():
                    choose = {"random": draw_evenly, "semihard": semihard, "distance": draw_by_distance}[self.mining]
                    chosen = choose(d, negative, embedding.shape[1])
                to_negative = paddle.take_along_axis(d, chosen, axis=1)
            return mean_where(pairs, F.relu(to_positive + self.margin - to_negative)).astype("float32")


def farthest(d, positive):
    """Index of each anchor's farthest positive, int64 [N, 1]. (The gradient of max(axis=1) takes 100 times as long.)"""
    return paddle.where(positive, d, paddle.full_like(d, -math.inf)).argmax(axis=1, keepdim=True)


def closest(d, negative):
    """Index of each anchor's closest negative, int64 [N, 1]."""
    return paddle.where(negative, d, paddle.full_like(d, math.inf)).argmin(axis=1, keepdim=True)


# Each of the following chooses a negative for every anchor-positive pair:
#     d float64 [N, M], negative bool [N, M], dimension of the embeddings -> index int64 [N, M]
# The result at [a, p] is a negative of a; it has no meaning where a has none.


def draw_evenly(d, negative, dimension):
    """In the order of classes an anchor's negatives are all images but one run: no search, unlike `draw`."""
    anchors, images = d.shape
    # Each image's class by its first anchor; those of no anchor's class come last.
    first_anchor = paddle.where(negative, paddle.full_like(negative, anchors, "int64"),
                                paddle.arange(anchors).unsqueeze(1)).min(axis=0)  # fmt: skip
    order = first_anchor.argsort()
    first = paddle.searchsorted(first_anchor.gather(order), first_anchor[:anchors]).unsqueeze(1)
    count = negative.astype("int64").sum(axis=1, keepdim=True)
    # A number of the negative, from 0; rounding must not lead beyond the last.
    drawn = (paddle.rand(d.shape, dtype="float64") * count.astype("float64")).astype("int64")
    drawn = paddle.minimum(drawn, count - 1).clip(min=0)
    place = paddle.where(drawn < first, drawn, drawn + images - count).clip(max=images - 1)
    return order.gather(place.flatten()).reshape(d.shape)


def draw_by_distance(d, negative, dimension):
    """Draws with the inverse of the density of distances q(d) ~ d^(D-2) (1 - d^2/4)^((D-3)/2) on the unit sphere."""
    low, high = SAMPLED_DISTANCES
    e = d.clip(min=low, max=2.0)
    log_weight = (2.0 - dimension) * e.log() - (dimension - 3.0) / 2 * (1 - e * e / 4).clip(min=1e-8).log()
    log_weight = paddle.where(
        paddle.logical_and(negative, d < high), log_weight, paddle.full_like(log_weight, -math.inf)
    )
    top = log_weight.max(axis=1, keepdim=True)
    # Where no negative is in reach, all are as good as each other: the loss is nearly always 0 there.
    reached = top > -math.inf
    weight = (log_weight - paddle.where(reached, top, paddle.zeros_like(top))).exp()
    return draw(paddle.where(reached.expand_as(weight), weight, negative.astype("float64")))


def draw(weight):
    """For each [a, p] a column of row a, drawn with the probabilities weight[a] / sum(weight[a])."""
    cumulative = weight.cumsum(axis=1)
    # A little less than the sum at most, so that rounding cannot lead beyond the last column with a weight.
    point = paddle.rand(weight.shape, dtype="float64") * cumulative[:, -1:] * (1 - 1e-12)
    return paddle.searchsorted(cumulative, point, right=True).clip(max=weight.shape[1] - 1)


def semihard(d, negative, dimension):
    masked = paddle.where(negative, d, paddle.full_like(d, math.inf))
    order = masked.argsort(axis=1)
    ascending = paddle.take_along_axis(masked, order, axis=1)
    farthest = negative.astype("int64").sum(axis=1, keepdim=True) - 1
    # Equal distances differ in their last bits: one that is a rounding error farther is not farther.
    rank = paddle.minimum(paddle.searchsorted(ascending, d + 1e-8, right=True), farthest).clip(min=0)
    return paddle.take_along_axis(order, rank, axis=1)
