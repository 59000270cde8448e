"""The folder of a training run: its checkpoints, the links `latest` and `best`, and what a crash may leave there.

A checkpoint is a directory, `<epoch>` after an epoch and `<epoch>_<step>` inside one, with the weights, the optimizer's
state, and checkpoint.json. It is written beside its name, flushed to the disk and renamed, so that under its name there
is all of it or nothing; it is deleted the other way round. Whatever ends the process in between leaves a name that ends
in `.tmp<letters>`, which the next run in the folder deletes.
"""

import contextlib
import filecmp
import json
import math
import os
import re

import numpy as np

import files
import parallel
from utility import UserError

LOG_FILE = "train_log.jsonl"
CHECKPOINT_FORMAT = 1
CHECKPOINT_FILE = "checkpoint.json"
WEIGHTS_FILE = "model.pdparams"
OPTIMIZER_FILE = "model.pdopt"
SET_ASIDE = "replaced"
LINKS = ("latest", "best")
# What a folder that is one of our checkpoints holds, and nothing else; what a process that was ended may leave.
PARTS = re.compile(r"(model\.pdparams|model\.pdopt|checkpoint\.json)(\.tmp\w+)?")
LEFTOVER = re.compile(r"(model\.pdparams|model\.pdopt|checkpoint\.json|latest|best|\d+(_\d+)?(\.old)?)\.tmp\w+")
PROBE = re.compile(r"\.write_test(\.old)?\.tmp\d+")

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
    import paddle

    name = checkpoint_name(state)
    final = os.path.join(run_dir, name)
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    broken = [name for name, value in weights.items() if not np.isfinite(value).all()]
    if broken:
        raise UserError(f"{final}: not written: {len(broken)} tensors became NaN or infinite, {broken[0]} among them")
    entries = _optimizer_entries(network, optimizer)
    optimizer_state = {name: value.numpy() for name, (_, value) in entries.items()}
    try:
        with files.temporary_folder(final) as temporary:
            paddle.save(weights, os.path.join(temporary, WEIGHTS_FILE))
            paddle.save(optimizer_state, os.path.join(temporary, OPTIMIZER_FILE))
            for file_name in (WEIGHTS_FILE, OPTIMIZER_FILE):
                with open(os.path.join(temporary, file_name), "rb") as file:
                    files.sync(file.fileno())
            write_checkpoint_state(temporary, state)
            remove_checkpoints(run_dir, [name])
            os.rename(temporary, final)
        files.sync_directory(run_dir)
    except OSError as error:
        raise UserError(f"{final}: cannot write the checkpoint: {error.strerror or error}") from None
    point_at(run_dir, "latest", name)
    return final


def write_checkpoint_state(path, state):
    """Writes what `read_checkpoint_state` reads into the checkpoint directory `path`."""
    with files.atomic_write(os.path.join(path, CHECKPOINT_FILE)) as file:
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
    if not isinstance(state, dict):
        raise UserError(f"{file_name}: not readable as a checkpoint's description: no JSON object")
    if state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{file_name}: checkpoint format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}")
    # Written before checkpoints inside an epoch existed.
    return {"step": state.get("steps"), "evaluated": True, **state}


def make_optimizer_state(optimizer, parameters):
    """Has a new optimizer make its state, which Paddle's make at their first step.

    From then on its state_dict says what a checkpoint must hold, and a run that goes on in another folder can save what
    it has loaded before it does a step.
    """
    import paddle

    rate = optimizer.get_lr()
    optimizer.set_lr(0.0)
    paddle.add_n([(parameter * 0).sum() for parameter in parameters]).backward()
    optimizer.step()
    optimizer.clear_grad()
    optimizer.set_lr(rate)
    # That step has left weight decay in the momentum, and counts for Adam: back to what a first step begins with.
    first = {"beta1_pow_acc": 0.9, "beta2_pow_acc": 0.999}
    state = optimizer.state_dict()
    for key, value in state.items():
        state[key] = paddle.full_like(value, next((first[kind] for kind in first if kind in key), 0.0))
    optimizer.set_state_dict(state)


def _optimizer_entries(network, optimizer):
    """{"<structured parameter name>/<accumulator>_0": (Paddle's name, tensor)} of an optimizer."""
    # The longest generated name first, so that no name is mistaken for the beginning of another.
    names = sorted(((p.name, n) for n, p in network.named_parameters()), key=lambda pair: -len(pair[0]))
    entries = {}
    for key, value in optimizer.state_dict().items():
        if key == "master_weights":
            continue  # rebuilt from the weights, which are kept in float32
        owner = next((pair for pair in names if key.startswith(pair[0] + "_")), None)
        if owner is None:
            raise RuntimeError(f"the optimizer has {key}, of no parameter of the network: it would be lost")
        # Paddle counts the optimizers of a process: velocity_0, velocity_1.
        accumulator = re.sub(r"\d+$", "0", key[len(owner[0]) + 1 :])
        entries[f"{owner[1]}/{accumulator}"] = key, value
    return entries


def load_optimizer_state(network, optimizer, saved, path):
    """Puts back what `save_checkpoint` wrote of an optimizer: all of it or, with a UserError, nothing.

    Args:
        optimizer: one of the same kind, after `make_optimizer_state`.
        saved: {"<structured parameter name>/<accumulator>_0": array}.
        path: where it is from, for messages.
    """
    import paddle

    entries = _optimizer_entries(network, optimizer)
    parameters = {name for name, _ in network.named_parameters()}
    unknown = [key for key in saved if key.rpartition("/")[0] not in parameters]
    if unknown:
        raise UserError(f"{path}: has {unknown[0]!r}, which this network lacks")
    missing = [key for key in entries if key not in saved]
    if missing:
        raise UserError(f"{path}: incomplete: {len(missing)} entries are missing, such as {missing[0]!r}")
    for key, (_, value) in entries.items():
        if list(np.shape(saved[key])) != list(value.shape):
            shapes = f"{list(np.shape(saved[key]))} in place of {list(value.shape)}"
            raise UserError(f"{path}: {key!r} is {shapes}")
    optimizer.set_state_dict({name: paddle.to_tensor(saved[key]) for key, (name, _) in entries.items()})


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
    names = [name for name in names if _position(name) and described_name(os.path.join(run_dir, name)) == name]
    return sorted(names, key=_position)


def described_name(path):
    """The name that the checkpoint in the folder `path` was written under; None where there is none."""
    try:
        return checkpoint_name(read_checkpoint_state(path))
    except (UserError, KeyError):
        return None


def copied_checkpoints(run_dir):
    """Which of `latest` and `best` are checkpoints themselves rather than links: of a run copied without its links."""
    paths = {link: os.path.join(run_dir, link) for link in LINKS}
    return [link for link, path in paths.items() if not os.path.islink(path) and described_name(path)]


def newest_checkpoint(run_dir):
    """The path of the newest checkpoint in `run_dir`, under whatever name, or None."""
    paths = [os.path.join(run_dir, name) for name in (*copied_checkpoints(run_dir), *checkpoint_names(run_dir))]
    paths.sort(key=lambda path: _position(described_name(path)))  # stable: the number goes before the copy
    return paths[-1] if paths else None


def in_the_way(run_dir, epochs):
    """The paths of what is no checkpoint of ours and has the name that one of a run of `epochs` epochs will have."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    own = checkpoint_names(run_dir)
    taken = [name for name in names if _position(name) and _position(name)[0] < epochs and name not in own]
    return [os.path.join(run_dir, name) for name in sorted(taken, key=_position)]


def is_there(run_dir, state):
    """Whether the checkpoint that `state` belongs to is in `run_dir`."""
    return checkpoint_name(state) in checkpoint_names(run_dir)


def later_checkpoints(run_dir, name):
    """The names of those that come after the checkpoint `name`."""
    return [other for other in checkpoint_names(run_dir) if _position(other) > _position(name)]


def remove_checkpoints(run_dir, names):
    """Deletes checkpoints; one that holds something else, or was not written under its name, stays."""
    for name in names:
        path = os.path.join(run_dir, name)
        if name in LINKS or described_name(path) == name:
            files.remove_folder(path, PARTS)


def remove_old_checkpoints(run_dir, keep):
    """Deletes what is no longer needed: epochs but for the `keep` newest, checkpoints inside an epoch but for the
    newest, and a run set aside. What `latest` and `best` point at stays."""
    names = checkpoint_names(run_dir)
    stay = {read_link(run_dir, link) for link in LINKS}
    stay.update([name for name in names if "_" not in name][-keep:], names[-1:])
    remove_checkpoints(run_dir, [name for name in names if name not in stay])
    remove_set_aside(run_dir)


# ---------------------------------------------------------------- latest and best


def point_at(run_dir, link, name):
    """Makes the link `<run_dir>/<link>` (latest, best) point at the checkpoint `name`, in one step.

    Where there are no links, it is a small file with that name in it.
    """
    path = os.path.join(run_dir, link)
    temporary = f"{path}.tmp{os.getpid()}"
    make_way(run_dir, link)
    try:
        if files.link(temporary, name):
            os.replace(temporary, path)
            files.sync_directory(run_dir)
            return
    except OSError as error:
        raise UserError(f"{path}: cannot make this a link to {name}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
    if os.path.islink(path):
        os.remove(path)  # atomic_write would write what it points at
    with files.atomic_write(path) as file:
        file.write(f"{name}\n")


def read_link(run_dir, link):
    """The name of the checkpoint that `latest` or `best` points at; None where it is nothing that `point_at` made."""
    path = os.path.join(run_dir, link)
    name = ""
    with contextlib.suppress(OSError, ValueError):
        if os.path.islink(path):
            name = os.readlink(path)
        elif os.path.isfile(path) and os.path.getsize(path) < 100:
            with open(path) as file:
                name = file.read().strip()
    return name if _position(name) else None


def remove_dangling(run_dir):
    """Removes those of `latest` and `best` that point at a checkpoint which is no more."""
    for link in LINKS:
        name = read_link(run_dir, link)
        if name and name not in checkpoint_names(run_dir):
            os.remove(os.path.join(run_dir, link))


def resolve(path):
    """The folder of the checkpoint `path`, which may be a small file in place of a link; else `path` as it is."""
    run_dir, link = os.path.split(os.path.normpath(path))
    if link in LINKS and os.path.isfile(path):
        name = read_link(run_dir, link)
        return os.path.join(run_dir, name) if name else path
    return path


def make_way(run_dir, link):
    """Makes room for the link `<run_dir>/<link>` where something else has that name, such as the checkpoint itself in
    a run that was copied without its links.

    That may be the only copy of its weights: it takes the checkpoint's own name where that is free. It is deleted where
    that checkpoint is there and the same, and else kept under a name that nothing here touches.
    """
    path = os.path.join(run_dir, link)
    if not os.path.lexists(path) or read_link(run_dir, link):
        return
    name = None if os.path.islink(path) else described_name(path)
    numbered = name and os.path.join(run_dir, name)
    if name and _is_copy(path, numbered) and files.remove_folder(path, PARTS):
        return
    files.keep(path, numbered)


def _is_copy(path, other):
    names = os.listdir(path)
    if os.path.islink(other) or not os.path.isdir(other) or sorted(names) != sorted(os.listdir(other)):
        return False
    return filecmp.cmpfiles(path, other, names, shallow=False)[0] == names


# ---------------------------------------------------------------- starting in the folder of a run


def lock(run_dir):
    """Keeps other processes out of `run_dir` until this one ends, however it does; once more is no matter.

    Raises: UserError where there is another. On a system or file system without locks a line says so.
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
        print(f"note: {run_dir}: no locks here: nothing keeps a second run from writing there at the same time")


_locks = {}  # folder -> descriptor, which stays open


def remove_leftovers(run_dir):
    """Deletes what a process that was ended in the middle of something has left; for the one that holds the lock."""
    for folder in (run_dir, *(os.path.join(run_dir, name) for name in checkpoint_names(run_dir))):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if not LEFTOVER.fullmatch(name) and not PROBE.fullmatch(name):
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                files.remove_folder(path, re.compile("[ab]") if PROBE.fullmatch(name) else PARTS)
            else:
                with contextlib.suppress(OSError):
                    os.remove(path)


# ---------------------------------------------------------------- the log


def log_json(run_dir, record):
    """Appends one JSON object to the log of the run; of several processes only the first does."""
    if parallel.is_first():
        files.append(os.path.join(run_dir, LOG_FILE), json.dumps(record) + "\n")


def cut_log(run_dir, size):
    """Takes from the log what was written after the checkpoint at which it had `size` bytes: it will come again."""
    if size is not None:
        files.cut(os.path.join(run_dir, LOG_FILE), size)


def log_size(run_dir):
    """Bytes of the log, which are on the disk then."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(run_dir, LOG_FILE), "rb") as file:
        files.sync(file.fileno())
        return os.fstat(file.fileno()).st_size
    return 0


def read_log(run_dir):
    """The records of the log, a list of dicts; None where there is none, or where it is not a log of ours."""
    path = os.path.join(run_dir, LOG_FILE)
    if os.path.islink(path):
        return None
    try:
        with open(path, "rb") as file:
            *lines, rest = file.read().split(b"\n")  # the last line may be half written
        records = [json.loads(line) for line in lines]
        ours = all(isinstance(record, dict) and {"args", "epoch"} & set(record) for record in records)
    except (OSError, ValueError):
        return None
    return records if ours and (lines or not rest) else None


# ---------------------------------------------------------------- a run that another replaces


def set_run_aside(run_dir):
    """Moves the checkpoints and the log of an earlier run, and nothing else, to `<run_dir>/replaced/`.

    There they stay until the new run has a checkpoint of its own. What is there already is kept: then the run to set
    aside is one that never came to its first checkpoint.
    """
    aside = os.path.join(run_dir, SET_ASIDE)
    names = [*checkpoint_names(run_dir), *copied_checkpoints(run_dir)]
    names += [link for link in LINKS if read_link(run_dir, link)]
    names += [LOG_FILE] if read_log(run_dir) is not None else []
    if os.path.lexists(aside) and (os.path.islink(aside) or not os.path.isdir(aside)):
        raise UserError(f"{aside}: in the way: the earlier run would be moved there until the new one has a checkpoint")
    try:
        if names and not os.path.isdir(aside):
            os.makedirs(aside)
        for name in names:
            path, target = os.path.join(run_dir, name), os.path.join(aside, name)
            if not os.path.lexists(target):
                os.rename(path, target)
            elif (name in LINKS and not os.path.isdir(path)) or (name == LOG_FILE and restarts(run_dir)):
                os.remove(path)
            else:
                raise UserError(f"{target}: in the way: {path} would be moved there; remove it or rename it")
    except OSError as error:
        raise UserError(f"{run_dir}: cannot set the earlier run aside: {error.strerror}") from None


def remove_set_aside(run_dir):
    """Deletes what `set_run_aside` has moved, and nothing else that the folder may hold."""
    aside = os.path.join(run_dir, SET_ASIDE)
    if os.path.islink(aside) or not os.path.isdir(aside):
        return
    remove_checkpoints(aside, [*checkpoint_names(aside), *copied_checkpoints(aside)])
    own = [link for link in LINKS if read_link(aside, link)]
    own += [LOG_FILE] if read_log(aside) is not None else []
    for name in own:
        with contextlib.suppress(OSError):
            os.remove(os.path.join(aside, name))
    with contextlib.suppress(OSError):  # it holds something of the user's
        os.rmdir(aside)


def restarts(run_dir):
    """Whether the log is ours and of a run that never finished an epoch: a new one will write the same."""
    records = read_log(run_dir)
    return records is not None and all(record.get("epoch", 0) <= 0 for record in records)


def make_way_for_log(run_dir):
    """For a new run where there are no checkpoints: empties the log of one that never had any, and keeps any other."""
    path = os.path.join(run_dir, LOG_FILE)
    if restarts(run_dir):
        files.cut(path, 0)
    elif os.path.lexists(path):
        files.keep(path)
