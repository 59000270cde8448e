"""What training says while it runs: a line on stdout and a JSON object in the run's log."""

import time

from runtime import process
from utility import UserError, duration


class StepLog:
    """Counts steps, pictures and time since its last line.

    Args:
        run: training.run.Run; signals: process.Signals, which hears of it where nobody reads the lines any more.
    """

    def __init__(self, run, signals):
        self.run, self.signals = run, signals
        self.restart()

    def restart(self):
        self.start, self.steps, self.images, self.waited = time.time(), 0, 0, 0.0

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

    def write(self, progress, num_epochs, lr, figures, logits, label):
        """Prints and logs the step that is done, with the speed since the last such line.

        Args:
            progress: training.run.Progress, after the step.
            figures: of losses.objective; logits float [N, C], label int64 [N].
        """
        epoch, step, steps = progress.epoch, progress.step - 1, progress.steps
        record = {"epoch": epoch, "step": step, "lr": lr}
        record.update({name: figures[name].item() for name in ("loss_metric", "loss_cls")})
        record.update({f"acc{k}": accuracy(logits, label, k) for k in (1, 5)})
        seconds = time.time() - self.start
        record.update(
            sec=seconds / self.steps,
            img_per_sec=self.images / seconds,
            data_wait=self.waited / seconds,
            peak_memory=process.peak_memory(),
        )
        left = ((num_epochs - epoch) * steps - step - 1) * record["sec"]
        self.run.log(record)
        with self.signals.note_lost_output():
            print(
                f"Pass {epoch}, trainbatch {step}, lr {lr:.6g}, loss_metric {record['loss_metric']:.4f}, "
                f"loss_cls {record['loss_cls']:.4f}, acc1 {record['acc1']:.4f}, acc5 {record['acc5']:.4f}, "
                f"time {record['sec']:.2f} sec, {record['img_per_sec']:.1f} img/s, "
                f"data wait {record['data_wait']:.1%}, "
                f"memory {record['peak_memory'] / 2**30:.2f} GiB, left {duration(left)}",
                flush=True,
            )
        self.restart()


def accuracy(logits, label, k):
    """The share of labels among the k largest logits."""
    import paddle

    k = min(k, logits.shape[1])
    return paddle.metric.accuracy(logits.astype("float32"), label.unsqueeze(1), k=k).item()
