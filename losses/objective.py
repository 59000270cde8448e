"""What is trained: metric loss + alpha * cross-entropy of the softmax head, as one layer that is built once.

A metric loss is a `paddle.nn.Layer`, forward(embedding float [N, D], label int64 [N]) -> float32 scalar. It finds its
positives and negatives from the labels. It may own

* parameters (proxies, class weights, a learned margin), which are optimised at `learning_rate_scale` times the rate of
  the network, an attribute of the loss (1 where it has none);
* buffers (a memory of earlier embeddings: `register_buffer`), which it changes in `forward` with
  `paddle.assign(..., output=self.buffer)`; what the gradient needs of one is then to be taken from its `clone()`.

Both are saved with the checkpoint and continued to the bit. Of several processes each computes the same loss of the
whole batch, so that what the loss owns is the same in all.
"""

import paddle
from paddle import nn

import losses
from losses.softmax import SoftmaxLoss


class Objective(nn.Layer):
    """What a step of training lowers.

    Args:
        settings: losses.LossSettings.
        num_classes: outputs of the head; embedding_size: D.
    """

    def __init__(self, settings, num_classes, embedding_size):
        super().__init__()
        self.metric_loss = losses.build_loss(settings, num_classes=num_classes, embedding_size=embedding_size)
        self.head_loss = SoftmaxLoss(settings.label_smoothing)
        self.alpha = settings.alpha
        scale = getattr(self.metric_loss, "learning_rate_scale", 1.0)
        for parameter in self.parameters():
            parameter.optimize_attr["learning_rate"] = scale

    def forward(self, embedding, logits, label):
        """embedding float [N, D], logits float [N, C], label int64 [N], all of the whole batch.

        Returns: {"loss": what is to become smaller, "loss_metric", "loss_cls": its parts}, float32 scalars.
        """
        loss_cls = self.head_loss(logits, label)
        if self.metric_loss is None:
            return {"loss": loss_cls, "loss_metric": paddle.zeros([]), "loss_cls": loss_cls}
        loss_metric = self.metric_loss(embedding, label)
        return {"loss": loss_metric + self.alpha * loss_cls, "loss_metric": loss_metric, "loss_cls": loss_cls}
