"""What every file may use: the error that a user can mend, and the types of flags. Imports nothing of ours."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import textwrap


class UserError(Exception):
    """A mistake that the user can mend; its message is one line that says how. Scripts exit with status 2."""


# What other tools call a flag.
ALIASES = {
    "arch": "model", "backbone": "model", "network": "model", "pretrained": "pretrained_model", "resume": "checkpoint",
    "epochs": "num_epochs", "epoch": "num_epochs", "max_epochs": "num_epochs", "learning_rate": "lr", "k": "recall_at",
    "wd": "weight_decay", "bs": "train_batch_size", "batch": "train_batch_size", "batchsize": "train_batch_size",
    "workers": "num_workers", "gpu": "use_gpu", "cuda": "use_gpu", "device": "use_gpu", "fp16": "amp",
    "topk": "recall_at", "recall_ks": "recall_at", "ks": "recall_at", "neighbors_file": "neighbours_file",
    "faiss": "index",
    "size": "image_shape", "image_size": "image_shape", "img_size": "image_shape", "root": "data_dir",
    "bf16": "precision", "amp": "precision",
    "output": "model_save_dir", "output_dir": "model_save_dir", "save_dir": "model_save_dir", "top_k": "recall_at",
    "gallery": "gallery_list", "query_list": "val_list", "images": "input", "features": "feature_file",
    "loss": "loss_name",
    "export": "export_dir", "embedding_dim": "embedding_size", "dim": "embedding_size", "data": "val_list",
}  # fmt: skip
# What others call a value.
OTHER_VALUES = {
    "fp16": "float16", "half": "float16", "fp32": "float32", "bf16": "bfloat16", "bfloat16": "bf16",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors that name the flag or the value that was probably meant."""

    def parse_known_args(self, words=None, namespace=None):
        return super().parse_known_args(_at_home(words), namespace)

    def parse_args(self, words=None, namespace=None):
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(self._unknown(plain(unknown[0])))
        return found

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def _unknown(self, text):
        if not text.startswith("-"):
            return f"unrecognized arguments: {text}: flags are written --flag=value"
        name = text.lstrip("-").partition("=")[0].replace("-", "_").lower()
        known = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        close = [ALIASES.get(name), *difflib.get_close_matches(name, known, n=1, cutoff=0.8)]
        return f"unrecognized arguments: {text}" + _did_you_mean(
            next((known[dest] for dest in close if dest in known), None)
        )

    def _check_value(self, action, value):
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        bare = {_bare(choice): choice for choice in choices}
        wanted = _bare(str(value))
        begin = [name for name in bare if len(wanted) > 2 and name.startswith(wanted)]
        close = [name for name in (wanted, OTHER_VALUES.get(wanted)) if name in bare] + sorted(begin, key=len)
        close += difflib.get_close_matches(wanted, bare, n=1)
        meant = _did_you_mean(bare[close[0]] if close else None)
        message = f"{plain(value)!r} is none of {', '.join(choices)}{meant}"
        raise argparse.ArgumentError(action, message)


def _at_home(words):
    """The words of a command line (None: of this one's), --flag=~/path with the home folder in it.

    A shell puts it in only where a word begins with ~.
    """
    words = sys.argv[1:] if words is None else words
    home = os.path.expanduser("~/")
    return [re.sub("^(--[a-z_]+=)~/", lambda match: match[1] + home, word) for word in words]


def _bare(text):
    return text.lower().replace("-", "").replace("_", "")


def _did_you_mean(text):
    return f"; did you mean {text}?" if text else ""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, keeps the lines of examples in descriptions, and has long choices in the help, not before it."""

    def _fill_text(self, text, width, indent):
        parts = text.strip().split("\n\n")
        return "\n\n".join(part if part[0] == " " else textwrap.fill(part, width) for part in parts)

    def _get_help_string(self, action):
        text = action.help or ""
        if _has_many_choices(action):
            text += f"; one of {', '.join(map(str, action.choices))}"
        if action.default in (None, "", argparse.SUPPRESS) or "%(default)" in text:
            return text  # a default of None or "" is explained by the help text itself
        return f"{text} (default: {as_typed(action.default)})"

    def _metavar_formatter(self, action, default_metavar):
        if action.metavar is None and (action.choices is None or _has_many_choices(action)):
            short = "NAME" if action.choices else getattr(action.type, "metavar", "...")
            return lambda size: (short,) * size
        return super()._metavar_formatter(action, default_metavar)


def as_typed(default):
    """A default of a flag in the form in which it could be typed."""
    return ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def _has_many_choices(action):
    return action.choices is not None and len(",".join(map(str, action.choices))) > 30


def make_parser(description):
    """An ArgumentParser whose --help shows defaults and keeps line breaks, and whose errors are UserErrors."""
    usage = "%(prog)s [--flag=value ...]"
    return _Parser(description=description, usage=usage, formatter_class=_Formatter, allow_abbrev=False)


def start_here(parser, names):
    """Moves the flags `names` to a group of their own, in front of all others."""
    group = parser.add_argument_group("start here", "what most commands name")
    for other in parser._action_groups[:-1]:
        moved = [action for action in other._group_actions if action.dest in names]
        other._group_actions = [action for action in other._group_actions if action not in moved]
        group._group_actions += moved
    group._group_actions.sort(key=lambda action: names.index(action.dest))
    parser._action_groups.insert(0, parser._action_groups.pop())


def parse_typed(parser):
    """-> (the flags of the command line, the names of those that were typed and not left at their default)

    A flag that is given twice with different values is said: the last one counts.
    """
    args = parser.parse_args()
    defaults = [action.default for action in parser._actions]
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    typed = set(vars(parser.parse_args()))
    for action, default in zip(parser._actions, defaults):
        action.default = default
    for flag, values in _repeated(sys.argv[1:]).items():
        print(f"note: {flag} is given {len(values)} times: the last, {plain(values[-1])}, counts")
    return args, typed


def _repeated(words):
    """{flag: [value]} of the flags that have several different values in the words of a command line."""
    given, values = {}, []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            values = [value] if equals else []
            given.setdefault(flag, []).append(values)
        else:
            values.append(word)
    values = {flag: [" ".join(words) for words in lists] for flag, lists in given.items()}
    return {flag: texts for flag, texts in values.items() if len(set(texts)) > 1}


def check_values(parser, values, source):
    """Raises a UserError where values out of a file are none that the flags of those names can have.

    Args:
        values: {flag: value}; names that are no flag's, as of other versions, are passed over.
        source: the file, for messages.
    """
    for action in parser._actions:
        if action.dest in values and not _can_be(action, values[action.dest]):
            raise UserError(f"{source}: {action.dest} is {plain(json.dumps(values[action.dest]), 50)}")


def _can_be(action, value):
    """Whether a flag can have a value: it comes out of the flag's type again when it is typed."""
    if value is None:
        return action.default is None
    if action.choices:
        return type(value) is type(action.choices[0]) and value in action.choices
    if action.type in (None, boolean):
        return isinstance(value, bool if action.type else str)
    text = ",".join(str(item) for item in value) if isinstance(value, list) else str(value)
    try:
        typed = action.type(text)
    except argparse.ArgumentTypeError:
        return False
    return typed == value and not isinstance(value, str)


def boolean(text):
    """The type of a True/False flag."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return values[text.lower()]


boolean.metavar = "True|False"


def number(kind, low=None, above=None, high=None):
    """The type of a numeric flag: `kind` is int or float, the range `low <= x`, `above < x`, `x <= high`."""

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, not {text!r}") from None
        if kind is int and not -(2**31) <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{plain(text, 50)} does not fit into 32 bits")
        finite = kind is int or math.isfinite(value)
        if (
            not finite
            or (low is not None and value < low)
            or (above is not None and value <= above)
            or (high is not None and value > high)
        ):
            limits = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (above is not None)
            limits += [f"at most {high}"] * (high is not None) + ["finite"] * (not finite)
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {' and '.join(limits)}")
        return value

    parse.metavar = "N" if kind is int else "X"
    return parse


def comma_separated(parse):
    """The type of a flag that takes a list, such as 1,2,4,8."""

    def parse_list(text):
        values = [parse(item) for item in text.split(",") if item.strip()]
        if not values:
            raise argparse.ArgumentTypeError("expected numbers with commas between them")
        return values

    parse_list.metavar = f"{getattr(parse, 'metavar', '...')},..."
    return parse_list


def print_arguments(flags, parser, where="--help has them"):
    """Prints the flags in force as the original scripts did, those at their defaults counted in one line.

    Args:
        flags: {name: value}; parser: whose flags they are.
        where: what has the others.

    Does nothing with --quiet.
    """
    if flags["quiet"]:
        return
    defaults = {action.dest: action.default for action in parser._actions}
    changed = [name for name, value in flags.items() if name not in defaults or value != defaults[name]]
    print("-----------  Configuration Arguments -----------")
    for name in sorted(changed):
        print(f"{name}: {plain(flags[name], 1000)}")
    print(f"and {len(flags) - len(changed)} others at their defaults: {where}")
    print("------------------------------------------------", flush=True)


def note_idle(idle, typed):
    """Says which of the typed flags have no effect in this run.

    Args:
        idle: {name: why}, of any flags; typed: the names of those that were typed.
    """
    found = [f"--{name} ({why})" for name, why in idle.items() if name in typed]
    if found:
        print(f"note: without effect here: {', '.join(found)}")


def fill(record, args, **values):
    """Makes a record, a dataclass, of those flags in `args` (a Namespace) that it has; `values` override them."""
    names = [field.name for field in dataclasses.fields(record)]
    return record(**{**{name: getattr(args, name) for name in names if hasattr(args, name)}, **values})


def plain(text, most=200):
    """Text from outside, such as a file's name, fit for one line on a terminal: what a terminal would obey is escaped,
    and of more than about `most` characters the middle is left out."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in _ends(str(text), most))
    return _ends(text, most)


def _ends(text, most):
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[len(text) - most // 2 :]}"


def parse_row(row):
    """What a row of a list file says: [path, label], without the white space around them; [path] without a label."""
    return row.strip().rsplit(None, 1)


def say(text):
    """Prints text with names from outside in it, as one line."""
    print(plain(text, 2000), flush=True)


def number_of(count, one, many=None):
    """A count in words: 1 class, 2 classes. `many`: the plural, where it is not `one` and an s."""
    return f"{count} {one}" if count == 1 else f"{count} {many or one + 's'}"


def duration(seconds):
    """Seconds as h:mm:ss."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
