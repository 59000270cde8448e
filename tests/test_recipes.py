"""The recipes: what they type is taken by the scripts, and what is missing is one line."""

import glob
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, read_rows

RECIPES = sorted(os.path.basename(p) for p in glob.glob(f"{ROOT}/recipes/*.sh") if not p.endswith("common.sh"))
# A `python` that notes each command instead of running it, and leaves behind what a recipe reads.
NOTING = """#!/bin/sh
{python} -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "$@" >> {folder}/commands
for word; do
    case "$word" in
    --output_json=*) echo '{{"recall@1": 0.5}}' > "${{word#--output_json=}}" ;;
    --output_dir=* | --model_save_dir=*) mkdir -p "${{word#*=}}" ;;
    esac
done
cat > /dev/null
"""


def run(recipe, folder, *flags, status=0, **environment):
    """Runs a recipe from `folder`."""
    command = ["sh", f"{ROOT}/recipes/{recipe}", *flags]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip
    assert result.returncode == status, result.stdout + result.stderr
    return result


@pytest.fixture
def lists(birds, tmp_path):
    """A folder with the lists of drawn birds under the names of the recipes' data sets."""
    for name in ("CUB200", "SOP"):
        for part in ("train", "val"):
            shutil.copy(getattr(birds, f"{part}_list"), tmp_path / f"{name}_{part}.txt")
    os.symlink(f"{birds.root}/images", tmp_path / "images")
    return tmp_path


@pytest.mark.parametrize("processes", ("1", "2"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_scripts_take_what_a_recipe_types(recipe, processes, lists, monkeypatch):
    noting = lists / "python"
    noting.write_text(NOTING.format(python=shlex.quote(sys.executable), folder=shlex.quote(str(lists))))
    noting.chmod(0o755)
    run(recipe, lists, PYTHON=str(noting), DATA=".", PROCESSES=processes)
    commands = [shlex.split(line) for line in read_rows(lists / "commands")]
    seen = set()
    for command in commands:
        script = next(
            (i for i, word in enumerate(command) if word.endswith(("train.py", "eval.py", "average.py"))), None
        )
        if script is not None:
            name = os.path.relpath(command[script], ROOT)[:-3].replace(os.sep, ".")
            monkeypatch.setattr(sys, "argv", command[script:])
            importlib.import_module(name).build_parser().parse_args()
            assert "--nproc_per_node=2" in command[:script] or name != "train" or processes == "1"
            seen.add(name)
    assert seen - {"weights.average"} == {"train", "eval"}


def test_a_recipe_averages_with_its_start(lists, trained):
    environment = {"DATA": ".", "MODEL": "ResNet8", "WEIGHTS": f"{trained}/ResNet8/best"}
    small = [*TINY[1:], "--num_epochs=1", "--label_smoothing=0", "--freeze_stages=1"]
    result = run("cub200_quadruplet.sh", lists, *small, **environment)
    folder = lists / "output_recipes" / "cub200_quadruplet"
    assert (
        f"averaged: 0.7 output_recipes/cub200_quadruplet/ResNet8/latest + 0.3 {trained}/ResNet8/best" in result.stdout
    )
    figures = json.loads((folder / "averaged.json").read_text())
    assert figures["args"]["pretrained_model"].endswith("/averaged") and figures["averaged"].startswith("0.7 output_")


def test_a_recipe_trains_measures_and_goes_on(lists, trained):
    environment = {"DATA": ".", "MODEL": "ResNet8", "WEIGHTS": f"{trained}/ResNet8/best"}
    small = [*TINY[1:], "--num_epochs=1", "--label_smoothing=0"]
    first = run("cub200_triplet.sh", lists, *small, **environment)
    assert "Pass 0, trainbatch 0" in first.stdout and "recall@1" in first.stdout
    folder = lists / "output_recipes" / "cub200_triplet"
    assert 0 <= json.loads((folder / "recall.json").read_text())["recall@1"] <= 1
    again = run("cub200_triplet.sh", lists, *small, **environment)
    assert "trainbatch" not in again.stdout and "recall@1" in again.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    (
        ({"DATA": "nowhere"}, "error: nowhere/CUB200_train.txt is not there: type 'sh data/download_cub200.sh', or"),
        ({"DATA": ".", "WEIGHTS": "none.pdparams"}, "error: WEIGHTS=none.pdparams is not there"),
        ({"DATA": ".", "PYTHON": "snake"}, "error: no 'snake' here: type '. .venv/bin/activate' first"),
        ({"DATA": ".", "WEIGHTS": sys.executable, "PROCESSES": "two"}, "error: PROCESSES=two: a number of processes"),
    ),
)
def test_what_is_missing_is_one_line(environment, message, lists):
    result = run("cub200_triplet.sh", lists, status=2, **environment)
    assert result.stdout == "" and result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert not (lists / "output_recipes").exists()


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    (
        ("cub200_softmax.sh", ["--model_save_dir=x"], "--model_save_dir: OUTPUT=... names the folder of a recipe"),
        ("cub200_softmax.sh", ["--seed=1", "--model", "ResNet8"], "--model: MODEL=... names the network of a recipe"),
        ("cub200_softmax.sh", ["--pretrained_model=x"], "--pretrained_model: WEIGHTS=... names what a recipe starts"),
        ("cub200_softmax.sh", ["--val_list=x"], "--val_list: DATA=... names the folder of a recipe's lists"),
        ("cub200_softmax.sh", ["--data_dir=x"], "--data_dir: DATA=... names the folder of a recipe's lists"),
        ("sample_table.sh", ["--seed=2"], "--seed=2: this recipe takes no flags"),
    ),
)
def test_flags_that_a_recipe_would_not_follow(recipe, flags, message, lists):
    result = run(recipe, lists, *flags, status=2, DATA=".", WEIGHTS=sys.executable)
    assert result.stdout == "" and result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_help_is_the_head_of_a_recipe(lists):
    out = run("cub200_softmax.sh", lists, "--help").stdout
    assert "recall@1" in out and "train " not in out and not (lists / "output_recipes").exists()
