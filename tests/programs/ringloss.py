"""A loss with all that a loss may own: a learned proxy for each class, and a ring of past embeddings. For tests."""

import paddle
import paddle.nn.functional as F
from paddle import nn


class RingLoss(nn.Layer):
    """Cross-entropy of the cosines to the proxies, plus the mean cosine to past embeddings of other classes."""

    def __init__(self, ring_size, num_classes, embedding_size):
        super().__init__()
        self.proxies = self.create_parameter([num_classes, embedding_size])
        self.register_buffer("past", paddle.zeros([ring_size, embedding_size]))
        self.register_buffer("past_label", paddle.full([ring_size], -1, "int64"))

    def forward(self, embedding, label):
        x = F.normalize(embedding.astype("float32"), axis=1)
        loss = F.cross_entropy(8 * paddle.matmul(x, F.normalize(self.proxies, axis=1), transpose_y=True), label)
        known = paddle.logical_and(self.past_label >= 0, label.unsqueeze(1) != self.past_label).astype("float32")
        cosine = F.relu(paddle.matmul(x, self.past.clone(), transpose_y=True))  # of what it is now, for the gradient
        loss = loss + (cosine * known).sum() / known.sum().clip(min=1.0)
        with paddle.no_grad():
            size = self.past.shape[0]
            paddle.assign(paddle.concat([x.detach(), self.past])[:size], output=self.past)
            paddle.assign(paddle.concat([label, self.past_label])[:size], output=self.past_label)
        return loss
