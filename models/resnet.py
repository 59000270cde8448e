"""ResNet feature extractors.

He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385.

Layers are named as in `paddle.vision.models.resnet50`, so that its weights fit. Where a stage halves the resolution,
the paper's network ("va": Caffe, Keras) does so in the first 1x1 convolution of the stage; Paddle, torchvision and
PaddleClas ("vb") in the 3x3. The shapes are the same, the outputs are not: weights belong to one of the two.
"""

import paddle.nn as nn
import paddle.nn.functional as F

from models.blocks import Conv1x1, ResidualStages, shortcut

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class BasicBlock(nn.Layer):
    """Two 3x3 convolutions with a shortcut."""

    last_norm = "bn2"

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.out_channels = width
        self.conv1 = nn.Conv2D(in_channels, width, 3, stride, padding=1, bias_attr=False)
        self.bn1 = nn.BatchNorm2D(width)
        self.conv2 = nn.Conv2D(width, width, 3, padding=1, bias_attr=False)
        self.bn2 = nn.BatchNorm2D(width)
        self.downsample = shortcut(in_channels, width, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class BottleneckBlock(nn.Layer):
    """1x1, 3x3, 1x1 convolutions with a shortcut."""

    last_norm = "bn3"

    def __init__(self, in_channels, width, stride, stride_in_first=False, vd=False):
        super().__init__()
        self.out_channels = out_channels = width * 4
        first, second = (stride, 1) if stride_in_first else (1, stride)
        self.conv1 = Conv1x1(in_channels, width, first)
        self.bn1 = nn.BatchNorm2D(width)
        self.conv2 = nn.Conv2D(width, width, 3, second, padding=1, bias_attr=False)
        self.bn2 = nn.BatchNorm2D(width)
        self.conv3 = Conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2D(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride, vd)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(ResidualStages):
    """ImageNet ResNet of 18, 50, 101 or 152 layers: [N, 3, H, W] -> [N, C, H/32, W/32], H/16 with a last stride of 1.

    C is 512 for 18 layers and 2048 for the others.

    Args:
        stride_in_first: halve the resolution in a block's first convolution ("va").
        vd: three 3x3 convolutions in the stem, and shortcuts that average where they halve the resolution.
        last_stride: of the last stage.
    """

    def __init__(self, depth, stride_in_first=False, vd=False, last_stride=2):
        super().__init__()

        def block(in_channels, stage, stride):
            if depth < 50:
                return BasicBlock(in_channels, 64 * 2**stage, stride)
            return BottleneckBlock(in_channels, 64 * 2**stage, stride, stride_in_first, vd)

        self.add_stem([32, 32, 64] if vd else [64])
        self.add_stages(BLOCKS[depth], (1, 2, 2, last_stride), 64, block)


class CifarResNet(ResidualStages):
    """The paper's small network for 32x32 pictures: [N, 3, H, W] -> [N, 64, H/4, W/4].

    Depth is 6n+2; ResNet8 has 78,000 values.
    """

    def __init__(self, depth, last_stride=2):
        super().__init__()
        self.conv1 = nn.Conv2D(3, 16, 3, padding=1, bias_attr=False)
        self.bn1 = nn.BatchNorm2D(16)
        counts = [(depth - 2) // 6] * 3
        self.add_stages(
            counts, (1, 2, last_stride), 16, lambda channels, stage, stride: BasicBlock(channels, 16 * 2**stage, stride)
        )

    def stem(self, x):
        return F.relu(self.bn1(self.conv1(x)))
