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
from utility import UserError
from weights import layouts

BLOCKS = {
    "ResNet50": (3, 4, 6, 3),
    "ResNet50_vd": (3, 4, 6, 3),
    "SE_ResNeXt50_vd_32x4d": (3, 4, 6, 3),
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
    if block is None:
        at = f"stem.{int(str(layer)[-1]) - 1}"
    else:
        at = f"blocks.{number}.{layer if layer == 'short' else f'conv{layer - 1}'}"
    return _names(f"{at}.conv.weight", f"{at}.bn.")


def paddleclas_se_resnext(stage, block, number, layer):
    if layer == "head":
        return {"weight": "out.weight", "bias": "out.bias"}
    if layer in ("squeeze", "excitation"):
        return {value: f"bb_{stage}_{block}.scale.{layer}.{value}" for value in ("weight", "bias")}
    at = "conv" if block is None else f"bb_{stage}_{block}.{layer if layer == 'short' else f'conv{layer - 1}'}"
    return _names(f"{at}._conv.weight", f"{at}._batch_norm.")


def paddleclas_se_resnext_vd(stage, block, number, layer):
    if block is None and layer != "head":
        at = f"conv1_{str(layer)[-1]}"
        return _names(f"{at}._conv.weight", f"{at}._batch_norm.")
    return paddleclas_se_resnext(stage, block, number, layer)


def every_layer(model):
    """(stage, block, number, layer, shape) of all layers; shape is the kernel's, or [inputs, outputs]."""
    se = model.startswith("SE")
    if "_vd" in model:
        stem = [(1, 3), ("stem2", 32), ("stem3", 32)], [32, 32, 64]
        stem = ([(1, 3), ("stem2", 64), ("stem3", 64)], [64, 64, 128]) if se else stem
        for (layer, inputs), outputs in zip(*stem):
            yield None, None, None, layer, [outputs, inputs, 3, 3]
        inputs = outputs
    else:
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
    x = F.relu(conv(x, outside, 1, stride=2))
    for layer in ("stem2", "stem3") if "_vd" in model else ():
        x = F.relu(conv(x, outside, layer))
    x = F.max_pool2d(x, 3, 2, 1)
    for number, (stage, block) in enumerate(NUMBERED[BLOCKS[model]]):
        at = (stage, block, number)
        stride = 2 if stage and block == 0 else 1
        y = F.relu(conv(x, at, 1))
        y = F.relu(conv(y, at, 2, stride, groups=32 if se else 1))
        y = conv(y, at, 3)
        if se:
            s = F.sigmoid(linear(F.relu(linear(y.mean([2, 3]), at, "squeeze")), at, "excitation"))
            y = y * s.unsqueeze([2, 3])
        if block == 0 and "_vd" in model and stride == 2:
            x = F.relu(y + conv(mean_of_four(x), at, "short"))
        else:
            x = F.relu(y + (conv(x, at, "short", stride) if block == 0 else x))
    return linear(x.mean([2, 3]), outside, "head")


def mean_of_four(x):
    """Of each 2 x 2 positions; at an odd edge, of those that there are."""
    sums, counts = 0, 0
    for y in (0, 1):
        for z in (0, 1):
            part = x[:, :, y::2, z::2]
            missing = [0, (x.shape[3] + 1) // 2 - part.shape[3], 0, (x.shape[2] + 1) // 2 - part.shape[2]]
            sums, counts = sums + F.pad(part, missing), counts + F.pad(paddle.ones_like(part), missing)
    return sums / counts


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
        ("ResNet50_vd", paddleclas_resnet, "PaddleClas ResNet50_vd"),
        ("SE_ResNeXt50_vd_32x4d", paddleclas_se_resnext_vd, "PaddleClas SE_ResNeXt50_vd_32x4d"),
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
    for image in (pictures(), pictures()[:, :36, :52]):  # whose feature maps have odd sides
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


@pytest.mark.parametrize("model", [model for model in BLOCKS if "_vd" not in model])
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
        found = layouts.rename(tensors)
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


# ---------------------------------------------------------------- Keras


def keras_names(old):
    """layer of a convolution -> its name, and that of its batch norm."""

    def names(stage, block, part):
        if stage is None:
            return ("conv1", "bn_conv1") if old else ("conv1_conv", "conv1_bn")
        if old:
            at = f"{stage + 2}{'abcdef'[block]}_branch{'1' if part == 0 else '2' + 'abc'[part - 1]}"
            return f"res{at}", f"bn{at}"
        return tuple(f"conv{stage + 2}_block{block + 1}_{part}_{kind}" for kind in ("conv", "bn"))

    return names


def keras_layers():
    """(stage, block, part, kernel's shape, stride) of ResNet50, whose stages halve in their first 1x1 convolution."""
    yield None, None, 1, (7, 7, 3, 64), 2
    inputs = 64
    for stage, block in NUMBERED[BLOCKS["ResNet50"]]:
        width, stride = 64 * 2**stage, 2 if stage and block == 0 else 1
        if block == 0:
            yield stage, block, 0, (1, 1, inputs, 4 * width), stride
        yield stage, block, 1, (1, 1, inputs, width), stride
        yield stage, block, 2, (3, 3, width, width), 1
        yield stage, block, 3, (1, 1, width, 4 * width), 1
        inputs = 4 * width


def write_keras(path, old):
    """A file of random weights as Keras writes them; -> {layer: {value: array}}."""
    h5py = pytest.importorskip("h5py")
    rng, layers, names = np.random.default_rng(0), {}, keras_names(old)
    for stage, block, part, shape, _ in keras_layers():
        conv, norm = names(stage, block, part)
        bound = (6 / np.prod(shape[:3])) ** 0.5 / (100 if stage is None else 1)
        layers[conv] = {"kernel": rng.uniform(-bound, bound, shape), "bias": rng.uniform(-0.3, 0.3, shape[3])}
        layers[norm] = {
            "gamma": rng.uniform(0.5, 1.5, shape[3]),
            "beta": rng.uniform(-0.2, 0.2, shape[3]),
            "moving_mean": rng.uniform(-0.2, 0.2, shape[3]),
            "moving_variance": rng.uniform(0.01, 1.0, shape[3]),
        }
    layers["fc1000" if old else "predictions"] = {
        "kernel": rng.uniform(-0.03, 0.03, (2048, 7)),
        "bias": rng.uniform(-0.5, 0.5, 7),
    }
    words = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    with h5py.File(path, "w") as file:
        file.create_group("activation_1")
        for layer, values in layers.items():
            for value, array in values.items():
                name = f"{layer}/{layer}_{words.get(value, value)}_1:0" if old else f"{layer}/{layer}/{value}:0"
                file[name] = array.astype(np.float32)
    return layers


def keras_forward(layers, image, old):
    """Keras' network restated: RGB uint8 [N, H, W, 3] -> logits."""
    names, epsilon = keras_names(old), 1e-3 if old else 1.001e-5
    strides = {(stage, block, part): stride for stage, block, part, _, stride in keras_layers()}

    def conv(x, *at):
        kernel, norm = (layers[name] for name in names(*at))
        weight = paddle.to_tensor(kernel["kernel"].transpose(3, 2, 0, 1))
        x = F.conv2d(x, weight, paddle.to_tensor(kernel["bias"]), strides[at], padding=weight.shape[2] // 2)
        values = ("gamma", "beta", "moving_mean", "moving_variance")
        gamma, beta, mean, variance = (paddle.to_tensor(norm[value]).reshape([1, -1, 1, 1]) for value in values)
        return (x - mean) / (variance + epsilon).sqrt() * gamma + beta

    bgr = image[..., ::-1].astype(np.float64) - (103.939, 116.779, 123.68)
    x = F.max_pool2d(F.relu(conv(paddle.to_tensor(bgr.transpose(0, 3, 1, 2)), None, None, 1)), 3, 2, 1)
    for stage, block in NUMBERED[BLOCKS["ResNet50"]]:
        y = F.relu(conv(x, stage, block, 1))
        y = conv(F.relu(conv(y, stage, block, 2)), stage, block, 3)
        x = F.relu(y + (conv(x, stage, block, 0) if block == 0 else x))
    head = layers["fc1000" if old else "predictions"]
    return x.mean([2, 3]) @ paddle.to_tensor(head["kernel"]) + paddle.to_tensor(head["bias"])


@pytest.mark.parametrize("old", [False, True], ids=["2019", "2015"])
def test_keras(tmp_path, old):
    path = tmp_path / "resnet50.h5"
    layers = write_keras(path, old)
    network, line = loaded(path, "ResNet50_va", head="must")
    assert line == f"loaded 265 of 265 backbone tensors from {path} (Keras ResNet50); head loaded: 7 classes"
    with paddle.no_grad():
        found, wanted = network(paddle.to_tensor(pictures()))[1].numpy(), keras_forward(layers, pictures(), old).numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


def test_keras_that_is_broken(tmp_path):
    path = tmp_path / "resnet50.h5"
    write_keras(path, False)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"resnet50\.h5: cut off: \d+ bytes are there of \d+; download"):
        weights.read_weights(str(path))


@pytest.mark.parametrize(
    "odd",
    [
        {"res2a_branch2a/kernel": (1, 1, 4, 4), "bn_conv1/moving_mean": (4000, 1), "conv1/bias": (4000,)},
        {"res2a_branch2a/kernel": (1, 1, 4, 4), "bn_conv1/moving_mean": (4000, 1), "conv1/kernel": (7, 7, 3, 64)},
        {"res2a_branch2a/kernel": (1, 1, 4, 4), "bn_conv1/moving_mean": (64,), "conv1/kernel": (64,)},
    ],
)
def test_keras_names_for_arrays_of_other_shapes(tmp_path, odd):
    """What would be spread over each other, or has no such dimension, is refused."""
    paddle.save({name: paddle.zeros(shape) for name, shape in odd.items()}, str(tmp_path / "x.pdparams"))
    with pytest.raises(UserError, match=r"x\.pdparams: refused: backbone\."):
        weights.read_weights(str(tmp_path / "x.pdparams"))


def test_keras_of_a_model_in_a_model(tmp_path):
    """Keras writes all of an inner model's layers into one group, beside those of the outer one."""
    h5py = pytest.importorskip("h5py")
    layers = write_keras(tmp_path / "resnet50.h5", False)
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        for layer, values in layers.items():
            for value, array in values.items():
                file[f"model_weights/resnet50/{layer}/{value}:0"] = array.astype(np.float32)
        file["model_weights/dense/dense/kernel:0"] = np.zeros((3, 2), np.float32)
    inner, whole = (weights.read_weights(str(tmp_path / name)) for name in ("resnet50.h5", "whole.h5"))
    assert whole.source == "Keras ResNet50, under 'resnet50/'" and whole.unused == ["dense/kernel"]
    assert all(np.array_equal(value, whole.tensors[name]) for name, value in inner.tensors.items())
