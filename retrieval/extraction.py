"""From weights and a list to features."""

import collections
import sys

import numpy as np

import models
import reader
import weights
from models import Settings
from runtime import parallel
from utility import UserError

# network: EmbeddingNet; settings: models.Settings as settled; file_name: of its weights, "" for random ones; labels:
# int64, the labels of the head's classes in their order; trained_labels: int64, those that were trained, sorted (both
# None where they are not known); chosen_on: see `list_that_chose`.
Opened = collections.namedtuple("Opened", "network settings file_name labels trained_labels chosen_on")
# features: float32 [N, D], the embeddings; index: int64 [N], the pictures' positions in the list, ascending; bad:
# (index, reason) of those that could not be read.
Features = collections.namedtuple("Features", "features index bad")


def open_network(asked, pretrained_model, allow_partial=False, which=""):
    """The network that eval.py and infer.py run: as --pretrained_model says, or random where none is given.

    Args:
        asked: {name: value} of models.Settings, None where it was left open.
        which: of a checkpoint's weights, see weights.read_weights.

    Returns: Opened. The settings' class_dim is the number of classes of the head, 0 without one.
    """
    found = None
    if pretrained_model:
        found = weights.read_weights(pretrained_model, asked["model"] or models.DEFAULT_MODEL, which)
    state = found.state if found else None
    if found and state is None:  # a file without its description: its tensors say the rest
        size = weights.layer_size(found, "embedding") if asked["embedding_size"] is None else asked["embedding_size"]
        pooling = asked["pooling"] or ("gem" if "pool.power" in found.tensors else None)
        no_bias = "head.weight" in found.tensors and "head.bias" not in found.tensors
        head = asked["head"] or ("cosine" if no_bias else None)
        asked = {**asked, "embedding_size": size, "pooling": pooling, "head": head}
    stored = state["settings"] if state else {}
    settings = Settings.settle(asked, stored, fixed=models.IN_WEIGHTS)
    if found:
        known = weights.layer_size(found, "embedding")
        if settings.embedding_size != known:
            has = f"an embedding layer of {known}" if known else "no embedding layer"
            raise UserError(f"--embedding_size={settings.embedding_size}, but {found.file_name} has {has}")
        known = weights.layer_size(found, "head")
        if settings.class_dim and settings.class_dim != known:
            message = f"--class_dim={settings.class_dim}, but the head in {found.file_name} has {known} classes"
            raise UserError(message)
        settings = settings.with_classes(known)
        weights.check_layers(found, settings)
    network = settings.build()
    if found:
        head = "fit" if state is None or allow_partial else "must"
        print(weights.load_weights(network, found, settings.model, head, allow_partial))
    else:
        print(f"note: no --pretrained_model: this {settings.model} has random weights", file=sys.stderr)
    network.eval()
    labels = [np.array(state[name], np.int64) if state else None for name in ("labels", "trained_labels")]
    return Opened(network, settings, found.file_name if found else "", *labels, list_that_chose(state))


def list_that_chose(state):
    """The fingerprint of the list whose recall chose a checkpoint among those of its run, or None.

    Args:
        state: the checkpoint's description, or None.
    """
    best, args = (state or {}).get("best"), (state or {}).get("args", {})
    every, epochs = args.get("eval_every", 0), args.get("num_epochs", 0)
    several = best and type(every) is type(epochs) is int and 0 < every < epochs
    return state.get("val_list") if several and best["epoch"] == state["epoch"] else None


def extract(network, samples, reading, batch_size, on_batch=None, signals=None):
    """Runs a network in evaluation mode over a list; several processes bring their batches together on rank 0.

    Args:
        network: an EmbeddingNet, or what engine.prepare made of one.
        samples: reader.Samples; reading: reader.Reading.
        on_batch: called as on_batch(index, logits) after each batch; logits float32 [B, C] or None without a head.
        signals: process.Signals: a signal to one process ends this in all, between two batches.

    Returns: Features; None on all ranks but 0.
    Raises: UserError where not one picture could be read; parallel.Signalled after a signal.
    """
    import paddle
    from tqdm import tqdm

    run = network
    if isinstance(network, paddle.nn.Layer):
        network.eval()
        run = eager(network)
    batches = _run(run, reader.read_in_order(samples, reading, batch_size), on_batch is not None)
    features, indices, bad = [], [], []
    # Shown on stderr where that is a terminal.
    with tqdm(total=len(samples.paths), unit=" images", disable=None, dynamic_ncols=True) as bar:
        for index, embedding, logits, bad_here in parallel.collect(batches, signals):
            bar.update(len(index) + len(bad_here))
            bad += bad_here
            if not len(index):
                continue
            indices.append(index)
            features.append(embedding)
            if on_batch:
                bar.clear()
                on_batch(index, logits)
    if not parallel.is_first():
        return None
    if not features:
        raise UserError("not one image could be read")
    index = np.concatenate(indices)
    order = np.argsort(index, kind="stable")
    return Features(np.concatenate(features)[order], index[order], sorted(bad))


def eager(network):
    """A network as a function of NumPy arrays: uint8 [N, H, W, 3] -> its outputs, float32 or None."""
    import paddle

    def run(image):
        with paddle.no_grad():
            outputs = network(paddle.to_tensor(image))
        return tuple(None if x is None else x.numpy().astype(np.float32, copy=False) for x in outputs)

    return run


def _run(run, batches, with_logits):
    """Yields (index, embedding, logits or None, bad) of each batch."""
    for batch in batches:
        embedding, logits = run(batch.image) if len(batch.index) else (None, None)
        yield batch.index, embedding, logits if with_logits else None, list(batch.bad)
