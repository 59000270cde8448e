"""What a loss owns (here a learned proxy a class and a ring of past embeddings) is trained, the same in all processes,
saved, and continued to the bit. Adding such a loss touches two files."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import TINY
from programs.ring_checkout import make_checkout

import weights

RING = [*TINY, "--train_batch_size=12", "--loss_name=ringloss", "--ring_size=30"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The scripts with a loss more: a file of its own, and the table in losses/__init__.py."""
    root = tmp_path_factory.mktemp("checkout")
    make_checkout(str(root))
    return root


def start(checkout, birds, folder, *flags, processes=1):
    """Starts train.py of the checkout; -> subprocess.Popen."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "paddle.distributed.launch", f"--log_dir={folder}_log", f"--nproc_per_node={processes}"]
    command += ["train.py", *birds.lists, *RING, f"--model_save_dir={folder}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment)  # fmt: skip


def train(*arguments, processes=1, status=0):
    """-> what train.py printed"""
    process = start(*arguments, processes=processes)
    out, err = process.communicate()
    assert process.returncode == status, out + err
    return out + err


def read(folder, name, epoch):
    return weights.read_pickle(f"{folder}/ResNet8/{epoch}/{name}")


def same(a, b):
    return list(a) == list(b) and all(np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes() for key in a)


def test_what_a_loss_owns_is_trained_and_saved(checkout, birds, tmp_path):
    train(checkout, birds, tmp_path / "a", "--num_epochs=1", "--keep=9")
    train(checkout, birds, tmp_path / "a", "--num_epochs=2", "--keep=9", "--checkpoint=latest")
    first, second = (read(tmp_path / "a", "objective.pdparams", epoch) for epoch in (0, 1))
    assert list(first) == ["metric_loss.proxies", "metric_loss.past", "metric_loss.past_label"]
    assert first["metric_loss.proxies"].shape == (6, 64)
    assert not np.allclose(first["metric_loss.proxies"], second["metric_loss.proxies"])
    assert (first["metric_loss.past_label"] >= 0).all() and np.abs(first["metric_loss.past"]).sum() > 1
    assert "objective.metric_loss.proxies/velocity_0" in read(tmp_path / "a", "model.pdopt", 1)


def test_its_learning_rate_is_its_own(checkout, birds, tmp_path):
    """Of plain SGD the change of the proxies is proportional to their scale."""
    flags = ["--num_epochs=1", "--total_images=12", "--optimizer=sgd", "--weight_decay=0", "--eval_every=0"]
    found = []
    for scale in ([], ["--loss_lr_scale=0"], ["--loss_lr_scale=20"]):  # the table says 10
        folder = tmp_path / str(len(found))
        train(checkout, birds, folder, *flags, *scale)
        found.append(read(folder, "objective.pdparams", 0)["metric_loss.proxies"])
    once, still, twice = found
    assert np.abs(once - still).max() > 1e-4
    np.testing.assert_allclose(twice - still, 2 * (once - still), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_kills_change_nothing(checkout, birds, tmp_path, optimizer):
    flags = [f"--optimizer={optimizer}", "--num_epochs=8", "--eval_every=4", "--lr=0.003", "--embedding_size=8"]
    train(checkout, birds, tmp_path / "whole", *flags)
    rng = random.Random(optimizer)
    for _ in range(5):
        process = start(checkout, birds, tmp_path / "killed", *flags, "--save_every=1", "--checkpoint=auto")
        steps = rng.randint(1, 6)
        for line in process.stdout:
            steps -= "trainbatch" in line
            if steps <= 0:
                break
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
    train(checkout, birds, tmp_path / "killed", *flags, "--save_every=1", "--checkpoint=auto")
    for name in ("model.pdparams", "objective.pdparams", "model.pdopt"):
        assert same(*(read(tmp_path / folder, name, 7) for folder in ("whole", "killed"))), name


def test_two_processes_are_one(checkout, birds, tmp_path):
    """With batch norm frozen, to the rounding of some steps; and its state is the same in both processes' own steps."""
    flags = ["--freeze_bn=True", "--num_epochs=2", "--eval_every=0"]
    for processes in (1, 2):
        train(checkout, birds, tmp_path / str(processes), *flags, processes=processes)
    for name in ("model.pdparams", "objective.pdparams", "model.pdopt"):
        one, two = (read(tmp_path / str(processes), name, 1) for processes in (1, 2))
        assert list(one) == list(two)
        for key in one:
            np.testing.assert_allclose(two[key], one[key], rtol=1e-3, atol=2e-5, err_msg=key)
    train(checkout, birds, tmp_path / "2", *flags, "--num_epochs=3", "--checkpoint=latest", processes=2)


def test_what_is_missing_is_named(checkout, birds, tmp_path):
    flags = ["--num_epochs=2", "--checkpoint=latest"]
    train(checkout, birds, tmp_path, "--num_epochs=1")
    path = tmp_path / "ResNet8" / "0" / "objective.pdparams"
    whole = path.read_bytes()
    path.unlink()
    out = train(checkout, birds, tmp_path, *flags, status=2)
    assert f"error: {path}: " in out and "--force=True starts the loss anew" in out
    path.write_bytes(whole)
    out = train(checkout, birds, tmp_path, *flags, "--ring_size=31", status=2)
    assert "another run: --ring_size=31 (was 30)" in out
    out = train(checkout, birds, tmp_path, *flags, "--ring_size=31", "--force=True")
    assert "note: the loss starts anew: " in out and "'metric_loss.past' is [30, 64] in place of [31, 64]" in out
    assert weights.read_weights(str(tmp_path / "ResNet8" / "1")).state["args"]["ring_size"] == 31
