"""What is trained: metric loss + alpha * cross-entropy of the softmax head, as one layer that is built once.

A metric loss is a `paddle.nn.Layer`, forward(embedding float [N, D], label int64 [N]) -> float32 scalar. It finds its
positives and negatives from the labels; one that can have a memory also takes `other` and `other_label` (see
losses/distances.py). It may own

* parameters (proxies, a learned margin), which are optimised at --loss_lr_scale times the rate of the network;
* buffers (a memory of earlier embeddings: `register_buffer`), which it changes in `forward` with
  `paddle.assign(..., output=self.buffer)`; what the gradient needs of one is then to be taken from its `clone()`.

Both are saved with the checkpoint and continued to the bit. Of several processes each computes the same loss of the
whole batch, so that what the loss owns is the same in all.
"""

import paddle
from paddle import nn

import losses
from losses.memory import MemoryLoss


class Objective(nn.Layer):
    """What a step of training lowers.

    Args:
        settings: losses.LossSettings.
        num_classes: outputs of the head; embedding_size: D.
    """

    def __init__(self, settings, num_classes, embedding_size):
        super().__init__()
        self.metric_loss = losses.build_loss(settings, num_classes=num_classes, embedding_size=embedding_size)
        self.head_loss = losses.build_head_loss(settings)
        loss = losses.row(settings.loss_name)
        self.alpha = loss.alpha if settings.alpha is None else settings.alpha
        scale = loss.lr_scale if settings.loss_lr_scale is None else settings.loss_lr_scale
        for parameter in self.parameters():
            parameter.optimize_attr["learning_rate"] = scale

    def begin_epoch(self, epoch):
        """To be called before the steps of `epoch`, from 0: a memory may begin with a later one."""
        if isinstance(self.metric_loss, MemoryLoss):
            self.metric_loss.epoch = epoch

    def forward(self, embedding, logits, label):
        """embedding float [N, D], logits float [N, C], label int64 [N], all of the whole batch.

        Returns: {"loss": what is to become smaller, "loss_metric", "loss_cls": its parts}, float32 scalars.
        """
        loss_cls = self.head_loss(logits, label)
        if self.metric_loss is None:
            return {"loss": loss_cls, "loss_metric": paddle.zeros([]), "loss_cls": loss_cls}
        loss_metric = self.metric_loss(embedding, label)
        loss = loss_metric + self.alpha * loss_cls if self.alpha else loss_metric
        return {"loss": loss, "loss_metric": loss_metric, "loss_cls": loss_cls}
