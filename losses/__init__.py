"""The losses, by name: `--loss_name=emlloss` is losses/emlloss.py. Importing this does not import paddle."""

import importlib

from utility import UserError, number

METRIC_LOSSES = {"tripletloss": "TripletLoss", "quadrupletloss": "QuadrupletLoss", "emlloss": "EmlLoss"}
LOSSES = ("softmax", *METRIC_LOSSES)
MINING = ("random", "semihard", "hard", "distance")


def build_loss(name, margin=0.1, mining="random"):
    """The metric loss `name`: a layer (embedding [N, D], label int64 [N]) -> float32 scalar; None for softmax.

    Raises: UserError for an unknown name.
    """
    if name not in LOSSES:
        raise UserError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}")
    if name == "softmax":
        return None
    arguments = {"tripletloss": {"margin": margin, "mining": mining}, "quadrupletloss": {"margin": margin}}
    return getattr(importlib.import_module(f"losses.{name}"), METRIC_LOSSES[name])(**arguments.get(name, {}))


def add_loss_arguments(parser):
    """Adds the flags that describe the loss."""
    # fmt: off
    add = parser.add_argument_group("loss").add_argument
    add("--loss_name", choices=LOSSES, default="tripletloss", help="softmax: the classifier alone")
    add("--margin", type=number(float, low=0), default=0.1, help="of tripletloss and quadrupletloss: a distance, 0..2")
    add("--triplet_mining", choices=MINING, default="random",
        help="negatives of tripletloss: random is the original; semihard: the closest beyond the positive; hard: "
        "farthest positive, closest negative; distance: drawn evenly over distances")
    add("--alpha", type=number(float, low=0), default=1.0,
        help="weight of the softmax head's cross-entropy beside the metric loss; 0 leaves the head untrained")
    add("--label_smoothing", type=number(float, low=0, high=1), default=0.0,
        help="share of the cross-entropy's target that is spread over all classes; 0.1 often pays")
    add("--samples_each_class", type=number(int, low=2), default=4,
        help="images of each class in a batch of a metric loss; must divide the batch")
    # fmt: on
