"""Where weights are: the file that --pretrained_model means, or which one it should have named."""

import contextlib
import difflib
import os
import re

from utility import UserError, plain
from weights import layouts
from weights.checkpoint import DESCRIPTION, EMA_FILE, PART_FILES, WEIGHTS_FILE, position, resolve
from weights.imagenet import IMAGENET, imagenet_file


def find_weights(path, model=None, which=""):
    """The file, or the directory of a fluid model, that `path` means for `model`; see read_weights."""
    if path == "imagenet":
        path = imagenet_file(model)
    elif re.match(r"[A-Za-z][\w+.-]+:/", path):
        raise UserError(_of_url(path))
    path = resolve(path)
    try:
        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    known = ["model", *(["ema"] if EMA_FILE in names else [])]
    if WEIGHTS_FILE in names and DESCRIPTION in names and which not in ("", *known):
        has = " and ".join(known)
        raise UserError(f"--weights={plain(which, 60)}: {path} is a checkpoint directory, which has {has}")
    if which != "model" and {WEIGHTS_FILE, EMA_FILE} <= set(names):
        return os.path.join(path, EMA_FILE)
    if WEIGHTS_FILE in names:
        return os.path.join(path, WEIGHTS_FILE)
    if layouts.is_fluid_directory(names):
        return path
    if os.path.isfile(path):
        return _check_kind(path)
    if os.path.isfile(f"{path}.pdparams"):
        return f"{path}.pdparams"
    if os.path.isdir(path):
        raise UserError(f"{path}: no weights there: {_other_directory(path, names)}")
    raise UserError(f"{plain(path)}: no weights there: {_nothing_there(path)}")


def beside(file_name):
    """The weights that belong to a file beside them, an optimizer's state or a part of our checkpoint, or ""."""
    folder, name = os.path.split(file_name)
    if name in (*PART_FILES.values(), DESCRIPTION) and os.path.isfile(os.path.join(folder, WEIGHTS_FILE)):
        return folder or "."
    weights_file = f"{os.path.splitext(file_name)[0]}.pdparams"
    return weights_file if weights_file != file_name and os.path.isfile(weights_file) else ""


def _of_url(path):
    """What to do with an address in place of a file."""
    name = re.split("[?#]", path)[0].rstrip("/").rpartition("/")[2]
    official = [model for model, (url, _) in IMAGENET.items() if url.endswith(f"/{name}")]
    model = official[0] if official else _nearest_model(name)
    itself = f" --model={model}" if model else ""
    return (
        f"--pretrained_model={plain(path, 100)}: an address, not a file: download it first and give the file; "
        f"--pretrained_model=imagenet{itself} fetches the official ImageNet weights by itself"
    )


def _check_kind(path):
    """The path of a file, if it is none of those that lie beside weights and are none."""
    name = os.path.basename(path)
    stem, suffix = os.path.splitext(path)
    whole = beside(path)
    if name in (DESCRIPTION, PART_FILES["objective"]) and whole:
        raise UserError(f"{path}: a part of a checkpoint, not its weights: give the directory, {whole}")
    program = suffix == ".json" and os.path.isfile(f"{stem}.pdiparams")
    if program or suffix in (".pdmodel", ".pdiparams") or name.endswith(".pdiparams.info"):
        raise UserError(f"{path}: a part of {_EXPORTED}")
    return path


_EXPORTED = (
    "a model that was exported for Paddle Inference, whose tensors have no names that are known here: give the "
    "checkpoint or the .pdparams that it was exported from"
)


def _other_directory(path, names):
    """What to do with a directory that is no checkpoint."""
    inside = _checkpoint_inside(path, names)
    if inside:
        return f"it holds {inside[0]}; give one of them, such as {inside[1]}"
    files = [name for name in names if name.endswith((".pdparams", ".safetensors", ".h5"))]
    if files:
        return f"give one of the files in it: {', '.join(plain(name, 100) for name in files[:5])}"
    if any(name.endswith((".pdmodel", ".pdiparams")) for name in names):
        return _EXPORTED
    if "__model__" in names:
        return "a fluid model whose variables are joined in one file, without their names; save them one file each"
    above = os.path.dirname(os.path.abspath(path))
    if os.path.isfile(os.path.join(above, WEIGHTS_FILE)):
        return f"the checkpoint is the directory above: give {above}"
    return "neither a checkpoint directory of train.py nor one of a fluid model with a file for each variable"


def _checkpoint_inside(path, names, deeper=True):
    """(what a directory holds, the path of one checkpoint below it), or None."""
    numbers = sorted((name for name in names if position(name)), key=position, reverse=True)
    for name in ("best", "latest", *numbers[:100]):
        if os.path.isfile(os.path.join(resolve(os.path.join(path, name)), WEIGHTS_FILE)):
            return "the checkpoints of a run", os.path.join(path, name)
    for name in names[:100] if deeper else ():
        folder = os.path.join(path, name)
        with contextlib.suppress(OSError):
            if os.path.isfile(os.path.join(folder, WEIGHTS_FILE)):
                return "checkpoints", folder
            if os.path.isdir(folder) and (found := _checkpoint_inside(folder, sorted(os.listdir(folder)), False)):
                return "the folders of runs", found[1]
    return None


def _nearest_model(name):
    """The model with an official ImageNet file that a file or a flag of this name seems to mean, or None."""
    plain_name = re.sub(r"[\W_]", "", re.sub(r"(?i)\.\w+$|_?(ssld_)?pretrained|imagenet", "", name).lower())
    models_by_name = {re.sub(r"[\W_]", "", model.lower()): model for model in IMAGENET}
    close = difflib.get_close_matches(plain_name[:100], models_by_name, n=1, cutoff=0.75)
    return models_by_name[close[0]] if close else None


def _nothing_there(path):
    """What of `path` does not exist, and what is there instead."""
    model = _nearest_model(os.path.basename(path.rstrip("/")))
    official = f"; --pretrained_model=imagenet --model={model} takes the official ImageNet weights" if model else ""
    missing = path.rstrip("/")
    while os.path.dirname(missing) and not os.path.isdir(os.path.dirname(missing)):
        missing = os.path.dirname(missing)
    if os.path.isfile(missing):
        return f"{plain(missing)} is a file, not a directory; give {plain(beside(missing) or missing)}"
    parent, name = os.path.split(missing)
    try:
        names = os.listdir(parent or ".")
    except OSError:
        names = []
    if {WEIGHTS_FILE, DESCRIPTION} <= set(names):
        return f"{parent} is a checkpoint directory: give that"
    stems = {entry: entry for entry in names} | {os.path.splitext(entry)[0]: entry for entry in names
                                                 if entry.endswith((".pdparams", ".safetensors", ".h5"))}  # fmt: skip
    close = difflib.get_close_matches(name[:100], stems, n=1, cutoff=0.6)
    meant = f"; did you mean {plain(os.path.join(parent, stems[close[0]]))}?" if close else ""
    suffixed = name.endswith((".pdparams", ".safetensors", ".h5"))
    neither = plain(name, 100) if suffixed else f"{plain(name, 100)} and no {plain(name, 100)}.pdparams"
    return f"{plain(parent) or 'the working directory'} has no {neither}{meant}{official}"
