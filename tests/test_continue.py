"""Going on with a run: which one, with what, and what is said of it."""

import hashlib
import json
import os
import re
import shutil

import paddle
import pytest
from conftest import TINY, listing, read_rows, run
from test_faults import start, wait_for_steps

from training import start as training_start
from training.run import Run
from utility import UserError
from weights import checkpoint


def test_auto_finds_the_model_of_its_run(birds, trained, tmp_path):
    """Where no --model is typed: it is the one of --pretrained_model."""
    flags = [*birds.lists, *TINY[1:], f"--pretrained_model={trained}/ResNet8/best", f"--model_save_dir={tmp_path}"]
    run("train.py", *flags, "--num_epochs=1", "--checkpoint=auto")
    out = run("train.py", *flags, "--num_epochs=2", "--checkpoint=auto").stdout
    assert "Pass 1, " in out and "Pass 0, " not in out
    assert checkpoint.read_description(f"{tmp_path}/ResNet8/1")["args"]["pretrained_model"] == f"{trained}/ResNet8/best"
    # What started from other weights is another run; what does not say from which goes on.
    auto = ["--num_epochs=2", "--checkpoint=auto"]
    assert "done before: " in run("train.py", *flags[:-2], flags[-1], *auto).stderr
    flags[-2] = f"--pretrained_model={tmp_path}/ResNet8/0"
    error = run("train.py", *flags, *auto, status=2).stderr
    assert f"which started from {trained}/ResNet8/best: another --model_save_dir" in error
    assert "done before: " in run("train.py", *flags, *auto, "--force=True").stderr


def test_where_a_run_started_from(tmp_path, monkeypatch):
    """By the path as it is reached from here, whether it ends in .pdparams or not; a copy of what is no more counts."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "w.pdparams").write_text("")
    state = {"args": {"pretrained_model": "w.pdparams"}, "settings": {"model": "ResNet8"}, "folder": f"{tmp_path}/a"}
    monkeypatch.setattr(training_start, "read_description", lambda path, needed: state)
    monkeypatch.chdir(tmp_path)
    for typed in ("a/w.pdparams", f"{tmp_path}/a/w"):
        training_start.check_pretrained_model(typed, "run")
    for typed in ("b/w.pdparams", "", "imagenet"):
        with pytest.raises(UserError, match=r"which started from w\.pdparams"):
            training_start.check_pretrained_model(typed, "run")
    (tmp_path / "a" / "w.pdparams").unlink()
    training_start.check_pretrained_model("scratch/w.pdparams", "run")
    state["args"] = {"pretrained_model": "", "checkpoint": "run/0"}
    training_start.check_pretrained_model("imagenet", "run")  # as runs that went on were described
    state["digests"] = 2
    with pytest.raises(UserError, match="which started from random weights"):
        training_start.check_pretrained_model("imagenet", "run")


def test_a_run_that_goes_on_in_another_folder_or_with_other_steps(birds, tmp_path):
    """The checkpoint that it goes on from is put there first: its recall may still have to be measured."""
    flags = ["--num_epochs=1", "--eval_every=0", "--keep=9"]
    process = start(birds, tmp_path / "a", *flags)
    assert process.wait() == 0
    flags = [f"--checkpoint={tmp_path}/a/ResNet8/0", "--eval_every=1"]
    out = run("train.py", *flags, f"--model_save_dir={tmp_path}/b", "--num_epochs=2").stdout
    assert re.findall(r"^Pass (\d), recall", out, re.MULTILINE) == ["0", "1"]
    assert Run(tmp_path / "b" / "ResNet8").names() == ["0", "1"]
    process = start(birds, tmp_path / "c", "--num_epochs=2", "--save_every=4", "--total_images=80")
    assert wait_for_steps(process, 6)
    process.kill()
    process.communicate()
    assert Run(tmp_path / "c" / "ResNet8").names()[-1].startswith("0_")
    flags = [f"--model_save_dir={tmp_path}/c", "--checkpoint=latest", "--total_images=8", "--force=True"]
    out = run("train.py", *flags).stdout
    assert re.findall(r"^Pass (\d), recall", out, re.MULTILINE) == ["0", "1"]


def test_the_best_goes_along_into_another_folder_or_is_said_to_stay(birds, tmp_path):
    assert start(birds, tmp_path / "a", "--num_epochs=1").wait() == 0
    description = checkpoint.read_description(f"{tmp_path}/a/ResNet8/0")
    checkpoint.update_description(f"{tmp_path}/a/ResNet8/0", {**description, "best": {"recall@1": 1.0, "epoch": 0}})
    flags = [f"--model_save_dir={tmp_path}/b", "--num_epochs=3"]
    out = run("train.py", f"--checkpoint={tmp_path}/a/ResNet8/0", *flags).stdout
    assert "best recall@1 1.0000 in pass 0" in out and "is not in" not in out
    assert Run(tmp_path / "b" / "ResNet8").names() == ["0", "2"]
    assert os.readlink(tmp_path / "b" / "ResNet8" / "best") == "0"
    flags = [f"--model_save_dir={tmp_path}/c", "--num_epochs=4"]
    out = run("train.py", f"--checkpoint={tmp_path}/b/ResNet8/2", *flags).stdout
    assert "note: the best so far, recall@1 1.0000 in pass 0, is not in" in out
    assert os.readlink(tmp_path / "c" / "ResNet8" / "best") == "3"
    # What --overwrite deletes has no best: that of c is of the same number.
    flags = [f"--model_save_dir={tmp_path}/b", "--num_epochs=5", "--overwrite=True"]
    out = run("train.py", f"--checkpoint={tmp_path}/c/ResNet8/3", *flags).stdout
    assert os.path.isdir(tmp_path / "b" / "ResNet8" / "best") and "done: " in out


def test_what_a_run_cannot_go_on_with(birds, trained, tmp_path):
    latest = f"--checkpoint={trained}/ResNet8/latest"
    flags = [latest, f"--model_save_dir={tmp_path}", "--num_epochs=2", "--force=True"]
    for more, wanted in (
        (["--class_dim=12"], "error: --class_dim=12, but the head in "),
        (
            ["--loss_name=normsoftmax"],
            "error: --loss_name=normsoftmax: the loss of a cosine head, the run's is",
        ),
    ):
        error = run("train.py", *flags, *more, status=2).stderr.splitlines()[-1]
        assert error.startswith(wanted) and not os.listdir(tmp_path), error
    out = run("train.py", *flags, "--loss_name=emlloss", "--margin=0.2", "--alpha=0", "--total_images=8").stdout
    assert "note: without effect on emlloss: --margin\n" in out and "--alpha=0: the head is not trained" in out


@pytest.mark.parametrize(
    "flags, line",
    [
        # Computed by hand: 0.01 * 0.1 ** 3 in the last quarter, 0.01 * 0.1 ** 2 where the third of four begins.
        (["--lr_strategy=piecewise_decay"], "was 1e-05 at the last step and is 0.0001 at the next"),
        # 3 steps an epoch: 0.01 / 2 * (1 + cos(pi * 5 / 6)), and half of 0.01 in the middle of the schedule.
        (["--lr_strategy=cosine_decay"], "was 0.000669873 at the last step and is 0.005 at the next"),
        (["--lr_strategy=constant"], None),
    ],
)
def test_more_epochs_say_what_becomes_of_the_learning_rate(birds, tmp_path, flags, line):
    flags += [f"--model_save_dir={tmp_path}", "--total_images=24", "--eval_every=0"]
    run("train.py", *birds.lists, *TINY, *flags, "--num_epochs=2")
    out = run("train.py", *flags, "--checkpoint=latest", "--num_epochs=4").stdout
    assert (f"note: the learning rate {line}" in out) if line else ("the learning rate" not in out)
    out = run("train.py", *flags, "--checkpoint=latest", "--num_epochs=4", status=2).stderr  # nothing left to do
    assert "has all of its 4 epochs" in out


def test_what_is_missing_in_the_optimizers_file_is_named(birds, trained, tmp_path):
    shutil.copytree(trained / "ResNet8", tmp_path / "ResNet8", symlinks=True)
    path = tmp_path / "ResNet8" / "0" / checkpoint.PART_FILES["optimizer"]
    saved = paddle.load(str(path), return_numpy=True)
    checkpoint.update_description(path.parent, {"sums": {}})  # as in older checkpoints
    lost = sorted(saved)[0]
    flags = ["--model=ResNet8", f"--model_save_dir={tmp_path}", "--checkpoint=latest", "--num_epochs=2"]
    for content, what in (
        ({key: saved[key] for key in saved if key != lost}, f"incomplete: 1 entries are missing, such as '{lost}'"),
        ({}, f"incomplete: {len(saved)} entries are missing"),
    ):
        paddle.save(content, str(path))
        before = listing(tmp_path)
        assert f"{path}: {what}" in run("train.py", *flags, status=2).stderr
        assert listing(tmp_path) == before
    assert f"note: momentum starts anew: {path}: incomplete" in run("train.py", *flags, "--force=True").stdout


def test_a_checkpoint_outside_a_run_needs_a_place(birds, trained, tmp_path):
    checkpoint = tmp_path / "some" / "copy" / "weights"
    shutil.copytree(trained / "ResNet8" / "0", checkpoint)
    before = listing(tmp_path)
    message = run("train.py", f"--checkpoint={checkpoint}", "--num_epochs=2", status=2).stderr
    assert f"--checkpoint={checkpoint}: not in the folder of a run (ResNet8/ with its train_log.jsonl)" in message
    assert "--model_save_dir" in message and message.count("\n") == 1
    assert listing(tmp_path) == before
    run("train.py", f"--checkpoint={checkpoint}", "--num_epochs=2", f"--model_save_dir={tmp_path}/new")
    after = listing(tmp_path)
    assert {name: after[name] for name in before} == before and "new/ResNet8/1/model.pdparams" in after


def test_a_head_of_other_classes_starts_anew(birds, trained, tmp_path):
    """Of as many; a part of a run's own classes, or those in another order, is no reason."""
    flags = [*TINY, f"--pretrained_model={trained}/ResNet8/best", "--num_epochs=1", "--eval_every=0"]
    same = run("train.py", *flags, *birds.lists, f"--model_save_dir={tmp_path}/same").stdout
    assert "head loaded: 6 classes" in same and "other classes" not in same
    other = run("train.py", *flags, f"--train_list={birds.val_list}", f"--model_save_dir={tmp_path}/other").stdout
    assert "is one of other classes: it starts anew" in other and "head starts anew: none there" in other


def test_a_wide_head_of_other_classes_starts_anew(birds, tmp_path):
    """And the scale of its loss is the checkpoint's."""
    flags = [*TINY, "--loss_name=normsoftmax", "--class_dim=50", "--num_epochs=1", "--eval_every=0"]
    run("train.py", *flags, *birds.lists, "--head_scale=30", f"--model_save_dir={tmp_path}/first")
    flags += [f"--pretrained_model={tmp_path}/first/ResNet8/latest", f"--model_save_dir={tmp_path}/second"]
    rows = [f"{birds.root}/{path} {500 + int(label)}" for path, label in map(str.split, read_rows(birds.train_list))]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    out = run("train.py", *flags, f"--train_list={tmp_path}/list.txt").stdout
    assert "is one of other classes: it starts anew" in out and "\nhead_scale: 30.0\n" in out


def test_digests_of_before_are_still_read(birds, trained, tmp_path):
    """Digests of base names and class indices."""
    shutil.copytree(trained / "ResNet8", tmp_path / "ResNet8", symlinks=True)
    path = tmp_path / "ResNet8" / "0" / checkpoint.DESCRIPTION
    state = json.loads(path.read_text())
    digest = hashlib.sha256()
    for row in read_rows(birds.train_list):
        name, label = row.rsplit(" ", 1)
        digest.update(f"{os.path.basename(name)} {int(label) - 1}\n".encode())  # the class index
    state["train_list"] = digest.hexdigest()
    del state["digests"]  # which says that they are as today
    path.write_text(json.dumps(state))
    run("train.py", f"--model_save_dir={tmp_path}", "--checkpoint=latest", "--model=ResNet8", "--num_epochs=2")
    assert json.loads((tmp_path / "ResNet8/1/checkpoint.json").read_text())["train_list"] != digest.hexdigest()


def test_the_best_of_another_list_is_forgotten(birds, tmp_path):
    process = start(birds, tmp_path / "a", "--num_epochs=1")
    assert process.wait() == 0
    (tmp_path / "short.txt").write_text("\n".join(read_rows(birds.val_list)[:12]))
    flags = [f"--val_list={tmp_path}/short.txt", f"--data_dir={birds.root}", f"--model_save_dir={tmp_path}/a"]
    out = run("train.py", *flags, "--checkpoint=latest", "--num_epochs=2").stdout
    assert "note: another --val_list" in out and os.readlink(tmp_path / "a" / "ResNet8" / "best") == "1"
