"""What the residual networks share."""

import paddle
import paddle.nn as nn
import paddle.nn.functional as F

from utility import UserError


class Conv1x1(nn.Conv2D):
    """A 1x1 convolution without bias: [N, C, H, W] -> [N, out_channels, H/stride, W/stride].

    Paddle's CPU kernel multiplies picture by picture, and its gradients read and write all weights each time: with few
    positions that takes two to three times as long as one product for the whole batch.
    """

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__(in_channels, out_channels, 1, stride, bias_attr=False)

    def forward(self, x):
        trains = paddle.in_dynamic_mode() and paddle.is_grad_enabled() and x.place.is_cpu_place()
        stride = self._stride[0]
        if not trains or x.shape[2] * x.shape[3] > 16 * stride**2:
            return nn.Conv2D.forward(self, x)  # Paddle 2.6 can't trace super()
        x = x[:, :, ::stride, ::stride]
        channels_first = x.transpose([1, 0, 2, 3])
        product = paddle.matmul(self.weight.flatten(1), channels_first.flatten(1))
        return product.reshape([-1, *channels_first.shape[1:]]).transpose([1, 0, 2, 3])


def shortcut(in_channels, out_channels, stride, vd=False):
    """The identity, or a 1x1 convolution with batch norm where the block changes the shape.

    Args:
        vd: True halves the resolution by an average beforehand, False by the convolution's stride.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if vd and stride > 1:
        return Averaged(Conv1x1(in_channels, out_channels), nn.BatchNorm2D(out_channels))
    return nn.Sequential(Conv1x1(in_channels, out_channels, stride), nn.BatchNorm2D(out_channels))


class Averaged(nn.Sequential):
    """Layers behind a mean over each 2 x 2 positions, at an odd edge over what there is of them."""

    def forward(self, x):
        # Not super(), which Paddle 2.6 can't trace.
        return nn.Sequential.forward(self, F.avg_pool2d(x, 2, 2, ceil_mode=True))


class ResidualStages(nn.Layer):
    """A network that is a stem followed by the blocks of its `stages`; [N, 3, H, W] -> [N, out_channels, h, w].

    Each block has `out_channels`, and names in `last_norm` the batch norm that ends its residual branch.
    """

    recompute = False

    def add_stem(self, widths):
        """Adds what `stem` runs: conv1 of 7x7 for one width; of more, 3x3 ones called conv1, conv1_2, conv1_3.

        The latter is of the _vd networks: He et al., Bag of Tricks, arXiv 1812.01187.
        """
        size, channels = 3 if len(widths) > 1 else 7, 3
        self.stem_names = [("conv1", "bn1")] + [(f"conv1_{i}", f"bn1_{i}") for i in range(2, len(widths) + 1)]
        for (conv, norm), width in zip(self.stem_names, widths):
            stride = 2 if conv == "conv1" else 1
            self.add_sublayer(conv, nn.Conv2D(channels, width, size, stride, padding=size // 2, bias_attr=False))
            self.add_sublayer(norm, nn.BatchNorm2D(width))
            channels = width
        self.maxpool = nn.MaxPool2D(3, stride=2, padding=1)

    def stem(self, x):
        for conv, norm in self.stem_names:
            x = F.relu(getattr(self, norm)(getattr(self, conv)(x)))
        return self.maxpool(x)

    def add_stages(self, counts, strides, channels, make):
        """Adds the stages layer1, layer2, ...; sets `stages`, their names, and `out_channels`.

        Args:
            counts: blocks of each stage; strides: of the first of them.
            channels: of the stem.
            make: function (in_channels, stage from 0, stride) -> a block.
        """
        self.stages = [f"layer{number}" for number, _ in enumerate(counts, 1)]
        for stage, (name, blocks) in enumerate(zip(self.stages, counts)):
            layers = []
            for i in range(blocks):
                layers.append(make(channels, stage, strides[stage] if i == 0 else 1))
                channels = layers[-1].out_channels
            self.add_sublayer(name, nn.Sequential(*layers))
        self.out_channels = channels

    def blocks(self):
        return [block for name in self.stages for block in getattr(self, name)]

    def front(self, stages):
        """The layers of the stem and the first `stages` stages; [] for 0. Raises: UserError where there are fewer."""
        if stages > len(self.stages):
            raise UserError(f"--freeze_stages={stages}: this backbone has {len(self.stages)} stages")
        late = self.stages[stages:]
        return [layer for name, layer in self.named_children() if name not in late] if stages else []

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks():
            x = self._recomputed(block, x) if self.recompute and block.training else block(x)
        return x

    def _recomputed(self, block, x):
        from paddle.distributed.fleet.utils import recompute

        if x.stop_gradient:  # behind what is frozen: of an input that needs no gradient, it would keep nothing
            x = x.detach()
            x.stop_gradient = False
        # No block draws at random: there is no state of generators to keep for the second time.
        return recompute(block, x, preserve_rng_state=False)

    def zero_init_residual(self):
        """Starts every block as the identity (Goyal et al., arXiv 1706.02677, 5.1): helps training from scratch."""
        for block in self.blocks():
            nn.initializer.Constant(0.0)(getattr(block, block.last_norm).weight)

    def use_recompute(self):
        """Keeps only the blocks' inputs for the backward pass and computes the rest again: less memory, more time.

        A block then sees every batch twice, and its batch norms would update their running statistics twice. Two
        updates by the same batch with the square root of the momentum are one update with the momentum.
        """
        self.recompute = True
        for block in self.blocks():
            for layer in block.sublayers():
                if isinstance(layer, nn.BatchNorm2D):
                    layer._momentum = layer._momentum**0.5
