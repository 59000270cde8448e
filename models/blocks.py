"""What the residual networks share."""

import paddle
import paddle.nn as nn

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


def shortcut(in_channels, out_channels, stride):
    """The identity, or a 1x1 convolution with batch norm where the block changes the shape."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(Conv1x1(in_channels, out_channels, stride), nn.BatchNorm2D(out_channels))


class ResidualStages(nn.Layer):
    """A network that is `stem` followed by the blocks of its `stages`; [N, 3, H, W] -> [N, out_channels, h, w].

    Subclasses set `stages` (names of Sequentials of blocks) and `out_channels`; each block names in `last_norm` the
    batch norm that ends its residual branch.
    """

    recompute = False

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
            x = self._recomputed(block, x) if self.recompute and self.training else block(x)
        return x

    def _recomputed(self, block, x):
        from paddle.distributed.fleet.utils import recompute

        return recompute(block, x)

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
