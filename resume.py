"""How a run of train.py starts, or goes on where an earlier process ended, and how it records how far it is."""

import hashlib
import os
import random

import numpy as np

import checkpoints
import files
import models
import parallel
import utility
from utility import UserError

# Another value of one of these makes a continued run another run.
SAME_RUN = (
    *("loss_name", "margin", "triplet_mining", "alpha", "label_smoothing", "train_batch_size", "samples_each_class"),
    *("total_images", "min_area", "optimizer", "freeze_bn", "seed"),
)
# What a continued run does not take over from the run it continues.
THIS_PROCESS = ("checkpoint", "force", "overwrite", "model_save_dir", "pretrained_model", "use_gpu", "num_workers")


def find_start(args, typed):
    """Reads --checkpoint or --pretrained_model and settles flags and seed; -> models.Weights or None.

    Raises: UserError; Stopped where --checkpoint=auto finds nothing left to do.
    """
    auto = args.checkpoint == "auto"  # the same command starts a run and goes on with it
    if auto:
        args.checkpoint = find_latest(args) or ""
        args.pretrained_model = "" if args.checkpoint else args.pretrained_model
    if args.checkpoint and args.pretrained_model:
        raise UserError("--checkpoint continues a run with its own weights: --pretrained_model has no place beside it")
    if args.checkpoint == "latest":
        args.checkpoint = find_latest(args)
        if not args.checkpoint:
            raise UserError(f"{args.model_save_dir}: --checkpoint=latest, but there is no checkpoint to continue")
    if args.checkpoint:
        args.checkpoint = checkpoints.resolve(args.checkpoint)
        state = continue_run(args, typed)
        if is_done(args, state) and state["epoch"] + 1 >= args.num_epochs:
            if auto:
                raise utility.Stopped(0, f"done before: {args.checkpoint}")
            raise UserError(
                f"{args.checkpoint}: has all of its {state['epoch'] + 1} epochs: a larger --num_epochs than "
                f"{args.num_epochs} goes on"
            )
        return models.read_weights(args.checkpoint)
    model = args.model or models.DEFAULT_MODEL
    weights = models.read_weights(args.pretrained_model, model) if args.pretrained_model else None
    models.settle_arguments(args, weights.state if weights else None, () if args.allow_partial else ("model",))
    if not weights and parallel.is_first():
        print("note: no --pretrained_model: training starts from random weights")
    args.seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    return weights


def find_latest(args):
    """The path of the newest whole checkpoint in --model_save_dir, whatever the link points at, or None."""
    names = [args.model] if args.model else models.MODELS
    runs = [name for name in names if checkpoints.newest_checkpoint(os.path.join(args.model_save_dir, name))]
    if len(runs) > 1:
        raise UserError(f"{args.model_save_dir}: --checkpoint=latest or auto needs --model, one of {', '.join(runs)}")
    return checkpoints.newest_checkpoint(os.path.join(args.model_save_dir, runs[0])) if runs else None


def check_alike(args, weights, lists):
    """Raises a UserError, in all of several processes, where they were not started alike.

    As where --checkpoint=latest finds another folder on another machine.
    """
    if parallel.world_size() == 1:
        return
    own = {*THIS_PROCESS, "data_dir", "train_list", "val_list"}  # each machine may have the lists elsewhere
    facts = {f"--{name}": value for name, value in vars(args).items() if name not in own}
    facts.update({f"the content of --{name}": value for name, value in lists.items()})
    digest = hashlib.sha256()
    for name, value in sorted(weights.tensors.items()) if weights else ():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value))
    facts["the weights to start from"] = digest.hexdigest()
    facts["the checkpoint to go on from"] = checkpoints.checkpoint_name(weights.state) if args.checkpoint else None
    first, *others = parallel.gather_objects(facts)
    for number, other in enumerate(others, 1):
        different = sorted(name for name in first if first[name] != other[name])
        if different:
            raise UserError(
                f"process {number} was not started as process 0 was: different are {', '.join(different)}; all "
                "machines need the same command, and the same files or a folder that they share"
            )


def continue_run(args, typed):
    """Takes every flag that was not typed over from the run that wrote `args.checkpoint`; -> its state.

    Raises: UserError where a typed one makes it another run.
    """
    state = checkpoints.read_checkpoint_state(args.checkpoint)
    models.settle_arguments(
        args, state, ("model", "pooling", "embedding_size") if args.force else tuple(models.SETTINGS)
    )
    before = state["args"]
    for name in set(before) & set(vars(args)) - typed - set(THIS_PROCESS):  # without flags that are no more
        setattr(args, name, before[name])
    if "model_save_dir" not in typed:
        args.model_save_dir = find_run(args.checkpoint, state)
    changed = {n: f"--{n}={getattr(args, n)} (was {before[n]})" for n in sorted(typed & set(before) - set(THIS_PROCESS))
               if getattr(args, n) != before[n]}  # fmt: skip
    forbidden = [what for name, what in changed.items() if name in SAME_RUN]
    if forbidden and not args.force:
        raise UserError(f"{args.checkpoint}: another run: {', '.join(forbidden)}; --force=True continues all the same")
    if changed:
        print(f"note: the run goes on with {', '.join(changed.values())}")
    return state


def find_run(checkpoint, state):
    """The --model_save_dir of the run that the folder `checkpoint` is in, links followed.

    Raises: UserError where it lies anywhere else: nothing is written around a checkpoint that somebody copied.
    """
    model, names = state["settings"]["model"], (checkpoints.checkpoint_name(state), *checkpoints.LINKS)
    for path in (os.path.normpath(checkpoint), os.path.realpath(checkpoint)):
        run_dir, name = os.path.split(path)
        has_log = os.path.isfile(os.path.join(run_dir, checkpoints.LOG_FILE))
        if name in names and os.path.basename(os.path.abspath(run_dir)) == model and has_log:
            return os.path.normpath(os.path.join(run_dir, os.pardir))
    raise UserError(
        f"--checkpoint={checkpoint}: not in the folder of a run ({model}/ with its {checkpoints.LOG_FILE}): "
        "--model_save_dir says where to go on"
    )


def prepare_run_dir(args, run_dir, continued):
    """Makes `run_dir` ready; an earlier run in it is only touched with --checkpoint or --overwrite."""
    if os.path.isdir(run_dir):
        checkpoints.lock(run_dir)  # before looking, for another process may be about to save
    names = [*checkpoints.checkpoint_names(run_dir), *checkpoints.copied_checkpoints(run_dir)]
    above = os.path.realpath(os.path.dirname(os.path.normpath(args.checkpoint)))
    same = continued and os.path.realpath(run_dir) in (above, os.path.dirname(os.path.realpath(args.checkpoint)))
    later = checkpoints.later_checkpoints(run_dir, checkpoints.checkpoint_name(continued)) if same else []
    if later and not args.overwrite:
        raise UserError(
            f"{args.checkpoint}: the run has later checkpoints ({', '.join(later)}): --checkpoint=latest goes on from "
            "the last, --overwrite=True deletes them, another --model_save_dir keeps them"
        )
    if names and not same and not args.overwrite:
        raise UserError(
            f"{run_dir}: holds an earlier run: continue it with --checkpoint=latest, delete it with --overwrite=True, "
            "or take another --model_save_dir"
        )
    check_room(args, run_dir, same)
    for line in files.try_folder(run_dir):
        print(f"note: {run_dir}: {line}")
    checkpoints.lock(run_dir)
    checkpoints.remove_leftovers(run_dir)
    if same:
        checkpoints.cut_log(run_dir, continued.get("log_bytes"))
        for link in checkpoints.LINKS:
            checkpoints.make_way(run_dir, link)
        checkpoints.point_at(run_dir, "latest", checkpoints.checkpoint_name(continued))
        checkpoints.remove_checkpoints(run_dir, later)
        checkpoints.remove_dangling(run_dir)
        return
    if args.overwrite:
        checkpoints.set_run_aside(run_dir)
    checkpoints.make_way_for_log(run_dir)
    for link in checkpoints.LINKS:
        checkpoints.make_way(run_dir, link)


def check_room(args, run_dir, same):
    """Raises a UserError where something that must stay has a name in `run_dir` that the run will need."""
    taken = checkpoints.in_the_way(run_dir, args.num_epochs)
    if taken:
        raise UserError(
            f"{taken[0]}: no checkpoint that was written under this name, where the run will write one: move it, or "
            "take another --model_save_dir"
        )
    for name in checkpoints.checkpoint_names(run_dir):
        foreign = files.foreign_entry(os.path.join(run_dir, name), checkpoints.PARTS)
        if foreign:
            print(f"note: {foreign} is not train.py's: the checkpoint that it lies in will not be deleted")
    weights = os.path.realpath(args.pretrained_model) if args.pretrained_model else ""
    if args.overwrite and not same and weights.startswith(os.path.join(os.path.realpath(run_dir), "")):
        raise UserError(
            f"--pretrained_model={args.pretrained_model}: lies in the run that --overwrite=True deletes: copy it "
            "elsewhere, or take another --model_save_dir"
        )


def load_progress(args, run_dir, continued, network, optimizer, scaler, state):
    """Puts what the checkpoint says of optimizer, loss scaling and progress into `optimizer`, `scaler` and `state`."""
    if args.optimizer == continued["args"]["optimizer"]:
        checkpoint = args.checkpoint
        if not os.path.isdir(checkpoint):  # a copied run's latest/ or best/, which has its own name by now
            checkpoint = os.path.join(run_dir, checkpoints.checkpoint_name(continued))
        path = os.path.join(checkpoint, checkpoints.OPTIMIZER_FILE)
        try:
            checkpoints.load_optimizer_state(network, optimizer, models.read_pickle(path), path)
        except UserError as error:
            if not args.force:
                raise UserError(f"{error} (--force=True starts the optimizer anew)") from None
            print(f"note: {args.optimizer} starts anew: {error}")
    else:
        print(f"note: {args.optimizer} starts anew: it can't use the state of {continued['args']['optimizer']}")
    if continued.get("scaler"):
        scaler.load_state_dict({**continued["scaler"], "scale": np.array(continued["scaler"]["scale"], np.float32)})
    # With --force an epoch may have other steps than the one that was begun: then the next begins.
    step = state["steps"] if continued["step"] == continued["steps"] else min(continued["step"], state["steps"])
    state.update(epoch=continued["epoch"], step=step, evaluated=continued["evaluated"])
    best = continued["best"]
    if best and continued.get("val_list") not in (None, state["val_list"]):
        print("note: another --val_list: what was the best on the old one is forgotten")
        best = None
    if best and str(best["epoch"]) in checkpoints.checkpoint_names(run_dir):  # not in another folder, or deleted since
        state["best"] = best
        if parallel.is_first():
            checkpoints.point_at(run_dir, "best", str(best["epoch"]))
    utility.compare_process(continued["process"])


def last_checkpoint(args):
    """The path of the newest checkpoint of the run in progress, or None."""
    return checkpoints.newest_checkpoint(os.path.join(args.model_save_dir, args.model))


def is_done(args, state):
    """Whether nothing is left to do of the epoch that `state` is in."""
    return state["step"] == state["steps"] and (state["evaluated"] or not is_due(args, state["epoch"]))


def is_due(args, epoch):
    """Whether recall is measured after `epoch`."""
    return args.eval_every > 0 and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.num_epochs)


def record_recall(args, run_dir, state, recall):
    """Adds the evaluation of an epoch to its checkpoint, and points `best` at the best."""
    if state["best"] is None or recall > state["best"]["recall@1"]:
        state["best"] = {"recall@1": recall, "epoch": state["epoch"]}
    state.update(evaluated=True, log_bytes=checkpoints.log_size(run_dir))
    checkpoints.write_checkpoint_state(os.path.join(run_dir, str(state["epoch"])), state)
    checkpoints.point_at(run_dir, "best", str(state["best"]["epoch"]))
    checkpoints.remove_old_checkpoints(run_dir, args.keep)
