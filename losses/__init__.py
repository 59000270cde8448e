"""The losses, by name: `--loss_name=emlloss` is losses/emlloss.py. Importing this does not import paddle.

A new loss is a file of its own and a row of METRIC_LOSSES; a new flag is an entry of FLAGS.
"""

import collections
import dataclasses
import importlib

from utility import UserError, number

# class_name: a layer in losses/<name>.py, see losses/objective.py. flags: those of FLAGS that are arguments of its
# constructor; needs: what else is, of num_classes (of the training list) and embedding_size.
Loss = collections.namedtuple("Loss", "class_name flags needs", defaults=[(), ()])

METRIC_LOSSES = {
    "tripletloss": Loss("TripletLoss", ("margin", "triplet_mining")),
    "quadrupletloss": Loss("QuadrupletLoss", ("margin",)),
    "emlloss": Loss("EmlLoss"),
}
LOSSES = ("softmax", *METRIC_LOSSES)

MINING = ("random", "semihard", "hard", "distance")
# What losses have to choose, as arguments of argparse.
FLAGS = {
    "margin": {
        "type": number(float, low=0),
        "default": 0.1,
        "help": "of tripletloss and quadrupletloss: a distance, 0..2",
    },
    "triplet_mining": {
        "choices": MINING,
        "default": "random",
        "help": "negatives of tripletloss: random is the original; semihard: the closest beyond the positive; hard: "
        "farthest positive, closest negative; distance: drawn evenly over distances",
    },
}


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What is trained, in the flags' words; `options` are the values of FLAGS."""

    loss_name: str
    alpha: float = 1.0
    label_smoothing: float = 0.0
    options: dict = dataclasses.field(default_factory=dict)


def build_loss(settings, **given):
    """The metric loss of LossSettings, a layer (see losses/objective.py), or None for softmax.

    Args:
        given: num_classes and embedding_size, for the losses that need them.

    Raises: UserError for an unknown name.
    """
    name = settings.loss_name
    if name not in LOSSES:
        raise UserError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}")
    if name == "softmax":
        return None
    loss = METRIC_LOSSES[name]
    arguments = {flag: settings.options.get(flag, FLAGS[flag]["default"]) for flag in loss.flags}
    arguments.update({need: given[need] for need in loss.needs})
    return getattr(importlib.import_module(f"losses.{name}"), loss.class_name)(**arguments)


def add_loss_arguments(parser):
    """Adds the flags that describe the loss."""
    # fmt: off
    add = parser.add_argument_group("loss").add_argument
    add("--loss_name", choices=LOSSES, default="tripletloss", help="softmax: the classifier alone")
    for name, arguments in FLAGS.items():
        add(f"--{name}", **arguments)
    add("--alpha", type=number(float, low=0), default=1.0,
        help="weight of the softmax head's cross-entropy beside the metric loss; 0 leaves the head untrained")
    add("--label_smoothing", type=number(float, low=0, high=1), default=0.0,
        help="share of the cross-entropy's target that is spread over all classes; 0.1 often pays")
    add("--samples_each_class", type=number(int, low=2), default=4,
        help="images of each class in a batch of a metric loss; must divide the batch")
    # fmt: on
