"""Batches of classes with fewer pictures than --samples_each_class, counted picture by picture."""

import json
import re

import numpy as np
import pytest
from conftest import TINY, read_rows, run
from test_faults import start, wait_for_steps
from test_parallel import finish, launch
from test_sampler import class_sizes

import sampler
from training.run import Run
from utility import UserError

SOP = np.random.default_rng(7).choice(np.arange(2, 13), 600, p=np.array([24, 15, 12, 11, 10, 9, 8, 5, 3, 2, 1]) / 100)
SIZES = {
    "SOP's": (list(SOP), 60, 4),
    "twos alone": ([2] * 40, 24, 4),
    "twos alone, an odd batch": ([2] * 40, 9, 3),
    "threes alone, by an even batch": ([3] * 30, 16, 4),
    "one large": ([300, *[2] * 30, *[3] * 30], 20, 5),
    "as many as there are": ([2, 3, 4, 2, 5], 12, 4),
    "lone ones": ([1] * 20 + [2] * 10 + [3] * 10, 12, 3),
    "odd ones in pairs": ([1] * 3 + [3] * 10 + [2] * 5 + [5] * 4, 8, 2),
    "K of many": ([2, 30, 7, 12, 9, 25, 40], 40, 20),
}


def batches_of(name, seed=0, epoch=0, epochs=1):
    sizes, batch_size, k = SIZES[name]
    labels = class_sizes(sizes)
    steps = epochs * max(1, len(labels) // batch_size)
    return labels, list(sampler.filled_batches(labels, batch_size, k, seed, epoch, steps)), batch_size, k


@pytest.mark.parametrize("name", SIZES)
def test_no_batch_has_a_picture_twice_and_each_class_has_company(name):
    for seed in range(3):
        labels, batches, batch_size, k = batches_of(name, seed, epochs=5)
        count = dict(zip(*np.unique(labels, return_counts=True)))
        alone = 0
        for batch in batches:
            assert len(batch) == batch_size == len(set(batch.tolist()))
            classes, members = np.unique(labels[batch], return_counts=True)
            assert members.max() <= k and len(classes) >= 2
            assert all(count[c] > 1 for c in classes)
            alone += (members == 1).sum()
            if name == "SOP's":
                assert all(n == count[c] for c, n in zip(classes, members) if count[c] < k) or alone == 0
        odd = name == "twos alone, an odd batch"
        assert alone == (len(batches) if odd else 0)


@pytest.mark.parametrize("name", SIZES)
def test_over_epochs_pictures_of_all_classes_come_evenly(name):
    labels, batches, batch_size, _ = batches_of(name, epochs=20)
    names, sizes = np.unique(labels, return_counts=True)
    usable = np.isin(labels, names[sizes > 1])
    counts = np.bincount(np.concatenate(batches), minlength=len(labels))
    assert not counts[~usable].any()
    for c in names:  # no picture of a class is ahead of another, but for the shufflings that go on
        assert np.ptp(counts[labels == c]) <= 2
    share = len(batches) * batch_size / usable.sum()
    if name not in ("one large", "as many as there are", "K of many"):  # where a class can't come as often
        assert counts[usable].min() >= share - 2 and counts[usable].max() <= share + 2


def test_an_epoch_of_sops_classes_has_nearly_every_picture_once():
    labels, batches, _, _ = batches_of("SOP's")
    counts = np.bincount(np.concatenate(batches), minlength=len(labels))
    assert (counts == 1).mean() > 0.93 and counts.max() <= 2
    missed = labels[counts == 0]
    assert len(np.unique(labels[counts > 0])) > 0.97 * 600 and len(missed) < 0.04 * len(labels)
    other = np.concatenate(batches_of("SOP's", epoch=1)[1])
    pairs = [set(zip(one, one[1:])) for one in (np.concatenate(batches).tolist(), other.tolist())]
    assert len(pairs[0] & pairs[1]) < 0.2 * len(labels)  # another order, other companions


def test_the_large_class_that_could_not_come_more_often_is_in_every_batch():
    labels, batches, _, _ = batches_of("one large", epochs=3)
    large = np.bincount(labels - labels.min()).argmax() + labels.min()
    assert all((labels[batch] == large).sum() in (4, 5) for batch in batches)


def test_draws_depend_on_seed_and_epoch_alone_and_go_on_in_the_middle():
    def draw(*key):
        return np.array(batches_of("SOP's", *key)[1])

    assert np.array_equal(draw(0, 0), draw(0, 0))
    labels, whole, batch_size, k = batches_of("SOP's")
    few = list(sampler.filled_batches(labels, batch_size, k, 0, 0, 3))
    assert np.array_equal(whole[:3], few)
    assert len({draw(seed, epoch).tobytes() for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize(
    ("sizes", "batch_size", "k", "wanted"),
    [
        ([2, 3, 5], 9, 4, "a batch of 9 is not divisible by --samples_each_class=4; the nearest that is: 8"),
        ([2, 3, 5], 4, 4, "a batch of 4 with --samples_each_class=4 has one class: it takes at least two"),
        ([2, 3, 5, 1], 12, 4, "the classes have 9 images for it: take --train_batch_size=8 or less"),
        ([2, 2, 1], 10, 5, "the classes have 4 images for it: take a smaller --samples_each_class"),
        ([1, 1, 5, 1], 8, 4, "fewer than two classes have two images or more: --small_classes=repeat"),
    ],
)
def test_batches_that_cannot_be(sizes, batch_size, k, wanted):
    with pytest.raises(UserError) as error:
        sampler.check_filling(np.array(sizes), batch_size, k)
    assert wanted in str(error.value)
    with pytest.raises(UserError):
        next(sampler.filled_batches(class_sizes(sizes), batch_size, k, 0, 0, 1))


# ---------------------------------------------------------------- train.py


@pytest.fixture(scope="module")
def few(birds, tmp_path_factory):
    """A training list of 6 classes with 1, 2, 2, 3, 4 and 8 pictures."""
    folder = tmp_path_factory.mktemp("few")
    kept, rows = dict(zip("123456", (1, 2, 2, 3, 4, 8))), []
    for row in read_rows(birds.train_list):
        label = row.rsplit(" ", 1)[1]
        if kept[label]:
            kept[label] -= 1
            rows.append(f"{birds.root}/{row}\n")
    (folder / "few.txt").write_text("".join(rows))
    flags = [*TINY, "--samples_each_class=4", "--lr_strategy=constant", "--eval_every=0", "--freeze_bn=True"]
    return [f"--train_list={folder}/few.txt", f"--val_list={birds.val_list}", *flags]


def logged(folder):
    rows = [json.loads(row) for row in read_rows(folder / "ResNet8" / "train_log.jsonl")]
    return [{name: row[name] for name in ("epoch", "step", "loss_metric", "loss_cls")} for row in rows if "step" in row]


def test_train_goes_on_in_the_middle_of_an_epoch_and_in_two_processes(birds, few, tmp_path):
    few = [*few, "--num_epochs=2", "--total_images=64"]
    out = run("train.py", *few, f"--model_save_dir={tmp_path}/whole").stdout
    assert "note: 4 classes have fewer than 4 images: more classes fill their place in a batch\n" in out
    assert "note: 1 class of one image: in no batch (--small_classes=repeat takes them)\n" in out
    process = start(birds, tmp_path / "parts", *few, "--save_every=1")
    assert wait_for_steps(process, 4)
    process.kill()
    process.communicate()
    assert Run(tmp_path / "parts" / "ResNet8").names()[-1].startswith("0_")
    run("train.py", *few, f"--model_save_dir={tmp_path}/parts", "--checkpoint=latest")
    assert len(logged(tmp_path / "whole")) == 16
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    flags = ["train.py", *few, f"--model_save_dir={tmp_path}/two"]
    finish(launch(2, tmp_path / "log", *flags), tmp_path / "log")
    for one, two in zip(logged(tmp_path / "whole"), logged(tmp_path / "two")):
        assert one["step"] == two["step"] and one["loss_metric"] == pytest.approx(
            two["loss_metric"], rel=1e-3, abs=1e-4
        )
    other = ["--num_epochs=3", "--checkpoint=latest", "--small_classes=repeat"]
    stderr = run("train.py", *few, f"--model_save_dir={tmp_path}/parts", *other, status=2).stderr
    assert "another run: --small_classes=repeat (was fill)" in stderr


def test_train_can_repeat_them_and_older_runs_still_do(few, tmp_path):
    folder = f"--model_save_dir={tmp_path}"
    out = run("train.py", *few, folder, "--num_epochs=1", "--small_classes=repeat").stdout
    assert "note: 4 classes have fewer than 4 images: drawn with replacement\n" in out
    path = tmp_path / "ResNet8" / "0" / "checkpoint.json"
    state = json.loads(path.read_text())
    del state["args"]["small_classes"]
    path.write_text(json.dumps(state))
    out = run("train.py", *few, folder, "--num_epochs=2", "--checkpoint=latest").stdout
    assert "drawn with replacement\n" in out and re.search("^small_classes: repeat$", out, re.MULTILINE)


def test_a_batch_size_that_is_not_typed_fits(few, tmp_path):
    flags = [flag for flag in few if not flag.startswith("--train_batch_size")]
    out = run("train.py", *flags, f"--model_save_dir={tmp_path}", "--num_epochs=1").stdout
    assert "note: --train_batch_size=12 instead of 256: the list and the flags allow no more\n" in out
