"""Cross-batch memory: the last embeddings that were computed stand beside the batch as positives and negatives.

    loss(batch) + loss(batch against the memory)

Wang, Zhang, Huang, Scott, Cross-Batch Memory for Embedding Learning, arXiv 1912.06798. The memory is a ring that holds
the batch, too: an image is no pair with its own copy there, which is found by its place and not by its likeness.
"""

import paddle
from paddle import nn


class MemoryLoss(nn.Layer):
    """A loss with a memory.

    Args:
        loss: a layer, forward(embedding, label, other, other_label).
        size: embeddings that are remembered.
        embedding_size: D.
        start_epoch: the first epoch with a memory: before, embeddings change too fast to be worth comparing with.
    """

    def __init__(self, loss, size, embedding_size, start_epoch=0):
        super().__init__()
        self.loss, self.start_epoch, self.epoch = loss, start_epoch, 0
        self.register_buffer("past", paddle.zeros([size, embedding_size]))
        self.register_buffer("past_label", paddle.zeros([size], "int64"))
        self.register_buffer("seen", paddle.zeros([1], "int64"))  # embeddings so far
        self._seen = None  # the same as a number, read once: reading it would stall a GPU in each step

    def forward(self, embedding, label):
        """embedding float [N, D], label int64 [N] -> float32 scalar."""
        loss = self.loss(embedding, label)
        if self.epoch < self.start_epoch:
            return loss
        self._seen = int(self.seen.numpy()[0]) if self._seen is None else self._seen
        size, new = self.past.shape[0], label.shape[0]
        kept = min(self._seen, max(size - new, 0))  # what the batch leaves of the past
        places = (self._seen - kept + paddle.arange(kept)) % size
        x = embedding.detach().astype("float32")
        other = paddle.concat([x, self.past.gather(places)]) if kept else x
        other_label = paddle.concat([label, self.past_label.gather(places)]) if kept else label
        self.remember(x, label)
        return loss + self.loss(embedding, label, other, other_label)

    def remember(self, x, label):
        """Puts a batch in the place of the oldest embeddings; of one larger than the memory, the last."""
        size, new = self.past.shape[0], label.shape[0]
        first = max(new - size, 0)
        places = (self._seen + paddle.arange(first, new)) % size
        with paddle.no_grad():
            for buffer, value in ((self.past, x), (self.past_label, label)):
                paddle.assign(paddle.scatter(buffer, places, value[first:]), output=buffer)
            self._seen += new
            paddle.assign(paddle.full([1], self._seen, "int64"), output=self.seen)
