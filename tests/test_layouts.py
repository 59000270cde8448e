"""Other people's names: a network loaded from each source gives the outputs of an independent writer."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import safetensors.numpy
from conftest import ROOT
from test_formats import fluid_variable
from test_models import close, normalised, pictures, scramble

import models
import weights
from weights import layouts

BLOCKS = {
    "ResNet50": (3, 4, 6, 3),
    "ResNet101": (3, 4, 23, 3),
    "ResNet152": (3, 8, 36, 3),
    "SE_ResNeXt50_32x4d": (3, 4, 6, 3),
    "SE_ResNeXt101_32x4d": (3, 4, 23, 3),
}
NUMBERED = {stages: [(s, b) for s, n in enumerate(stages) for b in range(n)] for stages in BLOCKS.values()}

# Each: (stage from 0, block from 0 or None for the stem and the head, number of the block over all stages, layer) ->
# {value: name}. Layers: 1, 2, 3 and short, each a convolution with batch norm; squeeze, excitation, head.


def _names(conv, norm, values=("weight", "bias", "_mean", "_variance")):
    return {"kernel": conv, **dict(zip(("scale", "shift", "mean", "variance"), (f"{norm}{v}" for v in values)))}


def paddle_vision(stage, block, number, layer, statistics=("_mean", "_variance")):
    if layer == "head":
        return {"weight": "fc.weight", "bias": "fc.bias"}
    prefix = "" if block is None else f"layer{stage + 1}.{block}."
    values = ("weight", "bias", *statistics)
    if layer == "short":
        return _names(f"{prefix}downsample.0.weight", f"{prefix}downsample.1.", values)
    if layer in ("squeeze", "excitation"):
        prefix += f"se.fc{1 if layer == 'squeeze' else 2}."
        return {"weight": f"{prefix}weight", "bias": f"{prefix}bias"}
    return _names(f"{prefix}conv{layer}.weight", f"{prefix}bn{layer}.", values)


def pytorch(*layer):
    return paddle_vision(*layer, statistics=("running_mean", "running_var"))


def paddleclas_resnet(stage, block, number, layer):
    if layer == "head":
        return {"weight": "fc.weight", "bias": "fc.bias"}
    at = "stem.0" if block is None else f"blocks.{number}.{layer if layer == 'short' else f'conv{layer - 1}'}"
    return _names(f"{at}.conv.weight", f"{at}.bn.")


def paddleclas_se_resnext(stage, block, number, layer):
    if layer == "head":
        return {"weight": "out.weight", "bias": "out.bias"}
    if layer in ("squeeze", "excitation"):
        return {value: f"bb_{stage}_{block}.scale.{layer}.{value}" for value in ("weight", "bias")}
    at = "conv" if block is None else f"bb_{stage}_{block}.{layer if layer == 'short' else f'conv{layer - 1}'}"
    return _names(f"{at}._conv.weight", f"{at}._batch_norm.")


def every_layer(model):
    """(stage, block, number, layer, shape) of all layers; shape is the kernel's, or [inputs, outputs]."""
    se = model.startswith("SE")
    yield None, None, None, 1, [64, 3, 7, 7]
    inputs = 64
    for number, (stage, block) in enumerate(NUMBERED[BLOCKS[model]]):
        width = (128 if se else 64) * 2**stage
        outputs = 256 * 2**stage
        yield stage, block, number, 1, [width, inputs, 1, 1]
        yield stage, block, number, 2, [width, width // 32 if se else width, 3, 3]
        yield stage, block, number, 3, [outputs, width, 1, 1]
        if se:
            yield stage, block, number, "squeeze", [outputs, outputs // 16]
            yield stage, block, number, "excitation", [outputs // 16, outputs]
        if block == 0:
            yield stage, block, number, "short", [outputs, inputs, 1, 1]
        inputs = outputs
    yield None, None, None, "head", [2048, 7]


def random_weights(model, names, torch_linear=False, seed=0):
    """{name: array} of a whole network; no value is at its neutral start."""
    rng, tensors = np.random.default_rng(seed), {}
    for *at, layer, shape in every_layer(model):
        name = names(*at, layer)
        if len(shape) == 4:
            tensors[name["kernel"]] = rng.uniform(-1, 1, shape) * (2 / np.prod(shape[1:])) ** 0.5
            for value in ("scale", "shift", "mean", "variance"):
                low, high = (0.5, 1.5) if value in ("scale", "variance") else (-0.2, 0.2)
                tensors[name[value]] = rng.uniform(low, high, shape[:1])
        else:
            weight = rng.uniform(-1, 1, shape) * (2 / shape[0]) ** 0.5
            if torch_linear:
                weight = weight.T if layer == "head" else weight.T[:, :, None, None]
            tensors[name["weight"]] = weight
            tensors[name["bias"]] = rng.uniform(-0.5, 0.5, shape[1:])
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def forward(model, tensors, names, x, torch_linear=False):
    """The network that `tensors` belong to, restated: normalised picture -> logits."""
    se = model.startswith("SE")
    w = {name: paddle.to_tensor(value) for name, value in tensors.items()}

    def conv(x, at, layer, stride=1, groups=1):
        name = names(*at, layer)
        kernel = w[name["kernel"]]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2, groups=groups)
        statistics = (w[name[value]].reshape([1, -1, 1, 1]) for value in ("scale", "shift", "mean", "variance"))
        scale, shift, mean, variance = statistics
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def linear(x, at, layer):
        name = names(*at, layer)
        weight = w[name["weight"]]
        weight = weight.reshape(weight.shape[:2]).t() if torch_linear else weight
        return x @ weight + w[name["bias"]]

    outside = (None, None, None)
    x = F.max_pool2d(F.relu(conv(x, outside, 1, stride=2)), 3, 2, 1)
    for number, (stage, block) in enumerate(NUMBERED[BLOCKS[model]]):
        at = (stage, block, number)
        stride = 2 if stage and block == 0 else 1
        y = F.relu(conv(x, at, 1))
        y = F.relu(conv(y, at, 2, stride, groups=32 if se else 1))
        y = conv(y, at, 3)
        if se:
            s = F.sigmoid(linear(F.relu(linear(y.mean([2, 3]), at, "squeeze")), at, "excitation"))
            y = y * s.unsqueeze([2, 3])
        x = F.relu(y + (conv(x, at, "short", stride) if block == 0 else x))
    return linear(x.mean([2, 3]), outside, "head")


def loaded(path, model, class_dim=7, **options):
    """-> (network in evaluation mode, the account)"""
    network = models.build_model(model, class_dim)
    line = weights.load_weights(network, weights.read_weights(str(path)), model, **options)
    network.eval()
    return network, line


@pytest.mark.parametrize(
    ("model", "names", "source"),
    [
        ("ResNet50", paddleclas_resnet, "PaddleClas ResNet50"),
        ("SE_ResNeXt50_32x4d", paddleclas_se_resnext, "PaddleClas SE_ResNeXt50_32x4d"),
        ("ResNet50", paddleclas_se_resnext, "PaddleClas ResNet50"),  # its older dygraph models had such names, too
        ("ResNet50", pytorch, "torchvision/timm ResNet50"),
        ("SE_ResNeXt50_32x4d", pytorch, "torchvision/timm SE_ResNeXt50_32x4d"),
    ],
)
def test_a_network_gives_the_outputs_of_the_one_that_wrote_the_weights(tmp_path, model, names, source):
    torch = names is pytorch
    tensors = random_weights(model, names, torch)
    if torch:
        counts = {re.sub("running_mean$", "num_batches_tracked", n): np.array(7) for n in tensors if "_mean" in n}
        path = tmp_path / "weights.safetensors"
        safetensors.numpy.save_file({**tensors, **counts}, str(path))
    else:
        path = tmp_path / "weights.pdparams"
        paddle.save({name: paddle.to_tensor(value) for name, value in tensors.items()}, str(path))
    network, line = loaded(path, model, head="must")
    count = len(tensors) - 2
    assert line == f"loaded {count} of {count} backbone tensors from {path} ({source}); head loaded: 7 classes"
    image = pictures()
    with paddle.no_grad():
        close(network(paddle.to_tensor(image))[1], forward(model, tensors, names, normalised(image), torch))


@pytest.mark.parametrize(
    ("model", "names"), [("ResNet50", paddleclas_resnet), ("SE_ResNeXt50_32x4d", paddleclas_se_resnext)]
)
def test_names_and_shapes_of_paddleclas_are_those_of_its_files(model, names):
    path = os.path.join(ROOT, "..", "shared", "reference", f"paddleclas_{model}.keys.json")
    if not os.path.exists(path):
        pytest.skip("the list of PaddleClas' keys is not at hand")
    with open(path) as file:
        keys = json.load(file)
    tensors = {name: list(value.shape) for name, value in random_weights(model, names).items()}
    theirs = {name: shape[:-1] + [7] if name in ("fc.weight", "out.weight") else shape for name, shape in keys}
    theirs.update({name: [7] for name in ("fc.bias", "out.bias") if name in theirs})
    assert tensors == theirs


@pytest.fixture(scope="module")
def fluid(tmp_path_factory):
    """Directories of variables as Paddle's own `save_vars` writes them, and what the networks in them compute."""
    folder = tmp_path_factory.mktemp("fluid")
    command = [sys.executable, "-W", "ignore", os.path.join(ROOT, "tests", "programs", "write_fluid.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "FLAGS_enable_pir_api": "0"})
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("year", [2018, 2019])
@pytest.mark.parametrize("model", ["ResNet50", "SE_ResNeXt50_32x4d"])
def test_fluid_directories(fluid, model, year):
    path = fluid / f"{model}_{year}"
    (path / "conv2d_0.w_0_velocity_0").write_bytes(b"an optimizer's state is not read")
    network, line = loaded(path, model, head="must")
    count = {"ResNet50": 265, "SE_ResNeXt50_32x4d": 329}[model]
    assert line == f"loaded {count} of {count} backbone tensors from {path} (fluid {model}); head loaded: 7 classes"
    theirs = np.load(f"{path}.npz")
    with paddle.no_grad():
        embedding = network.pool(network.backbone(paddle.to_tensor(theirs["image"])))
        close(embedding, theirs["embedding"])
        close(network.head(embedding), theirs["logits"])


def test_fluid_numbers_need_not_start_at_zero_and_an_embedding_may_come_before_the_head(fluid, tmp_path):
    shutil.copytree(fluid / "ResNet50_2018", tmp_path / "moved")
    for name in os.listdir(tmp_path / "moved"):
        kind, number, value = re.fullmatch(r"(.+)_(\d+)\.(\w+)", name).groups() if "velocity" not in name else (0, 0, 0)
        if kind:
            os.rename(tmp_path / "moved" / name, tmp_path / "moved" / f"new_{kind}_{int(number) + 53}.{value}")
    for name in os.listdir(tmp_path / "moved"):
        os.rename(tmp_path / "moved" / name, tmp_path / "moved" / name.replace("new_", ""))
    (tmp_path / "moved" / "fc_54.w_0").write_bytes(fluid_variable(np.zeros((7, 3), np.float32)))
    (tmp_path / "moved" / "fc_54.b_0").write_bytes(fluid_variable(np.zeros(3, np.float32)))
    found = weights.read_weights(str(tmp_path / "moved"))
    assert found.tensors["embedding.weight"].shape == (2048, 7) and found.tensors["head.weight"].shape == (7, 3)
    line = weights.load_weights(models.build_model("ResNet50", 3, embedding_size=7), found, "ResNet50", head="must")
    assert line.endswith("(fluid ResNet50); embedding loaded: 7 values; head loaded: 3 classes")


def fluid_2018():
    """Names by counting up; asked for in the order of creation."""
    counts = dict.fromkeys(("conv2d", "batch_norm", "fc"), -1)

    def names(stage, block, number, layer):
        kinds = ["fc"] if isinstance(layer, str) and layer != "short" else ["conv2d", "batch_norm"]
        for kind in kinds:
            counts[kind] += 1
        if kinds == ["fc"]:
            return {"weight": f"fc_{counts['fc']}.w_0", "bias": f"fc_{counts['fc']}.b_0"}
        at = f"batch_norm_{counts['batch_norm']}."
        return _names(f"conv2d_{counts['conv2d']}.w_0", at, ("w_0", "b_0", "w_1", "w_2"))

    return names


def fluid_2019_resnet(deep):
    """Only the third stage of 101 and 152 layers has numbers: res4a, res4b1, res4b2 ..."""

    def names(stage, block, number, layer):
        if layer == "head":
            return {"weight": "fc_0.w_0", "bias": "fc_0.b_0"}
        values = ("scale", "offset", "mean", "variance")
        if block is None:
            return _names("conv1_weights", "bn_conv1_", values)
        letter = f"b{block}" if deep and stage == 2 and block else chr(ord("a") + block)
        at = f"{stage + 2}{letter}_branch" + ("1" if layer == "short" else f"2{'abc'[layer - 1]}")
        return _names(f"res{at}_weights", f"bn{at}_", values)

    return names


def fluid_2019_se_resnext(stage, block, number, layer):
    if layer == "head":
        return {"weight": "fc6_weights", "bias": "fc6_offset"}
    at = "conv1" if block is None else f"{stage + 2}_{block + 1}_"
    if layer in ("squeeze", "excitation"):
        at += "sqz" if layer == "squeeze" else "exc"
        return {"weight": f"fc{at}_weights", "bias": f"fc{at}_offset"}
    at = at if block is None else f"conv{at}{'prj' if layer == 'short' else f'x{layer}'}"
    return _names(f"{at}_weights", f"{at}_bn_", ("scale", "offset", "mean", "variance"))


@pytest.mark.parametrize("model", list(BLOCKS))
def test_every_name_of_every_layout_and_depth(model):
    se = model.startswith("SE")
    given = fluid_2019_se_resnext if se else fluid_2019_resnet(deep="50" not in model)
    for names in (paddle_vision, pytorch, paddleclas_se_resnext if se else paddleclas_resnet, fluid_2018(), given):
        tensors, wanted = {}, {}
        for stage, block, number, layer, _ in every_layer(model):
            prefix = "backbone." + ("" if block is None else f"layer{stage + 1}.{block}.")
            conv, norm = (f"{prefix}conv{layer}.", f"{prefix}bn{layer}.")
            if layer == "short":
                conv, norm = f"{prefix}downsample.0.", f"{prefix}downsample.1."
            linear = "head." if layer == "head" else f"{prefix}{layer}."
            ours = {"kernel": f"{conv}weight", "scale": f"{norm}weight", "shift": f"{norm}bias"}
            ours.update(
                mean=f"{norm}_mean", variance=f"{norm}_variance", weight=f"{linear}weight", bias=f"{linear}bias"
            )
            for value, name in names(stage, block, number, layer).items():
                tensors[name] = wanted[ours[value]] = np.zeros(1)
        found = layouts.recognise(tensors)
        assert not found.unused and found.tensors.keys() == wanted.keys(), names
        assert all(found.tensors[name] is value for name, value in wanted.items()), names


def test_paddle_vision_and_float16_and_bfloat16(tmp_path):
    """A ResNet50 of half precision: the account names it, the values are those of the file."""
    theirs = scramble(paddle.vision.models.resnet50(num_classes=1000))
    half = {n: v.numpy().astype(np.float16 if "conv" in n else np.float32) for n, v in theirs.state_dict().items()}
    paddle.save(half, str(tmp_path / "half.pdparams"))
    network, line = loaded(tmp_path / "half", "ResNet50", class_dim=100)
    assert line == (
        f"loaded 265 of 265 backbone tensors from {tmp_path}/half.pdparams (paddle.vision ResNet50, "
        "float16 -> float32); head skipped: 1000 classes there, 100 here"
    )
    theirs.set_state_dict({name: value.astype(np.float32) for name, value in half.items()})
    theirs.fc = paddle.nn.Identity()
    image = pictures()
    with paddle.no_grad():
        close(network(paddle.to_tensor(image))[0], theirs(normalised(image)))

    brain = {n: paddle.to_tensor(v.astype(np.float32)).astype("bfloat16") for n, v in half.items()}
    paddle.save(brain, str(tmp_path / "brain.pdparams"))
    network, line = loaded(tmp_path / "brain", "ResNet50", class_dim=100)
    assert "ResNet50, bfloat16 -> float32)" in line
    for name in ("conv1.weight", "layer3.4.bn2._variance"):
        wanted = brain[name].astype("float32").numpy()
        assert np.array_equal(network.state_dict()[f"backbone.{name}"].numpy(), wanted)
