"""weights/average.py: the numbers against NumPy's own average, what it leaves to the first network, and mistakes."""

import json
import os
import re

import numpy as np
import paddle
import pytest
from conftest import SMALL, TINY, run

import models
import weights
from weights import checkpoint
from weights.average import average, check_shares

SCRIPT = "weights/average.py"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A file of random weights of ResNet8 with a head of 1,000 classes."""
    path = str(tmp_path_factory.mktemp("start") / "start.pdparams")
    paddle.seed(11)
    paddle.save(models.build_model("ResNet8", 1000).state_dict(), path)
    return path


def tensors(path):
    return weights.read_pickle(os.path.join(path, checkpoint.WEIGHTS_FILE))


def figures(path, birds, tmp_path):
    output = tmp_path / "figures.json"
    run("eval.py", *birds.lists, f"--pretrained_model={path}", f"--output_json={output}", "--use_gpu=False")
    content = json.loads(output.read_text())
    return {name: content[name] for name in ("recall@1", "MAP@R", "mAP")}


def test_average_of_three():
    rng = np.random.default_rng(0)
    states = [{"a": rng.normal(size=(5, 3)).astype("float32"), "b": np.full(2, i, "float32")} for i in range(3)]
    found = average(states, [0.5, 0.3, 0.2], ["a"])
    wanted = np.average([state["a"] for state in states], axis=0, weights=[0.5, 0.3, 0.2])
    assert found["a"].dtype == np.float32 and np.allclose(found["a"], wanted, rtol=1e-6, atol=1e-7)
    assert np.array_equal(found["b"], states[0]["b"]) and list(found) == ["a", "b"]


def test_equal_shares_are_the_default():
    assert check_shares(None, 4) == [0.25] * 4
    assert check_shares([0.1] * 10, 10) == [0.1] * 10  # which do not come to 1 to the bit


def test_with_the_start_the_backbone_is_averaged(birds, trained, start, tmp_path):
    first, output = trained / "ResNet8" / "latest", tmp_path / "averaged"
    result = run(SCRIPT, first, start, "--shares=0.75,0.25", f"--output_dir={output}")
    assert result.stdout.endswith(f"\nwrote {output}: backbone averaged: 0.75 {first} + 0.25 {start}\n")
    assert "head skipped: 1000 classes there, 6 here" in result.stdout
    assert "batch-norm statistics differ" in result.stderr
    one, other, mean = tensors(first), weights.read_pickle(start), tensors(output)
    assert list(mean) == list(one)
    for name, value in mean.items():
        wanted = 0.75 * one[name] + 0.25 * other[name] if name.startswith("backbone.") else one[name]
        assert value.dtype == np.float32 and np.allclose(value, wanted, rtol=1e-6, atol=1e-7), name
    # As any checkpoint: it knows its lists and settings, exports, and is a start for another run.
    said = run("eval.py", f"--pretrained_model={output}", "--use_gpu=False").stdout
    assert re.search(r"epoch 0, averaged: 0\.75 \S+ \+ 0\.25 \S+\)", said) and "queries: 48" in said
    run("infer.py", f"--pretrained_model={output}", f"--export_dir={tmp_path}/exported", "--use_gpu=False")
    more = ["--num_epochs=1", f"--model_save_dir={tmp_path}/more", f"--pretrained_model={output}"]
    assert "head loaded: 6 classes" in run("train.py", *birds.lists, *TINY, *more).stdout


def test_a_share_of_one_is_the_network_itself(birds, trained, start, tmp_path):
    first, output = trained / "ResNet8" / "latest", tmp_path / "averaged"
    run(SCRIPT, first, start, "--shares=1,0", f"--output_dir={output}")
    assert figures(output, birds, tmp_path) == figures(first, birds, tmp_path)


def test_runs_of_the_same_classes_are_averaged_whole(birds, trained, tmp_path):
    """And one of other classes in its backbone alone; an earlier average makes way."""
    flags = [*birds.lists, *TINY, "--num_epochs=1", "--seed=9"]
    run("train.py", *flags, f"--model_save_dir={tmp_path}/second")
    run("train.py", f"--train_list={birds.val_list}", *flags[1:], f"--model_save_dir={tmp_path}/foreign")
    first, second, foreign = (
        f"{folder}/ResNet8/latest" for folder in (trained, tmp_path / "second", tmp_path / "foreign")
    )
    output = tmp_path / "averaged"
    assert "network averaged" in run(SCRIPT, first, second, f"--output_dir={output}").stdout
    one, other, mean = tensors(first), tensors(second), tensors(output)
    for name, value in mean.items():
        assert np.allclose(value, (one[name] + other[name]) / 2, rtol=1e-6, atol=1e-7), name
    assert not np.allclose(mean["head.weight"], one["head.weight"])
    assert "backbone averaged" in run(SCRIPT, first, foreign, f"--output_dir={output}").stdout
    assert np.array_equal(tensors(output)["head.weight"], one["head.weight"])


def altered(folder, to, tensors, **changes):
    """A copy of a checkpoint with other tensors and another description."""
    description = checkpoint.read_description(str(folder))
    for name in ("sums", *(name for name, value in changes.items() if value is None)):
        description.pop(name, None)
    description.update({name: value for name, value in changes.items() if value is not None})
    checkpoint.write_checkpoint(str(to), {"model": tensors}, description, lambda: None)
    return to


def test_heads_that_do_not_mean_the_same_are_left_alone(trained, tmp_path):
    """A head of another size, which would be random; one that its run did not train. Settings that an older checkpoint
    lacks are those of their defaults."""
    first = trained / "ResNet8" / "latest"
    state, values = checkpoint.read_description(str(first)), tensors(first)
    wide = {**values, "head.weight": np.ones((64, 10), np.float32), "head.bias": np.ones(10, np.float32)}
    settings = {name: value for name, value in state["settings"].items() if name not in ("head", "embedding_norm")}
    for name, other, changes, whole in (
        ("wide", wide, {}, False),
        ("untrained", values, {"args": {**state["args"], "alpha": 0.0}}, False),
        ("older", values, {"settings": settings}, True),
    ):
        path = altered(first, tmp_path / name, other, **changes)
        out = run(SCRIPT, first, path, f"--output_dir={tmp_path}/{name}_averaged").stdout
        assert ("network averaged" if whole else "backbone averaged") in out, out
        assert np.array_equal(tensors(tmp_path / f"{name}_averaged")["head.weight"], values["head.weight"])


def test_another_network_of_the_same_shapes_is_none(trained, tmp_path):
    first = trained / "ResNet8" / "latest"
    state = checkpoint.read_description(str(first))
    other = altered(first, tmp_path / "b", tensors(first), settings={**state["settings"], "model": "ResNet18"})
    error = run(SCRIPT, first, other, f"--output_dir={tmp_path}/c", status=2).stderr
    assert "b/model.pdparams: of ResNet18, and " in error and not os.path.exists(tmp_path / "c")


@pytest.mark.parametrize(
    ("others", "flags", "message"),
    [
        (["{start}"], ["--shares=0.7,0.2"], "--shares: they come to 0.9 rather than 1"),
        (["{start}"], ["--shares=1"], "--shares: 1 numbers for 2 weights"),
        (["{start}"], ["--shares=1.5,-0.5"], "1.5 is out of range"),
        (["{first}/nowhere"], [], "nowhere: no weights there"),
        ([], [], "the following arguments are required: WEIGHTS"),
        (["{deeper}"], [], "the file is a ResNet18"),
    ],
)
def test_mistakes(trained, start, tmp_path, others, flags, message):
    deeper = str(tmp_path / "deeper.pdparams")
    if "{deeper}" in others:
        paddle.save(models.build_model("ResNet18", 0).state_dict(), deeper)
    first = str(trained / "ResNet8" / "latest")
    others = [other.format(start=start, first=first, deeper=deeper) for other in others]
    error = run(SCRIPT, first, *others, *flags, f"--output_dir={tmp_path}/out", status=2).stderr
    assert error.splitlines()[-1].startswith("error: ") and message in error.splitlines()[-1]
    assert not os.path.exists(tmp_path / "out")


def test_the_first_is_a_checkpoint(trained, start, tmp_path):
    error = run(SCRIPT, start, trained / "ResNet8" / "latest", f"--output_dir={tmp_path}/out", status=2).stderr
    assert f"error: {start}: not a checkpoint of train.py: the first says what the network is\n" in error
    error = run(SCRIPT, "imagenet", trained / "ResNet8" / "latest", f"--output_dir={tmp_path}/out", status=2).stderr
    assert "error: imagenet: not a checkpoint of train.py: the first says what the network is\n" in error


def test_what_is_there_is_kept(birds, trained, start, tmp_path):
    """Other files, and the checkpoints of a run; an average is none to go on from."""
    first = trained / "ResNet8" / "latest"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for folder in (tmp_path / "mine", first, os.path.realpath(first)):
        error = run(SCRIPT, first, start, f"--output_dir={folder}", status=2).stderr
        assert f"error: --output_dir={folder}: is there already, and no earlier average: give another name\n" == error
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine" and tensors(first)
    run(SCRIPT, first, start, f"--output_dir={tmp_path}/averaged")
    error = run("train.py", *birds.lists, *SMALL, f"--checkpoint={tmp_path}/averaged", status=2).stderr
    assert error.startswith(f"error: --checkpoint={tmp_path}/averaged: an average, where no run was: start one from it")
