"""A run in progress: what it is made of, and what is done beside its steps."""

import collections
import dataclasses
import os

from reader import Reading
from runtime import parallel, process
from training import optimizers
from training.data import Batching, Data
from training.log import gather_bad
from training.parts import Parts, arrays, loss_scale, scaler_state
from training.run import Run
from training.run_settings import RunSettings
from utility import UserError
from weights.checkpoint import checkpoint_name, update_description

# Below this loss scale gradients overflow float16 even unscaled.
LEAST_SCALE = 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of training: what stays the same from its first step to its last."""

    run: Run
    data: Data
    parts: Parts
    settings: RunSettings
    reading: Reading
    batching: Batching
    schedule: optimizers.Schedule
    freezing: optimizers.Freezing
    amp: str  # float16, bfloat16 or None
    signals: process.Signals
    description: dict  # what checkpoints say beside how far the run is


# due: log: print a line; save: write a checkpoint inside the epoch; look: read what the device has computed.
Due = collections.namedtuple("Due", "log save look")


def what_is_due(job, progress):
    """What is to be done beside a step when it is the one before `progress`."""
    settings, last = job.settings, progress.step == progress.steps
    log = last or (progress.step - 1) % settings.log_every == 0
    save = not last and settings.save_every > 0 and progress.step % settings.save_every == 0
    return Due(log, save, log or save or not process.on_gpu())


def check_finite(job, progress, loss, tensors):
    """Raises a UserError where the step before `progress` has shown that the run comes to nothing.

    Args:
        loss: scalar; tensors: gradients or weights.
    """
    if not optimizers.all_finite([loss, *tensors]):
        raise diverged(job, progress)
    scale = loss_scale(job.parts.scaler)
    if scale is not None and scale < LEAST_SCALE:
        raise UserError(
            f"the loss scale of --amp=float16 fell to {scale:g} by pass {progress.epoch}, trainbatch "
            f"{progress.step - 1}: the gradients overflow in every step, and none of these changes a weight; last good "
            f"checkpoint: {job.run.newest() or 'none yet'}; try --amp=bfloat16 or off, or a smaller --lr than "
            f"{job.schedule.lr:g}"
        )


def save_or_stop(job, progress, due, loss):
    """Writes a checkpoint inside an epoch where one is due or a signal has come. Raises: Stopped after a signal.

    Args:
        loss: scalar, of the step before `progress`.
    """
    # Several processes stop at the same step; on GPUs they ask each other at log lines and at every tenth step.
    asks = due.look or parallel.world_size() == 1 or progress.step % 10 == 0
    signal = parallel.largest(job.signals.number) if asks else 0
    if progress.step == progress.steps or not (due.save or signal):
        return
    if not due.look:
        check_finite(job, progress, loss, optimizers.trained_parameters(job.parts.network, job.parts.objective))
    path = save(job, progress)
    if signal:
        raise stopped(signal, path)


def stop_if_told(job, progress, path):
    """Ends the run at the end of an epoch, saved at `path`, if a signal has come and something is left to do.

    Raises: Stopped
    """
    signal = parallel.largest(job.signals.number)
    if signal and not (job.settings.is_done(progress) and job.settings.is_over(progress)):
        raise stopped(signal, path)


def save(job, progress):
    """Writes the checkpoint of `progress`; -> its path. Of several processes the first does so, and all wait."""
    if not shares_each_step(job):
        parallel.average(job.parts.network.batch_norm_statistics())
    described = describe(job, dataclasses.replace(progress, bad=gather_bad(progress.bad)))
    if parallel.is_first():
        job.run.save(arrays(job.parts), described)
        job.run.remove_old(job.settings.keep)
    parallel.meet("a checkpoint")
    return os.path.join(job.run.path, checkpoint_name(described))


def shares_each_step(job):
    """Whether several processes bring their batch norms' running statistics together in each step.

    These are sums over the steps: on GPUs, where each step of it costs hundreds of launches, it is done before a
    checkpoint, and the same but for rounding. An average of the weights needs them in each step.
    """
    return not process.on_gpu() or job.parts.average is not None


def describe(job, progress):
    """What a checkpoint says of the run."""
    changing = {"scaler": scaler_state(job.parts.scaler), "log_bytes": job.run.log_size()}
    return {**job.description, **dataclasses.asdict(progress), **changing}


def diverged(job, progress):
    return UserError(
        f"the loss or a gradient became NaN or infinite in pass {progress.epoch}, trainbatch {progress.step - 1}; last "
        f"good checkpoint: {job.run.newest() or 'none yet'}; try a smaller --lr than {job.schedule.lr:g}, "
        + ("--warmup_epochs=1, --amp=bfloat16" if job.amp == "float16" else "--warmup_epochs=1")
    )


def stopped(signal, path):
    """What ends the run after a signal; `path`: the checkpoint to go on from, or None."""
    saved = f"saved {path}; --checkpoint=latest goes on from there" if path else "nothing to save yet"
    return process.Stopped(128 + signal, f"stopped: {saved}")


def record_recall(job, progress):
    """Adds the evaluation of an epoch to its checkpoint, and points `best` at the best."""
    described = describe(job, progress)
    update_description(os.path.join(job.run.path, checkpoint_name(described)), described)
    job.run.point_at("best", str(progress.best["epoch"]))
    job.run.remove_old(job.settings.keep)
