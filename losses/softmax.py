"""Softmax cross-entropy, the loss of the head, with optional label smoothing.

    -sum_c t_c log softmax(logits)_c,  t = 1 - eps + eps/C for the true class, eps/C for the others

Szegedy et al., arXiv 1512.00567, section 7. With a cosine head it is the normalised softmax of Zhai and Wu, arXiv
1811.12649.
"""

import paddle
from paddle import nn

from losses.distances import log_sum_exp


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
            logits = logits.astype("float32")
            # With z the logits and y the label, the smoothed loss is (log sum exp z - z_y) + eps (z_y - mean z). Not
            # F.cross_entropy, which on a CPU never gives more than 64 for a picture, nor log_softmax, which takes 80
            # times as long there.
            of_label = paddle.take_along_axis(logits, label.unsqueeze(1), axis=1)
            return (
                log_sum_exp(logits).mean() - of_label.mean() + self.label_smoothing * (of_label.mean() - logits.mean())
            )
