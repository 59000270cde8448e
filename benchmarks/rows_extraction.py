"""Features of a ResNet50 on the CPU: these scripts against PyTorch, ONNX Runtime and OpenVINO.

Everybody gets the same uint8 pictures [N, 224, 224, 3] and the same random weights, normalises the pictures, and
returns the pooled features, which must agree.
"""

import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from comparison import Comparison, Speed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS, EAGER = "infer.py", "Paddle eager"
OTHERS = {
    "PyTorch eager": ("pytorch", {"channels_last": False}),
    "PyTorch channels_last": ("pytorch", {"channels_last": True}),
    "ONNX Runtime": ("onnx_runtime", {}),
    "OpenVINO": ("open_vino", {}),
}
OTHERS_BF16 = {
    "PyTorch bf16": ("pytorch", {"channels_last": True, "bf16": True}),
    "OpenVINO bf16": ("open_vino", {"bf16": True}),
}


def comparisons(tiny):
    folder = tempfile.mkdtemp()
    # In a process of its own: the contenders are measured without a Paddle beside them.
    code = f"import rows_extraction; rows_extraction.write_weights({folder!r})"
    here = os.path.dirname(os.path.abspath(__file__))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here)
    for batch in [2] if tiny else [8, 32]:
        size = {"folder": folder, "side": 64 if tiny else 224, "batch": batch, "seconds": 0.1 if tiny else 2.0}
        yield comparison(f"features, ResNet50, {size['side']} px, batch {batch}", size, False)
        if has_bf16():
            yield comparison(f"features in bf16, ResNet50, {size['side']} px, batch {batch}", size, True)


def comparison(what, size, bf16):
    others = OTHERS_BF16 if bf16 else OTHERS
    contenders = {OURS: ("ours", {**size, "precision": "bf16" if bf16 else "float32"})}
    if not bf16:
        contenders[EAGER] = ("eager", size)
    contenders.update({name: (function, {**size, **more}) for name, (function, more) in others.items()})
    rows = [Speed(OURS, name, None if name == EAGER else 1.0) for name in contenders if name != OURS]
    return Comparison(what, contenders, rows, 7, size["batch"], None if bf16 else "features")


def has_bf16():
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from retrieval import engine

    return not engine.lacks("bf16")


def measured(run, side, batch, seconds):
    """-> what run.py calls: `run` over a batch again and again, for some seconds."""
    pictures = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)

    def measure():
        start, count = time.perf_counter(), 0
        while count < 2 or time.perf_counter() - start < seconds:
            features = run(pictures)
            count += 1
        spent = time.perf_counter() - start
        # One figure of all features, between -1 and 1: the cosine to a direction that is drawn.
        direction = np.random.default_rng(1).standard_normal(features.shape)
        agreed = float((features * direction).sum() / np.linalg.norm(features) / np.linalg.norm(direction))
        return {"seconds": spent / count, "features": agreed}

    return measure


# ---------------------------------------------------------------- ours


def our_network(folder=None):
    import models
    from runtime import process

    paddle = process.start_paddle(seed=0)
    network = models.build_model("ResNet50", 0, "avg")
    network.eval()
    if folder:
        with np.load(os.path.join(folder, "weights.npz")) as arrays:
            network.set_state_dict({name: paddle.to_tensor(arrays[name]) for name in arrays.files})
    return paddle, network


def write_weights(folder):
    """Random weights for everybody, with statistics that keep the features' size: a file of arrays."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    _, network = our_network()
    rng = np.random.default_rng(0)
    for name, value in network.state_dict().items():
        if name.endswith(("_mean", ".bias")):
            value.set_value(rng.normal(0, 0.1, value.shape).astype(np.float32))
        elif name.endswith("_variance"):
            value.set_value(rng.uniform(0.5, 1.5, value.shape).astype(np.float32))
    np.savez(os.path.join(folder, "weights.npz"), **{k: v.numpy() for k, v in network.state_dict().items()})


def ours(folder, side, batch, seconds, precision):
    from retrieval import engine

    _, network = our_network(folder)
    run = engine.compile_network(network, [3, side, side], precision)
    return measured(lambda pictures: run(pictures)[0], side, batch, seconds)


def eager(folder, side, batch, seconds):
    paddle, network = our_network(folder)
    run = paddle.no_grad()(lambda pictures: network(paddle.to_tensor(pictures))[0].numpy())
    return measured(run, side, batch, seconds)


# ---------------------------------------------------------------- PyTorch, ONNX Runtime, OpenVINO


def torch_network(folder):
    import torch
    from torch import nn

    def conv_norm(i, o, kernel, stride=1):
        return [nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o)]

    class Block(nn.Module):
        def __init__(self, i, width, stride):
            super().__init__()
            self.conv1, self.bn1 = conv_norm(i, width, 1)
            self.conv2, self.bn2 = conv_norm(width, width, 3, stride)
            self.conv3, self.bn3 = conv_norm(width, 4 * width, 1)
            changed = i != 4 * width or stride > 1
            self.downsample = nn.Sequential(*conv_norm(i, 4 * width, 1, stride)) if changed else nn.Identity()

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = torch.relu(self.bn2(self.conv2(y)))
            return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv_norm(3, 64, 7, 2)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            channels = 64
            for stage, blocks in enumerate((3, 4, 6, 3)):
                width, layers = 64 << stage, []
                for block in range(blocks):
                    layers.append(Block(channels, width, 2 if stage and not block else 1))
                    channels = 4 * width
                setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            self.register_buffer("scale", 1 / (255 * torch.tensor(STD)))
            self.register_buffer("shift", -torch.tensor(MEAN) / torch.tensor(STD))

        def forward(self, pictures, channels_last=True):
            x = (pictures.float() * self.scale + self.shift).permute(0, 3, 1, 2)
            x = x if channels_last else x.contiguous()
            x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
            return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))

    network = Network().eval()
    with np.load(os.path.join(folder, "weights.npz")) as weights:
        names = {"._mean": ".running_mean", "._variance": ".running_var"}
        state = {}
        for name in weights.files:
            there = name.replace("backbone.", "")
            for paddle_name, torch_name in names.items():
                there = there.replace(paddle_name, torch_name)
            state[there] = torch.from_numpy(weights[name])
    left = network.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all("num_batches" in n or n in ("scale", "shift") for n in left.missing_keys)
    return network


def pytorch(folder, side, batch, seconds, channels_last, bf16=False):
    import torch

    network = torch_network(folder)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(pictures):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return network(torch.from_numpy(pictures), channels_last).float().numpy()

    return measured(run, side, batch, seconds)


def onnx_file(folder, side):
    import torch

    path = os.path.join(folder, f"network{os.getpid()}.onnx")
    torch.onnx.export(
        torch_network(folder),
        (torch.zeros(2, side, side, 3, dtype=torch.uint8),),
        path,
        input_names=["pictures"],
        dynamic_axes={"pictures": {0: "n"}},
        opset_version=17,
        dynamo=False,
    )
    return path


def onnx_runtime(folder, side, batch, seconds):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    session = onnxruntime.InferenceSession(onnx_file(folder, side), options, providers=["CPUExecutionProvider"])
    return measured(lambda pictures: session.run(None, {"pictures": pictures})[0], side, batch, seconds)


def open_vino(folder, side, batch, seconds, bf16=False):
    import openvino

    core = openvino.Core()
    model = core.read_model(onnx_file(folder, side))
    model.reshape([batch, side, side, 3])  # OpenVINO is fastest with a fixed shape
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", hints)
    return measured(lambda pictures: compiled([pictures])[0].astype(np.float32), side, batch, seconds)
