"""train.py --log_to=tensorboard: the figures of a run's log as TensorBoard reads them."""

import importlib.util
import os
import time

import files
from utility import UserError

FOLDER = "tensorboard"  # in the run's
KINDS = ("tensorboard",)
# Fields of a log record that are not plotted.
COUNTERS = ("epoch", "step")


def check_log_to(log_to):
    """Raises a UserError where --log_to needs a package that is not there."""
    if log_to and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("--log_to=tensorboard needs tensorboardX: pip install tensorboardX")


class TensorBoard:
    """Writes what it is called with, records of the run's log, to <run>/tensorboard/ as scalars, by steps done.

    Args:
        path: the run's folder.
        progress: training.run.Progress at the start. What an earlier process wrote of later steps is not shown.
    """

    def __init__(self, path, progress):
        from tensorboardX import SummaryWriter

        self.steps = progress.steps
        done = progress.epoch * progress.steps + progress.step
        folder = os.path.join(path, FOLDER)
        files.make_directory(folder)
        # The names that the package gives are of whole seconds, and a second file of a name replaces the first.
        suffix = f".{time.time_ns()}"
        self.writer = SummaryWriter(folder, purge_step=done + 1 if done else 0, filename_suffix=suffix)

    def __call__(self, record):
        if "eval" in record:
            self._add("eval", record["eval"], (record["epoch"] + 1) * self.steps)
        elif "step" in record:
            figures = {name: value for name, value in record.items() if name not in COUNTERS}
            self._add("train", figures, record["epoch"] * self.steps + record["step"] + 1)

    def _add(self, group, figures, step):
        for name, value in figures.items():
            tag = name.replace("@", "_at_")  # which TensorBoard takes
            self.writer.add_scalar(f"{group}/{tag}", value, step)
        self.writer.flush()
