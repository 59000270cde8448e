"""Writes docs/flags.md from the parsers of train.py, eval.py and infer.py.

python docs/make_flags.py
"""

import argparse
import contextlib
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

SCRIPTS = ("train", "eval", "infer")


class _Caught(Exception):
    pass


def parser_of(script):
    """The ArgumentParser that a script makes, caught when it is about to read the command line."""
    caught = []

    def catch(parser, *_):
        caught.append(parser)
        raise _Caught

    kept, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, catch
    try:
        with contextlib.suppress(_Caught):
            __import__(script).parse_args()
    finally:
        argparse.ArgumentParser.parse_args = kept
    return caught[0]


def rows(parser):
    """Yields the lines of a table for each group of flags."""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        yield from (f"### {group.title}", "", "| flag | values | default | |", "|---|---|---|---|")
        for action in actions:
            values = ", ".join(map(str, action.choices)) if action.choices else ""
            default = "" if action.default in (None, "") else f"`{action.default}`"
            text = (action.help or "").replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")
            yield f"| `{action.option_strings[0]}` | {values} | {default} | {text} |"
        yield ""


def page():
    lines = [
        "# All flags",
        "",
        "Made from the scripts by `python docs/make_flags.py`; each script's `--help` says the same.",
        "",
    ]
    for script in SCRIPTS:
        lines += [f"## {script}.py", "", *rows(parser_of(script))]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    with open(os.path.join(HERE, "flags.md"), "w") as file:
        file.write(page())
