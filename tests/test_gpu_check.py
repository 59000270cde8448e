"""make gpu-check, on a stand-in for a GPU and without one."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import ROOT

import losses
from losses.tripletloss import TripletLoss
from utility import UserError

BENCHMARKS = os.path.join(ROOT, "benchmarks")
COMMAND = [sys.executable, os.path.join(BENCHMARKS, "gpu_check.py")]


@pytest.fixture
def check(gpu, birds, tmp_path, monkeypatch):
    """A Check of the stand-in, which runs scripts in this process, with its module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("gpu_check")
    monkeypatch.chdir(tmp_path)
    check = module.Check(
        lambda script, *flags: gpu.call(importlib.import_module(script[:-3]), *flags), tmp_path, tiny=True
    )
    check.module, check.lists = module, birds.lists
    gpu.set_device("gpu")
    return check


def outcomes(check):
    """{what: outcome} of the rows so far."""
    return {row.split(" | ")[0][2:]: row.split(" | ")[1] for row in check.rows}


def test_without_a_gpu_it_is_one_line(tmp_path):
    result = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == "" and os.listdir(tmp_path) == []
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: there is no GPU to check: paddlepaddle ")


def test_every_step_works_on_the_stand_in(check, monkeypatch):
    monkeypatch.setattr(check.module, "multiplications", lambda paddle, kind, size: 1e12)  # a CPU has not all kinds
    for step in check.module.STEPS:
        step(check, paddle)
    found = outcomes(check)
    assert set(found.values()) == {"works", "-"}, check.rows
    for name in losses.LOSSES:
        assert name == "tripletloss" or found[f"loss and gradient: {name}"] == "works"
    wanted = [
        "the GPU computes", "loss and gradient: tripletloss, semihard", "the first loss of training, against the CPU's",
        "training, --amp=bfloat16", "training, --amp=float16", "eval.py, float32, against the CPU",
        "a continued run to the bit, --pooling=gem --amp=float16", "eval.py, bf16, against the CPU",
        "infer.py --export_dir",
    ]  # fmt: skip
    assert [found[what] for what in wanted] == ["works"] * len(wanted)
    assert found["training steps, ResNet8, 32 px, batch 8, float16"] == found["two GPUs"] == "-"
    assert any("img/s" in row and "TFLOP/s" in row for row in check.rows)
    check.module.write_report(check)
    with open("gpu_check.md") as file:
        text = file.read()
    assert "* gpu: NVIDIA Stand-in\n" in text and "* cudnn: 8900\n" in text and all(row in text for row in check.rows)


def test_what_differs_and_what_fails_are_rows(check, gpu, monkeypatch):
    forward = TripletLoss.forward

    def wrong_there(loss, *args):
        return forward(loss, *args) * (1.5 if gpu.device == "gpu:0" else 1)

    monkeypatch.setattr(TripletLoss, "forward", wrong_there)
    check.module.losses_and_gradients(check, paddle)
    found = outcomes(check)
    assert found["loss and gradient: tripletloss, hard"] == "differs"
    assert found["loss and gradient: marginloss"] == "works"

    def fails(script, *flags):
        raise UserError(f"{script} ended with status 1:\nC++ Traceback\nExternalError: CUDA error(2), | out of memory.")

    check.run = fails
    check.module.training(check, paddle)
    assert check.rows[-1] == "| training, --amp=float16 | fails | ExternalError: CUDA error(2), / out of memory. |"
    assert outcomes(check)["training, --amp=off"] == "fails"


def test_a_script_that_fails_is_told_by_its_last_line(check):
    with pytest.raises(UserError, match=r"train.py ended with status 2: error: unrecognized arguments: --nothing"):
        check.module.run_script(check.left(), "train.py", "--nothing=1")
    (check.folder / "sleeps.py").write_text("import time; time.sleep(60)")
    with pytest.raises(UserError, match=r"sleeps.py did not end within 1 seconds"):
        check.module.run_script(-59, str(check.folder / "sleeps.py"))
    check.begun -= 1e6
    assert check.left() < 0


@pytest.mark.parametrize(("two", "outcome"), [([2.0, 1.001], "works"), ([2.0, 1.5], "differs")])
def test_two_gpus(check, gpu, two, outcome):
    def writes(*command):
        launched = command[0] == "-m"
        folder = next(word for word in command if word.startswith("--model_save_dir=")).split("=")[1]
        os.makedirs(f"{folder}/ResNet8")
        with open(f"{folder}/ResNet8/train_log.jsonl", "w") as file:
            file.writelines(json.dumps({"loss_cls": loss}) + "\n" for loss in (two if launched else [2.0, 1.0]))

    check.run, gpu.count = writes, 2
    check.module.two_gpus(check, paddle)
    assert list(outcomes(check).values()) == [outcome]


def test_a_comparison_for_each_precision(check, monkeypatch):
    step = importlib.import_module("rows_step")
    monkeypatch.setattr(step, "both_have_a_gpu", lambda: True)
    monkeypatch.setattr(step, "ask", lambda code: ["True", "True"])
    found = [comparison.what for comparison in step.comparisons(True)]
    assert found == [f"training step, ResNet50, 32 px, batch 8, {k}" for k in ("float32", "bfloat16", "float16")]
    monkeypatch.setattr(step, "ask", lambda code: ["False", "True"])
    assert step.usable_types() == ["float16"]
    assert np.isfinite(check.module.multiplications(paddle, "float32", 8))
