"""The losses, by name: `--loss_name=emlloss` is losses/emlloss.py. Importing this does not import paddle.

A new loss is a file of its own and a row of LOSSES; a new flag is an entry of FLAGS.
"""

import collections
import dataclasses
import importlib
import math

from utility import UserError, number

# class_name: a layer in losses/<file>.py (default: <name>.py), of a metric loss see losses/objective.py.
# flags: {name in FLAGS: default}, which are arguments of its constructor; needs: what else is, of num_classes (of the
# training list) and embedding_size. balanced: whether its batches have --samples_each_class images of each class; else
# they are shuffled. alpha: default weight of the head's cross-entropy. head: the head that it is the loss of, None for
# a metric loss beside any head. lr_scale: default learning rate of what it owns, or of the weights of its head, as a
# multiple of --lr. memory: whether it can compare a batch with earlier ones.
Loss = collections.namedtuple(
    "Loss",
    "class_name flags needs balanced alpha head lr_scale memory file",
    defaults=[{}, (), True, 1.0, None, 1.0, False, None],
)

LOSSES = {
    "softmax": Loss("SoftmaxLoss", head="linear", balanced=False),
    "normsoftmax": Loss(
        "SoftmaxLoss", {"head_scale": 20.0}, head="cosine", balanced=False, lr_scale=10.0, file="softmax"
    ),
    "arcmarginloss": Loss(
        "ArcMarginLoss", {"margin": 0.15, "head_scale": 80.0}, head="cosine", balanced=False, lr_scale=10.0
    ),
    "tripletloss": Loss("TripletLoss", {"margin": 0.1, "triplet_mining": "random"}, memory=True),
    "quadrupletloss": Loss("QuadrupletLoss", {"margin": 0.1}),
    "emlloss": Loss("EmlLoss"),
    "npairsloss": Loss("NPairsLoss"),
    "marginloss": Loss("MarginLoss", {"margin": 0.2}, lr_scale=10.0, memory=True),
    "contrastiveloss": Loss("ContrastiveLoss", {"margin": 1.0}, memory=True),
    "multisimilarityloss": Loss("MultiSimilarityLoss", {"margin": 0.1, "scale": 50.0}, memory=True),
    "supconloss": Loss("SupConLoss", {"scale": 10.0}, memory=True),
    "circleloss": Loss("CircleLoss", {"margin": 0.4, "scale": 80.0}, memory=True),
    "proxyanchorloss": Loss(
        "ProxyAnchorLoss", {"margin": 0.1, "scale": 32.0}, ("num_classes", "embedding_size"),
        balanced=False, alpha=0.0, lr_scale=100.0,
    ),
}  # fmt: skip

MINING = ("random", "semihard", "hard", "distance")


def _defaults(flag):
    """What a flag is by default, in the words of its help."""
    values = collections.defaultdict(list)
    for name, loss in LOSSES.items():
        if flag in loss.flags:
            values[loss.flags[flag]].append(name)
    return "default: " + ", ".join(f"{value:g} of {' and '.join(names)}" for value, names in values.items())


# What losses have to choose, as arguments of argparse; each loss has its own default.
FLAGS = {
    "margin": {
        "type": number(float, low=0),
        "help": "of distances (0..2), of arcmarginloss an angle in radians, else of cosines; multisimilarityloss: of "
        f"its miner ({_defaults('margin')})",
    },
    "scale": {"type": number(float, above=0), "help": f"sharpness of a loss of cosines ({_defaults('scale')})"},
    "triplet_mining": {
        "choices": MINING,
        "help": "negatives of tripletloss: random is the original and the default; semihard: the closest beyond the "
        "positive; hard: farthest positive, closest negative; distance: drawn evenly over distances",
    },
}


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What is trained, in the flags' words; `options` are the values of FLAGS. None takes the loss's own default."""

    loss_name: str
    alpha: float = None
    label_smoothing: float = 0.0
    head_scale: float = None
    loss_lr_scale: float = None
    memory_size: int = 0
    memory_start_epoch: int = 0
    options: dict = dataclasses.field(default_factory=dict)


def row(name):
    """The Loss of `name`. Raises: UserError for an unknown one."""
    if name not in LOSSES:
        raise UserError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}")
    return LOSSES[name]


def trains_head(flags):
    """Whether the softmax head learns, of settled {name: value}: with alpha 0, a metric loss leaves it as it began."""
    return row(flags["loss_name"]).head is not None or flags["alpha"] != 0


def settle(flags):
    """{name: value} of all flags, with the loss's own defaults for those that are None and concern it.

    Raises: UserError where another head, no memory or another margin is asked for than the loss can have.
    """
    name = flags["loss_name"]
    loss = row(name)
    own = {**loss.flags, "alpha": loss.alpha, "loss_lr_scale": loss.lr_scale, "head_lr_scale": 1.0}
    if loss.head:
        if flags["head"] not in (None, loss.head):
            raise UserError(f"--head={flags['head']}: {name} is the loss of a {loss.head} head")
        own.update(head=loss.head, head_lr_scale=loss.lr_scale)
    if flags["memory_size"] and not loss.memory:
        known = ", ".join(other for other in LOSSES if LOSSES[other].memory)
        raise UserError(f"--memory_size: {name} can't compare a batch with earlier ones; these can: {known}")
    if name == "arcmarginloss" and (flags["margin"] or 0) > math.pi:
        raise UserError(
            f"--margin={flags['margin']:g}: of {name} an angle in radians, at most 3.14: 0.5 are 29 degrees"
        )
    return {**flags, **{flag: value for flag, value in own.items() if flags[flag] is None}}


def learns_itself(loss):
    """Whether a metric loss, a row, has parameters of its own."""
    return not loss.head and (loss.lr_scale != 1 or bool(loss.needs))


def without_effect(flags, typed):
    """The names of those flags in `typed` that don't concern the loss, in the order of the help."""
    loss = row(flags["loss_name"])
    idle = [flag for flag in FLAGS if flag not in loss.flags]
    if loss.head:
        idle += ["alpha"]
    if not learns_itself(loss):
        idle += ["loss_lr_scale"]
    if not loss.balanced:
        idle += ["samples_each_class", "small_classes"]
    if not flags["memory_size"]:
        idle += ["memory_start_epoch"]
    return [flag for flag in idle if flag in typed]


def build_loss(settings, **given):
    """The metric loss of LossSettings, a layer (see losses/objective.py), or None for the loss of a head.

    Args:
        given: num_classes and embedding_size, for the losses that need them.

    Raises: UserError for an unknown name.
    """
    loss = row(settings.loss_name)
    if loss.head:
        return None
    needed = {need: given[need] for need in loss.needs}
    layer = _layer(settings.loss_name)(**_options(settings), **needed)
    if settings.memory_size:
        from losses.memory import MemoryLoss

        layer = MemoryLoss(layer, settings.memory_size, given["embedding_size"], settings.memory_start_epoch)
    return layer


def build_head_loss(settings):
    """The loss of the head, a layer, forward(logits float [N, C], label int64 [N]) -> float32 scalar."""
    from losses.softmax import SoftmaxLoss

    if settings.loss_name == "arcmarginloss":
        return _layer("arcmarginloss")(**_options(settings), label_smoothing=settings.label_smoothing)
    return SoftmaxLoss(settings.label_smoothing)


def _layer(name):
    return getattr(importlib.import_module(f"losses.{LOSSES[name].file or name}"), LOSSES[name].class_name)


def _options(settings):
    """{name: value} of the flags that the loss's constructor takes."""
    given = {**settings.options, "head_scale": settings.head_scale}
    flags = LOSSES[settings.loss_name].flags
    return {flag: default if given.get(flag) is None else given[flag] for flag, default in flags.items()}


def add_loss_arguments(parser):
    """Adds the flags that describe the loss."""
    # fmt: off
    add = parser.add_argument_group("loss").add_argument
    add("--loss_name", choices=list(LOSSES), default="tripletloss",
        help="softmax, normsoftmax and arcmarginloss: the head alone, of class scores or of cosines")
    for name, arguments in FLAGS.items():
        add(f"--{name}", **arguments)
    add("--alpha", type=number(float, low=0),
        help="weight of the head's cross-entropy beside the metric loss (default: 1, of proxyanchorloss 0); 0 leaves "
        "the head untrained")
    add("--label_smoothing", type=number(float, low=0, high=1), default=0.0,
        help="share of the cross-entropy's target that is spread over all classes; 0.1 often pays")
    add("--samples_each_class", type=number(int, low=2), default=4,
        help="images of each class in a batch of a metric loss; must divide the batch (see --small_classes)")
    add("--loss_lr_scale", type=number(float, low=0),
        help="learning rate of what a loss learns itself, as a multiple of --lr (default: 100 for the proxies of "
        "proxyanchorloss, 10 for the boundary of marginloss)")
    add("--memory_size", type=number(int, low=0, high=2**20), default=0,
        help="earlier embeddings that a batch is compared with, too; 0: none. For "
        + ", ".join(name for name in LOSSES if LOSSES[name].memory))
    add("--memory_start_epoch", type=number(int, low=0), default=0,
        help="first epoch with the memory: before, embeddings may change too fast")
    # fmt: on
