"""The types of flags, the parser and small words."""

import argparse
import importlib
import os
import re
import sys

import pytest

import utility
from utility import UserError


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (utility.boolean, {"True": True, "true": True, "1": True, "FALSE": False, "no": False, "0": False},
         {"": "True or False", "2": "not '2'", "maybe": "not 'maybe'"}),
        (utility.number(int), {"3": 3, "-3": -3, "+3": 3}, {"": "expected int", "3.5": "expected int, not '3.5'"}),
        (utility.number(int, low=1), {"1": 1}, {"0": "0 is out of range: must be at least 1"}),
        (utility.number(int, low=0, high=9), {"0": 0, "9": 9}, {"10": "at least 0 and at most 9", "-1": "at least 0"}),
        (utility.number(float), {"1e-3": 0.001, "-2": -2.0},
         {"x": "expected float", "nan": "must be finite", "inf": "must be finite", "-inf": "finite", "1e999": ""}),
        (utility.number(float, above=0, high=1), {"1": 1.0, "1e-9": 1e-9},
         {"0": "above 0", "1.01": "at most 1", "nan": "out of range"}),
        (utility.number(float, low=0), {"0": 0.0},
         {"nan": "at least 0", "-1e-9": "at least 0", "inf": "at least 0 and finite"}),
        (utility.comma_separated(utility.number(int, low=1)), {"1,2, 4": [1, 2, 4], "8": [8], "8,": [8]},
         {"1,0": "0 is out of range", "1;2": "expected int, not '1;2'"}),
    ],
)  # fmt: skip
def test_flag_types(parse, good, bad):
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is type(value)
    for text, message in bad.items():
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert message in str(error.value)


def test_parser():
    parser = utility.make_parser("First line.\n\n    python train.py --lr=1\n")
    parser.add_argument("--lr", type=utility.number(float, low=0), default=0.25, help="the rate")
    parser.add_argument("--list", help="what else there is")
    parser.add_argument("--name", default="", help="how it is called")
    text = parser.format_help()
    assert "\n    python train.py --lr=1\n" in text  # line breaks are kept
    assert "the rate (default: 0.25)" in text
    assert "default: None" not in text and "how it is called (" not in text
    assert vars(parser.parse_args(["--lr=1"])) == {"lr": 1.0, "list": None, "name": ""}
    at_home = parser.parse_args(["--name=~/a b.txt", "--list=a~/b"])  # which bash leaves as they are
    assert at_home.name == os.path.expanduser("~/a b.txt") and at_home.list == "a~/b"
    for flags, message in (
        (["--lr=x"], "argument --lr: expected float, not 'x' (see "),
        (["--lr=-1"], "must be at least 0"),
        (["--nam=x"], "unrecognized arguments: --nam=x"),
        (["--lr"], "expected one argument"),
    ):
        with pytest.raises(UserError) as error:
            parser.parse_args(flags)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_flags_and_values_say_what_was_meant():
    import eval
    import infer
    import train

    for script, flags, meant in (
        (train, "--epochs=5", "--num_epochs"),
        (train, "--num-epochs=5", "--num_epochs"),
        (train, "--num_epoch 5", "--num_epochs"),
        (train, "--learning-rate=1", "--lr"),
        (train, "--loss=eml", "--loss_name"),
        (train, "--loss_name=triplet", "tripletloss"),
        (train, "--loss_name=Triplet-Loss", "tripletloss"),
        (train, "--model=resnet50", "ResNet50"),
        (train, "--model=se_resnext50", "SE_ResNeXt50_32x4d"),
        (train, "--pooling=average", "avg"),
        (train, "--optimizer=AdamW", "adamw"),
        (eval, "--topk=1", "--recall_at"),
        (eval, "--gallery=x", "--gallery_list"),
        (infer, "--features=x.npz", "--feature_file"),
        (infer, "--precision=FP16", "float16"),
        (eval, "--precision=bfloat16", "bf16"),
        (train, "--amp=bf16", "bfloat16"),
        (train, "--amp=half", "float16"),
        (infer, "--epochs=5", None),  # it has no such flag
        (train, "--loss_name=xyzzy", None),
        (train, "5", None),
    ):
        with pytest.raises(UserError) as error:
            script.build_parser().parse_args(flags.split())
        message = str(error.value)
        assert (f"; did you mean {meant}? (see " in message) == (meant is not None), message
        assert "did you mean" not in message or meant


@pytest.mark.parametrize("script", ["train", "eval", "infer"])
def test_help_fits_a_terminal_and_begins_with_what_matters(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = importlib.import_module(script).build_parser()
    lines = parser.format_help().splitlines()
    assert max(map(len, lines)) < 80
    titles = [group.title for group in parser._action_groups]
    headings = [line[:-1] for line in lines if line[:-1] in titles]
    own = {"train": "run", "eval": "evaluation", "infer": "inference"}[script]
    assert headings[:3] == ["start here", "options", own] and "data" in headings[3:]
    flags = [re.match(r"  (--\w+)", line)[1] for line in lines if line.startswith("  --")]
    assert sorted(flags) == sorted(a.option_strings[0] for a in parser._actions if a.dest != "help")
    first = lines.index("options:")
    assert 5 <= sum(line.startswith("  --") for line in lines[:first]) <= 10


def test_flags_that_are_given_twice(monkeypatch, capsys):
    parser = utility.make_parser("")
    for flag in ("--lr", "--name"):
        parser.add_argument(flag)
    parser.add_argument("--input", nargs="+")
    for words, said in (
        ("--lr=1 --lr=1 --name=2", ""),
        ("--lr=1 --name=--lr --lr 2", "note: --lr is given 2 times: the last, 2, counts\n"),
        ("--input a b --lr=1 --input a b c", "note: --input is given 2 times: the last, a b c, counts\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["x", *words.split()])
        args, typed = utility.parse_typed(parser)
        assert capsys.readouterr().out == said and "lr" in typed
    assert args.input == ["a", "b", "c"]


def test_print_arguments(capsys):
    parser = utility.make_parser("")
    for flag in ("--lr", "--model", "--pooling", "--alpha"):
        parser.add_argument(flag, default="x")
    flags = {"model": "ResNet50", "lr": 0.1, "pooling": "x", "alpha": "x", "quiet": False, "made": [1, 2]}
    utility.print_arguments(flags, parser, "the log has them")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "-----------  Configuration Arguments -----------" and lines[-1] == "-" * 48
    assert lines[1:-2] == ["lr: 0.1", "made: [1, 2]", "model: ResNet50", "quiet: False"]
    assert lines[-2] == "and 2 others at their defaults: the log has them"
    utility.print_arguments({**flags, "quiet": True}, parser)
    assert capsys.readouterr().out == ""


def test_duration():
    assert [utility.duration(s) for s in (0, 59.9, 61, 3600, 90061)] == [
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "1:00:00",
        "25:01:01",
    ]
