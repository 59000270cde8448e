"""The network that train, eval and infer share: pictures -> embedding and class scores."""

import paddle
import paddle.nn as nn
import paddle.nn.functional as F

from transforms import MEAN, STD


class Pooling(nn.Layer):
    """Feature map [N, C, h, w] -> [N, C].

    avg: mean; max: maximum; avg+max: their sum; gem: generalised mean (mean of x^p)^(1/p) with a learned p that
    starts at 3 (Radenovic et al., arXiv 1711.02512) and counts as 1 below 1, and as 6 above: nothing else keeps a high
    rate from taking it through 0, or to where 1e-6^p is 0 in float32, whose root has no gradient.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "gem":
            self.power = self.create_parameter([1], default_initializer=nn.initializer.Constant(3.0))

    def extra_repr(self):
        return self.kind

    def forward(self, x):
        # Not x.max(axis=[2, 3]), whose gradient takes a CPU 1.8 s for 20 x 2048 x 7 x 7, or x.mean, which takes 25 ms:
        # these take 2 ms, and the inference engine has fast code for them.
        if self.kind == "avg":
            return F.adaptive_avg_pool2d(x, 1).flatten(1)
        if self.kind == "max":
            return F.adaptive_max_pool2d(x, 1).flatten(1)
        if self.kind == "avg+max":
            return (F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1)).flatten(1)
        # float32 throughout: x^p leaves float16's range early.
        x = x.astype("float32").clip(min=1e-6)
        power = self.power.clip(1.0, 6.0)
        return F.adaptive_avg_pool2d(x**power, 1).flatten(1) ** (1 / power)


class CosineHead(nn.Layer):
    """Embedding [N, D] -> its cosines to the weights of each class, times `scale`, float32 [N, class_dim]."""

    def __init__(self, size, class_dim, scale):
        super().__init__()
        self.scale = scale
        self.weight = self.create_parameter([size, class_dim], default_initializer=nn.initializer.XavierNormal())

    def extra_repr(self):
        return f"scale={self.scale}"

    def forward(self, embedding):
        with paddle.amp.auto_cast(enable=False):
            directions = unit(self.weight.astype("float32"), axis=0)
            return self.scale * paddle.matmul(unit(embedding.astype("float32"), axis=1), directions)


def unit(x, axis):
    """Vectors along `axis` at length 1; a zero vector stays 0 and gets no gradient."""
    square = (x * x).sum(axis=axis, keepdim=True)
    inverse = square.clip(min=1e-24).rsqrt()
    return x * (inverse * (square > 1e-24).astype(x.dtype))


class EmbeddingNet(nn.Layer):
    """Backbone, pooling, optional norm and embedding layer, and the softmax head that trains alongside the metric loss.

    Args:
        backbone: layer with `out_channels` that maps [N, 3, H, W] to [N, out_channels, h, w].
        class_dim: outputs of the head; 0 builds none.
        pooling: avg, max, gem or avg+max.
        embedding_size: the pooled features go through a linear layer of this size; 0: they are the embedding.
        dropout: probability in front of the head while training.
        embedding_norm: "layer" brings each picture's pooled features to mean 0 and variance 1; "none".
        head: "linear" in the embedding, or "cosine": `head_scale` times the cosines to the weights of each class.
    """

    def __init__(
        self,
        backbone,
        class_dim,
        pooling="avg",
        embedding_size=0,
        dropout=0.0,
        embedding_norm="none",
        head="linear",
        head_scale=20.0,
    ):
        super().__init__()
        self.resting = False  # whether the backbone is left out of training for now
        self.backbone = backbone
        self.pool = Pooling(pooling)
        channels = backbone.out_channels
        layer_norm = embedding_norm == "layer"
        self.norm = nn.LayerNorm(channels, weight_attr=False, bias_attr=False) if layer_norm else nn.Identity()
        self.embedding = nn.Linear(channels, embedding_size) if embedding_size else nn.Identity()
        self.dimension = size = embedding_size or channels  # of the embedding
        self.dropout = nn.Dropout(dropout)
        uniform = nn.initializer.Uniform(-(size**-0.5), size**-0.5)
        self.head = None
        if class_dim and head == "cosine":
            self.head = CosineHead(size, class_dim, head_scale)
        elif class_dim:
            self.head = nn.Linear(size, class_dim, weight_attr=paddle.ParamAttr(initializer=uniform))
        scale = [1 / (255 * s) for s in STD]
        shift = [-m / s for m, s in zip(MEAN, STD)]
        self.register_buffer("scale", paddle.to_tensor(scale, dtype="float32"), persistable=False)
        self.register_buffer("shift", paddle.to_tensor(shift, dtype="float32"), persistable=False)

    def forward(self, image):
        """uint8 RGB [N, H, W, 3] -> embedding float [N, D] (not normalised), logits [N, class_dim] or None."""
        # Arithmetic first, in the memory order the pictures have: transposing bytes first is several times slower.
        x = (image.astype("float32") * self.scale + self.shift).transpose([0, 3, 1, 2])
        embedding = self.embedding(self.norm(self.pool(self._features(x))))
        return embedding, self.head(self.dropout(embedding)) if self.head is not None else None

    def _features(self, x):
        if not self.resting:
            return self.backbone(x)
        with paddle.no_grad():
            return self.backbone(x)

    def start_training(self, freeze_bn=False, freeze_stages=0, freeze_head=False, rest=False):
        """Puts the network in training mode, but for what is frozen.

        Args:
            freeze_bn: running statistics, scale and shift of every batch norm stay as they are.
            freeze_stages: so do the stem and the first stages of the backbone; 0: none.
            freeze_head: so does the head.
            rest: the backbone stays as it is for now, and only what is behind it trains.

        Raises: UserError where the backbone has fewer stages.
        """
        self.train()
        self.resting = rest
        if rest:
            self.backbone.eval()
        for layer in self.backbone.front(freeze_stages):
            layer.eval()
            for parameter in layer.parameters():
                parameter.stop_gradient = True
        for parameter in self.head.parameters() if freeze_head and self.head is not None else ():
            parameter.stop_gradient = True
        for layer in self._batch_norms() if freeze_bn else ():
            layer.eval()
            layer.weight.stop_gradient = layer.bias.stop_gradient = True

    def batch_norm_statistics(self):
        """The running means and variances that training changes."""
        return [tensor for norm in self._batch_norms() if norm.training for tensor in (norm._mean, norm._variance)]

    def _batch_norms(self):
        return [layer for layer in self.sublayers() if isinstance(layer, nn.BatchNorm2D)]


class Unit(nn.Layer):
    """uint8 RGB [N, H, W, 3] -> the embedding of an EmbeddingNet at length 1, float [N, D]."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        embedding, _ = self.network(image)
        return F.normalize(embedding, axis=1)
