"""What training says while it runs: a line on stdout and a JSON object in the run's log; and at its end."""

import os
import sys
import time

import numpy as np

import reader
from runtime import parallel, process
from training.run import LOG_FILE
from utility import UserError, duration


class RunLog:
    """Counts steps, pictures and time since its last line.

    Args:
        run: training.run.Run; settings: training.run_settings.RunSettings.
        signals: process.Signals, which hears of it where nobody reads the lines any more.
    """

    def __init__(self, run, settings, signals):
        self.run, self.settings, self.signals = run, settings, signals
        self.evaluation = 0.0  # seconds that the last one took
        self.bar = None
        self.restart()

    def restart(self):
        self.start, self.steps, self.images, self.waited = time.time(), 0, 0, 0.0

    def begin_epoch(self, progress):
        """Shows the epoch's bar, on stderr where that is a terminal. `progress`: training.run.Progress."""
        from tqdm import tqdm

        hidden = True if self.settings.quiet or not parallel.is_first() else None
        shown = {"desc": f"Pass {progress.epoch}", "total": progress.steps, "initial": progress.step, "unit": "batch"}
        self.bar = tqdm(**shown, disable=hidden, leave=False, dynamic_ncols=True)
        self.restart()

    def end_epoch(self, epoch, train, bad):
        """Closes the bar, and reports the bad pictures, [(index, reason)], of the Samples `train` in all processes."""
        self.bar.close()
        bad = gather_bad(bad)
        if bad and parallel.is_first():
            reader.report_bad_images(train, bad)
            self.run.log({"epoch": epoch, **reader.list_bad_images(train, bad)})

    def next_batch(self, batches):
        """The next of `batches`; the time that this waits is part of the line."""
        start = time.time()
        batch = next(batches)
        self.waited += time.time() - start
        if not len(batch.index):
            raise UserError(f"not one image of a whole batch could be read: {batch.bad[-1][1]}")
        return batch

    def add(self, images):
        """Counts a step with so many pictures."""
        self.images += images
        self.steps += 1
        self.bar.update()

    def write(self, progress, lr, figures, logits, label, scale=None):
        """Prints and logs the step that is done, with the speed since the last such line.

        Args:
            progress: training.run.Progress, after the step.
            figures: of losses.objective; logits float [N, C], label int64 [N].
            scale: of the loss, for the log; None: none.
        """
        epoch, step = progress.epoch, progress.step - 1
        record = {"epoch": epoch, "step": step, "lr": lr}
        record.update({name: float(figures[name].numpy()) for name in ("loss_metric", "loss_cls")})
        record.update({f"acc{k}": accuracy(logits, label, k) for k in (1, 5)})
        record.update({} if scale is None else {"loss_scale": scale})
        seconds = time.time() - self.start
        record.update(
            sec=seconds / self.steps,
            img_per_sec=self.images / seconds,
            data_wait=self.waited / seconds,
            peak_memory=process.peak_memory(),
        )
        self.run.log(record)
        line = (
            f"Pass {epoch}, trainbatch {step}, lr {lr:.6g}, loss_metric {record['loss_metric']:.4f}, "
            f"loss_cls {record['loss_cls']:.4f}, acc1 {record['acc1']:.4f}, acc5 {record['acc5']:.4f}, "
            f"time {record['sec']:.2f} sec"
        )
        rest = (
            f"{record['img_per_sec']:.1f} img/s, data wait {record['data_wait']:.1%}, "
            f"memory {record['peak_memory'] / 2**30:.2f} GiB, left {duration(self.left(progress, record['sec']))}"
        )
        if not self.settings.quiet:
            self.print(line, rest)
        self.restart()

    def print(self, line, rest):
        """Prints a line; on a terminal with a bar, the rest of it goes into the bar."""
        in_bar = not self.bar.disable and sys.stdout.isatty()
        if in_bar:
            self.bar.set_postfix_str(rest, refresh=False)
            self.bar.clear()
        with self.signals.note_lost_output():
            print(line if in_bar else f"{line}, {rest}", flush=True)
        self.bar.refresh()

    def left(self, progress, seconds):
        """Seconds that the rest of the run may take, if steps take `seconds` and evaluations as long as the last."""
        epochs = self.settings.num_epochs
        steps = (epochs - progress.epoch) * progress.steps - progress.step
        return steps * seconds + self.evaluation * sum(map(self.settings.is_due, range(progress.epoch, epochs)))


def gather_bad(bad):
    """[(index, reason)] of the bad pictures of all processes, each once, in the order of the list."""
    return sorted({tuple(picture) for part in parallel.gather_objects(bad) for picture in part})


def recalls_by_epoch(records):
    """{epoch: recall@1} of the records of a log, on a list of the name that the last process' --val_list had."""
    found, val_list = {}, None
    for record in records:
        now = os.path.basename(record["args"].get("val_list") or "") if "args" in record else val_list
        if now != val_list:
            found, val_list = {}, now
        if "eval" in record:
            found[record["epoch"]] = record["eval"]["recall@1"]
    return found


def accuracy(logits, label, k):
    """The share of labels among the k largest logits."""
    import paddle

    k = min(k, logits.shape[1])
    found = paddle.metric.accuracy(logits.astype("float32"), label.unsqueeze(1), k=k)
    return float(np.ravel(found.numpy())[0])


def summary(run, progress, val, seconds):
    """What came out of a run, and the commands that use it, as text.

    Args:
        run: training.run.Run; progress: training.run.Progress, at its end.
        val: reader.Samples, or None.
        seconds: that this process has trained.
    """
    best = os.path.join(run.path, "best" if progress.best else "latest")
    rows = [f"checkpoint    {best}", f"log           {os.path.join(run.path, LOG_FILE)}"]
    found = recalls_by_epoch(run.read_log() or [])
    names = {-1: "untrained", progress.epoch: f"last, pass {progress.epoch}"}
    if progress.best:
        names[progress.best["epoch"]] = f"best, pass {progress.best['epoch']}"
    recalls = [f"    {name:16}{found[epoch]:6.1%}" for epoch, name in sorted(names.items()) if epoch in found]
    if recalls and val:
        rows[:0] = [f"recall@1 on {val.source}", *recalls, ""]
    line = "-" * 72
    return "\n".join(
        [
            line,
            *rows,
            f"time          {duration(seconds)}, to pass {progress.epoch}",
            "",
            "what to type next:",
            f"    python eval.py --pretrained_model={best}",
            f"    python infer.py --pretrained_model={best} --input <pictures> --feature_file=features.npz",
            f"    python infer.py --pretrained_model={best} --export_dir=exported",
            line,
        ]
    )
