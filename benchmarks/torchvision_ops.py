"""To be imported before torchvision or timm: lets a torchvision built for CUDA be imported beside a PyTorch for the
CPU, which is a fifth of the size. It misses two compiled operators then, which no row here uses."""

import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
