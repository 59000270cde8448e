"""Proxy-Anchor loss. Kim, Kim, Cho, Kwak, arXiv 2003.13911.

    mean over classes in the batch of ln(1 + sum_{own x} exp(-scale (s(x, p) - margin)))
    + mean over all classes of        ln(1 + sum_{other x} exp(scale (s(x, p) + margin)))

s is the cosine of an embedding x of the batch and the learned proxy p of a class.
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

from losses.distances import log_sum_exp, normalize


class ProxyAnchorLoss(nn.Layer):
    """Proxy-Anchor loss on the images of one batch; owns a proxy for each class.

    Args:
        margin: delta, a cosine.
        scale: alpha, the sharpness.
        num_classes, embedding_size: of the proxies, float32 [num_classes, embedding_size].
    """

    def __init__(self, num_classes, embedding_size, margin=0.1, scale=32.0):
        super().__init__()
        self.margin, self.scale = margin, scale
        start = nn.initializer.Normal(
            0.0, math.sqrt(2 / num_classes)
        )  # as the authors; of its directions all are alike
        self.proxies = self.create_parameter([num_classes, embedding_size], default_initializer=start)

    def forward(self, embedding, label):
        """embedding float [N, D], label int64 [N] in 0..num_classes-1 -> float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            proxies = normalize(self.proxies, "float32")
            s = paddle.matmul(proxies, normalize(embedding, "float32"), transpose_y=True)
            own = paddle.arange(len(proxies)).unsqueeze(1) == label.unsqueeze(0)
            pull = F.softplus(log_sum_exp(-self.scale * (s - self.margin), own))
            push = F.softplus(log_sum_exp(self.scale * (s + self.margin), paddle.logical_not(own)))
            return pull.sum() / own.any(axis=1).astype(s.dtype).sum() + push.mean()
