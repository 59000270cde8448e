"""Every source of weights, from files of an independent writer; broken and malicious files; the account; the cache."""

import argparse
import contextlib
import hashlib
import http.server
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading

import checkpoints
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import safetensors.numpy
from conftest import ROOT, run
from test_models import close, normalised, pictures, scramble

import models
from models import imagenet, layouts, weight_files
from utility import UserError

# ---------------------------------------------------------------- other people's names, and a network that reads them

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
    line = models.load_weights(network, models.read_weights(str(path)), model, **options)
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
    command = [sys.executable, "-W", "ignore", os.path.join(ROOT, "tests", "write_fluid.py"), str(folder)]
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
    weights = models.read_weights(str(tmp_path / "moved"))
    assert weights.tensors["embedding.weight"].shape == (2048, 7) and weights.tensors["head.weight"].shape == (7, 3)
    line = models.load_weights(models.build_model("ResNet50", 3, embedding_size=7), weights, "ResNet50", head="must")
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


# ---------------------------------------------------------------- formats


def small_weights(seed=0):
    return {n: v.numpy() for n, v in scramble(models.build_model("ResNet8", 3), seed).state_dict().items()}


def same(read, written):
    assert list(read) == list(written)
    for name, value in written.items():
        assert read[name].dtype == value.dtype and np.array_equal(read[name], value)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_whatever_paddle_save_writes(tmp_path, protocol):
    path = str(tmp_path / "w.pdparams")
    arrays = {**small_weights(), "half": np.ones((2, 0, 3), np.float16), "number": np.array(5, np.int64)}
    arrays["columns"] = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    tensors = {name: paddle.to_tensor(value) for name, value in arrays.items()}
    nested = {"model": tensors, "epoch": 3, "best": np.float64(0.5), "lr": {"last_lr": 0.1, "steps": [1, (2,), None]}}
    for content in (tensors, arrays, nested, {"model": arrays, "epoch": 1}):
        paddle.save(content, path, protocol=protocol)
        same(weight_files.read_tensors(path), arrays)


def test_large_arrays_in_parts_and_pickles_of_python_2(tmp_path):
    path = tmp_path / "w.pdparams"
    array = np.arange(10, dtype=np.float32)
    parts = {"a@@.0": array[:6], "a@@.1": array[6:], "b": array}
    parts["UnpackBigParamInfor@@"] = {"a": {"OriginShape": (2, 5), "slices": ["a@@.0", "a@@.1"]}}
    path.write_bytes(pickle.dumps(parts, 2))
    same(weight_files.read_pickle(str(path)), {"b": array, "a": array.reshape(2, 5)})

    # Python 2 wrote the bytes of an array as a string: take the instruction that says so.
    data = array.tobytes()
    call = b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01K\n\x85"
    dtype = b"cnumpy\ndtype\nU\x02f4K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    path.write_bytes(call + dtype + b"\x89U" + bytes([len(data)]) + data + b"tbs.")
    same(weight_files.read_pickle(str(path)), {"w": array})


def fluid_variable(array, lod=(), packed=False, dtype=5):
    """A variable as save_vars writes it, from the description of the format."""
    if packed:
        dims = b"".join(varint(n) for n in array.shape)
        desc = b"\x08" + varint(dtype) + b"\x12" + varint(len(dims)) + dims
    else:
        desc = b"\x08" + varint(dtype) + b"".join(b"\x10" + varint(n) for n in array.shape)
    levels = b"".join(struct.pack("<Q", 8 * len(level)) + struct.pack(f"<{len(level)}Q", *level) for level in lod)
    head = struct.pack("<IQ", 0, len(lod)) + levels + struct.pack("<Ii", 0, len(desc))
    return head + desc + array.tobytes()


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


@pytest.mark.parametrize("packed", [False, True])
def test_fluid_variables(tmp_path, packed):
    path, array = tmp_path / "v", np.arange(300 * 2, dtype=np.float32).reshape(300, 2)
    path.write_bytes(fluid_variable(array, lod=[(0, 3, 300), (0, 1)], packed=packed))
    assert np.array_equal(weight_files.read_fluid_variable(str(path)), array)
    for dtype in ("float16", "float64", "int64"):
        paddle.save(paddle.to_tensor(array.astype(dtype)), str(path), use_binary_format=True)
        assert weight_files.read_fluid_variable(str(path)).dtype == dtype


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is text",
        fluid_variable(np.ones((2, 3), np.float32))[:-1],
        fluid_variable(np.ones((2, 3), np.float32)) + b"0",
        fluid_variable(np.ones((2, 3), np.float32), dtype=7),
        fluid_variable(np.ones(0, np.float32).reshape(0, 10**9)) + b"0000",
        fluid_variable(np.empty((10**9,), np.dtype([])), dtype=5),  # a billion numbers announced, none there
        fluid_variable(np.ones(1, np.float32), lod=[(0,)])[:20],
        struct.pack("<IQ", 0, 2**63) + b"\0" * 100,
        struct.pack("<IQIi", 0, 0, 0, -5) + b"\0" * 100,
        struct.pack("<IQIi", 0, 0, 0, 100) + b"\xff" * 100,
        struct.pack("<IQIi", 0, 0, 0, 4) + b"\x08\x05\x12\xff" + b"\0" * 100,
    ],
)
def test_broken_fluid_variables(tmp_path, content):
    (tmp_path / "conv2d_0.w_0").write_bytes(content)
    with pytest.raises(UserError, match=r"conv2d_0.w_0: no variable of a fluid model, or truncated \("):
        models.read_weights(str(tmp_path))


def test_safetensors(tmp_path):
    path = str(tmp_path / "w.safetensors")
    arrays = small_weights()
    safetensors.numpy.save_file(arrays, path)
    network, line = loaded(path, "ResNet8", 3, head="must")
    assert line.endswith("w.safetensors (this project ResNet8); head loaded: 3 classes")
    same({name: network.state_dict()[name].numpy() for name in arrays}, arrays)

    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + b"\x80\x3f\x20\xc0")
    assert weight_files.bfloat16_to_float32(weight_files.read_tensors(path)["a"]).tolist() == [1.0, -2.5]


# ---------------------------------------------------------------- files that are broken or worse


class Call:
    """Pickled, it asks for a call of `function` when it is read."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("suffix", ["pdparams", "pdopt"])
def test_a_pickle_that_runs_a_command_is_refused(tmp_path, protocol, suffix):
    marker, path = tmp_path / "marker", tmp_path / f"bad.{suffix}"
    code = f"__import__('os').mkdir({str(marker)!r})"
    for call, name in ((Call(os.mkdir, str(marker)), r"\w+.mkdir"), (Call(eval, code), "builtins.eval")):
        path.write_bytes(pickle.dumps({"w": call}, protocol))
        wanted = f"refused: not a plain file of weights .the forbidden object {name}" if protocol else "a text file"
        for read in (models.read_weights, models.read_pickle):
            with pytest.raises(UserError, match=rf"bad.{suffix}: {wanted}"):
                read(str(path))
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the file was a real one


@pytest.mark.parametrize(
    "content",
    [
        {"w": Call(np.zeros(1).__reduce__()[0], np.ndarray, (10**12,), b"d")},
        {"w": Call(np.ndarray, (10**10,))},
        {"w": Call(np.dtype, "S1000000000")},
        {"w": Call(tuple, range(3))},
        {"w": Call(eval, "data", {"data": 1})},
        {"w": np.zeros(3, "O")},
        {"w": np.zeros(3, [("a", "f4")])},
        {"w": bytearray(10)},
        {"w": models.UserError()},
    ],
    ids=lambda content: type(content).__name__,
)
def test_a_pickle_with_anything_but_plain_arrays_is_refused(tmp_path, content):
    path = tmp_path / "big.pdparams"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match=r"big\.pdparams: (refused|broken)"):
            models.read_weights(str(path))


@pytest.mark.parametrize(
    "content",
    [
        # a bytearray, bytes, text and a frame of 2**40 bytes
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x",
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"x",
        # attributes of one of our own functions
        b"\x80\x02}U\x01wc_codecs\nencode\n}U\x0c__defaults__K\x01sbs.",
        b"\x80\x02}U\x01wcnumpy\nndarray\n)\x81s.",
        b"\x80\x04",
        pickle.dumps({"w": np.zeros(100)})[:-50],
        pickle.dumps([1, 2]),
        pickle.dumps({1: np.zeros(3)}),
    ],
)
def test_broken_pickles_allocate_nothing(tmp_path, content):
    import tracemalloc

    path = tmp_path / "broken.pdparams"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"broken\.pdparams: (refused|broken|holds)"):
        models.read_weights(str(path))
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a text file, neither Paddle's .pdparams nor safetensors"),
        (b"<!DOCTYPE html><html>404", "a web page, not weights"),
        (b"PK\x03\x04" + b"0" * 50, "a PyTorch or NumPy archive.*safetensors.torch.save_file"),
        (fluid_variable(np.ones(3, np.float32)), "one variable of a fluid model.*give the directory"),
        (b"\x1f\x8b\x08\x00" + b"0" * 50, "an archive: unpack it first"),
        (
            np.random.default_rng(0).bytes(7) + b"\xff" + b"{" + np.random.default_rng(1).bytes(40),
            "an unknown format|a text file",
        ),
        (struct.pack("<Q", 10**9) + b'{"a":', "broken or truncated safetensors"),
        (safetensors.numpy.save({"a": np.ones(9)})[:-1], "broken or truncated safetensors"),
        (safetensors.numpy.save({"a": np.ones(9)}).replace(b"[9]", b"[8]"), "broken or truncated safetensors"),
        (pickle.dumps({"linear.weight": np.ones(9)}), r"names of no known network \(linear.weight ...\); known are"),
        (pickle.dumps({"a\n\x1b[2Jb": np.ones(9)}), r"names of no known network \(a\\n\\x1b\[2Jb ...\); known are"),
        (pickle.dumps({"fc.w/moment1": np.ones(9)}), "the state of an optimizer, not weights"),
        (pickle.dumps({"epoch": 3}), "holds no tensors"),
        # an array whose content never follows
        (b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87Rs.", "names of no"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, wanted):
    path = tmp_path / "any.name"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"any.name: ({wanted})"):
        models.read_weights(str(path))


# ---------------------------------------------------------------- the account


def vision_file(tmp_path, depth, **changed):
    """A file with the names and shapes of paddle.vision's network."""
    network = getattr(paddle.vision.models, f"resnet{depth}")()
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    paddle.save({**state, **changed}, str(tmp_path / f"resnet{depth}.pdparams"))
    return tmp_path / f"resnet{depth}.pdparams"


def refusal(path, model, **options):
    """The message that refuses the file; nothing of the network has changed then."""
    network = models.build_model(model, 3)
    before = {n: v.numpy().copy() for n, v in network.state_dict().items()}
    with pytest.raises(UserError) as caught:
        models.load_weights(network, models.read_weights(str(path)), model, **options)
    assert all(np.array_equal(v.numpy(), before[n]) for n, v in network.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_of_another_depth(tmp_path):
    path = vision_file(tmp_path, 101)
    message = refusal(path, "ResNet50")
    # Every tensor of ResNet50 is there with its shape: what is left over tells.
    assert f"{path}: not the weights of ResNet50: backbone.layer3.6.conv1.weight (not in ResNet50), " in message
    assert message.count(" (not in ResNet50)") == 5 and " and 250 more; " in message
    assert message.endswith("the file is a ResNet101: take --model=ResNet101")
    message = refusal(path, "ResNet152")
    assert "backbone.layer2.4.conv1.weight (missing)" in message and message.endswith("take --model=ResNet101")
    assert refusal(path, "ResNet50_va").endswith("take --model=ResNet101")


@pytest.mark.parametrize(
    ("file", "model", "wanted"),
    [
        ("resnet34", "ResNet18", "the file is a ResNet34: no model here is one"),
        ("resnet18", "ResNet50", "the file is a ResNet18: take --model=ResNet18"),
        ("resnext50_32x4d", "SE_ResNeXt50_32x4d", "the file is a ResNeXt50_32x4d: no model here is one"),
    ],
)
def test_another_network_of_paddle_vision(tmp_path, file, model, wanted):
    paddle.save(getattr(paddle.vision.models, file)().state_dict(), str(tmp_path / "w.pdparams"))
    message = refusal(tmp_path / "w.pdparams", model)
    assert "w.pdparams: not the weights of " in message and message.endswith(wanted)
    assert len(re.findall(r"backbone\.", message)) == 5 and " more; " in message


@pytest.mark.parametrize(
    ("names", "deep_stem"),
    [
        (paddleclas_resnet, "stem.{}.conv.weight"),
        (paddleclas_se_resnext, "conv1_{}._conv.weight"),
        (pytorch, "conv1.{}.weight"),
    ],
)
def test_vd_variants_are_guessed(tmp_path, names, deep_stem):
    tensors = random_weights("ResNet50", names)
    tensors.pop(names(None, None, None, 1)["kernel"])
    tensors.update({deep_stem.format(i): np.zeros((32, 3, 3, 3), np.float32) for i in range(3)})
    safetensors.numpy.save_file(tensors, str(tmp_path / "vd.safetensors"))
    message = refusal(tmp_path / "vd.safetensors", "ResNet50")
    assert message.endswith("a variant with three convolutions in its stem, such as _vd, which no model here has")
    network = models.build_model("ResNet50", 7)
    line = models.load_weights(
        network, models.read_weights(str(tmp_path / "vd.safetensors")), "ResNet50", allow_partial=True
    )
    assert line.startswith("loaded 26") and "--allow_partial passed over backbone.conv1.weight (" in line


def test_fluid_networks_of_other_sizes_are_no_resnet(tmp_path):
    for number in range(20):
        (tmp_path / f"conv2d_{number}.w_0").write_bytes(fluid_variable(np.ones((1, 1, 1, 1), np.float32)))
    wanted = "20 convolutions and 0 batch norms are no ResNet of 50, 101 or 152 layers"
    assert refusal(tmp_path, "ResNet50").endswith(wanted)
    assert refusal(tmp_path, "ResNet50", allow_partial=True).endswith(wanted)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"bn1.bias": np.zeros(65, np.float32)}, "[65] there, [64] here"),
        ({"bn1.bias": np.zeros(64, np.int8)}, "int8 values"),
        ({"bn1.bias": np.full(64, np.inf, np.float16)}, "NaN or infinite"),
    ],
)
def test_allow_partial_loads_the_rest_and_names_what_it_left(tmp_path, changed, why):
    path = vision_file(tmp_path, 18, **changed)
    message = refusal(path, "ResNet18")
    assert (
        f"backbone.bn1.bias ({why}); the file has the layers of ResNet18, but some tensors are missing or changed"
        in message
    )
    network, line = loaded(path, "ResNet18", 3, allow_partial=True)
    assert line.startswith(f"loaded 99 of 100 backbone tensors from {path} (paddle.vision ResNet18); ")
    assert f"; --allow_partial passed over backbone.bn1.bias ({why}); head skipped: 1000 classes there, 3 here" in line
    tensors = weight_files.read_pickle(str(path))
    for name, value in network.state_dict().items():
        if name.startswith("backbone.") and name != "backbone.bn1.bias":
            assert np.array_equal(value.numpy(), tensors[name[9:]])
    assert (network.backbone.bn1.bias.numpy() == 0).all()
    # What continues a run or is measured must fit whole.
    assert "backbone.bn1.bias" in refusal(path, "ResNet18", head="must", allow_partial=True)


def test_nothing_loaded_is_never_a_success(tmp_path):
    paddle.save({"layer1.0.bn1._mean": paddle.zeros([5])}, str(tmp_path / "w.pdparams"))
    for allow_partial in (False, True):
        message = refusal(tmp_path / "w.pdparams", "ResNet18", allow_partial=allow_partial)
        assert message.endswith("the file's network is none that is known here")
    assert "nothing in it fits ResNet18" in message
    path = tmp_path / "head.pdparams"
    paddle.save({"head.weight": paddle.zeros([64, 3]), "backbone.conv1.weight": paddle.zeros([1])}, str(path))
    assert "nothing in it fits" in refusal(path, "ResNet8", allow_partial=True)


@pytest.mark.parametrize(
    ("there", "here", "wanted"),
    [
        ((3, "avg", 0), (4, "avg", 0), "head skipped: 3 classes there, 4 here"),
        ((3, "avg", 0), (3, "avg", 0), "head loaded: 3 classes"),
        ((0, "avg", 0), (3, "avg", 0), "head starts anew: none there"),
        ((3, "avg", 0), (0, "avg", 0), "head unused: none here"),
        ((0, "avg", 0), (0, "avg", 0), ""),
        ((3, "gem", 0), (3, "avg", 0), "pool unused: none here; head loaded: 3 classes"),
        ((3, "avg", 0), (3, "gem", 0), "pool starts anew: none there; head loaded: 3 classes"),
        ((3, "gem", 8), (5, "gem", 8), "pool loaded; embedding loaded: 8 values; head skipped: 3 classes there, 5 "
                                       "here"),
        ((3, "avg", 8), (3, "avg", 9), "embedding skipped: 8 values there, 9 here; head skipped: head.weight ([8, 3] "
                                       "there, [9, 3] here), head.bias (not with the rest)"),
        ((3, "avg", 0), (3, "avg", 64), "embedding starts anew: none there; head skipped: head.weight (not with "
                                        "the rest), head.bias (not with the rest)"),
    ],
)  # fmt: skip
def test_the_account_of_pooling_embedding_and_head(tmp_path, there, here, wanted):
    theirs, ours = (models.build_model("ResNet8", *settings) for settings in (there, here))
    path = str(tmp_path / "w.pdparams")
    paddle.save(theirs.state_dict(), path)
    before = {n: v.numpy().copy() for n, v in ours.state_dict().items()}
    line = models.load_weights(ours, models.read_weights(path), "ResNet8")
    start = f"loaded 45 of 45 backbone tensors from {path} (this project ResNet8)"
    assert line == (f"{start}; {wanted}" if wanted else start)
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        part = name.split(".")[0]
        source = state if part == "backbone" or f"{part} loaded" in wanted else before
        assert np.array_equal(value.numpy(), np.asarray(source[name]))
    if "skipped" in wanted or "unused" in wanted or "anew" in wanted:
        with pytest.raises(UserError, match=r"w\.pdparams: not the weights of ResNet8"):
            models.load_weights(ours, models.read_weights(path), "ResNet8", head="must")


@pytest.mark.parametrize("prefix", ["module.", "_layers.", "backbone."])
def test_names_behind_a_wrapper(tmp_path, prefix):
    """Data-parallel layers and PaddleClas' retrieval models put a word in front of the names."""
    network = paddle.vision.models.resnet18(num_classes=-1)
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    paddle.save({**state, "neck.weight": paddle.zeros([3])}, str(tmp_path / "w.pdparams"))
    network, line = loaded(tmp_path / "w", "ResNet18", 3)
    assert line.startswith("loaded 100 of 100") and line.endswith("none there; unknown and not used: neck.weight")


def test_half_a_head_is_skipped_whole(tmp_path):
    network = models.build_model("ResNet8", 3)
    state = {**network.state_dict(), "head.bias": paddle.zeros([])}
    paddle.save(state, str(tmp_path / "w.pdparams"))
    other, line = loaded(tmp_path / "w", "ResNet8", 3)
    assert line.endswith("; head skipped: 1 classes there, 3 here")
    assert not np.array_equal(other.head.weight.numpy(), network.head.weight.numpy())


def test_unknown_tensors_beside_known_ones_are_named(tmp_path):
    path = vision_file(tmp_path, 18, **{"aux.weight": np.zeros(3, np.float32)})
    assert loaded(path, "ResNet18", 1000)[1].endswith("head loaded: 1000 classes; unknown and not used: aux.weight")


# ---------------------------------------------------------------- paths


def test_paths(tmp_path):
    run_dir = tmp_path / "output" / "ResNet8"
    os.makedirs(run_dir / "3")
    os.symlink("3", run_dir / "best")
    paddle.save(models.build_model("ResNet8", 3).state_dict(), str(run_dir / "3" / checkpoints.WEIGHTS_FILE))
    for path in (run_dir / "3", run_dir / "best", run_dir / "best" / "model", run_dir / "3" / "model.pdparams"):
        assert models.read_weights(str(path)).tensors["head.bias"].shape == (3,)
    shutil.copy(run_dir / "3" / "model.pdparams", tmp_path / "mine.pdparams")

    def message(*parts):
        with pytest.raises(UserError) as caught:
            models.read_weights(os.path.join(tmp_path, *parts))
        return str(caught.value)

    assert message("mime") == (
        f"{tmp_path}/mime: no weights there: {tmp_path} has no mime and no mime.pdparams; did you mean "
        f"{tmp_path}/mine.pdparams?"
    )
    assert message("outptu", "ResNet8", "best").endswith(f"; did you mean {tmp_path}/output?")
    assert message("output", "ResNet8", "bets").endswith(f"; did you mean {run_dir}/best?")
    assert message("output", "ResNet8").endswith(f"the checkpoints of a run; give one of them, such as {run_dir}/best")
    assert message("").endswith("give one of the files in it: mine.pdparams")
    assert "neither a checkpoint directory" in message("output")
    (tmp_path / "output" / "__model__").write_bytes(b"")
    assert "variables are joined in one file" in message("output")
    with pytest.raises(UserError, match="--pretrained_model=imagenet --model=ResNet50 takes the official"):
        models.read_weights("ResNet50")


def test_a_foreign_file_beside_a_checkpoint_has_not_its_description(tmp_path):
    (tmp_path / "checkpoint.json").write_text("{}")
    path = tmp_path / "other.pdparams"
    paddle.save(models.build_model("ResNet8", 3).state_dict(), str(path))
    assert models.read_weights(str(path)).state is None


# ---------------------------------------------------------------- official files


@contextlib.contextmanager
def server(content, promised=None):
    """A web server whose every file is `content`; -> (its URL, the paths that were asked for)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(promised or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEP_METRIC_LEARNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def official(monkeypatch, url, md5=None):
    monkeypatch.setitem(imagenet.IMAGENET, "ResNet8", imagenet.Official(f"{url}/r8.pdparams", md5))


def test_imagenet_is_downloaded_once_and_checked(tmp_path, cache, monkeypatch, capsys):
    paddle.save(models.build_model("ResNet8", 3).state_dict(), str(tmp_path / "r8"))
    content = (tmp_path / "r8").read_bytes()
    with server(content) as (url, asked):
        official(monkeypatch, url, hashlib.md5(content).hexdigest())
        for _ in range(2):
            assert models.read_weights("imagenet", "ResNet8").file_name == f"{cache}/r8.pdparams"
    assert asked == ["/r8.pdparams"] and os.listdir(cache) == ["r8.pdparams"]
    assert capsys.readouterr().err == f"downloading {url}/r8.pdparams (0 MB)\n"


@pytest.mark.parametrize(
    ("content", "promised", "md5", "wanted"),
    [
        (b"content", None, "0" * 32, "has MD5 9a0364b9e99bb480dd25e1f0284c8555 instead of 000"),
        (b"content", 1000, None, "ended after 7 of 1000 bytes|IncompleteRead"),
        (b"<html>login</html>", None, None, "a web page, not weights"),
    ],
)
def test_a_bad_download_is_refused_and_leaves_nothing(cache, monkeypatch, content, promised, md5, wanted):
    with server(content, promised) as (url, _):
        official(monkeypatch, url, md5)
        with pytest.raises(UserError, match=wanted):
            models.read_weights("imagenet", "ResNet8")
    assert os.listdir(cache) == []


def test_without_a_network_it_says_which_file_to_bring_and_where_to_put_it(cache, monkeypatch):
    official(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        models.read_weights("imagenet", "ResNet8")
    message = str(caught.value)
    assert message.startswith("cannot download http://127.0.0.1:9/r8.pdparams (")
    assert message.endswith(f"without a network, bring this file yourself and put it at {cache}/r8.pdparams")
    paddle.save(models.build_model("ResNet8", 3).state_dict(), f"{cache}/r8.pdparams")
    assert models.read_weights("imagenet", "ResNet8").file_name == f"{cache}/r8.pdparams"


def test_models_without_an_official_file(monkeypatch):
    for name in set(models.MODELS) - set(imagenet.IMAGENET):
        with pytest.raises(UserError, match=f"no official ImageNet file for {name}.*; there is one for .*ResNet50, "):
            models.read_weights("imagenet", name)
    assert set(imagenet.IMAGENET) <= set(models.MODELS)
    urls = getattr(paddle.vision.models.resnet, "model_urls", {})
    for depth in (18, 50, 101, 152):
        assert tuple(imagenet.IMAGENET[f"ResNet{depth}"]) == urls[f"resnet{depth}"]
    monkeypatch.delenv("DEEP_METRIC_LEARNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert imagenet.cache_folder() == "/somewhere/deep_metric_learning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert imagenet.cache_folder() == os.path.expanduser("~/.cache/deep_metric_learning")


# ---------------------------------------------------------------- the scripts


def test_the_scripts_take_foreign_weights_and_say_in_one_line_what_is_wrong(birds, tmp_path):
    path = vision_file(tmp_path, 18)
    common = [*birds.lists, "--use_gpu=False", "--image_shape=3,32,32", "--model=ResNet18"]
    result = run("infer.py", *common, f"--pretrained_model={path}", f"--feature_file={tmp_path}/f.npz")
    line = f"loaded 100 of 100 backbone tensors from {path} (paddle.vision ResNet18); head loaded: 1000 classes"
    assert line in result.stdout.splitlines()
    assert np.load(tmp_path / "f.npz")["features"].shape == (48, 512)

    broken = vision_file(tmp_path, 18, **{"bn1.bias": np.zeros(65, np.float32)})
    flags = ["--num_epochs=1", "--total_images=8", "--train_batch_size=8", "--samples_each_class=2", "--eval_every=0"]
    train = ["train.py", *common, *flags, f"--model_save_dir={tmp_path}/out"]
    result = run(*train, f"--pretrained_model={broken}", status=2)
    assert re.fullmatch(r"error: .*: not the weights of ResNet18: backbone.bn1.bias .*\n", result.stderr)
    for script in (train, ["eval.py", *common]):
        result = run(*script, f"--pretrained_model={broken}", "--allow_partial=True")
        assert "loaded 99 of 100 backbone tensors" in result.stdout
        done = "skipped" if script is train else "loaded"
        assert f"passed over backbone.bn1.bias ([65] there, [64] here); head {done}: 1000 classes" in result.stdout
    message = run("eval.py", *common, f"--pretrained_model={path}", "--embedding_size=16", status=2).stderr
    assert message == f"error: --embedding_size=16, but {path} has no embedding layer\n"


def test_eval_and_infer_rebuild_pooling_embedding_and_head_of_a_file_without_description(tmp_path, capsys):
    paddle.save(models.build_model("ResNet8", 3, "gem", 16).state_dict(), str(tmp_path / "w.pdparams"))
    settings = dict.fromkeys((*models.SETTINGS, "class_dim"))
    args = argparse.Namespace(**{**settings, "model": "ResNet8"}, pretrained_model=f"{tmp_path}/w", allow_partial=False)
    _, labels, _ = models.load_network(args)
    assert labels is None and (args.pooling, args.embedding_size, args.class_dim) == ("gem", 16, 3)
    assert capsys.readouterr().out.endswith("; pool loaded; embedding loaded: 16 values; head loaded: 3 classes\n")


def test_help_says_what_cannot_be_seen_in_a_file():
    text = " ".join(run("train.py", "--help").stdout.split())
    assert "cannot be seen in a file: Caffe and Keras" in text and "--allow_partial" in text


# ---------------------------------------------------------------- PyTorch itself, where it is installed


@pytest.mark.parametrize(
    ("name", "model"),
    [("resnet50", "ResNet50"), ("resnet101", "ResNet101"), ("seresnext50_32x4d", "SE_ResNeXt50_32x4d")],
)
def test_a_network_of_timm(tmp_path, name, model):
    """timm's ResNets have torchvision's names."""
    torch, timm = (pytest.importorskip(name, exc_type=ImportError) for name in ("torch", "timm"))
    from safetensors.torch import save_file

    theirs = timm.create_model(name, num_classes=7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in theirs.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5, generator=generator)
    theirs.eval()
    save_file(theirs.state_dict(), str(tmp_path / "t.safetensors"))
    network, line = loaded(tmp_path / "t.safetensors", model, head="must")
    assert f"(torchvision/timm {model}); head loaded: 7 classes" in line
    image = pictures()
    with torch.no_grad(), paddle.no_grad():
        wanted = theirs(torch.from_numpy(normalised(image).numpy())).numpy()
        close(network(paddle.to_tensor(image))[1], wanted)
