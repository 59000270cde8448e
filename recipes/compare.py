"""Compares runs by the files that eval.py --output_json wrote: a table, and how sure the differences are.

    python recipes/compare.py a.json b.json ...

Runs that differ by their seeds alone are one row, with mean and standard deviation. Each row is compared with the first
one class by class: the interval is where 95 % of the differences lie when the classes of the test are drawn again.
"""

import collections
import math
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runtime import packages

packages.check(("numpy",))

import json

import numpy as np

import files
import utility
from retrieval.figures import interval
from runtime import process
from utility import UserError, plain, say

# What says where a run was or what it printed rather than how it was made. Lists are compared by what is in them.
ASIDE = {
    "seed", "model_save_dir", "checkpoint", "output_json", "quiet", "num_workers", "log_every", "log_to", "use_gpu",
    "train_list", "val_list", "gallery_list", "data_dir", "save_whiten", "report", "overwrite", "force", "keep",
    "recall_at", "save_every", "batch_size", "test_batch_size",
}  # fmt: skip
COLUMN = re.compile(r"recall@[0-9]{1,9}|MAP@R|mAP")
PAIRED = ("recall@1", "MAP@R")

# One file. figures: {name: float}; list: of what is measured, equal for the same list; classes: {"label", "queries",
# *PAIRED}: arrays [C], or None in files of older versions; method: equal for runs that differ by their seeds alone;
# seed: as JSON has it, or None.
Run = collections.namedtuple("Run", "path figures list classes method seed")


def read_run(path):
    """Run, of a file of eval.py --output_json. Raises: UserError for any other."""
    try:
        content = files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    foreign = UserError(f"{path}: not a file that eval.py --output_json wrote")
    if not (isinstance(content, dict) and isinstance(content.get("args"), dict)):
        raise foreign
    figures = {name: value for name, value in content.items() if COLUMN.fullmatch(name)}
    lists = [content.get("list"), content.get("gallery")]
    trained, averaged = content.get("trained_with", {}), content.get("averaged", "")
    if not (
        figures
        and all(_is_share(value) for value in figures.values())
        and all(value is None or isinstance(value, str) for value in lists)
        and isinstance(trained, dict)
        and isinstance(averaged, str)
    ):
        raise foreign
    classes = content.get("classes")
    if classes is not None:
        classes = _read_classes(classes)
        if classes is None:
            raise foreign
    seed = trained.get("seed", content["args"].get("seed"))
    return Run(path, figures, lists, classes, _method(content["args"], trained, averaged), seed)


def _is_share(value):
    return type(value) in (int, float) and 0 <= value <= 1


def _is_integer(value, low, high):
    return type(value) is int and low <= value <= high


def _read_classes(classes):
    """{name: array [C]} of the classes in a file; None where they are none."""
    names = ("label", "queries", *PAIRED)
    if not (isinstance(classes, dict) and all(isinstance(classes.get(name), list) for name in names)):
        return None
    labels, counts, *means = (classes[name] for name in names)
    if not (
        labels
        and len({len(classes[name]) for name in names}) == 1
        and all(_is_integer(value, -(2**63), 2**63 - 1) for value in labels)
        and all(_is_integer(value, 1, 2**31) for value in counts)
        and all(_is_share(value) for values in means for value in values)
    ):
        return None
    return {name: np.array(classes[name]) for name in names}


def _method(flags, trained, averaged):
    """How a run was made and measured, a text.

    Args:
        flags: of eval.py; trained: of train.py, {} where they are not known: then the weights' path stands for them.
        averaged: shares and paths, "0.7 a/latest + 0.3 imagenet", or "".
    """
    flags = {name: value for name, value in flags.items() if name not in ASIDE}
    if averaged:
        flags.pop("pretrained_model", None)  # the folder of an average, which says nothing
    elif trained and isinstance(flags.get("pretrained_model"), str):
        flags["pretrained_model"] = os.path.basename(os.path.normpath(flags["pretrained_model"]))  # best, latest, ...
    trained = {name: value for name, value in trained.items() if name not in ASIDE}
    parts = (part.partition(" ") for part in averaged.split(" + "))
    averaged = [(share, os.path.basename(path)) for share, _, path in parts]
    return json.dumps([flags, trained, averaged], sort_keys=True)


def grouped(runs):
    """The runs in groups, lists of those with one method and one list, in the order of their first.

    Raises: UserError where two of a group have one seed and the same figures: they are one.
    """
    groups = {}
    for run in runs:
        group = groups.setdefault((run.method, *run.list), [])
        for other in group:
            if (other.seed, other.figures) == (run.seed, run.figures):
                raise UserError(f"{other.path} and {run.path}: one run, measured twice: leave one of them out")
        group.append(run)
    return list(groups.values())


def name_of(group):
    more = len(group) - 1
    return plain(group[0].path, 100).replace("|", "\\|") + (f" and {more} more" if more else "")


def table(groups):
    """The lines of a table of groups of runs, in percent; spreads are standard deviations (N - 1)."""
    runs = [run for group in groups for run in group]
    columns = [name for name in runs[0].figures if all(name in run.figures for run in runs)]
    lines = [f"| run | runs | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for group in groups:
        cells = []
        for name in columns:
            values = [100 * run.figures[name] for run in group]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(group) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}")
        lines.append(f"| {name_of(group)} | {len(group)} | {' | '.join(cells)} |")
    return lines


def difference(first, other):
    """How another group of runs differs from the first, by class: a text, or why it can't be said."""
    runs = [*first, *other]
    if any(run.list != runs[0].list for run in runs):
        return "not compared: of another list"
    if any(run.classes is None or run.list[0] is None for run in runs):
        return "not compared: eval.py of an older version wrote no figures of each class: measure again"
    for name in ("label", "queries"):
        if any(not np.array_equal(run.classes[name], runs[0].classes[name]) for run in runs):
            return "not compared: not the same pictures could be read"
    counts, parts = runs[0].classes["queries"], []
    for name in PAIRED:
        means = [np.mean([run.classes[name] for run in group], axis=0) for group in (first, other)]
        sums = (means[1] - means[0]) * counts
        low, high = interval(sums, counts) or [math.nan] * 2
        parts.append(f"{name} {100 * sums.sum() / counts.sum():+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]")
    return f"{', '.join(parts)} (95 %, over {len(counts)} classes)"


def main():
    parser = utility.make_parser(__doc__)
    parser.usage = "%(prog)s a.json b.json ..."
    parser.add_argument("files", nargs="+", help="what eval.py --output_json wrote")
    paths = parser.parse_args().files
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UserError("a file is named twice: it is one run")
    groups = grouped([read_run(path) for path in paths])
    print("\n".join(table(groups)))
    if len(groups) == 1 and len(paths) == 2:  # two seeds: how much is chance
        groups = [[run] for run in groups[0]]
    for group in groups[1:]:
        say(f"{name_of(group)} minus {name_of(groups[0])}: {difference(groups[0], group)}")


if __name__ == "__main__":
    process.run_script(main)
