"""What a recipe for fine-tuning switches on: average of the weights, clipping, resting and frozen layers, jitter and
erasing, patience; and that all of it goes on to the bit."""

import itertools
import os

import numpy as np
import paddle
import pytest
from conftest import TINY, run
from PIL import Image, ImageEnhance
from test_transforms import noise, smooth

import transforms
import weights
from losses import LossSettings
from losses.objective import Objective
from models import build_model
from training import optimizers
from training.ema import Average
from training.run import Progress
from training.run_settings import RunSettings
from utility import UserError

ALWAYS = ["--lr_strategy=constant", "--optimizer=adamw", "--lr=0.001", "--keep=9"]
RECIPES = {
    "proxies": [
        *("--loss_name=proxyanchorloss", "--embedding_norm=layer", "--ema_decay=0.9", "--warmup_head_epochs=1"),
        *("--freeze_stages=1", "--clip_norm=1", "--color_jitter=0.25", "--random_erasing=0.5", "--dropout=0.2"),
    ],
    "memory": [
        *("--loss_name=marginloss", "--memory_size=30", "--memory_start_epoch=1", "--head=cosine", "--freeze_bn=True"),
        *("--last_stride=1", "--clip_value=1"),
    ],
}


@pytest.mark.parametrize(("recipe", "processes"), [("proxies", 1), ("proxies", 2), ("memory", 1)])
def test_a_recipe_goes_on_to_the_bit(birds, tmp_path, recipe, processes):
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node=2", f"--log_dir={tmp_path}/log", "train.py"]
    script = ["train.py"] if processes == 1 else launcher
    command = [*script, *birds.lists, *TINY, *ALWAYS, *RECIPES[recipe]]
    run(*command, "--num_epochs=3", f"--model_save_dir={tmp_path}/whole")
    run(*command, "--num_epochs=1", f"--model_save_dir={tmp_path}/parts")
    run(*command, "--num_epochs=3", f"--model_save_dir={tmp_path}/parts", "--checkpoint=latest")
    files = {part: tmp_path / part / "ResNet8" / "2" for part in ("whole", "parts")}
    names = {name for name in os.listdir(files["whole"]) if name.endswith((".pdparams", ".pdopt"))}
    assert {"model.pdparams", "objective.pdparams", "model.pdopt"} <= names
    for name in names:
        one, other = (weights.read_pickle(str(files[part] / name)) for part in ("whole", "parts"))
        assert list(one) == list(other) and all(one[key].tobytes() == other[key].tobytes() for key in one), name


def test_eval_takes_the_average_and_says_so(birds, tmp_path):
    out = run(
        "train.py", *birds.lists, *TINY, "--num_epochs=3", "--ema_decay=0.9", f"--model_save_dir={tmp_path}"
    ).stdout
    trained = out.split("Pass 2, recall@1 ")[1].split(",")[0]
    path = f"--pretrained_model={tmp_path}/ResNet8/latest"
    found = {}
    for which in ("ema", "model"):
        out = run("eval.py", *birds.lists, "--use_gpu=False", path, f"--weights={which}").stdout
        assert (f"{which}.pdparams (this project ResNet8, epoch 2" in out) and ("average over" in out) == (
            which == "ema"
        )
        found[which] = weights.read_weights(path.split("=")[1], which=which).tensors["head.weight"]
        assert which == "model" or f"recall@1: {trained}\n" in out
    assert not np.allclose(found["ema"], found["model"])


def test_average():
    """Against the formula, over all that a network has; and the weights come back."""
    network = paddle.nn.Sequential(paddle.nn.Linear(3, 2), paddle.nn.BatchNorm1D(2))
    average = Average(network, 0.75)
    wanted = {name: value.numpy().astype(np.float64) for name, value in network.state_dict().items()}
    for steps in range(30):
        for value in network.state_dict().values():
            value.set_value(np.random.default_rng(steps).normal(size=value.shape).astype(np.float32))
        average.update(network, steps)
        decay = min(0.75, (1 + steps) / (10 + steps))
        for name, value in network.state_dict().items():
            wanted[name] = decay * wanted[name] + (1 - decay) * value.numpy()
    before = {name: value.numpy().copy() for name, value in network.state_dict().items()}
    with average.in_place(network):
        for name, value in network.state_dict().items():
            np.testing.assert_allclose(value.numpy(), wanted[name], rtol=1e-5, atol=1e-6)
    assert all(np.array_equal(value.numpy(), before[name]) for name, value in network.state_dict().items())
    assert not network[0].weight.stop_gradient and network[0].weight.is_leaf


# ---------------------------------------------------------------- clipping


def step_of(**clip):
    """How far each parameter moves in a step of plain SGD at rate 1."""
    paddle.seed(1)
    network = build_model("ResNet8", 3)
    objective = Objective(LossSettings("softmax"), 3, 64)
    settings = optimizers.OptimizerSettings("sgd", lr=1.0, weight_decay=0.0, **clip)
    optimizer = optimizers.build_optimizer(settings, network, objective)
    parameters = optimizers.trained_parameters(network)
    before = [p.numpy().copy() for p in parameters]
    picture = paddle.to_tensor(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8))
    (100 * network(picture)[1].sum()).backward()
    optimizer.step()
    return np.concatenate([(p.numpy() - old).ravel() for p, old in zip(parameters, before)])


def test_clipping():
    free, shorter, smaller = step_of(), step_of(clip_norm=2.0), step_of(clip_value=0.5)
    norm = np.linalg.norm(free)
    assert norm > 20 and np.abs(free).max() > 1
    np.testing.assert_allclose(shorter, free * 2 / norm, rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(smaller, np.clip(free, -0.5, 0.5), rtol=1e-2, atol=1e-5)
    with pytest.raises(UserError, match="--clip_norm and --clip_value: take one of them"):
        step_of(clip_norm=1.0, clip_value=1.0)


# ---------------------------------------------------------------- pictures


class Draws:
    """A generator whose numbers are known."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self, count=None):
        drawn, self.numbers = self.numbers[: count or 1], self.numbers[count or 1 :]
        return np.array(drawn) if count else drawn[0]


@pytest.mark.parametrize("factors", [(1, 1, 1), (0.75, 1, 1), (1, 1.25, 1), (1, 1, 0.75), (1.2, 0.8, 1.25)])
def test_color_jitter_is_pillows(factors):
    for picture in (smooth(), noise(20, 30)):
        wanted = Image.fromarray(picture)
        for factor, kind in zip(factors, (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
            wanted = kind(wanted).enhance(factor)
        draws = Draws(*((factor - 1) / 0.25 / 2 + 0.5 for factor in factors))
        found = transforms.color_jitter(picture, draws, 0.25)
        assert found.dtype == np.uint8 and np.abs(found.astype(int) - np.asarray(wanted).astype(int)).max() <= 3


def test_random_erasing():
    picture, erased, areas, tops = noise(40, 60), 0, [], []
    for seed in range(400):
        found = transforms.random_erasing(picture, np.random.default_rng(seed), 0.5)
        changed = (found != picture).any(axis=2)
        if not changed.any():
            continue
        erased += 1
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        part = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (part == transforms.MEAN_COLOR).all()  # one whole rectangle
        areas.append(part.shape[0] * part.shape[1] / 2400)
        tops.append(rows[0])
    assert 160 < erased < 240 and 0.015 < min(areas) < 0.06 and 0.3 < max(areas) < 0.42
    assert min(tops) == 0 and max(tops) > 25
    assert picture.tobytes() == noise(40, 60).tobytes()


def test_without_them_a_crop_is_what_it_was():
    picture = noise(50, 50)
    plain = transforms.training_transform((32, 32), 1, 2)(picture, 3)
    assert np.array_equal(plain, transforms.random_resized_crop(picture, (32, 32), np.random.default_rng([1, 2, 3])))
    both = transforms.training_transform((32, 32), 1, 2, jitter=0.25, erasing=1.0)
    assert np.array_equal(both(picture, 3), both(picture, 3)) and not np.array_equal(both(picture, 3), plain)


# ---------------------------------------------------------------- patience


def test_patience():
    settings = RunSettings(20, eval_every=2, patience=3)
    progress, over = Progress(10), []
    for recall in (0.4, 0.5, 0.5, None, 0.3, None, 0.2):  # None: an epoch that is not evaluated
        progress = progress.at_epoch(progress.epoch + 1)
        progress = progress if recall is None else progress.with_recall(recall)
        over.append(settings.is_over(progress))
    assert over == [False] * 6 + [True] and progress.best == {"recall@1": 0.5, "epoch": 2}
    assert not settings.is_over(Progress(10, epoch=18)) and settings.is_over(Progress(10, epoch=19))
    assert not RunSettings(20).is_over(progress)
    assert progress.with_recall(0.6).waited == 0


def test_a_run_that_lost_its_patience_is_over(birds, tmp_path):
    flags = [*birds.lists, *TINY, "--lr=0.000001", "--patience=2", "--num_epochs=30", f"--model_save_dir={tmp_path}"]
    out = run("train.py", *flags).stdout
    epochs = [line for line in out.splitlines() if "recall@1" in line and line.startswith("Pass")]
    recalls = [float(line.split("recall@1 ")[1].split(",")[0]) for line in epochs]
    best = recalls.index(max(recalls))
    assert len(recalls) == best + 3 < 30
    assert f"ended by --patience=2: no better recall@1 since pass {best}\n" in out
    assert f"done before: {tmp_path}/ResNet8/{best + 2}" in run("train.py", *flags, "--checkpoint=auto").stderr
    message = run("train.py", *flags, "--checkpoint=latest", status=2).stderr
    assert "ended by --patience=2: a larger one goes on" in message
    out = run("train.py", *flags[:-2], "--num_epochs=30", flags[-1], "--checkpoint=latest", "--patience=3").stdout
    assert f"Pass {best + 3}, recall@1" in out


def test_holding_out(birds, tmp_path):
    """The training classes in two, the test untouched; and what chose an epoch is named."""
    out = run("data/split.py", birds.root, "--name=birds", f"--output_dir={tmp_path}", "--holdout=0.33").stdout
    lists = {
        part: (tmp_path / f"birds_{part}.txt").read_text().splitlines() for part in ("train", "val", "fit", "holdout")
    }
    assert lists["fit"] + lists["holdout"] == lists["train"] and len(lists["holdout"]) == 2 * 8
    assert len({row.split()[-1] for row in lists["holdout"]}) == 2 and not set(lists["holdout"]) & set(lists["val"])
    assert f"--train_list={tmp_path}/birds_fit.txt --val_list={tmp_path}/birds_holdout.txt" in out
    message = run("data/split.py", birds.root, f"--output_dir={tmp_path}", "--holdout=0.05", status=2).stderr
    assert message == "error: --holdout=0.05: 0 of the 6 training classes: it must be 1 to 5\n"

    chosen = [f"--{kind}_list={tmp_path}/birds_{part}.txt" for kind, part in (("train", "fit"), ("val", "holdout"))]
    note = "recall on this list chose the epoch"
    for epochs, part in itertools.product((1, 2), ("holdout", "val")):
        folder = tmp_path / str(epochs)
        if part == "holdout":
            run("train.py", *chosen, *TINY, f"--num_epochs={epochs}", f"--model_save_dir={folder}")
        flags = [
            "--use_gpu=False",
            f"--pretrained_model={folder}/ResNet8/best",
            f"--val_list={tmp_path}/birds_{part}.txt",
        ]
        assert (note in run("eval.py", *flags).stdout) == (epochs == 2 and part == "holdout")
