"""Our own checkpoint: one folder of named parts, written beside its name, flushed and renamed.

    model.pdparams       the network's state_dict
    ema.pdparams         the average of the network's state over the steps, where the run keeps one
    objective.pdparams   that of the objective, where a loss owns parameters or buffers
    model.pdopt          the optimizer's state, under the parameters' structured names
    checkpoint.json      what else belongs to the run: settings, labels, how far it is, and the SHA-256 of the others

Under its name there is all of it or nothing. Of a run's links `latest` and `best`, which are small files where there
are no links, everything that takes a checkpoint takes either form.
"""

import contextlib
import json
import math
import os
import re

import files
import losses
from models import Settings
from utility import UserError, plain

FORMAT = 1
DESCRIPTION = "checkpoint.json"
PART_FILES = {
    "model": "model.pdparams",
    "ema": "ema.pdparams",
    "objective": "objective.pdparams",
    "optimizer": "model.pdopt",
}
WEIGHTS_FILE, EMA_FILE = PART_FILES["model"], PART_FILES["ema"]
OPTIONAL = ("ema", "objective")  # not written where it is empty
LINKS = ("latest", "best")
# What a folder that is one of our checkpoints holds, and nothing else; with what an ended process may leave in it.
_NAMES = "|".join(re.escape(name) for name in (*PART_FILES.values(), DESCRIPTION))
CONTENT = re.compile(rf"({_NAMES})(\.tmp(\d+|[a-z0-9_]{{8}}))?")
LEFTOVER = re.compile(rf"({_NAMES}|(latest|best|\d+(_\d+)?)(\.old)?)\.tmp(\d+|[a-z0-9_]{{8}})")


def write_checkpoint(path, parts, description, make_way):
    """Writes a checkpoint to the folder `path`.

    Args:
        parts: {name of PART_FILES: {name: array}}.
        description: plain JSON values; "epoch", "step" (steps done in it) and "steps" (of an epoch) give it its name.
        make_way: called when all is written, to remove an earlier one of this name.

    Raises: UserError where it can't be written, or where a weight is NaN or infinite.
    """
    import numpy as np
    import paddle

    for name in ("model", "ema", "objective"):
        broken = [key for key, value in parts.get(name, {}).items() if not np.isfinite(value).all()]
        if broken:
            more = f"{len(broken)} tensors became NaN or infinite, {broken[0]} among them"
            raise UserError(f"{path}: not written: {more}")
    try:
        with files.temporary_folder(path) as temporary:
            sums = {}
            for name, arrays in parts.items():
                if arrays or name not in OPTIONAL:
                    file_name = os.path.join(temporary, PART_FILES[name])
                    paddle.save(arrays, file_name)
                    with open(file_name, "rb") as file:
                        files.sync(file.fileno())
                    sums[PART_FILES[name]] = files.sha256(file_name)
            _write_description(temporary, {**description, "sums": sums})
            make_way()
            os.rename(temporary, path)
        files.sync_directory(os.path.dirname(path))
    except OSError as error:
        raise UserError(f"{path}: cannot write the checkpoint: {error.strerror or error}") from None


def update_description(path, changes):
    """Replaces keys of what `read_description` reads from the checkpoint folder `path`."""
    _write_description(path, {**read_description(path), **changes})


def _write_description(path, description):
    with files.atomic_write(os.path.join(path, DESCRIPTION)) as file:
        json.dump({**description, "format": FORMAT}, file, indent=1)


def read_description(path, needed=()):
    """The dict that `write_checkpoint` was given as `description`, of the checkpoint folder `path`.

    Its values have the types, and are in the ranges, that train.py writes; those of "settings" are such as the flags of
    these names can have. Those of "args" are checked where they are used (`utility.check_values`).

    Args:
        needed: keys that must be there.

    Raises: UserError
    """
    file_name = os.path.join(path, DESCRIPTION)
    try:
        description = files.read_json(file_name)
    except OSError as error:
        raise UserError(f"{path}: not a checkpoint directory of train.py ({error.strerror}: {file_name})") from None
    except ValueError as error:
        raise UserError(f"{file_name}: not readable as a checkpoint's description: {error}") from None
    if not isinstance(description, dict):
        raise UserError(f"{file_name}: not readable as a checkpoint's description: no JSON object")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{file_name}: checkpoint format {plain(description.get('format'), 50)}, this version reads {FORMAT}"
        )
    missing = [key for key in needed if key not in description]
    if missing:
        raise UserError(f"{file_name}: not readable as a checkpoint's description: it lacks {missing[0]!r}")
    # Written before checkpoints inside an epoch existed.
    description = {"step": description.get("steps"), "evaluated": True, **description}
    wrong = [key for key, is_right in _RIGHT.items() if key in description and not is_right(description[key])]
    if wrong:
        found = plain(json.dumps(description[wrong[0]]), 50)
        raise UserError(f"{file_name}: not readable as a checkpoint's description: {wrong[0]!r} is {found}")
    _check_together(description, file_name)
    return description


def _is_count(value, high=2**31 - 1):
    return type(value) is int and 0 <= value <= high


def _is_number(value):
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))


def _are_labels(value):
    in_range = isinstance(value, list) and all(type(label) is int and -(2**63) <= label < 2**63 for label in value)
    return in_range and all(one < other for one, other in zip(value, value[1:]))


def _are_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_best(value):
    if not isinstance(value, dict):
        return value is None
    return _is_number(value.get("recall@1")) and _is_count(value.get("epoch"))


def _are_bad(value):
    pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return pairs and all(_is_count(index) and isinstance(reason, str) for index, reason in value)


def _is_plain(value):
    """Whether a value is None, or a dict of texts, numbers and lists of one number."""
    if not isinstance(value, dict):
        return value is None
    singles = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in value.values()]
    return all(item is None or isinstance(item, (str, bool)) or _is_number(item) for item in singles)


# What the values of a description must be.
_RIGHT = {
    "epoch": _is_count,
    "steps": _is_count,
    "step": lambda value: value is None or _is_count(value),
    "evaluated": lambda value: isinstance(value, bool),
    "best": _is_best,
    "waited": _is_count,
    "bad": _are_bad,
    "labels": _are_labels,
    "trained_labels": _are_labels,
    "settings": lambda value: isinstance(value, dict),
    "args": lambda value: isinstance(value, dict),
    "process": lambda value: value is not None and _is_plain(value),
    "scaler": _is_plain,
    "train_list": lambda value: value is None or isinstance(value, str),
    "val_list": lambda value: value is None or isinstance(value, str),
    "log_bytes": lambda value: value is None or _is_count(value, 2**63 - 1),
    "sums": _is_plain,
    "folder": lambda value: isinstance(value, str),
    "class_names": lambda value: value is None or _are_names(value),
    "averaged": lambda value: isinstance(value, str),
}


def _check_together(description, file_name):
    """Raises a UserError where values of a description contradict each other, or settings are none that flags have."""
    labels = description.get("labels", ())
    contradictions = {
        "step": (description["step"] or 0) > description.get("steps", math.inf),
        "trained_labels": not set(description.get("trained_labels", ())) <= set(description.get("labels", ())),
        "class_names": len(description.get("class_names") or labels) != len(labels),
    }
    for key, wrong in contradictions.items():
        if wrong:
            raise UserError(f"{file_name}: not readable as a checkpoint's description: {key!r} contradicts the rest")
    if "settings" in description:
        Settings.check(description["settings"], file_name)


def check_sum(path, description):
    """Raises a UserError where the part of a checkpoint in the file `path` is not the one that was written.

    Args:
        description: the checkpoint's; older ones have no sums, and nothing is checked.
    """
    wanted = (description.get("sums") or {}).get(os.path.basename(path))
    if wanted and os.path.isfile(path) and files.sha256(path) != wanted:
        raise UserError(f"{path}: damaged or replaced: not the file that was written with the checkpoint")


def check_part(saved, wanted, path):
    """Raises a UserError where the arrays of a part can't become the tensors `wanted`.

    Args:
        saved: {name: array}, read from `path`; wanted: {name: tensor}.
    """
    missing = [name for name in wanted if name not in saved]
    if missing:
        raise UserError(f"{path}: incomplete: {len(missing)} entries are missing, such as {missing[0]!r}")
    for name, tensor in wanted.items():
        there, here = saved[name], str(tensor.dtype).rpartition(".")[2]
        if list(there.shape) != list(tensor.shape):
            raise UserError(f"{path}: {name!r} is {list(there.shape)} in place of {list(tensor.shape)}")
        if there.dtype.name != here:
            raise UserError(f"{path}: {name!r} is {there.dtype.name} in place of {here}")


# ---------------------------------------------------------------- names


def checkpoint_name(description):
    """<epoch> after an epoch's last step, <epoch>_<step> before."""
    epoch, step = description["epoch"], description["step"]
    return str(epoch) if step == description["steps"] else f"{epoch}_{step}"


def position(name):
    """(epoch, step) of a checkpoint's name; step is infinite after the epoch's last. None where it is no such name."""
    found = re.fullmatch(r"(\d+)(?:_(\d+))?", name)
    return (int(found[1]), math.inf if found[2] is None else int(found[2])) if found else None


def described_name(path):
    """The name that the checkpoint in the folder `path` was written under; None where there is none."""
    try:
        return checkpoint_name(read_description(path))
    except (UserError, KeyError):
        return None


def read_link(path):
    """The name of the checkpoint that `path` (.../latest, .../best), a link or a small file, points at; else None."""
    name = ""
    with contextlib.suppress(OSError, ValueError):
        if os.path.islink(path):
            name = os.readlink(path)
        elif os.path.isfile(path):
            with files.open_file(path, most=100) as file:
                name = file.read().decode().strip()
    return name if position(name) else None


def resolve(path):
    """The folder of the checkpoint `path`, which may be a small file in place of a link; else `path` as it is."""
    run_dir, link = os.path.split(os.path.normpath(path))
    if link in LINKS and os.path.isfile(os.path.join(run_dir, link)):
        name = read_link(os.path.join(run_dir, link))
        return os.path.join(run_dir, name) if name else path
    return path


# ---------------------------------------------------------------- what the run was told


def head_was_trained(state):
    """Whether the head of a checkpoint learned with its network; True where its description, or None, does not say."""
    args = (state or {}).get("args", {})
    name = args.get("loss_name")
    return not (isinstance(name, str) and name in losses.LOSSES) or losses.trains_head({"alpha": None, **args})


def path_of_run(value, checkpoint, description):
    """A path among a run's flags as it is reached from here.

    A relative one counts from the folder that the run was started in. Where it is not there from here, that folder is
    the one that the run lies below (all may have been moved together), or the one that the description names.

    Args:
        value: the flag's; description: of the checkpoint in the folder `checkpoint`.
    """
    if os.path.isabs(value) or os.path.exists(value):
        return value
    started = [description["folder"]] if "folder" in description else []
    save_dir, run_dir = description["args"].get("model_save_dir"), os.path.dirname(os.path.realpath(checkpoint))
    if isinstance(save_dir, str) and not os.path.isabs(save_dir):
        below = os.path.join(os.sep, os.path.normpath(save_dir), description["settings"]["model"])
        started[:0] = [run_dir[: -len(below)] or os.sep] * run_dir.endswith(below)
    there = (os.path.join(folder, value) for folder in started)
    return next((path for path in there if os.path.exists(path)), value)
