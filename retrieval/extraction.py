"""From weights and a list to features."""

import collections
import contextlib
import itertools
import os
import sys
import time

import numpy as np

import files
import models
import reader
import weights
from models import Settings
from retrieval import exported_run, protocols
from runtime import parallel, process
from utility import UserError, plain
from weights import layouts
from weights.checkpoint import DESCRIPTION, head_was_trained, path_of_run, read_description, resolve

# network: EmbeddingNet, or a function as of `eager` over an exported model; settings: models.Settings as settled;
# file_name: of its weights, "" for random ones; labels: int64, the labels of the head's classes in their order;
# trained_labels: int64, those that were trained, sorted (both None where they are not known); class_names: of the
# labels, list of str or None; head_trained: False where a run of --alpha=0 left the head as it began; chosen_on: see
# `list_that_chose`; refined: in words, what an exported model does beyond the network; made_by: what it says of the
# network that it was made of, see features.made_by, else None.
Opened = collections.namedtuple(
    "Opened",
    "network settings file_name labels trained_labels class_names head_trained chosen_on refined made_by",
    defaults=["", None],
)
# features: float32 [N, D], the embeddings; index: int64 [N], the pictures' positions in the list, ascending; bad:
# (index, reason) of those that could not be read.
Features = collections.namedtuple("Features", "features index bad")


def open_network(asked, pretrained_model, allow_partial=False, which=""):
    """The network that eval.py and infer.py run: as --pretrained_model says, or random where none is given.

    Args:
        asked: {name: value} of models.Settings, None where it was left open. With an exported model, values of other
            flags in it are checked, too.
        which: of a checkpoint's weights, see weights.read_weights.

    Returns: Opened. The settings' class_dim is the number of classes of the head, 0 without one.
    """
    found = None
    if pretrained_model and exported_run.is_exported(pretrained_model):
        return _open_exported(asked, pretrained_model)
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
        head = "fit" if allow_partial else "may differ" if state is None else "must"
        print(weights.load_weights(network, found, settings.model, head, allow_partial))
    else:
        print(f"note: no --pretrained_model: this {settings.model} has random weights", file=sys.stderr)
    if found and state is None and found.source.startswith(layouts.OURS):
        names = ("pooling", "embedding_norm", "test_transform")
        taken = ", ".join(f"--{name}={getattr(settings, name)}" for name in names)
        print(f"note: {found.file_name} does not say how it was trained, as a checkpoint's folder does: {taken}")
    network.eval()
    labels = [np.array(state[name], np.int64) if state else None for name in ("labels", "trained_labels")]
    names = (state or {}).get("class_names")
    file_name = found.file_name if found else ""
    return Opened(network, settings, file_name, *labels, names, head_was_trained(state), list_that_chose(state))


def idle_flags(flags):
    """{flag: why} of those that have no effect on which network is opened, of {name: value}."""
    if flags["pretrained_model"]:
        return {} if flags["allow_partial"] else {"seed": "the weights are not random"}
    return dict.fromkeys(("weights", "allow_partial"), "no --pretrained_model")


def lists_of_run(flags, typed):
    """The flags with --val_list, --train_list and --data_dir as in the run of the checkpoint, where they are not typed;
    without the run's --data_dir where --val_list is.

    --train_list is None where it is not known or not there.

    Args:
        flags: {name: value}; typed: the names of those that were not left at their default.

    Returns: ({name: value}, the folder of relative paths in --train_list, or None)

    Raises: UserError for weights that are none, where nothing says which list to look at.
    """
    path, flags, of_run = resolve(flags["pretrained_model"]), dict(flags), {}
    otherwise = protocols.default_list(flags.get("protocol"), reader.VAL_LIST)
    if os.path.isfile(os.path.join(path, DESCRIPTION)):
        description = read_description(path, ("args", "settings"))
        for name in ("val_list", "train_list", "data_dir"):
            value = description["args"].get(name)
            if value and isinstance(value, str):
                of_run[name] = path_of_run(value, path, description)
        names = {"train_list"} if "val_list" in typed else {"val_list", "train_list", "data_dir"}
        flags.update({name: of_run[name] for name in (names & set(of_run)) - typed})
        if "train_list" not in typed and not os.path.isfile(flags["train_list"] or ""):
            flags["train_list"] = None
    named = path not in ("", "imagenet") and not exported_run.is_exported(path)
    if named and not flags["val_list"] and not os.path.exists(otherwise):
        weights.read_weights(path, flags["model"] or models.DEFAULT_MODEL, flags["weights"])
    data_dir = of_run.get("data_dir")
    if "train_list" in typed or "train_list" not in of_run or (data_dir and not os.path.isdir(data_dir)):
        data_dir = flags["data_dir"]
    return {**flags, "val_list": flags["val_list"] or otherwise}, data_dir


def description_of(pretrained_model):
    """The description of a checkpoint, {} of other weights."""
    path = resolve(pretrained_model)
    return read_description(path, ("args",)) if os.path.isfile(os.path.join(path, DESCRIPTION)) else {}


def origin(pretrained_model):
    """How weights were made, for a file of figures.

    Returns: {"trained_with": the flags of train.py, {} of other weights than its checkpoints; "averaged": the shares of
        an average, and what they are of, as a text}.
    """
    description = description_of(pretrained_model)
    if not description:
        return {"trained_with": {}}
    averaged = {"averaged": description["averaged"]} if "averaged" in description else {}
    return {"trained_with": description["args"], **averaged}


# Flags that would change what is in an exported model, or that it can't heed, and their values where nothing is asked.
NOT_EXPORTED = {
    **{"allow_partial": False, "weights": "", "head_labels": False, "export_dir": ""},
    **{"engine": "auto", "precision": "float32", "flip": False, "scales": [1.0], "join_scales": False, "whiten": ""},
    **dict.fromkeys(("class_dim", "embedding_norm", "embedding_size", "last_stride", "head", "head_scale")),
}


def _open_exported(asked, folder):
    """Opened, of a folder that infer.py --export_dir has written; what it does not say of its settings is None.

    Raises: UserError where it is damaged, and for flags that contradict it or that it can't heed.
    """
    description = exported_run.read_description(folder)
    wrong = [name for name, nothing in NOT_EXPORTED.items() if asked.get(name, nothing) != nothing]
    if wrong:
        raise UserError(f"--{wrong[0]}: {folder} is an exported model, which is run as it is: leave this out")
    known = {
        "model": description["model"],
        "pooling": description["pooling"],
        "image_shape": [3, *description["input"]["shape"][1:3]],
        "test_transform": description["transform"]["name"],
    }
    for name, value in known.items():
        if asked.get(name) not in (None, value):
            raise UserError(f"--{name}={asked[name]}, but {folder} is an exported model of {name} {plain(value, 50)}")
    embed = exported_run.open_model(folder, description)
    if process.on_gpu() and parallel.is_first():
        print("note: an exported model is run on the CPU", file=sys.stderr)
    refined = plain(description.get("refined") or "")
    what = plain(description["model"], 50) + (f" ({refined})" if refined else "")
    print(f"opened the exported model in {plain(folder, 1000)}: {what}")
    settings = Settings(**{**dict.fromkeys(models.SETTLED), **known}, class_dim=0)
    run, chosen_on = lambda pictures: (embed(pictures), None), description.get("chosen_on")
    made_by = description.get("made_by")
    if not made_by:  # of an older version: only this same export is known to give the same features
        program, parameters = (files.sha256(os.path.join(folder, name))[:32] for name in description["files"])
        made_by = [f"weights={parameters}", f"program={program}"]
    return Opened(run, settings, folder, None, None, None, True, chosen_on, refined, made_by)


def list_that_chose(state):
    """The fingerprint of the list whose recall chose a checkpoint among those of its run, or None.

    Args:
        state: the checkpoint's description, or None.
    """
    best, args = (state or {}).get("best"), (state or {}).get("args", {})
    every, epochs = args.get("eval_every", 0), args.get("num_epochs", 0)
    several = best and type(every) is type(epochs) is int and 0 < every < epochs
    return state.get("val_list") if several and best["epoch"] == state["epoch"] else None


def extract(network, samples, reading, batch_size, on_batch=None, signals=None, finish=None):
    """Runs a network in evaluation mode over a list; several processes bring their batches together on rank 0.

    Args:
        network: an EmbeddingNet, what engine.prepare made of one, or a function over an exported model.
        samples: reader.Samples; reading: reader.Reading.
        batch_size: pictures at once; None: 32, on a GPU 128.
        on_batch: called as on_batch(index, logits) after each batch; logits float32 [B, C] or None without a head.
        signals: process.Signals: a signal to one process ends this in all, between two batches.
        finish: function of features [B, D] that is applied to each batch's, such as a whitening.

    Memory beyond the features: that of some batches.

    Returns: Features, what was left out of which is said; None on all ranks but 0.
    Raises: UserError where not one picture could be read; parallel.Signalled after a signal.
    """
    from tqdm import tqdm

    batch_size = batch_size or (128 if process.on_gpu() else 32)
    batches = _run(_function(network), reader.read_in_order(samples, reading, batch_size), on_batch is not None)
    features, bad, good = None, [], np.zeros(len(samples.paths), bool)
    hidden = True if reading.quiet else None  # None: shown on stderr where that is a terminal
    with tqdm(total=len(samples.paths), unit=" images", disable=hidden, dynamic_ncols=True) as bar:
        for index, embedding, logits, bad_here in parallel.collect(batches, signals):
            bar.update(len(index) + len(bad_here))
            bad += bad_here
            if not len(index):
                continue
            embedding = finish(embedding) if finish else embedding
            if features is None:
                features = np.empty((len(good), embedding.shape[1]), np.float32)
            features[index], good[index] = embedding, True
            if on_batch:
                bar.clear()
                on_batch(index, logits)
    if not parallel.is_first():
        return None
    if features is None:
        raise UserError("not one image could be read")
    index = np.flatnonzero(good)
    for start in range(0, len(index), 4096):  # up into the places of the bad ones
        rows = index[start : start + 4096]
        features[start : start + len(rows)] = features[rows]
    bad = sorted(bad)
    reader.report_bad_images(samples, bad)
    return Features(features[: len(index)], index, bad)


def _function(network):
    """What `extract` takes as its network, as a function of NumPy arrays."""
    import paddle

    if not isinstance(network, paddle.nn.Layer):
        return network
    network.eval()
    return OnGpu(network) if process.on_gpu() else eager(network)


def eager(network):
    """A network as a function of NumPy arrays: uint8 [N, H, W, 3] -> its outputs, float32 or None."""
    import paddle

    def run(image):
        with paddle.no_grad():
            outputs = network(paddle.to_tensor(image))
        return tuple(None if x is None else x.numpy().astype(np.float32, copy=False) for x in outputs)

    return run


class OnGpu:
    """A network as a function of NumPy arrays, as `eager`, and in two halves: while the outputs of a batch are waited
    for, the GPU has the next one to do.

    Args:
        precision: float32, or bfloat16 or float16: outputs come as float32 all the same.
    """

    def __init__(self, network, precision="float32"):
        self.network, self.precision, self.most = network, precision, 0

    def begin(self, image, with_logits=True):
        """Hands pictures uint8 [N, H, W, 3] over; -> what `end` takes, which nothing has waited for."""
        import paddle

        count = len(image)
        self.most = max(self.most, count)
        if count < self.most:  # such as the last batch: cuDNN chooses its algorithms anew for each shape
            image = np.concatenate([image, image[-1:].repeat(self.most - count, axis=0)])
        half = self.precision != "float32"
        with paddle.no_grad(), paddle.amp.auto_cast(enable=half, dtype=self.precision if half else "float16"):
            outputs = self.network(process.to_device(image))
        if not with_logits:
            outputs = (outputs[0], None)
        # float32 on the device: as an array, bfloat16 is integers. The copies lie right behind the computation, so that
        # waiting for them is no waiting for the next batch.
        copies = [None if x is None else x.astype("float32").pin_memory(blocking=False) for x in outputs]
        done = paddle.device.cuda.Event()
        done.record()
        return copies, done, count

    def end(self, begun):
        """-> the outputs of the network, float32 [N, ...] or None."""
        copies, done, count = begun
        while not done.query():
            time.sleep(0.0005)  # not synchronize(), which would keep the threads that read pictures from going on
        return tuple(None if x is None else x.numpy()[:count] for x in copies)

    def __call__(self, image):
        return self.end(self.begin(image))


def _run(run, batches, with_logits):
    """Yields (index, embedding, logits or None, bad) of each batch."""
    begin, end, ahead = run, lambda outputs: outputs, 0
    if isinstance(run, OnGpu):
        run.most = 0  # of these batches
        begin, end, ahead = lambda image: run.begin(image, with_logits), run.end, 1
    begun = collections.deque()
    for batch in itertools.chain(batches, [None] * ahead):
        if batch is not None:
            begun.append((batch, begin(batch.image) if len(batch.index) else None))
        if begun and (batch is None or len(begun) > ahead):
            batch, outputs = begun.popleft()
            embedding, logits = (None, None) if outputs is None else end(outputs)
            yield batch.index, embedding, logits if with_logits else None, list(batch.bad)


def open_embedder(pretrained_model, model=None, use_gpu=None):
    """A function of pictures' files, for use from Python: paths -> embeddings of length 1.

    Sets up Paddle as the scripts do, which includes its random seed.

    Args:
        pretrained_model: what --pretrained_model takes: a checkpoint of train.py, an exported folder, "imagenet", ...
        model: the name of the network where that does not say it, as with "imagenet"; see models.MODELS.
        use_gpu: False stays on the CPU even where there is a GPU; None takes a GPU where there is one.

    Returns: function embed(paths, batch_size=32) -> float32 [N, D], row i that of paths[i]; the dot product of two rows
        is their cosine similarity. One path on its own counts as a list of one. It raises a UserError that names the
        first picture that is missing or bad, and where there are none.
    Raises: UserError where there are no such weights, or no such model.
    """
    process.start_paddle(use_gpu)
    opened = open_network({**dict.fromkeys((*models.SETTLED, "class_dim")), "model": model}, pretrained_model)
    run = _function(opened.network)
    reading = reader.Reading(opened.settings.image_shape, opened.settings.test_transform, on_bad_image="skip")

    def embed(paths, batch_size=32):
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        samples = reader.Samples([os.fspath(path) for path in paths], None, None, None)
        found = []
        with contextlib.closing(reader.read_in_order(samples, reading, batch_size)) as batches:
            for _, embedding, _, bad in _run(run, batches, with_logits=False):
                if bad:
                    index, reason = bad[0]
                    raise UserError(f"{reader.where(samples, index)}: {reason}")
                found.append(embedding)
        if not found:
            raise UserError("no pictures to embed")
        return at_length_1(np.concatenate(found))

    return embed


def at_length_1(features):
    """features float [N, D], each at length 1; zeros stay zeros."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
