"""Weights that somebody already has: read them, recognise what they are, load them and say what was loaded."""

import collections
import os

import numpy as np

import models
from utility import UserError, plain
from weights import layouts, sets
from weights.checkpoint import DESCRIPTION, EMA_FILE, WEIGHTS_FILE, check_sum, read_description
from weights.formats import bfloat16_to_float32, read_fluid_directory, read_tensors
from weights.places import beside, find_weights

# tensors: {name here: array as in the file}; state: what train.py stored beside them, or None; source: a few words on
# who wrote what; unused: what else is in the file, in words; hint: a reason known for weights that don't fit.
Weights = collections.namedtuple("Weights", "tensors file_name state source unused hint")

LARGE = 2**24  # values of a layer, 64 MB, that are not built on a file's word alone
# What a description must have for its weights to be used.
DESCRIBED = ("epoch", "settings", "labels", "trained_labels")

# ---------------------------------------------------------------- read and recognise


def read_state(file_name):
    """The description that train.py stored beside its weights `file_name`, or None where it did not write them."""
    folder, name = os.path.split(file_name)
    described = name in (WEIGHTS_FILE, EMA_FILE) and os.path.exists(os.path.join(folder, DESCRIPTION))
    return read_description(folder, DESCRIBED) if described else None


def read_weights(path, model=None, which=""):
    """Reads weights, whatever they are.

    Args:
        path: a checkpoint directory of train.py; a .pdparams, .safetensors or .h5 file, recognised by its content; the
            path of a .pdparams file without the suffix; a directory of fluid's save_vars; or "imagenet", for the
            official file of `model`.
        which: of a checkpoint directory, "ema" or "": the average over the steps, where there is one; "model": the
            weights of the last step. Of a file with several sets of weights, the sub-dict or prefix of one.

    Returns: Weights
    Raises: UserError where there are none, where they are broken or unsafe, of no known network, or where it takes a
        choice.
    """
    file_name = find_weights(path, model, which)
    if os.path.isdir(file_name):
        tensors = read_fluid_directory(file_name, layouts.FLUID_NAMES)
    else:
        tensors = read_tensors(file_name)
    state = read_state(file_name)
    if state:
        check_sum(file_name, state)
    try:
        found = sets.find_sets(tensors)
    except ValueError as error:
        raise UserError(f"{file_name}: refused: {error}") from None
    if not found:
        raise UserError(f"{file_name}: {_unknown_names(tensors, file_name)}")
    part = "ema" if os.path.basename(file_name) == EMA_FILE else "model"
    if state and which not in ("", part):
        raise UserError(f"--weights={plain(which, 60)}: {file_name} is the {part} of a checkpoint: give its folder")
    found = sets.choose(found, None if state else model, "" if state else which, file_name)
    renamed = found.renamed
    classes = _layer_size(renamed.tensors, "head")
    if state and classes and len(state["labels"]) > classes:
        raise UserError(
            f"{file_name}: a head of {classes} classes, but {DESCRIPTION} has {len(state['labels'])} labels"
        )
    network = state["settings"].get("model") if state else found.network or "network"
    source = f"{renamed.writer} {network}" + (f", epoch {state['epoch']}" if state else "")
    if state and part == "ema":
        source += ", average over its steps"
    if state and "averaged" in state:
        source += f", averaged: {plain(state['averaged'])}"
    if found.prefix:
        source += f", under {plain(found.prefix, 60)!r}"
    return Weights(renamed.tensors, file_name, state, source, sets.not_used(tensors, found), renamed.hint)


def _unknown_names(tensors, file_name):
    """What to say of tensors of which none are known weights."""
    if not tensors:
        return "holds no tensors"
    if any(map(sets.is_of_optimizer, tensors)):
        return f"the state of an optimizer, not weights: give {beside(file_name) or 'the .pdparams beside it'}"
    names = ", ".join(plain(name, 60) for name in list(tensors)[:3])
    return (
        f"names of no known network ({names} ...); known are those of this project, paddle.vision, PaddleClas, fluid, "
        "torchvision, timm and Keras, for ResNet and SE_ResNeXt, in any sub-dict and behind any prefix"
    )


# ---------------------------------------------------------------- load


def load_weights(network, weights, model, head="fit", allow_partial=False):
    """Loads `weights` into an EmbeddingNet.

    Args:
        weights: what `read_weights` returned.
        model: the network's name, for messages.
        head: "fit" loads the pooling's power, embedding layer and head where they fit and skips them otherwise, as
            fine-tuning wants; "may differ" skips the head alone; "must" takes it for an error if one of them does not
            fit.
        allow_partial: load those tensors of the backbone that fit rather than refuse all for the others.

    Returns: one line that says what was loaded and what was not.
    Raises: UserError naming the first missing, misshapen or left over tensors; nothing is loaded then.
    """
    wanted = network.state_dict()
    wrong = {name: why for name, here in wanted.items() if (why := _misfit(weights.tensors.get(name), here))}
    # The first blocks of a deeper network have the shapes of this one's: what is left over counts, too.
    wrong.update({name: f"not in {model}" for name in weights.tensors if name not in wanted})
    of_backbone = {name: why for name, why in wrong.items() if name.startswith("backbone.")}
    refused = {} if allow_partial else of_backbone
    if head == "must":
        refused = wrong
    elif head == "may differ":
        known = {name.partition(".")[0] for name in weights.tensors} & {"pool", "embedding"}
        own = {name: why for name, why in wrong.items() if name in wanted and name.partition(".")[0] in known}
        refused = {**refused, **own}
    if refused:
        raise UserError(f"{weights.file_name}: not the weights of {model}: {_five(refused)}; {_reason(weights, model)}")

    # A layer is loaded whole or not at all. A head was trained on one embedding, and with another one its shape says
    # nothing.
    for part, why in (("pool.", ("pool.",)), ("embedding.", ("embedding.",)), ("head.", ("embedding.", "head."))):
        if any(name.startswith(why) for name in wrong):
            wrong.update({n: "not with the rest" for n in wanted if n.startswith(part) and n not in wrong})
    loaded = [name for name in wanted if name not in wrong]
    backbone = sum(name.startswith("backbone.") for name in loaded)
    if not backbone:
        raise UserError(f"{weights.file_name}: nothing in it fits {model}; {_reason(weights, model)}")
    for name in loaded:
        wanted[name].set_value(_float32(weights.tensors[name]))

    types = sorted({layouts.dtype_name(weights.tensors[name]) for name in loaded} - {"float32"})
    cast = f", {' and '.join(types)} -> float32" if types else ""
    total = sum(name.startswith("backbone.") for name in wanted)
    account = [f"loaded {backbone} of {total} backbone tensors from {weights.file_name} ({weights.source}{cast})"]
    if of_backbone:
        account.append(f"--allow_partial passed over {_five(of_backbone)}")
    account += [_account(part, wanted, weights.tensors, wrong) for part in ("pool", "embedding", "head")]
    if weights.unused:
        account.append(f"not used: {_five(dict.fromkeys(weights.unused))}")
    return plain("; ".join(filter(None, account)), 2000)


def check_layers(weights, settings):
    """Raises a UserError where a large embedding layer or head would be built that is not in the file.

    A bias, or an array without values, can claim any size.

    Args:
        weights: Weights; settings: models.Settings, with the sizes that these say.
    """
    inputs = settings.channels
    for layer, size in (("embedding", settings.embedding_size), ("head", settings.class_dim)):
        weight = weights.tensors.get(f"{layer}.weight")
        there = 0 if weight is None else weight.size
        if inputs * size > max(there, LARGE):
            found = "missing" if weight is None else list(weight.shape)
            raise UserError(f"{weights.file_name}: {layer}.weight is {found} where {[inputs, size]} is needed")
        inputs = size or inputs


def without_head(weights):
    """Weights without what they have of a head."""
    return weights._replace(tensors={n: array for n, array in weights.tensors.items() if not n.startswith("head.")})


def layer_size(weights, layer):
    """Outputs of the linear layer (embedding or head) in the file, 0 where it has none."""
    return _layer_size(weights.tensors, layer)


def _layer_size(tensors, layer):
    if f"{layer}.bias" in tensors:
        return int(np.prod(tensors[f"{layer}.bias"].shape))
    weight = tensors.get(f"{layer}.weight")  # a cosine head has no bias
    return weight.shape[-1] if weight is not None and weight.ndim == 2 else 0


def _misfit(there, here):
    """Why an array can't become the parameter `here`, or "" where it can."""
    if there is None:
        return "missing"
    if list(there.shape) != list(here.shape):
        return f"{list(there.shape)} there, {list(here.shape)} here"
    if there.dtype.kind != "f" and there.dtype != np.uint16:
        return f"{there.dtype.name} values"
    return "" if np.isfinite(_float32(there)).all() else "NaN or infinite"


def _float32(array):
    return bfloat16_to_float32(array) if array.dtype == np.uint16 else array.astype(np.float32)


def _five(tensors):
    """The first five of {name: why} in words, and how many more."""
    words = [f"{plain(name)} ({why})" if why else plain(name) for name, why in list(tensors.items())[:5]]
    return ", ".join(words) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")


def _account(part, wanted, tensors, wrong):
    """What became of the pooling, the embedding layer or the head, or "" where neither side has one."""
    here = {name: value for name, value in wanted.items() if name.startswith(f"{part}.")}
    there = {name: value for name, value in tensors.items() if name.startswith(f"{part}.")}
    if not here:
        return f"{part} unused: none here" if there else ""
    if not there:
        return f"{part} starts anew: none there"
    if part == "pool":
        return "pool skipped" if any(name in wrong for name in here) else "pool loaded"
    unit = "classes" if part == "head" else "values"
    size_there, size_here = _layer_size(tensors, part), _layer_size(wanted, part)
    if not any(name in wrong for name in here):
        return f"{part} loaded: {size_here} {unit}"
    if size_there != size_here:
        return f"{part} skipped: {size_there} {unit} there, {size_here} here"
    return f"{part} skipped: {_five({name: wrong[name] for name in here if name in wrong})}"


def _reason(weights, model):
    """The likely reason why weights don't fit `model`, and the way out."""
    found = layouts.architecture(weights.tensors)
    if weights.hint:
        return weights.hint
    if found is None:
        return "the file's network is none that is known here"
    if found == model.replace("_va", ""):
        return f"the file has the layers of {found}, but some tensors are missing or changed"
    return f"the file is a {found}: " + (f"take --model={found}" if found in models.MODELS else "no model here is one")
