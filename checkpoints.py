"""The folder of a training run: its checkpoints, the links `latest` and `best`, and what a crash may leave there.

A checkpoint is a directory, `<epoch>` after an epoch and `<epoch>_<step>` inside one, with the weights, the optimizer's
state, and checkpoint.json. It is written beside its name, flushed to the disk and renamed, so that under its name there
is all of it or nothing; it is deleted the other way round. Whatever ends the process in between leaves a name that ends
in `.tmp<number>`, which the next run in the folder deletes.
"""

import contextlib
import itertools
import json
import math
import os
import re
import shutil

from utility import LOG_FILE, UserError, atomic_write, sync_directory

CHECKPOINT_FORMAT = 1
CHECKPOINT_FILE = "checkpoint.json"
WEIGHTS_FILE = "model.pdparams"
OPTIMIZER_FILE = "model.pdopt"
SET_ASIDE = "replaced"

# ---------------------------------------------------------------- one checkpoint


def save_checkpoint(run_dir, network, optimizer, state):
    """Writes the checkpoint of `state` to `run_dir`, then points `latest` at it.

    Args:
        network: its `state_dict` goes to model.pdparams.
        optimizer: its state goes to model.pdopt, under the parameters' structured names (Paddle's generated
            names depend on everything the process built before).
        state: what else belongs to the run, as plain JSON values; "epoch", "step" (steps done in it) and "steps" (of
            an epoch) give the checkpoint its name.

    Returns: the checkpoint's path.
    Raises: UserError where it can't be written, or where a weight is NaN or infinite.
    """
    import numpy as np
    import paddle

    name = checkpoint_name(state)
    final = os.path.join(run_dir, name)
    temporary = f"{final}.tmp{os.getpid()}"
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    broken = [name for name, value in weights.items() if not np.isfinite(value).all()]
    if broken:
        raise UserError(f"{final}: not written: {len(broken)} tensors became NaN or infinite, {broken[0]} among them")
    try:
        os.makedirs(temporary)
        paddle.save(weights, os.path.join(temporary, WEIGHTS_FILE))
        paddle.save(_named_optimizer_state(network, optimizer), os.path.join(temporary, OPTIMIZER_FILE))
        for file_name in (WEIGHTS_FILE, OPTIMIZER_FILE):
            with open(os.path.join(temporary, file_name), "rb") as file:
                os.fsync(file.fileno())
        write_checkpoint_state(temporary, state)
        if os.path.isdir(final):
            remove_checkpoints(run_dir, [name])
        os.replace(temporary, final)
        sync_directory(run_dir)
    except OSError as error:
        raise UserError(f"{final}: cannot write the checkpoint: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    point_at(run_dir, "latest", name)
    return final


def write_checkpoint_state(path, state):
    """Writes what `read_checkpoint_state` reads into the checkpoint directory `path`."""
    with atomic_write(os.path.join(path, CHECKPOINT_FILE)) as file:
        json.dump({"format": CHECKPOINT_FORMAT, **state}, file, indent=1)


def read_checkpoint_state(path):
    """The dict that `save_checkpoint` was given as `state`, of the checkpoint directory `path`."""
    file_name = os.path.join(path, CHECKPOINT_FILE)
    try:
        with open(file_name) as file:
            state = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: not a checkpoint directory of train.py ({error.strerror}: {file_name})") from None
    except ValueError as error:
        raise UserError(f"{file_name}: not readable as a checkpoint's description: {error}") from None
    if state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{file_name}: checkpoint format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}")
    # Written before checkpoints inside an epoch existed.
    return {"step": state.get("steps"), "evaluated": True, **state}


def _named_optimizer_state(network, optimizer):
    """{"<structured parameter name>/<accumulator>": array} of an optimizer."""
    # The longest generated name first, so that no name is mistaken for the beginning of another.
    names = sorted(((p.name, n) for n, p in network.named_parameters()), key=lambda pair: -len(pair[0]))
    named = {}
    for key, value in optimizer.state_dict().items():
        if key == "master_weights":
            continue  # rebuilt from the weights, which are kept in float32
        owner = next((pair for pair in names if key.startswith(pair[0] + "_")), None)
        if owner:
            named[f"{owner[1]}/{key[len(owner[0]) + 1 :]}"] = value.numpy()
    return named


def load_optimizer_state(network, optimizer, named):
    """Puts back what `_named_optimizer_state` wrote."""
    import paddle

    generated = {n: p.name for n, p in network.named_parameters()}
    state = {}
    for key, value in named.items():
        name, accumulator = key.rsplit("/", 1)
        if name not in generated:
            raise UserError(f"the optimizer's state has {name!r}, which this network lacks")
        state[f"{generated[name]}_{accumulator}"] = paddle.to_tensor(value)
    optimizer.set_state_dict(state)


# ---------------------------------------------------------------- the checkpoints of a run


def checkpoint_name(state):
    """The name of the checkpoint that `state` belongs to."""
    return str(state["epoch"]) if state["step"] == state["steps"] else f"{state['epoch']}_{state['step']}"


def _position(name):
    """(epoch, step) of a checkpoint's name; step is infinite after the epoch's last. None where it is no such name."""
    found = re.fullmatch(r"(\d+)(?:_(\d+))?", name)
    return (int(found[1]), math.inf if found[2] is None else int(found[2])) if found else None


def checkpoint_names(run_dir):
    """The names of the checkpoints in `run_dir`, the newest last."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    names = [n for n in names if _position(n) and os.path.exists(os.path.join(run_dir, n, CHECKPOINT_FILE))]
    return sorted(names, key=_position)


def copied_checkpoints(run_dir):
    """Which of `latest` and `best` are checkpoints themselves rather than links: of a run copied without its links."""
    paths = {link: os.path.join(run_dir, link) for link in ("latest", "best")}
    return [n for n, p in paths.items() if not os.path.islink(p) and os.path.exists(os.path.join(p, CHECKPOINT_FILE))]


def is_there(run_dir, state):
    """Whether the checkpoint that `state` belongs to is in `run_dir`."""
    return checkpoint_name(state) in checkpoint_names(run_dir)


def later_checkpoints(run_dir, name):
    """The names of those that come after the checkpoint `name`."""
    return [other for other in checkpoint_names(run_dir) if _position(other) > _position(name)]


def remove_checkpoints(run_dir, names):
    for name in names:
        path = os.path.join(run_dir, name)
        temporary = f"{path}.old.tmp{os.getpid()}"
        with contextlib.suppress(OSError):  # one that can't be deleted does no harm
            os.rename(path, temporary)  # so that half of it never looks like a whole one
            shutil.rmtree(temporary)


def remove_old_checkpoints(run_dir, keep):
    """Deletes what is no longer needed: epochs but for the `keep` newest, checkpoints inside an epoch but for the
    newest, and a run set aside. What `latest` and `best` point at stays."""
    names = checkpoint_names(run_dir)
    stay = {os.path.basename(os.path.realpath(os.path.join(run_dir, link))) for link in ("latest", "best")}
    stay.update([name for name in names if "_" not in name][-keep:], names[-1:])
    remove_checkpoints(run_dir, [name for name in names if name not in stay])
    remove_set_aside(run_dir)


def remove_set_aside(run_dir):
    """Deletes what `set_run_aside` has moved, and nothing else that the folder may hold."""
    aside = os.path.join(run_dir, SET_ASIDE)
    if os.path.islink(aside):
        return
    remove_checkpoints(aside, [*checkpoint_names(aside), *copied_checkpoints(aside)])
    for name in ("latest", "best", LOG_FILE):
        with contextlib.suppress(OSError):
            os.remove(os.path.join(aside, name))
    with contextlib.suppress(OSError):  # it is not there, or holds something of the user's
        os.rmdir(aside)


def point_at(run_dir, link, name):
    """Makes the link `<run_dir>/<link>` (latest, best) point at the checkpoint `name`, in one step."""
    path = os.path.join(run_dir, link)
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.symlink(name, temporary)
        keep_real_folder(run_dir, link)
        os.replace(temporary, path)
        sync_directory(run_dir)
    except OSError as error:
        raise UserError(f"{path}: cannot make this a link to {name}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def keep_real_folder(run_dir, link):
    """Makes room for the link `<run_dir>/<link>` where a folder has that name, as in a run copied without its links.

    The folder may be the only copy of its weights, so it is never deleted: it takes its checkpoint's own name where
    that is free, else a name that nothing here touches, and a line says so.
    """
    path = os.path.join(run_dir, link)
    if os.path.islink(path) or not os.path.isdir(path):
        return
    name = None
    with contextlib.suppress(UserError, KeyError):
        name = checkpoint_name(read_checkpoint_state(path))
    if name is None or os.path.lexists(os.path.join(run_dir, name)):
        taken = (f"{link}.kept{number}" for number in itertools.count(1))
        name = next(free for free in taken if not os.path.lexists(os.path.join(run_dir, free)))
    os.rename(path, os.path.join(run_dir, name))
    print(f"note: {path} was a folder and no link (a copied run?): it is now {os.path.join(run_dir, name)}")


# ---------------------------------------------------------------- starting in the folder of a run


def lock(run_dir):
    """Keeps other processes out of `run_dir` until this one ends, however it does; once more is no matter.

    Raises: UserError where there is another. Does nothing on a system or file system without locks.
    """
    if run_dir in _locks:
        return
    try:
        import fcntl

        _locks[run_dir] = os.open(run_dir, os.O_RDONLY)
        fcntl.flock(_locks[run_dir], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run_dir}: another train.py is writing here: take another --model_save_dir") from None
    except (ImportError, OSError):
        pass


_locks = {}  # folder -> descriptor, which stays open


def remove_leftovers(run_dir):
    """Deletes what a process that was ended in the middle of something has left; for the one that holds the lock."""
    for folder in (run_dir, *(os.path.join(run_dir, name) for name in checkpoint_names(run_dir))):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if re.search(r"\.tmp\d+$", name):
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.remove(path)


def cut_log(run_dir, size):
    """Takes from the log what was written after the checkpoint at which it had `size` bytes: it will come again."""
    path = os.path.join(run_dir, LOG_FILE)
    if os.path.islink(path):
        raise UserError(f"{path}: a link: the log of a run is cut where it goes on, and another's file must not be")
    if size is not None and os.path.exists(path) and os.path.getsize(path) > size:
        os.truncate(path, size)


def log_size(run_dir):
    """Bytes of the log, which are on the disk then."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(run_dir, LOG_FILE), "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size
    return 0


def set_run_aside(run_dir):
    """Moves the checkpoints and the log of an earlier run, and nothing else, to `<run_dir>/replaced/`.

    There they stay until the new run has a checkpoint of its own. What is there already is kept: then the run to set
    aside is one that never came to its first checkpoint.
    """
    aside = os.path.join(run_dir, SET_ASIDE)
    names = [*checkpoint_names(run_dir), *copied_checkpoints(run_dir)]
    for name in ("latest", "best", LOG_FILE):
        path = os.path.join(run_dir, name)
        if (os.path.lexists(path) and not os.path.isdir(path)) or os.path.islink(path):
            names.append(name)
    try:
        if names and not os.path.isdir(aside):
            os.makedirs(aside)
        for name in names:
            path, target = os.path.join(run_dir, name), os.path.join(aside, name)
            if not os.path.lexists(target):
                os.rename(path, target)
            elif os.path.isdir(path) and not os.path.islink(path):
                remove_checkpoints(run_dir, [name])
            else:
                os.remove(path)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot set the earlier run aside: {error.strerror}") from None
