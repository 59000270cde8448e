"""Additive angular margin loss (ArcFace) of a cosine head. Deng et al., arXiv 1801.07698.

    cross-entropy of scale * cos(t_c), where the angle t of an image's own class is made larger by the margin:
    cos(t + margin), or cos(t) - margin sin(margin) where t + margin is beyond 180 degrees

t_c is the angle between the embedding and the weights of class c.
"""

import math

import paddle
from paddle import nn

from losses.softmax import SoftmaxLoss


class ArcMarginLoss(nn.Layer):
    """Cross-entropy with an angular margin.

    Args:
        margin: an angle in radians, 0 to pi.
        head_scale: what the head has multiplied the cosines by.
        label_smoothing: as of SoftmaxLoss.
    """

    def __init__(self, margin=0.15, head_scale=80.0, label_smoothing=0.0):
        super().__init__()
        self.margin, self.scale = margin, head_scale
        self.cross_entropy = SoftmaxLoss(label_smoothing)

    def forward(self, logits, label):
        """logits float [N, C], cosines times the scale, label int64 [N] -> float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            logits = logits.astype("float32")
            column = label.unsqueeze(1)
            cosine = paddle.take_along_axis(logits, column, axis=1) / self.scale
            # Where the cosine is 1 or -1 the sine's slope would be infinite without the 1e-6 (as in the original).
            sine = ((1 - cosine * cosine).clip(min=0.0) + 1e-6).sqrt()
            moved = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
            beyond = cosine - self.margin * math.sin(self.margin)
            moved = paddle.where(cosine > -math.cos(self.margin), moved, beyond)
            own = (paddle.arange(logits.shape[1]).unsqueeze(0) == column).astype(logits.dtype)
            return self.cross_entropy(logits + own * (self.scale * (moved - cosine)), label)
