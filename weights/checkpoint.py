"""Our own checkpoint: one folder of named parts, written beside its name, flushed and renamed.

    model.pdparams       the network's state_dict
    ema.pdparams         the average of the network's state over the steps, where the run keeps one
    objective.pdparams   that of the objective, where a loss owns parameters or buffers
    model.pdopt          the optimizer's state, under the parameters' structured names
    checkpoint.json      what else belongs to the run: settings, labels, how far it is

Under its name there is all of it or nothing. Of a run's links `latest` and `best`, which are small files where there
are no links, everything that takes a checkpoint takes either form.
"""

import contextlib
import json
import math
import os
import re

import files
from utility import UserError

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
LEFTOVER = re.compile(rf"({_NAMES}|latest|best|\d+(_\d+)?(\.old)?)\.tmp(\d+|[a-z0-9_]{{8}})")


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
            for name, arrays in parts.items():
                if arrays or name not in OPTIONAL:
                    file_name = os.path.join(temporary, PART_FILES[name])
                    paddle.save(arrays, file_name)
                    with open(file_name, "rb") as file:
                        files.sync(file.fileno())
            write_description(temporary, description)
            make_way()
            os.rename(temporary, path)
        files.sync_directory(os.path.dirname(path))
    except OSError as error:
        raise UserError(f"{path}: cannot write the checkpoint: {error.strerror or error}") from None


def write_description(path, description):
    """Writes what `read_description` reads into the checkpoint folder `path`."""
    with files.atomic_write(os.path.join(path, DESCRIPTION)) as file:
        json.dump({"format": FORMAT, **description}, file, indent=1)


def read_description(path, needed=()):
    """The dict that `write_checkpoint` was given as `description`, of the checkpoint folder `path`.

    Args:
        needed: keys that must be there.
    """
    file_name = os.path.join(path, DESCRIPTION)
    try:
        with open(file_name) as file:
            description = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: not a checkpoint directory of train.py ({error.strerror}: {file_name})") from None
    except ValueError as error:
        raise UserError(f"{file_name}: not readable as a checkpoint's description: {error}") from None
    if not isinstance(description, dict):
        raise UserError(f"{file_name}: not readable as a checkpoint's description: no JSON object")
    if description.get("format") != FORMAT:
        raise UserError(f"{file_name}: checkpoint format {description.get('format')}, this version reads {FORMAT}")
    missing = [key for key in needed if key not in description]
    if missing:
        raise UserError(f"{file_name}: not readable as a checkpoint's description: it lacks {missing[0]!r}")
    # Written before checkpoints inside an epoch existed.
    return {"step": description.get("steps"), "evaluated": True, **description}


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
        elif os.path.isfile(path) and os.path.getsize(path) < 100:
            with open(path) as file:
                name = file.read().strip()
    return name if position(name) else None


def resolve(path):
    """The folder of the checkpoint `path`, which may be a small file in place of a link; else `path` as it is."""
    run_dir, link = os.path.split(os.path.normpath(path))
    if link in LINKS and os.path.isfile(os.path.join(run_dir, link)):
        name = read_link(os.path.join(run_dir, link))
        return os.path.join(run_dir, name) if name else path
    return path
