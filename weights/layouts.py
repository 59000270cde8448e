"""What the layers of a ResNet or SE-ResNeXt are called elsewhere, and their names here.

Every layout below is the same network under other names: a stem, blocks of up to three convolutions with batch norm and
a shortcut, in SE blocks two linear layers, and a linear head. The names are facts about the files that people have:
paddle.vision.models.resnet50, PaddleClas (`legendary_models` and the older dygraph ones), the fluid programs of
PaddlePaddle/models in 2018 (names generated in the order of creation) and 2019 (names given), torchvision, timm,
and ResNet50 of Keras.
"""

import collections
import re

import numpy as np

from transforms import MEAN, STD

OURS = "this project"  # the writer of a .pdparams of train.py
# What a file is: who wrote it, {our name: array}, names without a meaning here, and what a reader should know if the
# weights turn out not to fit.
Renamed = collections.namedtuple("Renamed", "writer tensors unused hint")

# Blocks of the four stages -> layers of a bottleneck network.
DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}

_VALUES = {
    "weight": "weight", "weights": "weight", "scale": "weight", "w_0": "weight",
    "bias": "bias", "offset": "bias", "b_0": "bias",
    "_mean": "_mean", "running_mean": "_mean", "mean": "_mean",
    "kernel": "weight", "W": "weight", "gamma": "weight", "b": "bias", "beta": "bias", "moving_mean": "_mean",
    "moving_variance": "_variance", "running_std": "_variance",  # of old Keras, which holds variances
    "_variance": "_variance", "running_var": "_variance", "variance": "_variance",
}  # fmt: skip
# Which of the convolutions 1, 2, 3 of a block; 0 is the shortcut's. The stem has one.
_PARTS = {
    None: 1, "0": 0, "1": 1, "2": 2, "3": 3, "conv0": 1, "conv1": 2, "conv2": 3, "x1": 1, "x2": 2, "x3": 3,
    "branch2a": 1, "branch2b": 2, "branch2c": 3, "branch1": 0, "short": 0, "downsample": 0, "prj": 0,
}  # fmt: skip
_SE = {"squeeze": "squeeze", "fc1": "squeeze", "sqz": "squeeze", "excitation": "excitation", "fc2": "excitation",
       "exc": "excitation"}  # fmt: skip

# sign: a name that only this layout has. Groups of the patterns: stage and block, or `through` for blocks numbered
# across the stages; stem, which of its convolutions; part, bn (present: a batch norm), se, head; value. first: what
# stages, blocks and, where there are several, the stem's convolutions are counted from.
_Layout = collections.namedtuple("_Layout", "writer sign first patterns")
_BN = r"(?P<value>weight|bias|_mean|_variance|running_mean|running_var)"
_FLUID_BN = r"(?P<value>scale|offset|mean|variance)"
_IN_BLOCK = r"(?:layer(?P<stage>\d)\.(?P<block>\d\d?\d?)\.)"
_VISION = (
    rf"{_IN_BLOCK}?(?:conv|(?P<bn>bn))(?P<part>\d)\.{_BN}",
    rf"{_IN_BLOCK}(?P<part>downsample)\.(?:0|(?P<bn>1))\.{_BN}",
    rf"{_IN_BLOCK}se\.(?P<se>fc1|fc2)\.(?P<value>weight|bias)",
    r"(?P<head>fc)\.(?P<value>weight|bias)",
)
_LAYOUTS = (
    _Layout("paddle.vision", r"layer1\.0\.bn1\._mean", (1, 0), _VISION),
    _Layout("torchvision/timm", r"layer1\.0\.bn1\.running_mean", (1, 0), _VISION),
    _Layout(
        "PaddleClas",
        r"blocks\.0\.conv0\.conv\.weight",
        (1, 0, 0),
        (
            rf"(?:stem\.(?P<stem>[012])|blocks\.(?P<through>\d\d?\d?)\.(?P<part>conv\d|short))\.(?:conv|(?P<bn>bn))\.{_BN}",
            r"(?P<head>fc)\.(?P<value>weight|bias)",
        ),
    ),
    _Layout(
        "PaddleClas",
        r"bb_0_0\.conv0\._conv\.weight",
        (0, 0, 1),
        (
            r"(?:conv|conv1_(?P<stem>[123])|bb_(?P<stage>\d)_(?P<block>\d\d?\d?)\.(?P<part>conv\d|short))\."
            rf"(?:_conv|(?P<bn>_batch_norm))\.{_BN}",
            r"bb_(?P<stage>\d)_(?P<block>\d\d?\d?)\.scale\.(?P<se>squeeze|excitation)\.(?P<value>weight|bias)",
            r"(?P<head>out)\.(?P<value>weight|bias)",
        ),
    ),
    _Layout(
        "fluid",
        r"res2a_branch2a_weights",
        (2, 0),
        (
            r"(?:conv1|res(?P<stage>\d)(?P<block>[a-z]\d?\d?\d?)_(?P<part>branch\w+))_(?P<value>weights)",
            rf"(?P<bn>bn)(?:_conv1|(?P<stage>\d)(?P<block>[a-z]\d?\d?\d?)_(?P<part>branch\w+))_{_FLUID_BN}",
        ),
    ),
    _Layout(
        "fluid",
        r"conv2_1_x1_weights",
        (2, 1),
        (
            r"(?:conv1|conv(?P<stage>\d)_(?P<block>\d\d?\d?)_(?P<part>x\d|prj))_(?P<value>weights)",
            rf"(?:conv1|conv(?P<stage>\d)_(?P<block>\d\d?\d?)_(?P<part>x\d|prj))_(?P<bn>bn)_{_FLUID_BN}",
            r"fc(?P<stage>\d)_(?P<block>\d\d?\d?)_(?P<se>sqz|exc)_(?P<value>weights|offset)",
            r"(?P<head>fc6)_(?P<value>weights|offset)",
        ),
    ),
)
# Layer and value in Keras' HDF5 files, and what its batch norm adds to a variance.
_KERAS_BN = r"(?P<value>gamma|beta|moving_mean|moving_variance|running_mean|running_std)"
_KERAS_CONV = r"(?P<value>kernel|bias|W|b)"
_KERAS = {
    "Keras": (
        _Layout(
            "Keras",
            r"conv2_block1_1_conv/kernel",
            (2, 1),
            (
                rf"(?:conv1|conv(?P<stage>\d)_block(?P<block>\d\d?)_(?P<part>\d))_conv/{_KERAS_CONV}",
                rf"(?:conv1|conv(?P<stage>\d)_block(?P<block>\d\d?)_(?P<part>\d))_(?P<bn>bn)/{_KERAS_BN}",
                rf"(?P<head>probs|predictions)/{_KERAS_CONV}",
            ),
        ),
        1.001e-5,
    ),
    "old Keras": (
        _Layout(
            "Keras",
            r"res2a_branch2a/(?:kernel|W)",
            (2, 0),
            (
                rf"(?:conv1|res(?P<stage>\d)(?P<block>[a-z])_(?P<part>branch\w+))/{_KERAS_CONV}",
                rf"(?P<bn>bn)(?:_conv1|(?P<stage>\d)(?P<block>[a-z])_(?P<part>branch\w+))/{_KERAS_BN}",
                rf"(?P<head>fc1000)/{_KERAS_CONV}",
            ),
        ),
        1e-3,
    ),
}
# What Keras subtracts from the RGB values 0..255 of a picture; it takes them as BGR.
_KERAS_MEAN = (123.68, 116.779, 103.939)
_OWN = r"backbone\.conv1\.weight"
_OWN_NAMES = re.compile(r"backbone\..*\.(?:weight|bias|_mean|_variance)|(?:pool|embedding|head)\..*", re.DOTALL)
_GENERATED = r"conv2d_\d+\.w_0"
_SIGNS = [_OWN, _GENERATED, *(layout.sign for layout, _ in _KERAS.values()), *(layout.sign for layout in _LAYOUTS)]
_SIGN = re.compile(rf"(?:{'|'.join(_SIGNS)})\Z")
_LAST_WORDS = ("weight", "weights", "_mean", ".w_0", "/kernel", "/W")  # of the signs: most names have none of them
_LONGEST = 60  # letters of a name of any layout

# Files of a fluid directory that can be weights. Momentum and other state of an optimizer have longer names.
FLUID_NAMES = re.compile(
    r"(?:conv\d|bn\d|bn_conv|batch_norm_|res\d|fc)[\w.]*?(?:_weights|_scale|_offset|_mean|_variance|\.w_\d|\.b_0)"
)
# Stems of three convolutions: the _vd variants of PaddleClas, timm's "d" variants, SE_ResNeXt152_64x4d.
_DEEP_STEM = re.compile(r"stem\.1\..*|conv1_1[._].*|conv1\.0\.weight|conv3\._conv\.weight|conv3_weights")


def is_fluid_directory(names):
    """Whether a directory with files of these names holds a fluid model, one file a variable."""
    return any(re.fullmatch(rf"res2a_branch2a_weights|conv2_1_x1_weights|{_GENERATED}", name) for name in names)


def prefix_of_sign(name):
    """What stands in front of a layout's sign at the end of a name, None where there is none."""
    match = _SIGN.search(name) if name.endswith(_LAST_WORDS) else None
    return name[: match.start()] if match else None


def rename(tensors):
    """Our names for the weights among tensors without a prefix.

    Returns: Renamed, or None where the names are of no layout.
    """
    signs = [name for name in tensors if prefix_of_sign(name) == ""]
    if _has(signs, _OWN):
        ours = {name: value for name, value in tensors.items() if _OWN_NAMES.fullmatch(name)}
        return Renamed(OURS, ours, [name for name in tensors if name not in ours], "")
    if _has(signs, _GENERATED):
        return _from_generated(tensors)
    for layout, epsilon in _KERAS.values():
        if _has(signs, layout.sign):
            renamed = _from_layout(tensors, layout)
            return renamed._replace(tensors=_from_keras(renamed.tensors, epsilon))
    layout = next((layout for layout in _LAYOUTS if _has(signs, layout.sign)), None)
    return _from_layout(tensors, layout) if layout else None


def _has(names, pattern):
    return any(re.fullmatch(pattern, name) for name in names)


def _from_layout(tensors, layout):
    found, unused = {}, []
    stages = _stages(tensors)
    for name, value in tensors.items():
        own = None
        for pattern in layout.patterns if len(name) <= _LONGEST else ():
            match = re.fullmatch(pattern, name)
            if match:
                own = _own_name(match.groupdict(), layout.first, stages)
        if own:
            found[own] = value
        elif not name.endswith("num_batches_tracked"):  # PyTorch's batch norms count; nothing uses it
            unused.append(name)
    if layout.writer == "fluid":
        unused = _take_fluid_linears(tensors, found, 0, unused)
    if layout.writer == "torchvision/timm":
        found = {name: _from_torch(name, value, found) for name, value in found.items()}
    deep = any(_DEEP_STEM.fullmatch(name) for name in unused)
    hint = "the file is a variant with three convolutions in its stem under names that are not known here"
    return Renamed(layout.writer, found, unused, hint if deep else "")


def _stages(tensors):
    """Blocks of each stage where PaddleClas numbers them through."""
    numbers = [int(match[1]) for match in (re.match(r"blocks\.(\d\d?\d?)\.", name) for name in tensors) if match]
    count = max(numbers, default=-1) + 1
    known = {sum(stages): stages for stages in ((2, 2, 2, 2), *DEPTHS)}
    return known.get(count, (count,))


def _own_name(groups, first, stages):
    value = _VALUES[groups["value"]]
    if groups.get("head"):
        return f"head.{value}"
    prefix = "backbone."
    if groups.get("through"):
        block = int(groups["through"])
        stage = 0
        while block >= stages[stage]:
            block -= stages[stage]
            stage += 1
        prefix += f"layer{stage + 1}.{block}."
    elif groups.get("stage"):
        block = groups["block"]
        # Caffe's letters: a, b, c ... or, in long stages, a, b1, b2 ...
        number = int(block) - first[1] if block.isdigit() else int(block[1:]) if block[1:] else ord(block) - ord("a")
        prefix += f"layer{int(groups['stage']) - first[0] + 1}.{number}."
    if groups.get("se"):
        return f"{prefix}{_SE[groups['se']]}.{value}"
    part = _PARTS.get(groups.get("part"))
    if part is None:
        return None
    if groups.get("stem"):  # counted from 0 or, in conv1_1, from 1
        number = int(groups["stem"]) + (1 - first[2])
        part = part if number == 1 else f"1_{number}"
    if part == 0:
        return f"{prefix}downsample.{1 if groups.get('bn') else 0}.{value}"
    return f"{prefix}{'bn' if groups.get('bn') else 'conv'}{part}.{value}"


def _from_keras(found, epsilon):
    """Keras' convolutions have biases and another memory order, its batch norm another epsilon, its pictures another
    scale: all of that goes into kernels and statistics, so that the outputs are the same.

    Only where the first convolution reaches beyond the edge, its mean (123.68 for 123.675) is another.

    Raises: ValueError for arrays that have many names: each would be copied.
    """
    values = [np.asarray(value) for value in found.values()]
    held = {value.__array_interface__["data"][0]: value.nbytes for value in values}
    if sum(value.nbytes for value in values) > sum(held.values()) + 2**20:
        raise ValueError("one array has the names of many")
    tensors = {}
    for name, value in found.items():
        layer, _, what = name.rpartition(".")
        value = np.asarray(value, np.float64)
        if what == "_variance":
            value = value + epsilon - 1e-5
        elif what == "_mean":
            conv = layer.replace("downsample.1", "downsample.0").replace(".bn", ".conv")
            bias = np.asarray(found.get(f"{conv}.bias", np.zeros(value.shape)))
            if bias.shape != value.shape:
                raise ValueError(f"{name} is {list(value.shape)}, the bias in front of it {list(bias.shape)}")
            value = value - bias
        elif value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        if not (what == "bias" and re.search(r"\.(conv\d|downsample\.0)$", layer)):
            tensors[name] = value
    first, mean = "backbone.conv1.weight", "backbone.bn1._mean"
    if first in tensors and mean in tensors:
        shape = tensors[first].shape
        if len(shape) != 4 or shape[1] != 3 or tensors[mean].shape != shape[:1]:
            raise ValueError(f"{first} is {list(shape)}, {mean} {list(tensors[mean].shape)}")
        kernel = tensors[first][:, ::-1]  # of RGB
        rest = 255 * np.array(MEAN) - _KERAS_MEAN
        tensors[mean] = tensors[mean] - np.einsum("ochw,c->o", kernel, rest)
        tensors[first] = kernel * (255 * np.array(STD))[:, None, None]
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def _from_torch(name, value, found):
    """PyTorch keeps linear weights as [out, in], and timm's SE layers are 1x1 convolutions [out, in, 1, 1]."""
    layer, _, what = name.rpartition(".")
    if what != "weight" or not (layer == "head" or layer.endswith(("squeeze", "excitation"))):
        return value
    value = value.reshape(value.shape[:2]) if value.shape[2:] == (1, 1) else value
    # Someone who converted the file to Paddle by hand may have transposed it already: the bias tells.
    bias = found.get(f"{layer}.bias")
    return value.T if value.ndim == 2 and (bias is None or bias.size == value.shape[0]) else value


def _fluid_numbers(tensors, kind):
    """The numbers n of the layers kind_n, in order: fluid counted up as it created them, not always from 0."""
    numbers = (re.fullmatch(rf"{kind}_(\d+)\.w_0", name) for name in tensors if len(name) < 40)
    return sorted(int(match[1]) for match in numbers if match)


def _take_fluid_linears(tensors, found, used, unused):
    """Adds fluid's linear layers after the first `used` to `found`: the head, or an embedding layer and the head."""
    layers = _fluid_numbers(tensors, "fc")[used:]
    names = {1: ["head"], 2: ["embedding", "head"]}.get(len(layers), [])
    for number, own in zip(layers, names):
        for value in ("w_0", "b_0"):
            name = f"fc_{number}.{value}"
            if name in tensors:
                found[f"{own}.{_VALUES[value]}"] = tensors[name]
    taken = {f"fc_{number}.{value}" for number, _ in zip(layers, names) for value in ("w_0", "b_0")}
    return [name for name in unused if name not in taken]


def _from_generated(tensors):
    """The programs of 2018 named nothing: conv2d_0.w_0, batch_norm_0.w_0 and so on, in the order of creation.

    That is the stem, then for each block its three convolutions, in SE blocks the two linear layers, and last the
    shortcut's convolution; the head comes at the end.
    """
    convs, norms = _fluid_numbers(tensors, "conv2d"), _fluid_numbers(tensors, "batch_norm")
    stages = next((stages for stages in DEPTHS if len(convs) == 3 * sum(stages) + 5), None)
    if stages is None or len(norms) != len(convs):
        hint = f"{len(convs)} convolutions and {len(norms)} batch norms are no ResNet of 50, 101 or 152 layers"
        return Renamed("fluid", {}, list(tensors), hint)
    pairs, se_layers = [("conv1", "bn1")], []
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            prefix = f"layer{stage + 1}.{block}."
            pairs += [(f"{prefix}conv{part}", f"{prefix}bn{part}") for part in (1, 2, 3)]
            pairs += [(f"{prefix}downsample.0", f"{prefix}downsample.1")] if block == 0 else []
            se_layers += [f"{prefix}squeeze", f"{prefix}excitation"]
    names = {}
    for (conv, norm), conv_number, norm_number in zip(pairs, convs, norms):
        names[f"conv2d_{conv_number}.w_0"] = f"backbone.{conv}.weight"
        for theirs, ours in (("w_0", "weight"), ("b_0", "bias"), ("w_1", "_mean"), ("w_2", "_variance")):
            names[f"batch_norm_{norm_number}.{theirs}"] = f"backbone.{norm}.{ours}"
    linears = _fluid_numbers(tensors, "fc")
    used = len(se_layers) if len(linears) >= len(se_layers) else 0
    for number, layer in zip(linears[:used], se_layers):
        names[f"fc_{number}.w_0"], names[f"fc_{number}.b_0"] = f"backbone.{layer}.weight", f"backbone.{layer}.bias"
    found = {own: tensors[name] for name, own in names.items() if name in tensors}
    unused = _take_fluid_linears(tensors, found, used, [name for name in tensors if name not in names])
    return Renamed("fluid", found, unused, "")


def _blocks(tensors):
    """{(stage, block)} of the blocks that have tensors, as text."""
    matches = (re.match(r"backbone\.layer(\d)\.(\d+)\.", name) for name in tensors)
    return {match.groups() for match in matches if match}


def architecture(tensors):
    """What network these weights (under our names) belong to, such as ResNet50 or SE_ResNeXt101_32x4d, or None.

    Strides have no weights: ResNet50 stands for ResNet50_va, too.
    """
    blocks = _blocks(tensors)
    stages = tuple(sum(stage == str(number) for stage, _ in blocks) for number in range(1, 5))
    middle = tensors.get("backbone.layer1.0.conv2.weight")
    if middle is None or middle.ndim != 4:
        return None
    if "backbone.layer1.0.conv3.weight" not in tensors:
        if stages[3] == 0 and len(set(stages[:3])) == 1:
            return f"ResNet{6 * stages[0] + 2}"
        return {(2, 2, 2, 2): "ResNet18", (3, 4, 6, 3): "ResNet34"}.get(stages)
    width, group = middle.shape[:2]
    depth = DEPTHS.get(stages)
    if depth is None or not group or width % group:
        return None
    name = "SE_" if "backbone.layer1.0.squeeze.weight" in tensors else ""
    vd = "_vd" if "backbone.conv1_2.weight" in tensors else ""
    if width > group:
        return f"{name}ResNeXt{depth}{vd}_{width // group}x{group}d"
    return f"{name}ResNet{depth}{vd}" if width == 64 else f"wide {name}ResNet{depth}{vd}"


def missing(tensors):
    """How many tensors these weights (under our names) lack of the network that `architecture` sees in them."""
    deep, bottleneck = "backbone.conv1_2.weight" in tensors, "backbone.layer1.0.conv3.weight" in tensors
    convs = ["conv1", "conv1_2", "conv1_3"] if deep else ["conv1"]
    linears = []
    for stage, number in _blocks(tensors):
        block = f"layer{stage}.{number}."
        convs += [f"{block}conv{part}" for part in ((1, 2, 3) if bottleneck else (1, 2))]
        if number == "0" and (bottleneck or stage != "1"):
            convs.append(f"{block}downsample.0")
        if "backbone.layer1.0.squeeze.weight" in tensors:
            linears += [f"{block}squeeze", f"{block}excitation"]
    wanted = [f"{conv}.weight" for conv in convs]
    for conv in convs:
        norm = conv.replace("downsample.0", "downsample.1").replace("conv", "bn")
        wanted += [f"{norm}.{value}" for value in ("weight", "bias", "_mean", "_variance")]
    wanted += [f"{linear}.{value}" for linear in linears for value in ("weight", "bias")]
    return sum(f"backbone.{name}" not in tensors for name in wanted)


def dtype_name(array):
    """The type that the values had where they were written: NumPy has no bfloat16, and Paddle stores its bits."""
    return "bfloat16" if array.dtype == np.uint16 else array.dtype.name
