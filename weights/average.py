"""Averages the weights of networks that have their start in common, and writes a checkpoint.

    python weights/average.py output/ResNet50/latest imagenet --shares=0.7,0.3 --output_dir=averaged
    python eval.py --pretrained_model=averaged

Training makes a network better at the classes that it sees, and lets it forget what tells others apart: the average of
what it has become and what it was, such as imagenet, often finds classes that training never saw better than either
(WiSE-FT, Wortsman et al., arXiv 2109.01903). So may that of runs that differ by their seeds or flags (model soups,
Wortsman et al., arXiv 2203.05482). Nothing is trained: it takes seconds. Choose the shares on classes held out from
training (data/split.py --holdout), not on those of the test.

The first checkpoint says what the network is. The backbone is averaged; embedding layer, pooling and head, too, where
all are checkpoints of the same classes and settings, else they are the first's.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from runtime import packages

packages.check()

import numpy as np

import files
import weights
from models import IN_WEIGHTS, Settings
from runtime import process
from utility import UserError, comma_separated, make_parser, number, parse_typed, plain
from weights import checkpoint


def read_networks(paths):
    """Reads weights, each as the network that the first of them, a checkpoint, is of.

    Returns: ([{name: float32 array}] of the whole networks, the names to average, the first's description).
    Raises: UserError where one is none, or none of that network.
    """
    first = None if paths[0] == "imagenet" else weights.read_weights(paths[0])
    if not first or not first.state:
        raise UserError(f"{paths[0]}: not a checkpoint of train.py: the first says what the network is")
    settings = Settings.settle({}, first.state["settings"], fixed=()).with_classes(weights.layer_size(first, "head"))
    weights.check_layers(first, settings)
    found = [first, *(weights.read_weights(path, settings.model) for path in paths[1:])]
    states = []
    for one in found:
        model = one.state["settings"]["model"] if one.state else settings.model
        if model != settings.model:
            raise UserError(f"{one.file_name}: of {model}, and {paths[0]} of {settings.model}")
        network = settings.build()
        print(weights.load_weights(network, one, settings.model, head="fit" if states else "must"))
        states.append({name: value.numpy() for name, value in network.state_dict().items()})
    names = list(states[0])
    if not all(_are_alike(one, first) for one in found):
        names = [name for name in names if name.startswith("backbone.")]
    elif len({one.state["args"].get("seed") for one in found}) > 1:
        own = [layer for layer in ("embedding", "head") if f"{layer}.weight" in names]
        if own != ["head"] or checkpoint.head_was_trained(first.state):
            layers = " and ".join(own)
            print(f"note: runs of several seeds: their average of what began at random ({layers}) may mean little")
    return states, names, first.state


def _are_alike(*pair):
    """Whether two Weights are of networks whose every layer means the same; the second is a checkpoint's."""
    if not pair[0].state:
        return False
    one, other = (
        [
            some.state["labels"],
            weights.layer_size(some, "head"),
            checkpoint.head_was_trained(some.state),
            [getattr(Settings.settle({}, some.state["settings"], ()), name) for name in IN_WEIGHTS],
        ]
        for some in pair
    )
    return one == other


def average(states, shares, names):
    """The first of `states` with the tensors `names` averaged over all.

    Args:
        states: [{name: float32 array}], the arrays of a name of one shape; shares: of each, float, 1 together.

    Returns: {name: float32 array}
    """
    mean = dict(states[0])
    for name in names:
        parts = (share * state[name].astype(np.float64) for share, state in zip(shares, states))
        mean[name] = sum(parts).astype(np.float32)
    return mean


def check_shares(shares, count):
    """The shares of `count` weights; equal where None are given. Raises: UserError where they are no average."""
    if shares is None:
        return [1 / count] * count
    if len(shares) != count:
        raise UserError(f"--shares: {len(shares)} numbers for {count} weights")
    if abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"--shares: they come to {sum(shares):g} rather than 1")
    return shares


def check_folder(folder):
    """Raises a UserError where the output may not go to `folder`: only an earlier one, or an empty one, is replaced."""
    if os.path.lexists(folder) and not _is_average(folder):
        raise UserError(f"--output_dir={folder}: is there already, and no earlier average: give another name")
    files.make_directory(os.path.dirname(os.path.realpath(folder)))


def _is_average(folder):
    if not os.path.isdir(folder) or files.foreign_entry(folder, checkpoint.CONTENT):
        return False
    if not os.listdir(folder):
        return True
    try:
        return bool(checkpoint.read_description(folder).get("averaged"))
    except UserError:
        return False


def build_parser():
    parser = make_parser(__doc__)
    parser.usage = "%(prog)s CHECKPOINT WEIGHTS [WEIGHTS ...] --output_dir=DIR [--shares=X,X,...]"
    parser.add_argument("first", metavar="CHECKPOINT", help="a checkpoint directory of train.py")
    parser.add_argument(
        "others", metavar="WEIGHTS", nargs="+", help="others, or what else --pretrained_model of train.py takes"
    )
    parser.add_argument(
        "--shares",
        type=comma_separated(number(float, low=0, high=1)),
        help="of each in the average, such as 0.7,0.3; 1 together (default: equal)",
    )
    parser.add_argument("--output_dir", required=True, help="folder for the new checkpoint")
    return parser


def main():
    args, _ = parse_typed(build_parser())
    paths, folder = [args.first, *args.others], os.path.normpath(args.output_dir)
    shares = check_shares(args.shares, len(paths))
    check_folder(folder)
    process.start_paddle()
    states, names, description = read_networks(paths)
    statistics = [name for name in names if name.endswith(("._mean", "._variance"))]
    if any(not np.array_equal(state[name], states[0][name]) for state in states[1:] for name in statistics):
        print(
            "note: their batch-norm statistics differ, and no average is the right one: train with --freeze_bn=True",
            file=sys.stderr,
        )
    how = " + ".join(f"{share:g} {plain(path, 100)}" for share, path in zip(shares, paths))
    parts, description = {"model": average(states, shares, names)}, {**description, "averaged": how}
    checkpoint.write_checkpoint(folder, parts, description, lambda: files.remove_folder(folder, checkpoint.CONTENT))
    of = "backbone" if len(names) < len(states[0]) else "network"
    print(f"wrote {plain(folder)}: {of} averaged: {how}")


if __name__ == "__main__":
    process.run_script(main)
