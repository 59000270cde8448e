"""How a run of train.py starts, or goes on where an earlier process ended."""

import dataclasses
import os
import random

import losses
import models
import reader
import weights
from models import Settings
from runtime import parallel, process
from training import tensorboard
from training.parts import restore_parts
from training.run import LOG_FILE, Progress, Run
from training.run_settings import START_ONLY, RunSettings, note_head, report_idle
from utility import UserError, check_values, number_of, plain
from weights import Weights
from weights.checkpoint import (
    DESCRIPTION,
    LINKS,
    PART_FILES,
    checkpoint_name,
    described_name,
    path_of_run,
    read_description,
    resolve,
)  # fmt: skip
from weights.raw import hash_of_arrays

# Another value of one of these makes a continued run another run.
SAME_RUN = (
    *("loss_name", *losses.FLAGS, "alpha", "label_smoothing", "train_batch_size", "samples_each_class"),
    *("memory_size", "memory_start_epoch", "total_images", "min_area", "optimizer", "freeze_bn", "seed"),
    *("small_classes", "freeze_stages", "warmup_head_epochs", "ema_decay", "color_jitter", "random_erasing"),
)
# What a continued run does not take over from the run it continues.
THIS_PROCESS = (
    "checkpoint",
    "force",
    "overwrite",
    "model_save_dir",
    "pretrained_model",
    "use_gpu",
    "num_workers",
    "max_pixels",
    "quiet",
    "log_to",
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins."""

    flags: dict  # {name: value} of all flags, as in force
    settings: Settings
    weights: Weights = None
    checkpoint: str = ""  # the folder to go on from, or ""
    before: dict = None  # its description, or None

    @property
    def labels(self):
        """The labels of the class indices in the run before, or None."""
        return self.before["labels"] if self.before else None


# ---------------------------------------------------------------- which run


def find_start(flags, typed, parser):
    """Reads --checkpoint or --pretrained_model and settles what the flags leave open; -> Start.

    Args:
        flags: {name: value} of all flags; typed: the names of those that were not left at their default.
        parser: whose flags they are: a checkpoint's are checked by it.

    Raises: UserError; Stopped where --checkpoint=auto finds nothing left to do.
    """
    tensorboard.check_log_to(flags["log_to"])
    path, folder = flags["checkpoint"], flags["model_save_dir"]
    auto = path == "auto"  # the same command starts a run and goes on with it
    if auto:
        path = find_latest(folder, flags["model"]) or ""
        if path and "pretrained_model" in typed and not flags["force"]:
            check_pretrained_model(flags["pretrained_model"], path)
    elif path and flags["pretrained_model"]:
        raise UserError("--checkpoint continues a run with its own weights: --pretrained_model has no place beside it")
    if path == "latest":
        path = find_latest(folder, flags["model"])
        if not path:
            raise UserError(f"{folder}: --checkpoint=latest, but there is no checkpoint to continue{elsewhere(flags)}")
    if not path:
        return new_run({**flags, "checkpoint": ""}, typed)
    if not os.path.isfile(os.path.join(resolve(path), DESCRIPTION)):
        raise UserError(f"--checkpoint={path}: not a checkpoint directory of train.py{elsewhere(flags)}")
    if "averaged" in read_description(resolve(path)):
        raise UserError(
            f"--checkpoint={path}: an average, where no run was: start one from it: --pretrained_model={path}"
        )
    start = continue_run({**flags, "checkpoint": resolve(path)}, typed, parser)
    why = nothing_left(start.flags, Progress.of(start.before))
    if why and auto:
        raise process.Stopped(0, f"done before: {start.checkpoint}")
    if why:
        raise UserError(f"{start.checkpoint}: {why}")
    return start


def nothing_left(flags, progress):
    """Why a run that is as far as `progress` has nothing left to do, and what to change; "" where it has."""
    epochs, done = flags["num_epochs"], progress.epoch + 1
    settings = RunSettings(epochs, eval_every=flags["eval_every"], patience=flags["patience"])
    if progress.epoch >= epochs and progress.step < progress.steps:
        return f"in the middle of pass {progress.epoch}: a --num_epochs above it goes on"
    if not (settings.is_done(progress) and settings.is_over(progress)):
        return ""
    if done < epochs:
        return f"ended by --patience={settings.patience}: a larger one goes on"
    return f"has all of its {number_of(done, 'epoch')}: a larger --num_epochs than {max(epochs, done)} goes on"


def check_pretrained_model(typed, path):
    """Raises a UserError where the run that --checkpoint=auto has found is known to have started from other weights.

    Args:
        typed: --pretrained_model; path: the run's newest checkpoint.
    """
    state = read_description(path, ("args", "settings"))
    before = state["args"].get("pretrained_model")
    if not isinstance(before, str) or (not before and state["args"].get("checkpoint") and "digests" not in state):
        return  # an older checkpoint of a run that went on did not say
    there = started_from(path, state)
    now, then = (os.path.realpath(name.removesuffix(".pdparams")) for name in (typed, there))
    same_name = os.path.basename(now) == os.path.basename(then)
    if now != then and (os.path.exists(there) or not same_name):  # else a copy elsewhere, of what is no more
        raise UserError(
            f"--pretrained_model={typed}: --checkpoint=auto goes on with {path}, which started from "
            f"{before or 'random weights'}: another --model_save_dir starts a run, --force=True goes on all the same"
        )


def started_from(path, state):
    """--pretrained_model of the run of a checkpoint, as it is reached from here; "" for random weights.

    Args:
        state: the description of the checkpoint, the folder `path`.
    """
    before = state["args"].get("pretrained_model")
    before = before if isinstance(before, str) else ""
    return before if before in ("", "imagenet") else path_of_run(before, path, state)


def find_latest(folder, model):
    """The path of the newest whole checkpoint in --model_save_dir, whatever the link points at, or None."""
    newest = {name: Run(os.path.join(folder, name)).newest() for name in ([model] if model else models.MODELS)}
    found = {name: path for name, path in newest.items() if path}
    if len(found) > 1:
        raise UserError(f"{folder}: --checkpoint=latest or auto needs --model, one of {', '.join(found)}")
    return next(iter(found.values()), None)


def elsewhere(flags):
    """Where a checkpoint is, near what --checkpoint names or below --model_save_dir, as the end of a sentence."""
    path, folder = flags["checkpoint"], flags["model_save_dir"]
    names = (*LINKS, *((path,) if path else ()))
    near = [os.path.join(path, link) for link in LINKS]
    near += [os.path.dirname(os.path.normpath(path))]
    for parent in (path, folder):
        near += [os.path.join(parent, model, name) for model in sorted(models.MODELS) for name in names]
    found = [other for other in near if other and os.path.isfile(os.path.join(resolve(other), DESCRIPTION))]
    found.sort(key=lambda other: os.path.basename(path) != os.path.basename(other))  # stable: the name asked for first
    if not found:
        return ""
    model = os.path.basename(os.path.dirname(os.path.abspath(found[0])))
    other = f", of --model={model}" if flags["model"] not in (None, model) else ""
    return f"; {plain(found[0], 1000)} is one{other}"


def new_run(flags, typed):
    """A Start from --pretrained_model, or from nothing. Raises: UserError."""
    found = None
    if flags["pretrained_model"]:
        found = weights.read_weights(
            flags["pretrained_model"], flags["model"] or models.DEFAULT_MODEL, flags["weights"]
        )
    stored = found.state["settings"] if found and found.state else {}
    if flags["head_scale"] is None and stored and found.state.get("args", {}).get("loss_name") == flags["loss_name"]:
        flags = {**flags, "head_scale": stored.get("head_scale")}
    flags = losses.settle(flags)
    settings = Settings.settle(flags, stored, () if flags["allow_partial"] else ("model",))
    flags.update(settled_flags(settings))
    resting = next((name for name in ("freeze_bn", "freeze_stages") if flags[name]), "")
    if parallel.is_first():
        report_idle(flags, typed)
        note_head(flags)
        if not found:
            kept = f", and --{resting} keeps a part of them as they are" if resting else ""
            print(f"note: no --pretrained_model: training starts from random weights{kept}")
    if flags["zero_init_residual"] and not found and resting:
        raise UserError(f"--zero_init_residual=True: blocks start as the identity, and --{resting} would keep them so")
    seed = random.SystemRandom().randrange(2**31) if flags["seed"] is None else flags["seed"]
    return Start({**flags, "seed": seed}, settings, found)


def settled_flags(settings):
    return {name: getattr(settings, name) for name in models.SETTLED}


def continue_run(flags, typed, parser):
    """A Start that takes every flag that was not typed over from the run that wrote flags["checkpoint"].

    Raises: UserError where a typed one makes it another run.
    """
    path = flags["checkpoint"]
    state = read_description(path, (*weights.DESCRIBED, "args", "process", "steps", "best"))
    fixed = models.IN_WEIGHTS if flags["force"] else models.SETTLED
    if flags["force"] and "loss_name" in typed and flags["loss_name"] != state["args"].get("loss_name"):
        own = losses.row(flags["loss_name"]).flags.get("head_scale")  # rather than that of the loss before
        flags = {**flags, "head_scale": own if flags["head_scale"] is None else flags["head_scale"]}
    settings = Settings.settle(flags, state["settings"], fixed)
    before = {"small_classes": "repeat", **state["args"]}  # as it was before there was such a flag
    check_values(
        parser,
        {name: value for name, value in before.items() if name not in THIS_PROCESS},
        os.path.join(path, DESCRIPTION),
    )
    if None in (before.get(name) for name in ("loss_name", "optimizer", "seed")):
        raise UserError(f"{os.path.join(path, DESCRIPTION)}: does not say loss, optimizer and seed of the run")
    flags = {**flags, **taken_over(flags, typed, before, path, state), **settled_flags(settings)}
    flags["pretrained_model"] = started_from(path, state)  # only said: the weights are the checkpoint's
    head = losses.row(flags["loss_name"]).head
    if head not in (None, settings.head):
        raise UserError(
            f"--loss_name={flags['loss_name']}: the loss of a {head} head, the run's is {settings.head}: start a "
            f"new one from its weights: --pretrained_model={path}"
        )
    settings = settings.with_classes(flags["class_dim"] or 0)
    if "model_save_dir" not in typed:
        flags["model_save_dir"] = save_dir_of(path, state)
    check_changes(flags, typed, before, path)
    found = weights.read_weights(path, which="model")
    classes = weights.layer_size(found, "head")
    if classes != settings.class_dim:
        raise UserError(f"--class_dim={settings.class_dim}, but the head in {found.file_name} has {classes} classes")
    weights.check_layers(found, settings)
    flags = losses.settle(flags)
    if parallel.is_first():
        report_idle(flags, typed)
        if "alpha" in typed:
            note_head(flags)
    check_memory(path, flags, settings)
    return Start(flags, settings, found, path, found.state)


def taken_over(flags, typed, before, path, state):
    """{name: value} of the flags that a continued run takes from the run before.

    Args:
        before: that run's flags; state: the description of its checkpoint, the folder `path`.
    """
    names = set(before) & set(flags) - typed - set(THIS_PROCESS)  # without flags that are no more
    if flags["loss_name"] != before["loss_name"] and "loss_name" in typed:
        names -= {*losses.FLAGS, "alpha", "loss_lr_scale", "head_lr_scale"}  # each loss has its own
    # None stands for a default that has been settled by now.
    taken = {name: before[name] for name in names if before[name] is not None or flags[name] is None}
    for name in ("train_list", "val_list", "data_dir"):
        if isinstance(taken.get(name), str):
            taken[name] = path_of_run(taken[name], path, state)
    return taken


def check_changes(flags, typed, before, path):
    """Says which typed flags are others than `before`. Raises: UserError where they make it another run, unless forced.

    Args:
        flags, before: {name: value}, now and of the run whose checkpoint is the folder `path`.
    """
    names = typed & set(before) - {*THIS_PROCESS, *START_ONLY}
    changed = [name for name in sorted(names) if flags[name] != before[name]]
    words = {name: plain(f"--{name}={flags[name]} (was {before[name]})") for name in changed}
    forbidden = [words[name] for name in changed if name in SAME_RUN]
    if forbidden and not flags["force"]:
        raise UserError(f"{path}: another run: {', '.join(forbidden)}; --force=True continues all the same")
    if changed:
        print(f"note: the run goes on with {', '.join(words.values())}")
    if before.get("max_pixels", flags["max_pixels"]) != flags["max_pixels"] and "max_pixels" not in typed:
        was = plain(before["max_pixels"], 50)
        print(f"note: --max_pixels={flags['max_pixels']}: that of the run before, {was}, only where it is typed")


def check_memory(checkpoint, flags, settings):
    """Raises a UserError where the memory that --memory_size asks for is larger than the one in the checkpoint."""
    path = os.path.join(checkpoint, PART_FILES["objective"])
    size = 4 * flags["memory_size"] * (settings.embedding_size or settings.channels)
    if size and not flags["force"] and (not os.path.isfile(path) or os.path.getsize(path) < size):
        raise UserError(
            f"{path}: no memory of {flags['memory_size']} embeddings (--force=True starts with an empty one)"
        )


def save_dir_of(checkpoint, state):
    """The --model_save_dir of the run that the folder `checkpoint` is in, links followed.

    Raises: UserError where it lies anywhere else: nothing is written around a checkpoint that somebody copied.
    """
    model, names = state["settings"]["model"], (checkpoint_name(state), *LINKS)
    for path in (os.path.normpath(checkpoint), os.path.realpath(checkpoint)):
        run_dir, name = os.path.split(path)
        has_log = os.path.isfile(os.path.join(run_dir, LOG_FILE))
        if name in names and os.path.basename(os.path.abspath(run_dir)) == model and has_log:
            return os.path.normpath(os.path.join(run_dir, os.pardir))
    raise UserError(
        f"--checkpoint={checkpoint}: not in the folder of a run ({model}/ with its {LOG_FILE}): "
        "--model_save_dir says where to go on"
    )


# ---------------------------------------------------------------- the same data


def compare_lists(start, data, digests):
    """Which of train_list and val_list are not those that the run to go on with had: [name].

    Args:
        data: training.data.Data; digests: {name: digest} of its lists.

    Raises: UserError where the training list is another, and --force is not given.
    """
    changed = []
    for name, samples in (("train_list", data.train), ("val_list", data.val)) if start.before else ():
        then = start.before.get(name)
        if then in (None, digests[name]) or not samples:
            continue
        if not reader.is_fingerprint(then, samples, "digests" not in start.before):
            changed.append(name)
    if "train_list" in changed and not start.flags["force"]:
        raise UserError(
            f"{start.flags['train_list']}: not the pictures and labels that the run of {start.checkpoint} had; "
            "--force=True continues all the same"
        )
    return changed


def check_alike(flags, start, digests):
    """Raises a UserError, in all of several processes, where they were not started alike.

    As where --checkpoint=latest finds another folder on another machine.
    """
    if parallel.world_size() == 1:
        return
    own = {*THIS_PROCESS, "data_dir", "train_list", "val_list"}  # each machine may have the lists elsewhere
    facts = {f"--{name}": value for name, value in flags.items() if name not in own}
    facts.update({f"the content of --{name}": value for name, value in digests.items()})
    facts["the weights to start from"] = start.weights and hash_of_arrays(sorted(start.weights.tensors.items()))
    facts["the checkpoint to go on from"] = checkpoint_name(start.before) if start.before else None
    first, *others = parallel.gather_objects(facts)
    for rank, other in enumerate(others, 1):
        different = sorted(name for name in first if first[name] != other[name])
        if different:
            raise UserError(
                f"process {rank} was not started as process 0 was: different are {', '.join(different)}; all "
                "machines need the same command, and the same files or a folder that they share"
            )


# ---------------------------------------------------------------- what the checkpoint holds


def restore(run, start, data, parts, same, changed):
    """Puts back what the checkpoint holds of objective, optimizer and loss scaling; -> Progress.

    Args:
        same: what `folder.prepare_run` returned; changed: what `compare_lists` returned.
    """
    before = start.before
    restore_parts(parts, start.checkpoint, before, start.flags["optimizer"], start.flags["force"])
    # With --force an epoch may have other steps than the one that was begun: then the next begins.
    done = before["step"] == before["steps"]
    step = data.steps if done else min(before["step"], data.steps)
    progress = dataclasses.replace(Progress.of(before), steps=data.steps, step=step, best=None, waited=0)
    if "train_list" in changed:
        progress = dataclasses.replace(progress, bad=())  # --force: its numbers are of another list
    best = before["best"]
    if best and "val_list" in changed:
        print("note: another --val_list: what was the best on the old one is forgotten")
        best = None
    there = [checkpoint_name(before)]  # which another folder will have, too
    if same:
        there += [*run.names(), *(described_name(os.path.join(run.path, link)) for link in run.copied())]
    if best and str(best["epoch"]) in there:
        progress = dataclasses.replace(progress, best=best, waited=Progress.of(before).waited)
    elif best:  # in another folder, or deleted since
        where = f"recall@1 {best['recall@1']:.4f} in pass {best['epoch']}"
        print(f"note: the best so far, {where}, is not in {run.path}: the best from here on is kept there")
    process.compare_process(before["process"])
    return progress
