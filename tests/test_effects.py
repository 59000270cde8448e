"""What a flag says, training does: each changes the weights that come out, by as much as it says where that is known.

Runs that are compared with each other (whole and continued, one process and two) would not notice a flag that is never
looked at.
"""

import numpy as np
import pytest
from conftest import TINY, run

import models
import train
from losses import LossSettings
from losses.objective import Objective
from training import optimizers
from weights import read_pickle

SHORT = [*TINY, "--num_epochs=1", "--total_images=24", "--eval_every=0"]
CHANGES = [
    *("lr_strategy=constant", "lr_epochs=0.9", "optimizer=sgd", "weight_decay=0.3", "head_lr_scale=7", "margin=0.9"),
    *("label_smoothing=0.3", "dropout=0.6", "min_area=0.9", "color_jitter=0.9", "random_erasing=1"),
    *("freeze_stages=1", "freeze_bn=True", "zero_init_residual=True", "warmup_epochs=0.5", "clip_norm=0.001"),
]


def part(folder, epoch=0, name="model"):
    return read_pickle(f"{folder}/ResNet8/{epoch}/{name}.pdparams")


@pytest.fixture(scope="module")
def plain(birds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run("train.py", *birds.lists, *SHORT, f"--model_save_dir={folder}")
    return part(folder)


@pytest.mark.parametrize("flag", CHANGES)
def test_a_flag_reaches_the_training(birds, plain, tmp_path, flag):
    """With the same seed only the flag can make other weights."""
    run("train.py", *birds.lists, *SHORT, f"--{flag}", f"--model_save_dir={tmp_path}")
    found = part(tmp_path)
    assert any(found[name].tobytes() != plain[name].tobytes() for name in plain)


def test_activations_are_computed_again():
    network = models.build_model("ResNet8", 3)
    begin = type("Begin", (), {"weights": None})
    train.prepare_network(network, begin, np.arange(3), False, with_mem_opt=True, allow_partial=False)
    assert network.backbone.recompute


def test_the_rate_of_each_step_is_the_schedules(birds, tmp_path):
    """Where decay alone moves a weight, for gradients are cut to nothing, each step takes rate * decay of it."""
    flags = ["--optimizer=adamw", "--weight_decay=0.5", "--lr_strategy=cosine_decay", "--clip_value=1e-30"]
    for name, lr in (("begin", "0"), ("end", "0.1")):
        run("train.py", *birds.lists, *SHORT, *flags, f"--lr={lr}", f"--model_save_dir={tmp_path}/{name}")
    before, after = (part(tmp_path / name)["backbone.conv1.weight"] for name in ("begin", "end"))
    schedule = optimizers.Schedule(lr=0.1, lr_strategy="cosine_decay", num_epochs=1)
    shrunk = np.prod([1 - 0.5 * optimizers.rate_of_step(schedule, 0, step, 3) for step in range(3)])
    np.testing.assert_allclose(after, before * shrunk, rtol=1e-4, atol=1e-7)


def test_the_average_follows_the_steps(birds, tmp_path):
    """After the first step: a tenth of the beginning, nine tenths of the step (the average warms up)."""
    flags = [*SHORT, "--total_images=8", "--ema_decay=0.9"]
    for name, lr in (("begin", 0), ("step", 0.1)):
        run("train.py", *birds.lists, *flags, f"--lr={lr}", f"--model_save_dir={tmp_path}/{name}")
    begin, step = (part(tmp_path / name)["head.weight"] for name in ("begin", "step"))
    average = part(tmp_path / "step", name="ema")["head.weight"]
    assert np.abs(step - begin).max() > 1e-4
    np.testing.assert_allclose(average, 0.1 * begin + 0.9 * step, rtol=1e-5, atol=1e-6)


def test_the_memory_begins_in_its_epoch(birds, tmp_path):
    flags = ["--loss_name=contrastiveloss", "--memory_size=30", "--memory_start_epoch=1", "--num_epochs=2", "--keep=9"]
    run("train.py", *birds.lists, *TINY, *flags, "--eval_every=0", f"--model_save_dir={tmp_path}")
    seen = [int(np.ravel(part(tmp_path, epoch, "objective")["metric_loss.seen"])[0]) for epoch in (0, 1)]
    assert seen == [0, 48]


def test_a_backbone_wakes_after_its_rest(birds, tmp_path):
    flags = ["--num_epochs=2", "--keep=9", "--eval_every=0", "--warmup_head_epochs=1"]
    run("train.py", *birds.lists, *TINY, *flags, f"--model_save_dir={tmp_path}")
    one, two = (part(tmp_path, epoch)["backbone.conv1.weight"] for epoch in (0, 1))
    assert not np.array_equal(one, two)


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", ["momentum", "sgd", "adam", "adamw"])
def test_two_steps_of_each_optimizer(name):
    """By their formulas, the head at ten times the rate."""
    network = models.build_model("ResNet8", 3)
    settings = optimizers.OptimizerSettings(name, lr=0.1, head_lr_scale=10.0, weight_decay=0.5)
    optimizer = optimizers.build_optimizer(settings, network, Objective(LossSettings("softmax"), 3, network.dimension))
    for parameter, lr in ((network.backbone.conv1.weight, 0.1), (network.head.weight, 1.0)):
        w, velocity, first, second = parameter.numpy().astype(np.float64), 0.0, 0.0, 0.0
        for step in (1, 2):
            (3 * parameter).sum().backward()
            optimizer.step()
            optimizers.clear_gradients(optimizer)
            g = 3 + (0 if name == "adamw" else 0.5 * w)
            velocity, first, second = 0.9 * velocity + g, 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            adam = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            decayed = w * (1 - 0.5 * lr) if name == "adamw" else w
            w = decayed - lr * {"momentum": velocity, "sgd": g}.get(name, adam)
            np.testing.assert_allclose(parameter.numpy(), w, rtol=1e-3, atol=1e-4)


def test_rates_of_what_losses_own():
    for name, scale in (("proxyanchorloss", 100.0), ("marginloss", 10.0)):
        objective = Objective(LossSettings(name), 3, 4)
        assert [p.optimize_attr["learning_rate"] for p in objective.parameters()] == [scale]
