"""How a run gets its folder: what may be in the way there, what it deletes, and what it begins with."""

import os

import files
from training import tensorboard
from utility import UserError, plain
from weights.checkpoint import CONTENT, LINKS, checkpoint_name, described_name


def prepare_run(run, start, settings):
    """Makes sure that `run` may have its folder, and can work in it; -> whether it goes on with the run that is there.

    An earlier run in it is only touched with --checkpoint or --overwrite, and not before `begin_run`.

    Args:
        settings: RunSettings.
    """
    if os.path.isdir(run.path):
        run.lock()  # before looking, for another process may be about to save
    above = os.path.realpath(os.path.dirname(os.path.normpath(start.checkpoint)))
    places = (above, os.path.dirname(os.path.realpath(start.checkpoint)))
    same = bool(start.before) and os.path.realpath(run.path) in places
    later = run.later(checkpoint_name(start.before)) if same else []
    if later and not settings.overwrite:
        raise UserError(
            f"{start.checkpoint}: the run has later checkpoints ({', '.join(later)}): --checkpoint=latest goes on from "
            "the last, --overwrite=True deletes them, another --model_save_dir keeps them"
        )
    if (run.names() or run.copied()) and not same and not settings.overwrite:
        raise UserError(
            f"{run.path}: holds an earlier run: continue it with --checkpoint=latest, delete it with --overwrite=True, "
            "or take another --model_save_dir"
        )
    check_room(run, start, settings, same)
    for line in files.try_folder(run.path):
        print(f"note: {run.path}: {line}")
    run.lock()
    run.remove_leftovers()
    return same


def begin_run(run, start, settings, progress, same):
    """Makes the changes that the run begins with, when all that may fail has been read.

    Args:
        progress: Progress, of the checkpoint to go on from.
        same: what `prepare_run` returned.
    """
    if same:
        run.cut_log(start.before.get("log_bytes"))
    else:
        if settings.overwrite:
            run.set_aside()
        run.make_way_for_log()
    copied = {link: described_name(os.path.join(run.path, link)) for link in run.copied()}
    for link in LINKS:
        run.make_way(link)
    if same:
        for link, name in copied.items():
            if name in run.names():
                run.point_at(link, name)
        name = checkpoint_name(start.before)
        if name in run.names():
            run.point_at("latest", name)
        run.remove(run.later(name))
        run.remove_dangling()
    if progress.best and run.has(start.before):
        run.point_at("best", str(progress.best["epoch"]))
    if settings.log_to:
        run.sink = tensorboard.TensorBoard(run.path, progress)


def check_room(run, start, settings, same):
    """Raises a UserError where something that must stay has a name in the folder that the run will need."""
    taken = run.in_the_way(settings.num_epochs)
    if taken:
        raise UserError(
            f"{taken[0]}: no checkpoint that was written under this name, where the run will write one: move it, or "
            "take another --model_save_dir"
        )
    for name in run.names():
        foreign = files.foreign_entry(os.path.join(run.path, name), CONTENT)
        if foreign:
            print(f"note: {plain(foreign, 1000)} is not train.py's: the checkpoint that it lies in will not be deleted")
    path = os.path.realpath(settings.pretrained_model) if settings.pretrained_model and not start.checkpoint else ""
    if settings.overwrite and not same and path.startswith(os.path.join(os.path.realpath(run.path), "")):
        raise UserError(
            f"--pretrained_model={settings.pretrained_model}: lies in the run that --overwrite=True deletes: copy it "
            "elsewhere, or take another --model_save_dir"
        )
