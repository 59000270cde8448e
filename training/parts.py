"""The parts of a run that change with every step: from here into a checkpoint and back."""

import collections
import os

import numpy as np

import weights
from training.optimizers import load_optimizer_state, optimizer_entries
from utility import UserError, plain
from weights.checkpoint import PART_FILES, check_part, check_sum

# network: EmbeddingNet; objective: losses.objective.Objective; optimizer; scaler: paddle.amp.GradScaler; average:
# training.ema.Average or None.
Parts = collections.namedtuple("Parts", "network objective optimizer scaler average", defaults=[None])


def named_parameters(parts):
    """{structured name: parameter} of all that is trained; the objective's begin with `objective.`."""
    named = dict(parts.network.named_parameters())
    named.update({f"objective.{name}": p for name, p in parts.objective.named_parameters()})
    return named


def arrays(parts):
    """What weights.checkpoint writes: {part: {name: array}}."""
    entries = optimizer_entries(named_parameters(parts), parts.optimizer)
    return {
        "model": {name: value.numpy() for name, value in parts.network.state_dict().items()},
        "ema": {name: value.numpy() for name, value in parts.average.tensors.items()} if parts.average else {},
        "objective": {name: value.numpy() for name, value in parts.objective.state_dict().items()},
        "optimizer": {name: value.numpy() for name, (_, value) in entries.items()},
    }


def scaler_state(scaler):
    """The state of the loss scaling as JSON values."""
    return {name: np.asarray(value).tolist() for name, value in scaler.state_dict().items()}


def loss_scale(scaler):
    """What the loss scaling multiplies with now, None without it; on a GPU this waits for the device."""
    return float(np.ravel(scaler.state_dict()["scale"])[0]) if scaler.is_enable() else None


def restore_parts(parts, folder, before, optimizer, force):
    """Puts back what the checkpoint in `folder` holds of objective, optimizer and loss scaling. (The network's weights
    are loaded when it is built.)

    Args:
        before: the checkpoint's description.
        optimizer: --optimizer; another one than the run's starts anew.
        force: True: what can't be put back starts anew with a note rather than a UserError.
    """
    tensors = {
        "ema": parts.average.tensors if parts.average else {},
        "objective": parts.objective.state_dict(),
        "optimizer": None,  # Paddle's, whose names are its own
    }
    if optimizer != before["args"]["optimizer"]:
        print(f"note: {optimizer} starts anew: it can't use the state of {before['args']['optimizer']}")
        del tensors["optimizer"]
    for name, own in tensors.items():
        path = os.path.join(folder, PART_FILES[name])
        try:
            check_sum(path, before)
            if name == "optimizer":
                load_optimizer_state(named_parameters(parts), parts.optimizer, weights.read_pickle(path), path)
            else:
                put_back(own, path)
        except UserError as error:
            what = {"optimizer": optimizer, "objective": "the loss", "ema": "the average"}[name]
            if not force:
                raise UserError(f"{error} (--force=True starts {what} anew)") from None
            print(f"note: {what} starts anew: {plain(error, 1000)}")
    if before.get("scaler") and parts.scaler.is_enable():
        if set(before["scaler"]) != set(parts.scaler.state_dict()):
            raise UserError(f"{folder}: the state of the loss scaling is incomplete (--amp=off does without)")
        scale = np.array(before["scaler"]["scale"], np.float32)
        parts.scaler.load_state_dict({**before["scaler"], "scale": scale})


def put_back(tensors, path):
    """Gives {name: tensor} the values in the file `path`: all or, with a UserError, none. For {} it reads nothing."""
    if not tensors:
        return
    saved = weights.read_pickle(path)
    check_part(saved, tensors, path)
    for name, tensor in tensors.items():
        tensor.set_value(saved[name])
