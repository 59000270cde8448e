"""What every file may use: the error that a user can mend, and the types of flags. Imports nothing of ours."""

import argparse
import dataclasses
import json
import math


class UserError(Exception):
    """A mistake that the user can mend; its message is one line that says how. Scripts exit with status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser(description):
    """An ArgumentParser whose --help shows defaults and keeps line breaks, and whose errors are UserErrors."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            # A default of None or "" is explained by the help text itself.
            return action.help if action.default in (None, "") else super()._get_help_string(action)

    return _Parser(description=description, formatter_class=Formatter, allow_abbrev=False)


def parse_typed(parser):
    """-> (the flags of the command line, the names of those that were typed and not left at their default)"""
    args = parser.parse_args()
    defaults = [action.default for action in parser._actions]
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    typed = set(vars(parser.parse_args()))
    for action, default in zip(parser._actions, defaults):
        action.default = default
    return args, typed


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

    return parse


def comma_separated(parse):
    """The type of a flag that takes a list, such as 1,2,4,8."""

    def parse_list(text):
        values = [parse(item) for item in text.split(",") if item.strip()]
        if not values:
            raise argparse.ArgumentTypeError("expected numbers with commas between them")
        return values

    return parse_list


def print_arguments(flags):
    """Prints the flags in force, {name: value}, as the original scripts did."""
    print("-----------  Configuration Arguments -----------")
    for name, value in sorted(flags.items()):
        print(f"{name}: {plain(value, 1000)}")
    print("------------------------------------------------", flush=True)


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


def duration(seconds):
    """Seconds as h:mm:ss."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
