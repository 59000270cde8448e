"""Writes docs/flags.md from the parsers of train.py, eval.py and infer.py.

python docs/make_flags.py
"""

import importlib
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import utility

SCRIPTS = ("train", "eval", "infer")


def rows(parser):
    """Yields the lines of a table for each group of flags."""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        yield from (f"### {group.title}", "", "| flag | values | default | |", "|---|---|---|---|")
        for action in actions:
            values = ", ".join(map(str, action.choices)) if action.choices else ""
            default = "" if action.default in (None, "") else f"`{utility.as_typed(action.default)}`"
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
        lines += [f"## {script}.py", "", *rows(importlib.import_module(script).build_parser())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    with open(os.path.join(HERE, "flags.md"), "w") as file:
        file.write(page())
