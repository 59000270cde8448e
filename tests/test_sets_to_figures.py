"""From a data set as people have it to figures on it: the commands that each script prints in the end are typed."""

import re
import shlex

import data_sets
import pytest
from conftest import ROOT, SMALL, run
from data_sets import prepare

QUICK = [*SMALL, "--pretrained_model=", "--num_epochs=1", "--seed=3", "--train_batch_size=4", "--samples_each_class=2"]


def make(kind, folder):
    """Writes a small copy; -> the script, its flags."""
    if kind == "sop":
        data_sets.write(folder, data_sets.sop())
        return "sop.py", []
    if kind == "inshop":
        pictures, files = data_sets.inshop()
        data_sets.write(folder, {**pictures, **files})
        return "inshop.py", ["--crop_boxes"]
    if kind == "cub":
        data_sets.write(folder, data_sets.birds_2011())
        return "cub200.py", ["--crop_boxes", "--box_padding=mean"]
    data_sets.write(folder, data_sets.cars_by_folders())
    return "cars196.py", ["--crop_boxes", "--box_padding=context"]


@pytest.mark.parametrize("kind, queries", [("sop", 8), ("inshop", 6), ("cub", 4), ("cars", 6)])
def test_a_data_set_is_trained_on_and_measured(tmp_path, kind, queries):
    script, flags = make(kind, tmp_path / "data")
    out = prepare(script, tmp_path / "data", "--any_counts", *flags).stdout
    command = shlex.split(re.search(r"^next: python (.*)$", out, re.MULTILINE)[1])
    assert command[0] == "train.py" and ("--test_transform=resize" in command) == ("--crop_boxes" in flags)
    out_dir = tmp_path / "out"
    trained = run("train.py", *command[1:], *QUICK, f"--model_save_dir={out_dir}").stdout
    assert re.search(r"^Pass 0, recall@1 ", trained, re.MULTILINE)
    then = re.search(r"^then: python (.*)$", out, re.MULTILINE)
    words = shlex.split(then[1]) if then else ["eval.py"]
    assert bool(then) == (kind == "inshop") and words[0] == "eval.py"
    figures = run("eval.py", *words[1:], f"--pretrained_model={out_dir}/ResNet8/best").stdout
    assert f"queries: {queries}" in figures and "recall@1: " in figures
    assert ROOT not in out  # the commands are as short as they can be from here
