"""data/split.py on the layouts of public sets, what it says of others, and the command that it prints."""

import hashlib
import os
import shlex
import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import ROOT, SMALL, draw_birds, read_rows, run
from test_split import JPEG, fails, lists, make, split

import reader
from training import data
from utility import UserError


def pictures(*folders, count=2):
    return {f"{folder}/{i}.jpg": JPEG for folder in folders for i in range(count)}


def labelled(path):
    """{class folder, relative to the list: label} of a list, and how many lines it has."""
    rows = [row.rsplit(" ", 1) for row in read_rows(path)]
    return {os.path.dirname(image): int(label) for image, label in rows}, len(rows)


# ---------------------------------------------------------------- layouts


def test_classes_at_any_depth(tmp_path):
    """As In-shop has them; what is beside them and no picture is no class."""
    folders = ["WOMEN/Dresses/id_00000002", "WOMEN/Dresses/id_00000004", "MEN/Denim/id_00000080", "MEN/Shirts/id_7"]
    make(tmp_path, pictures(*(f"img/{folder}" for folder in folders)))
    make(tmp_path, {"Anno/list.txt": b"text", "Eval/part.txt": b"text"})
    for root in (tmp_path / "img", tmp_path):
        run("data/split.py", root, "--name=x", f"--output_dir={tmp_path}")
        train, val, classes = lists(tmp_path, "x")
        inside = "img/" if root == tmp_path else ""
        assert classes == [f"{label} {inside}{name}" for label, name in enumerate(sorted(folders), 1)]
        assert [row.rsplit(" ", 1)[0] for row in train + val] == [
            f"img/{name}/{i}.jpg" for name in sorted(folders) for i in (0, 1)
        ]


def test_a_folder_of_pictures_and_class_folders_is_a_class_and_said(tmp_path):
    make(tmp_path, pictures("cat", "cat/siamese", "dog"))
    make(tmp_path, {"cover.jpg": JPEG})
    result = run("data/split.py", tmp_path, "--name=x")
    assert lists(tmp_path, "x")[2] == ["1 cat", "2 cat/siamese", "3 dog"]
    assert f"class folders in 1 class folder are classes of their own (first: {tmp_path}/cat)" in (result.stderr)
    assert f"left out 1 file: 1 in {tmp_path} itself, in no class folder (first: {tmp_path}/cover.jpg)" in result.stderr


@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("Train", "Test"), ("training", "valid")])
def test_train_and_test_folders_become_two_lists_with_the_same_labels(tmp_path, one, other):
    make(tmp_path, pictures(f"{one}/cow", f"{one}/dog", f"{other}/cat", f"{other}/dog", "masks/dog"))
    for flags in ([], ["--train_classes=all"]):
        result = run("data/split.py", tmp_path, "--name=x", *flags)
        assert labelled(tmp_path / "x_train.txt") == ({f"{one}/cow": 2, f"{one}/dog": 3}, 4)
        assert labelled(tmp_path / "x_val.txt") == ({f"{other}/cat": 1, f"{other}/dog": 3}, 4)
        assert read_rows(tmp_path / "x_classes.txt") == ["1 cat", "2 cow", "3 dog"]
        assert "note: val: 1 of its 2 classes train: recall on it is not that on unseen classes" in result.stderr
        assert f"left out 1 folder: 1 beside {one} and {other} (first: {tmp_path}/masks)" in result.stderr
    for flag in ("--train_classes=1", "--within_classes=0.5"):
        assert "say already what trains: name one of them to split its classes" in fails(tmp_path, flag)


def test_three_parts_and_a_holdout(tmp_path):
    make(tmp_path, pictures("train/a", "train/b", "train/c", "val/a", "test/d"))
    out = run("data/split.py", tmp_path, "--name=x", "--holdout=0.3").stdout
    found = {part: set(labelled(tmp_path / f"x_{part}.txt")[0].values()) for part in ("train", "val", "test", "fit")}
    assert found == {"train": {1, 2, 3}, "val": {1}, "test": {4}, "fit": {1, 2}}
    assert "x_fit.txt" in out.splitlines()[-1] and "x_holdout.txt" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("folders", "wanted"),
    [
        (["train/a", "train/b"], "{root}/train/ holds class folders: name it (--train_classes=all lists it whole)"),
        (["x/train/a", "x/train/b"], "{root}/x/train/ holds class folders: name it"),
        (["val/a", "test/b"], "{root}/test/, {root}/val/ hold class folders: name one of them"),
        (["query/a", "gallery/a"], "{root}/gallery/, {root}/query/ hold class folders: name one of them"),
        (["train/a", "query/b", "gallery/b"], "{root}/gallery/, {root}/query/, {root}/train/ hold class folders"),
        (["x/train/a", "x/test/b"], "{root}/x holds train/ and test/: name it"),
        (["train/a", "train/b", "test"], "2 pictures lie in {root}/test itself: each class needs a folder of its own; "
         "{root}/train/ holds class folders: name it"),
        (["train", "test"], "2 pictures lie in {root}/train itself: each class needs a folder of its own"),
        (["query", "gallery"], "2 pictures lie in {root}/gallery itself"),
    ],
)  # fmt: skip
def test_a_wrong_level_is_told(tmp_path, folders, wanted):
    make(tmp_path, pictures(*folders))
    assert wanted.format(root=tmp_path) in fails(tmp_path)
    assert not list(tmp_path.glob("**/*.txt"))


def test_train_is_a_class_among_vehicles(tmp_path):
    make(tmp_path, pictures("train/steam", "train/diesel", "bus/old", "car"))
    run("data/split.py", tmp_path, "--name=x")
    assert lists(tmp_path, "x")[2] == ["1 bus/old", "2 car", "3 train/diesel", "4 train/steam"]


def test_all_classes_in_one_list(tmp_path):
    make(tmp_path, pictures("001.A", "002.B", "007.C"))
    out = run("data/split.py", tmp_path, "--train_classes=all", "--name=x").stdout
    assert sorted(name for name in os.listdir(tmp_path) if "x_" in name) == ["x_classes.txt", "x_train.txt"]
    assert labelled(tmp_path / "x_train.txt") == ({"001.A": 1, "002.B": 2, "007.C": 7}, 6)
    assert "--eval_every=0" in out and "--val_list" not in out


# ---------------------------------------------------------------- which classes, which images


def test_a_seed_draws_the_classes(tmp_path):
    make(tmp_path, pictures(*(f"c{i:02d}" for i in range(20))))
    drawn = {}
    for seed in (1, 2, 1):
        run("data/split.py", tmp_path, "--name=x", f"--seed={seed}", "--train_classes=8")
        train, val, classes = lists(tmp_path, "x")
        labels = [int(row.split()[-1]) for row in train[::2]]
        assert len(labels) == 8 and labels == sorted(labels) and not {*train} & {*val} and len(train + val) == 40
        assert classes == [f"{i + 1} c{i:02d}" for i in range(20)]
        assert drawn.setdefault(seed, labels) == labels
    assert drawn[1] != drawn[2] and list(range(1, 9)) not in drawn.values()


@pytest.mark.parametrize(("share", "taken"), [("0.2", 2), ("0.5", 5), ("0.01", 1), ("0.99", 9)])
def test_a_split_within_classes(tmp_path, share, taken):
    make(tmp_path, pictures("a", "b", count=10))
    make(tmp_path, pictures("one", count=1))
    seen = []
    for seed in ([], ["--seed=3"], ["--seed=3"], ["--seed=4"]):
        result = run("data/split.py", tmp_path, "--name=x", f"--within_classes={share}", *seed)
        train, val, _ = lists(tmp_path, "x")
        assert len(val) == 2 * taken and len(train) == 21 - 2 * taken and not {*train} & {*val}
        assert sum(row.startswith("one/") for row in train) == 1  # at least one stays in each
        assert "note: val: 2 of its 2 classes train" in result.stderr
        seen.append(val)
    assert seen[0][-1] == "b/9.jpg 2" and seen[1] == seen[2] and seen[1] != seen[3] and seen[0] != seen[1]


def test_flags_that_say_two_things(tmp_path):
    make(tmp_path, pictures("a", "b", "c"))
    for flags in (["--train_classes=1"], ["--holdout=0.5"]):
        assert "--within_classes splits all classes" in fails(tmp_path, "--within_classes=0.5", *flags)
    for share in ("0", "1", "nan", "-1", "inf"):
        assert "--within_classes" in fails(tmp_path, f"--within_classes={share}")


def test_a_part_of_each_class_of_one_image(tmp_path):
    make(tmp_path, {"a/1.jpg": JPEG, "b/1.jpg": JPEG})
    assert "no class has two images" in fails(tmp_path, "--within_classes=0.5")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_warnings_of_classes_that_teach_nothing(tmp_path):
    make(tmp_path, {**pictures("a", "b"), **pictures("lone", count=1)})
    result = run("data/split.py", tmp_path, "--train_classes=1")
    assert "warning: one class trains: a metric loss needs images of at least two" in result.stderr
    assert "warning: val: 1 class of one image" in result.stderr and "next: " not in result.stdout
    result = run("data/split.py", tmp_path, "--train_classes=all")
    assert f"warning: train: 1 class of one image (first: {tmp_path}/lone)" in result.stderr


# ---------------------------------------------------------------- the next command


def next_words(*flags):
    (line,) = (line for line in run("data/split.py", *flags).stdout.splitlines() if line.startswith("next: "))
    return shlex.split(line)[1:]


@pytest.mark.parametrize(
    ("classes", "count", "epochs"), [(4, 5, 60), (100, 30, 20), (12, 100, 50), (200, 2, 60), (40, 5000, 10)]
)
def test_the_next_command_takes_some_500_steps(classes, count, epochs):
    found = [split.Class(i, f"{i}", f"{i}", range(count)) for i in range(classes)]
    words = split.next_command({"train": found[: classes // 2], "val": []}, {"train": "t", "val": "v"}, "x")
    assert [word for word in words if word.startswith("--num_epochs")] == [f"--num_epochs={epochs}"]


@pytest.mark.parametrize("sizes", [[2, 3], [1, 1, 5], [9, 1, 2], [40, 40, 40]])
def test_the_next_command_takes_any_classes(sizes):
    """Its loss compares with proxies of the classes: no picture needs another of its class in the batch."""
    classes = [split.Class(i, f"{i}", f"{i}", range(size)) for i, size in enumerate(sizes)]
    words = split.next_command({"train": classes, "val": []}, {"train": "t", "val": "v"}, "x")
    flags = dict(word[2:].split("=") for word in words if "=" in word)
    samples = reader.Samples(["x"] * sum(sizes), np.repeat(np.arange(len(sizes)), sizes), None, None)
    batching = data.Batching(flags["loss_name"], int(flags["train_batch_size"]), 4)
    assert data.check_batch(samples, batching) == min(60, sum(sizes))


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_readme_has_the_next_command(page):
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        text = file.read()
    command = text[text.index("python data/split.py my_images") :].split("```")[0]
    assert set(split.FINE_TUNING.split()) <= set(shlex.split(command))


def test_the_next_command_runs(tmp_path, server):
    """As it was printed, on smaller pictures, for one epoch, and with the weights of a server here."""
    draw_birds(tmp_path / "my birds", classes=4, images=4)
    words = next_words(tmp_path / "my birds")
    assert words[:2] == ["python", "train.py"] and "--pretrained_model=imagenet" in words
    paddle.save(paddle.vision.models.resnet50(num_classes=1).state_dict(), str(tmp_path / "w"))
    content = server.files["/resnet50.pdparams"] = (tmp_path / "w").read_bytes()
    official = f"imagenet.Official({server.url + '/resnet50.pdparams'!r}, {hashlib.md5(content).hexdigest()!r})"
    program = (
        "import runpy; from weights import imagenet; "
        f"imagenet.IMAGENET['ResNet50'] = {official}; runpy.run_path('train.py', run_name='__main__')"
    )
    smaller = ["--image_shape=3,32,32", "--num_epochs=1", "--use_gpu=False", f"--model_save_dir={tmp_path}/out"]
    command = [sys.executable, "-c", program, *words[2:], *smaller]
    environment = {**os.environ, "DEEP_METRIC_LEARNING_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Pass 0, recall@1 " in done.stdout and (tmp_path / "out" / "ResNet50" / "best").exists()
    assert os.listdir(tmp_path / "cache") == ["resnet50.pdparams"]


# ---------------------------------------------------------------- the default batch


@pytest.mark.parametrize(
    ("loss", "classes", "k", "processes", "size"),
    [
        ("tripletloss", 3, 4, 1, 12),
        ("tripletloss", 100, 4, 1, 256),
        ("tripletloss", 100, 3, 1, 255),
        ("tripletloss", 7, 3, 2, 18),
        ("tripletloss", 5, 5, 4, 20),
        ("softmax", 3, 4, 1, 30),
        ("softmax", 3, 4, 4, 28),
    ],
)
def test_the_default_batch_takes_what_the_list_allows(monkeypatch, capsys, loss, classes, k, processes, size):
    monkeypatch.setattr(data.parallel, "world_size", lambda: processes)
    samples = reader.Samples(["x"] * 10 * classes, np.repeat(np.arange(classes), 10), None, None)
    batching = data.Batching(loss, 256, k, typed=False)
    assert data.check_batch(samples, batching) == size
    said = capsys.readouterr().out
    balanced = loss == "tripletloss"
    assert (f"note: --train_batch_size={size} instead of 256" in said) == (balanced and size != 256)
    assert (f"note: batches of {size}: the list has 30 images" in said) == (not balanced)
    if not balanced:
        assert data.check_batch(samples, data.Batching(loss, 256, k)) == size
    elif size != 256:
        with pytest.raises(UserError):  # where it was typed
            data.check_batch(samples, data.Batching(loss, 256, k))


def test_no_batch_is_possible():
    one = reader.Samples(["x"] * 10, np.zeros(10, np.int64), None, None)
    for k in (4, 256):
        with pytest.raises(UserError, match=r"a metric loss needs|not divisible"):
            data.check_batch(one, data.Batching("tripletloss", 256, k, typed=False))


def test_training_without_a_batch_size(birds, tmp_path):
    """And going on with it, where the checkpoint says what it was."""
    flags = [*birds.lists, *SMALL, "--eval_every=0", f"--model_save_dir={tmp_path}"]
    out = run("train.py", *flags, "--num_epochs=1").stdout
    assert "note: --train_batch_size=24 instead of 256" in out and "train_batch_size: 24" in out
    out = run("train.py", *flags, "--num_epochs=2", "--checkpoint=latest").stdout
    assert "note: --train_batch_size" not in out and "train_batch_size: 24" in out and "Pass 1, trainbatch 0" in out
    error = run("train.py", *flags, "--num_epochs=1", "--batch_size=256", "--overwrite=True", status=2).stderr
    assert "needs 64 classes, the list has 6: take --train_batch_size=24 or less" in error
