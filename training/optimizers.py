"""The optimizer, the learning rate of each step, and the optimizer's state as a checkpoint holds it."""

import dataclasses
import math
import re

from runtime import process
from utility import UserError, boolean, comma_separated, number
from weights.checkpoint import check_part


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """In the flags' words."""

    optimizer: str = "momentum"
    lr: float = 0.1
    head_lr_scale: float = 1.0
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    clip_value: float = 0.0
    warmup_head_epochs: int = 0


@dataclasses.dataclass(frozen=True)
class Freezing:
    """What does not train, in the flags' words."""

    freeze_bn: bool = False
    freeze_stages: int = 0
    freeze_head: bool = False  # not a flag: see losses.trains_head
    warmup_head_epochs: int = 0

    def start(self, network, epoch):
        """Puts an EmbeddingNet in the mode in which it trains in `epoch`, from 0."""
        rest = epoch < self.warmup_head_epochs
        network.start_training(self.freeze_bn, self.freeze_stages, self.freeze_head, rest)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """In the flags' words."""

    num_epochs: int
    lr: float = 0.1
    lr_strategy: str = "piecewise_decay"
    lr_epochs: list = None
    warmup_epochs: float = 0.0


def add_optimizer_arguments(parser):
    """Adds the flags of OptimizerSettings and Schedule, and those that change what is trained."""
    # fmt: off
    add = parser.add_argument_group("optimizer").add_argument
    add("--num_epochs", type=number(int, low=1), default=120, help="epochs to train")
    add("--optimizer", choices=("momentum", "sgd", "adam", "adamw"), default="momentum", help="momentum: the original")
    add("--lr", type=number(float, low=0), default=0.1,
        help="learning rate; 0.1 is for momentum and a batch of 256 from scratch, 0.001 for fine-tuning; for adam and "
        "adamw 0.001 from scratch, 1e-5 to 1e-4 for fine-tuning")
    add("--head_lr_scale", type=number(float, low=0),
        help="learning rate of the head and the embedding layer, as a multiple of --lr; 10 suits fine-tuning, where "
        "they are the only parts that start from nothing (default: 1; of normsoftmax and arcmarginloss 10)")
    add("--lr_strategy", choices=("piecewise_decay", "cosine_decay", "constant"), default="piecewise_decay",
        help="piecewise_decay: a tenth after each of --lr_epochs; cosine_decay: to 0 at the last step")
    add("--lr_epochs", type=comma_separated(number(float, above=0)),
        help="epochs at which piecewise_decay steps down, such as 30,60,90 (default: a quarter, a half and three "
        "quarters of --num_epochs)")
    add("--warmup_epochs", type=number(float, low=0), default=0.0, help="epochs in which the rate rises to --lr")
    add("--weight_decay", type=number(float, low=0), default=1e-4, help="L2 penalty; for adamw the decoupled decay")
    add("--clip_norm", type=number(float, low=0), default=0.0,
        help="largest length of all gradients together, longer ones are shortened; 0: any")
    add("--clip_value", type=number(float, low=0), default=0.0,
        help="largest value of a gradient, such as 10 with proxies; 0: any")
    add("--freeze_stages", type=number(int, low=0), default=0,
        help="stages of the backbone, from the stem on, that don't train: quicker steps; 0: all train")
    add("--warmup_head_epochs", type=number(int, low=0), default=0,
        help="epochs in which the backbone is frozen and only head, embedding layer and what the loss owns train: a "
        "new head's first gradients spoil no pretrained weights")
    add("--ema_decay", type=number(float, low=0, high=1), default=0.0,
        help="keep an average of the weights, in which a step counts this share of the next: 0.99 to 0.9999; 0: "
        "none. The average is what is evaluated, and what eval.py and infer.py take")
    add("--freeze_bn", type=boolean, default=False, help="keep batch-norm statistics and scales: pays in fine-tuning")
    add("--dropout", type=number(float, low=0, high=1),
        help="probability in front of the head (default: the model's own: 0.5 for SE_ResNeXt, else 0)")
    add("--zero_init_residual", type=boolean, default=False, help="start blocks as identity: pays from scratch")
    add("--with_mem_opt", type=boolean, default=False,
        help="compute activations again in the backward pass: about half the memory, a third more time")
    add("--deterministic", type=boolean, default=False,
        help="on a GPU, take algorithms that give the same bits in each run rather than the fastest")
    add("--amp", choices=("off", "float16", "bfloat16"), default="off", help="mixed precision on a GPU")
    # fmt: on


# ---------------------------------------------------------------- the learning rate


def learning_rate(schedule, epoch):
    """The rate of a Schedule at `epoch`, a float: 1.5 is in the middle of the second epoch."""
    if epoch < schedule.warmup_epochs:
        return schedule.lr * epoch / schedule.warmup_epochs
    if schedule.lr_strategy == "cosine_decay":
        share = (epoch - schedule.warmup_epochs) / max(schedule.num_epochs - schedule.warmup_epochs, 1e-9)
        return schedule.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1)))
    if schedule.lr_strategy == "piecewise_decay":
        boundaries = schedule.lr_epochs or [schedule.num_epochs * share for share in (0.25, 0.5, 0.75)]
        return schedule.lr * 0.1 ** sum(epoch >= boundary for boundary in boundaries)
    return schedule.lr


def rate_of_step(schedule, epoch, step, steps):
    """The learning rate of step `step` of `steps`: that of its start; in the warmup, which begins at 0, its end."""
    if epoch + step / steps < schedule.warmup_epochs:
        return schedule.lr * min(epoch + (step + 1) / steps, schedule.warmup_epochs) / schedule.warmup_epochs
    return learning_rate(schedule, epoch + step / steps)


def report_rate(schedule, progress, before):
    """Says what another schedule than that of the run before makes of the learning rate where it goes on.

    Args:
        schedule: Schedule; progress: training.run.Progress, where it goes on.
        before: the description of the checkpoint that it goes on from.
    """
    names = [field.name for field in dataclasses.fields(Schedule) if field.name in before["args"]]
    earlier = dataclasses.replace(schedule, **{name: before["args"][name] for name in names})
    epoch, step = divmod(progress.epoch * progress.steps + progress.step, progress.steps)
    rate = rate_of_step(schedule, epoch, step, progress.steps)
    planned = rate_of_step(earlier, epoch, step, progress.steps)
    if epoch < schedule.num_epochs and not math.isclose(planned, rate):
        last = rate_of_step(earlier, before["epoch"], before["step"] - 1, before["steps"])
        print(
            f"note: the learning rate was {last:.6g} at the last step and is {rate:.6g} at the next (before: "
            f"{planned:.6g}): the schedule is computed anew from --lr, --lr_strategy, --lr_epochs, "
            f"--warmup_epochs and --num_epochs={schedule.num_epochs}"
        )


# ---------------------------------------------------------------- the optimizer


def build_optimizer(settings, network, objective):
    """The optimizer of all that is trained: the network's parameters and those that the objective owns.

    Args:
        settings: OptimizerSettings; network: EmbeddingNet; objective: losses.objective.Objective.
    """
    import paddle

    for layer in (network.head, network.embedding):
        for parameter in layer.parameters():
            parameter.optimize_attr["learning_rate"] = settings.head_lr_scale
    parameters = trained_parameters(network, objective)
    if not parameters:
        raise UserError("nothing is left to train: a smaller --freeze_stages, an --alpha above 0 or --embedding_size")
    if settings.clip_norm and settings.clip_value:
        raise UserError("--clip_norm and --clip_value: take one of them")
    clip = None
    if settings.clip_norm:
        clip = paddle.nn.ClipGradByGlobalNorm(settings.clip_norm)
    elif settings.clip_value:
        clip = paddle.nn.ClipGradByValue(settings.clip_value)
    common = {
        "learning_rate": settings.lr,
        "parameters": parameters,
        "weight_decay": settings.weight_decay,
        "grad_clip": clip,
    }
    # Less work in Python for each step, where Paddle has it; its kernels still go parameter by parameter. It needs all
    # gradients.
    fused = {"use_multi_tensor": process.on_gpu() and not settings.warmup_head_epochs}
    if settings.optimizer == "momentum":
        optimizer = paddle.optimizer.Momentum(momentum=0.9, **common, **fused)
    elif settings.optimizer == "adam":
        optimizer = paddle.optimizer.Adam(**common, **fused)
    else:
        kind = {"sgd": paddle.optimizer.SGD, "adamw": paddle.optimizer.AdamW}[settings.optimizer]
        optimizer = kind(**common)
    make_optimizer_state(optimizer, parameters)
    return optimizer


def trained_parameters(*layers):
    """The parameters of layers that are not frozen."""
    return [p for layer in layers for p in layer.parameters() if not p.stop_gradient]


def all_finite(tensors):
    """Whether float tensors are free of NaN and infinity; this waits for the device."""
    import paddle

    # A sum is finite where all it adds up is, and costs one small number a tensor.
    finite = paddle.isfinite(paddle.stack([tensor.sum() for tensor in tensors])).all()
    return bool(finite.numpy())  # unlike item(), numpy() lets other threads run while it waits for a GPU


def clear_gradients(optimizer):
    """Lets go of all gradients: the next backward writes them, rather than adding to zeros, and what gets none in the
    next step, as a backbone that is frozen, is left alone by the optimizer, weight decay included."""
    optimizer.clear_grad(set_to_zero=False)


def update_scale(scaler):
    """GradScaler.update after a step: halves or doubles the loss scale where that is due."""
    if scaler.is_enable():
        # It prints the scale, an array of one number: NumPy 2.4 makes a float of arrays without a length alone.
        scaler._scale = scaler._scale.reshape([])
        scaler.update()
        scaler._scale = scaler._scale.reshape([1])


# ---------------------------------------------------------------- its state in a checkpoint


def make_optimizer_state(optimizer, parameters):
    """Has a new optimizer make its state, which Paddle's make at their first step.

    From then on its state_dict says what a checkpoint must hold, and a run that goes on in another folder can save what
    it has loaded before it does a step.
    """
    import paddle

    rate = optimizer.get_lr()
    optimizer.set_lr(0.0)
    paddle.add_n([(parameter * 0).sum() for parameter in parameters]).backward()
    optimizer.step()
    clear_gradients(optimizer)
    optimizer.set_lr(rate)
    # That step has left weight decay in the momentum, and counts for Adam: back to what a first step begins with.
    first = {"beta1_pow_acc": 0.9, "beta2_pow_acc": 0.999}
    state = optimizer.state_dict()
    for key, value in state.items():
        state[key] = paddle.full_like(value, next((first[kind] for kind in first if kind in key), 0.0))
    optimizer.set_state_dict(state)


def optimizer_entries(named_parameters, optimizer):
    """{"<structured parameter name>/<accumulator>_0": (Paddle's name, tensor)} of an optimizer.

    Args:
        named_parameters: {structured name: parameter} of all that has an optimizer.

    Raises: RuntimeError for state of any other parameter.
    """
    # The longest generated name first, so that no name is mistaken for the beginning of another.
    names = sorted(((p.name, n) for n, p in named_parameters.items()), key=lambda pair: -len(pair[0]))
    entries = {}
    for key, value in optimizer.state_dict().items():
        if key == "master_weights":
            continue  # rebuilt from the weights, which are kept in float32
        owner = next((pair for pair in names if key.startswith(pair[0] + "_")), None)
        if owner is None:
            raise RuntimeError(f"the optimizer has {key}, of no parameter that is saved: it would be lost")
        # Paddle counts the optimizers of a process: velocity_0, velocity_1.
        accumulator = re.sub(r"\d+$", "0", key[len(owner[0]) + 1 :])
        entries[f"{owner[1]}/{accumulator}"] = key, value
    return entries


def load_optimizer_state(named_parameters, optimizer, saved, path):
    """Puts back what a checkpoint holds of an optimizer: all of it or, with a UserError, nothing.

    What it holds of parameters that are frozen now is left out.

    Args:
        optimizer: one of the same kind, after `make_optimizer_state`.
        saved: {"<structured parameter name>/<accumulator>_0": array}.
        path: where it is from, for messages.
    """
    import paddle

    entries = optimizer_entries(named_parameters, optimizer)
    unknown = [key for key in saved if key.rpartition("/")[0] not in named_parameters]
    if unknown:
        raise UserError(f"{path}: has {unknown[0]!r}, which this network lacks")
    check_part(saved, {key: value for key, (_, value) in entries.items()}, path)
    optimizer.set_state_dict({name: paddle.to_tensor(saved[key]) for key, (name, _) in entries.items()})
