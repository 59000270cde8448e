"""The types of flags, the parser and small words."""

import argparse

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
    for flags, message in (
        (["--lr=x"], "argument --lr: expected float, not 'x' (see "),
        (["--lr=-1"], "must be at least 0"),
        (["--nam=x"], "unrecognized arguments: --nam=x"),
        (["--lr"], "expected one argument"),
    ):
        with pytest.raises(UserError) as error:
            parser.parse_args(flags)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_print_arguments(capsys):
    utility.print_arguments({"model": "ResNet50", "lr": 0.1})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "-----------  Configuration Arguments -----------"
    assert lines[1:3] == ["lr: 0.1", "model: ResNet50"] and lines[3] == "-" * 48


def test_duration():
    assert [utility.duration(s) for s in (0, 59.9, 61, 3600, 90061)] == [
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "1:00:00",
        "25:01:01",
    ]
