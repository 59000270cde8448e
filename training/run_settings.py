"""What becomes of a run, in the flags' words, and which of the flags that were typed have no effect on it."""

import dataclasses

import losses
from training import tensorboard
from utility import boolean, note_idle, number, number_of

# What only the start of a run looks at.
START_ONLY = ("eval_at_start", "zero_init_residual", "weights", "allow_partial")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What becomes of a run, in the flags' words."""

    num_epochs: int
    pretrained_model: str = ""
    overwrite: bool = False
    eval_every: int = 1
    eval_at_start: bool = False
    patience: int = 0
    keep: int = 1
    save_every: int = 0
    log_every: int = 10
    test_batch_size: int = None
    log_to: str = None
    quiet: bool = False

    @property
    def evaluates(self):
        return self.eval_every > 0 or self.eval_at_start

    def is_due(self, epoch):
        """Whether recall is measured after `epoch`."""
        return self.eval_every > 0 and ((epoch + 1) % self.eval_every == 0 or epoch + 1 == self.num_epochs)

    def is_over(self, progress):
        """Whether the run ends with the epoch that `progress` is in."""
        return progress.epoch + 1 >= self.num_epochs or 0 < self.patience <= progress.waited

    def is_done(self, progress):
        """Whether nothing is left to do of the epoch that `progress` is in."""
        return progress.step == progress.steps and (progress.evaluated or not self.is_due(progress.epoch))


def add_run_arguments(parser):
    """Adds the flags of RunSettings, and which run it is."""
    # fmt: off
    add = parser.add_argument_group("run").add_argument
    add("--model_save_dir", default="output", help="checkpoints and log go to <model_save_dir>/<model>/")
    add("--checkpoint", default="", help="continue a run: a checkpoint directory, or latest; auto: latest where "
        "there is one, else a new run, for jobs that are started again by a scheduler")
    add("--overwrite", type=boolean, default=False, help="delete an earlier run's checkpoints and log")
    add("--force", type=boolean, default=False, help="continue with --checkpoint although flags differ from that run's")
    add("--eval_every", type=number(int, low=0), default=1, help="epochs between evaluations; 0: none, and no best")
    add("--patience", type=number(int, low=0), default=0,
        help="evaluations without a better recall@1 after which the run ends; 0: it goes on to --num_epochs")
    add("--eval_at_start", type=boolean, default=False, help="evaluate before the first step, too")
    add("--keep", type=number(int, low=1), default=1, help="newest epochs that stay on disk, beside the best one")
    add("--save_every", type=number(int, low=0), default=0,
        help="steps between checkpoints inside an epoch; 0: only at its end. The newest one is kept")
    add("--log_every", type=number(int, low=1), default=10, help="steps between log lines")
    add("--log_to", choices=tensorboard.KINDS, default=None,
        help="write the figures of the log to <model_save_dir>/<model>/tensorboard/, too (pip install tensorboardX)")
    # fmt: on


def note_head(flags):
    """Says where the head is not trained."""
    if not losses.trains_head(flags):
        print("note: --alpha=0: the head is not trained: loss_cls, acc1 and acc5 are those it starts with")


def report_idle(flags, typed):
    """Says which of the typed flags have no effect on what a run does, or keep another from it."""
    idle = losses.without_effect(flags, typed)
    if idle:
        print(f"note: without effect on {flags['loss_name']}: {', '.join(f'--{name}' for name in idle)}")
    epochs, loss = flags["num_epochs"], losses.row(flags["loss_name"])
    no_head = not losses.trains_head(flags) and "--alpha=0"
    whole = number_of(epochs, "epoch")
    why = {
        "lr_epochs": idle_lr_epochs(flags),
        "head_scale": flags["head"] != "cosine" and "the head is linear",
        **dict.fromkeys(("label_smoothing", "dropout"), no_head),
        "head_lr_scale": not flags["embedding_size"] and no_head,
        "zero_init_residual": flags["pretrained_model"] and "--pretrained_model has the blocks' weights",
        "patience": flags["eval_every"] == 0 and "--eval_every=0",
        "test_batch_size": flags["eval_every"] == 0 and not flags["eval_at_start"] and "--eval_every=0",
        "batch_size": flags["train_batch_size"] != flags["batch_size"] and "--train_batch_size overrides it",
        **dict.fromkeys(("weights", "allow_partial"), not flags["pretrained_model"] and "no --pretrained_model"),
        "force": not flags["checkpoint"] and "no run to go on with",
        "memory_start_epoch": flags["memory_start_epoch"] >= epochs and f"after the last of {whole}",
    }
    if flags["checkpoint"]:
        why.update(dict.fromkeys(START_ONLY, "the run has started before"))
    note_idle({name: reason for name, reason in why.items() if reason and name not in idle}, typed)
    if flags["warmup_epochs"] > epochs:
        print(f"note: the rate never comes to --lr: --warmup_epochs={flags['warmup_epochs']:g} of {whole}")
    if flags["warmup_head_epochs"] >= epochs:
        print(f"note: the backbone never trains: --warmup_head_epochs={flags['warmup_head_epochs']} of {whole}")
    behind = flags["embedding_size"] or flags["pooling"] == "gem" or losses.learns_itself(loss)
    if flags["warmup_head_epochs"] and no_head and not behind:
        print("note: nothing trains in the epochs of --warmup_head_epochs: --alpha=0, and nothing else is new")


def idle_lr_epochs(flags):
    """Why --lr_epochs changes nothing; "" where it does."""
    if flags["lr_strategy"] != "piecewise_decay":
        return f"--lr_strategy={flags['lr_strategy']}"
    over = flags["lr_epochs"] and min(flags["lr_epochs"]) >= flags["num_epochs"]
    return "all after the last epoch" if over else ""
