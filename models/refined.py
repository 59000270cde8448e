"""A network that looks at each picture in several ways and may whiten what it sees; for evaluation alone."""

import numpy as np
import paddle
import paddle.nn as nn
import paddle.nn.functional as F

from runtime import process


class Refined(nn.Layer):
    """uint8 RGB [N, H, W, 3] -> embedding of length 1, float [N, D], and mean logits of all views, or None.

    A picture's views are its sizes and, with `flip`, the mirror image of each. The embeddings of all views are brought
    to length 1 and added up, or those of the sizes are put side by side.

    Args:
        network: EmbeddingNet.
        flip: whether to look at the mirror image, too.
        scales: sizes as multiples of the picture's own.
        join: True puts the sizes side by side.
        whitening: (mean [D], matrix [D, K]), NumPy arrays: the embedding becomes (embedding - mean) matrix, at length
            1; None: it stays.
    """

    def __init__(self, network, flip=False, scales=(1.0,), join=False, whitening=None):
        super().__init__()
        self.network, self.flip, self.scales, self.join = network, flip, tuple(scales), join
        self.dimension = network.dimension * (len(self.scales) if join else 1)
        self.whitens = whitening is not None
        if self.whitens:
            for name, value in zip(("mean", "matrix"), whitening):
                self.register_buffer(name, paddle.to_tensor(value, dtype="float32"))
            self.dimension = whitening[1].shape[1]

    def extra_repr(self):
        return f"flip={self.flip}, scales={self.scales}, join={self.join}, whitens={self.whitens}"

    def forward(self, image):
        image = image.astype("float32")  # before its shape is asked for: 2.6 traces that for floats alone
        height, width = image.shape[1:3]
        sizes, scores = [], []
        for scale in self.scales:
            x = image
            if scale != 1:
                x = resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
            views = [self.network(view) for view in ([x, x.flip(axis=[2])] if self.flip else [x])]
            sizes.append(sum(unit(embedding) for embedding, _ in views))
            scores += [logits for _, logits in views if logits is not None]
        embedding = unit(paddle.concat(sizes, axis=1) if self.join else sum(sizes))
        if self.whitens:
            embedding = unit(paddle.matmul(embedding - self.mean, self.matrix))
        return embedding, sum(scores) / len(scores) if scores else None


def unit(embedding):
    """At length 1. In float32: under auto_cast, 2.6.2 sums up squares in float16, whose largest number is 65504."""
    return F.normalize(embedding.astype("float32"), axis=1)


def resize(x, height, width):
    """Pictures float32 [N, H, W, 3] -> [N, height, width, 3]: linear, and without aliasing where they shrink.

    As two matrix products: the inference engine of 3.3.1 has no code for F.interpolate.
    """
    full_height, full_width = x.shape[1:3]
    tensor = process.to_device if paddle.in_dynamic_mode() else paddle.to_tensor
    rows = paddle.matmul(tensor(shares(full_height, height)), x.reshape([-1, full_height, full_width * 3]))
    return paddle.matmul(tensor(shares(full_width, width)), rows.reshape([-1, height, full_width, 3]))


def shares(old, new):
    """What each of `old` pixels in a row gives to each of `new`: float32 [new, old], rows of sum 1.

    The triangle filter of Pillow's BILINEAR, which is as wide as the pixels that become one.
    """
    step = old / new
    centres = (np.arange(new) + 0.5) * step - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(old) - centres[:, None]) / max(step, 1))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
