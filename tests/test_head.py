"""Figures of the softmax head: loss and accuracy in eval.py and in the log, and lists whose labels are its classes."""

import numpy as np
import paddle
import pytest
from conftest import SMALL, run

import eval as evaluation
import models
from training import log


def test_figures_of_the_head_are_their_formulas():
    rng = np.random.default_rng(0)
    logits, label = (3 * rng.normal(size=(40, 9))).astype(np.float32), rng.integers(0, 9, 40)
    head = evaluation.HeadFigures(label, quiet=True)
    for rows in np.split(np.arange(40), [7, 30]):
        head.add(rows, logits[rows])
    shares = np.exp(logits.astype(np.float64))
    shares /= shares.sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    accuracy = {f"acc{k}": np.mean([c in row[:k] for c, row in zip(label, order)]) for k in (1, 5)}
    assert head.result() == pytest.approx({"loss": -np.log(shares[np.arange(40), label]).mean(), **accuracy}, rel=1e-5)


def test_accuracy_of_the_log():
    logits = paddle.to_tensor(np.tile(np.arange(6, 0, -1).astype("float32"), (6, 1)))
    assert [log.accuracy(logits, paddle.arange(6), k) for k in (1, 5)] == pytest.approx([1 / 6, 5 / 6])


def test_labels_that_are_class_numbers(birds, tmp_path):
    """As of an ImageNet list and an ImageNet head: only the user knows that."""
    flags = [*SMALL, f"--val_list={birds.val_list}"]  # labels 7 to 12
    for size in (13, 9):
        paddle.save(models.build_model("ResNet8", size).state_dict(), f"{tmp_path}/{size}.pdparams")
    wide, narrow = (f"--pretrained_model={tmp_path}/{size}.pdparams" for size in (13, 9))
    out = run("eval.py", *flags, wide).stdout
    assert "not applicable: which labels" in out and "\nacc1: " not in out
    assert "\nacc1: " in run("eval.py", *flags, wide, "--head_labels=True").stdout
    assert "the head has no class 9" in run("eval.py", *flags, narrow, "--head_labels=True", status=2).stderr
