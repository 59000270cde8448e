"""SE-ResNeXt feature extractors, 32 groups of width 4.

Xie et al., Aggregated Residual Transformations, arXiv 1611.05431; Hu et al., Squeeze-and-Excitation Networks,
arXiv 1709.01507. As PaddleClas builds SE_ResNeXt50_32x4d: 7x7 stem, inner widths 128..1024 in 32 groups, stride in the
3x3 convolution, SE reduction 16, a projection shortcut where the shape changes.
"""

import paddle.nn as nn
import paddle.nn.functional as F

from models.blocks import Conv1x1, ResidualStages, shortcut
from models.resnet import BLOCKS

GROUPS = 32
REDUCTION = 16


class SEBlock(nn.Layer):
    """Grouped bottleneck whose channels are weighted by a small network that sees the whole picture."""

    last_norm = "bn3"

    def __init__(self, in_channels, width, stride, vd):
        super().__init__()
        self.out_channels = out_channels = width * 2
        self.conv1 = Conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2D(width)
        self.conv2 = nn.Conv2D(width, width, 3, stride, padding=1, groups=GROUPS, bias_attr=False)
        self.bn2 = nn.BatchNorm2D(width)
        self.conv3 = Conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2D(out_channels)
        self.squeeze = nn.Linear(out_channels, out_channels // REDUCTION)
        self.excitation = nn.Linear(out_channels // REDUCTION, out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride, vd)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        # Not out.mean(axis=[2, 3]), whose gradient takes a CPU a third of the whole step.
        pooled = F.adaptive_avg_pool2d(out, 1).flatten(1)
        weight = F.sigmoid(self.excitation(F.relu(self.squeeze(pooled))))
        return F.relu(out * weight.unsqueeze([2, 3]) + self.downsample(x))


class SEResNeXt(ResidualStages):
    """SE-ResNeXt of 50, 101 or 152 layers: [N, 3, H, W] -> [N, 2048, H/32, W/32]."""

    def __init__(self, depth, vd=False, last_stride=2):
        super().__init__()

        def block(in_channels, stage, stride):
            return SEBlock(in_channels, 128 * 2**stage, stride, vd)

        self.add_stem([64, 64, 128] if vd else [64])
        self.add_stages(BLOCKS[depth], (1, 2, 2, last_stride), 128 if vd else 64, block)
