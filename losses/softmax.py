"""Softmax cross-entropy, the loss of the head, with optional label smoothing.

    -sum_c t_c log softmax(logits)_c,  t = 1 - eps + eps/C for the true class, eps/C for the others

Szegedy et al., arXiv 1512.00567, section 7.
"""

import paddle
import paddle.nn.functional as F
from paddle import nn


class SoftmaxLoss(nn.Layer):
    """Mean cross-entropy.

    Args:
        label_smoothing: eps in 0..1.
    """

    def __init__(self, label_smoothing=0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits, label):
        """logits float [N, C], label int64 [N] -> float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            log_p = F.log_softmax(logits.astype("float32"), axis=1)
            own = F.nll_loss(log_p, label)
            return own * (1 - self.label_smoothing) - log_p.mean() * self.label_smoothing
