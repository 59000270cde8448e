"""Every mistake costs one clear line on stderr, exit status 2, no traceback, and leaves nothing behind."""

import os
import re

import pytest
from conftest import SMALL, TINY, read_rows, run

import losses
import models
from weights.checkpoint import read_description

QUICK = [*TINY, "--num_epochs=1"]


def fails(script, *flags, allow=""):
    """Runs a script that must fail as promised; -> its message. `allow`: what else may stand on stderr."""
    result = run(script, *flags, status=2)
    lines = [line for line in result.stderr.splitlines() if not (allow and re.search(allow, line))]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture()
def output(tmp_path):
    return tmp_path / "output"


def train_fails(birds, output, *flags):
    message = fails("train.py", *birds.lists, *QUICK, f"--model_save_dir={output}", *flags)
    assert not output.exists()
    return message


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("script", ["train.py", "eval.py", "infer.py"])
def test_missing_and_empty_list(script, birds, tmp_path):
    flags = [*(QUICK if script == "train.py" else SMALL), f"--train_list={birds.train_list}"]
    message = fails(script, *flags, f"--val_list={tmp_path}/none.txt")
    assert f"{tmp_path}/none.txt: cannot read this list file: No such file" in message and "data/split.py" in message
    empty = write(tmp_path / "empty.txt", "\n  \n")
    assert f"{empty}: the list is empty" in fails(script, *flags, f"--val_list={empty}")


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ("picture.jpg", ":2: no label on this line: expected '<path> <label>', found 'picture.jpg'"),
        ("picture.jpg cat", ":2: the label 'cat' is no integer"),
        ("picture.jpg 1.5", ":2: the label '1.5' is no integer"),
        ("absent.jpg 3", ":2: "),
    ],
)
def test_bad_line(birds, tmp_path, output, row, wanted):
    first, *rest = read_rows(birds.train_list)
    bad = write(tmp_path / "list.txt", "\n".join([first, row, *rest]))
    message = train_fails(birds, output, f"--train_list={bad}", f"--data_dir={birds.root}")
    assert f"{bad}{wanted}" in message
    if row.startswith("absent"):
        assert f"{birds.root}/absent.jpg: no such image" in message


@pytest.mark.parametrize("content", [b"", b"text", "truncated"])
def test_corrupt_image(birds, tmp_path, content):
    rows = read_rows(birds.val_list)
    if content == "truncated":
        with open(os.path.join(birds.root, rows[0].rsplit(" ", 1)[0]), "rb") as file:
            content = file.read()[:-40]
    (tmp_path / "bad.jpg").write_bytes(content)
    bad = write(tmp_path / "list.txt", "\n".join([*rows[:5], f"{tmp_path}/bad.jpg 7", *rows[5:]]))
    feature_file = tmp_path / "f.npz"
    flags = [*SMALL, f"--val_list={bad}", f"--data_dir={birds.root}"]
    notes = "random weights"
    message = fails("infer.py", *flags, f"--feature_file={feature_file}", allow=notes)
    assert f"{bad}:6: {tmp_path}/bad.jpg: " in message and "--on_bad_image=skip" in message
    assert not [name for name in os.listdir(tmp_path) if "npz" in name]
    assert f"{bad}:6: " in fails("eval.py", *flags, f"--output_json={tmp_path}/e.json", allow=notes)
    assert not os.path.exists(tmp_path / "e.json")


def test_batch_shape(birds, output):
    message = train_fails(birds, output, "--train_batch_size=9")
    assert "a batch of 9 is not divisible by --samples_each_class=2; the nearest that is: 8" in message
    message = train_fails(birds, output, "--train_batch_size=40")
    assert "needs 20 classes, the list has 6" in message and "--train_batch_size=12 or less" in message


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--model=ResNet51", list(models.MODELS)),
        ("--loss_name=triplet", list(losses.LOSSES)),
        ("--memory_size=9 --loss_name=emlloss", ["--memory_size", "emlloss", "contrastiveloss"]),
        ("--head=linear --loss_name=arcmarginloss", ["--head=linear", "arcmarginloss", "cosine head"]),
        ("--triplet_mining=easy", list(losses.MINING)),
        ("--pooling=mean", list(models.POOLINGS)),
        ("--optimizer=lion", ["momentum", "sgd", "adam", "adamw"]),
        ("--lr_strategy=step", ["piecewise_decay", "cosine_decay", "constant"]),
        ("--lr=fast", ["--lr", "float", "fast"]),
        ("--lr=-1", ["--lr", "at least 0"]),
        ("--lr=nan", ["--lr", "at least 0"]),
        ("--num_epochs=0", ["--num_epochs", "at least 1"]),
        ("--use_gpu=maybe", ["--use_gpu", "True or False", "maybe"]),
        ("--image_shape=224", ["3,224,224"]),
        ("--image_shape=1,32,32", ["3,224,224"]),
        ("--test_transform=crop", ["center_crop", "resize"]),
        ("--learning_rate=1", ["unrecognized arguments", "--learning_rate"]),
        ("--class_dim=5", ["--class_dim=5", "6 classes"]),
        ("--checkpoint=nowhere", ["nowhere", "not a checkpoint directory"]),
        ("--pretrained_model=nowhere", ["nowhere", "no weights there"]),
    ],
)
def test_flag_values(birds, output, flag, wanted):
    message = train_fails(birds, output, *flag.split())
    assert all(str(word) in message for word in wanted), message


def test_checkpoint_of_another_model(birds, trained, output):
    best = f"{trained}/ResNet8/best"
    flags = [*birds.lists, "--model=ResNet18", "--use_gpu=False", f"--pretrained_model={best}"]
    wanted = "--model=ResNet18, but the checkpoint is one of model ResNet8"
    assert wanted in fails("eval.py", *flags)
    assert wanted in fails("infer.py", *flags)
    assert wanted in train_fails(birds, output, "--model=ResNet18", f"--pretrained_model={best}")
    # A weights file alone, without its description: seen by the tensors.
    os.makedirs(output)
    os.link(f"{best}/model.pdparams", f"{output}/weights.pdparams")
    message = fails("eval.py", *flags[:-1], f"--pretrained_model={output}/weights")
    assert "weights.pdparams: not the weights of ResNet18: backbone." in message and "more" in message
    flags = [*birds.lists, f"--pretrained_model={best}", "--use_gpu=False", "--class_dim=9"]
    assert "--class_dim=9, but the head in" in fails("eval.py", *flags)


def test_another_run_is_not_continued_or_overwritten(birds, trained):
    flags = [*birds.lists, *QUICK, f"--model_save_dir={trained}"]
    message = fails("train.py", *flags)
    assert "holds an earlier run" in message and "--checkpoint=latest" in message and "--overwrite=True" in message
    message = fails("train.py", *flags, "--checkpoint=latest", "--loss_name=emlloss", "--num_epochs=2")
    assert "--loss_name=emlloss (was tripletloss)" in message and "--force" in message
    assert os.path.exists(trained / "ResNet8" / "best" / "model.pdparams")


def test_output_that_cannot_be_written(birds, trained, tmp_path):
    file = write(tmp_path / "file", "")
    message = fails("train.py", *birds.lists, *QUICK, f"--model_save_dir={file}/output")
    assert f"{file}/output/ResNet8: cannot write into this directory" in message
    common = [*birds.lists, f"--pretrained_model={trained}/ResNet8/best", "--use_gpu=False"]
    assert "cannot write" in fails("infer.py", *common, f"--feature_file={file}/f.npz")
    assert "cannot write" in fails("eval.py", *common, f"--output_json={file}/e.json")
    assert "must end in .npz" in fails("infer.py", *common, f"--feature_file={tmp_path}/f.txt")


def test_gpu_asked_for_and_none_there(birds, trained):
    flags = [*birds.lists, f"--pretrained_model={trained}/ResNet8/best"]
    for more, count in (["--use_gpu=True"], 1), ([], 0):  # a CPU build: nobody asked for a GPU
        result = run("eval.py", *flags, *more, CUDA_VISIBLE_DEVICES="")
        notes = [line for line in result.stderr.splitlines() if line.startswith("note: --use_gpu=True, but ")]
        assert len(notes) == count and all("running on the CPU" in note for note in notes)


def test_diverging_loss_stops_with_the_step_and_the_last_good_checkpoint(birds, tmp_path):
    flags = [*birds.lists, *QUICK, f"--model_save_dir={tmp_path}"]
    run("train.py", *flags)
    message = fails("train.py", *flags, "--checkpoint=latest", "--num_epochs=3", "--lr=1e30", "--optimizer=momentum")
    assert re.search(r"NaN or infinite in pass 1, trainbatch \d", message)
    assert f"last good checkpoint: {tmp_path}/ResNet8/0" in message and "smaller --lr than 1e+30" in message
    assert sorted(n for n in os.listdir(tmp_path / "ResNet8") if n.isdigit()) == ["0"]


@pytest.mark.parametrize("inputs", [["nothing_here"], ["tests"]])
def test_infer_without_images(trained, inputs):
    message = fails("infer.py", f"--pretrained_model={trained}/ResNet8/best", "--use_gpu=False", "--input", *inputs)
    assert "no such file or folder" in message or "no images in this folder" in message


def test_a_checkpoint_that_cannot_be_continued(birds, trained, tmp_path):
    latest = f"{trained}/ResNet8/latest"
    assert "has all of its 1 epoch: a larger --num_epochs than 1" in fails("train.py", f"--checkpoint={latest}")
    message = fails("train.py", *birds.lists, f"--model_save_dir={tmp_path}", "--checkpoint=latest")
    assert f"{tmp_path}: --checkpoint=latest, but there is no checkpoint to continue" in message
    message = fails("train.py", f"--checkpoint={latest}", "--pretrained_model=x", "--num_epochs=2")
    assert "--pretrained_model has no place beside it" in message
    rows = read_rows(birds.train_list)[:40]
    short = [f"--train_list={write(tmp_path / 'short.txt', chr(10).join(rows))}", f"--data_dir={birds.root}"]
    message = fails("train.py", f"--checkpoint={latest}", *short, "--num_epochs=2")
    assert "short.txt: not the pictures and labels that the run of" in message and "--force=True" in message
    for flag, was in {"margin=0.3": 0.1, "seed=4": 3, "total_images=8": None, "train_batch_size=16": 8}.items():
        message = fails("train.py", f"--checkpoint={latest}", f"--{flag}", "--num_epochs=2")
        assert f"another run: --{flag} (was {was}); --force=True continues all the same" in message
    message = fails("train.py", f"--checkpoint={latest}", "--image_shape=3,40,40", "--num_epochs=2")
    assert "--image_shape=[3, 40, 40], but the checkpoint is one of image_shape [3, 32, 32]" in message
    flags = [*short, "--num_epochs=2", "--margin=0.3", "--image_shape=3,40,40", f"--model_save_dir={tmp_path}/forced"]
    out = run("train.py", f"--checkpoint={latest}", *flags, "--force=True").stdout
    assert "note: the run goes on with --data_dir=" in out and "--margin=0.3 (was 0.1)" in out
    assert "Pass 1, trainbatch 4, " in out  # 5 steps, of 40 pictures


def test_going_back_to_an_earlier_epoch(birds, tmp_path):
    run("train.py", *birds.lists, *QUICK, "--num_epochs=3", "--total_images=8", "--keep=3",
        f"--model_save_dir={tmp_path}")  # fmt: skip
    flags = [f"--checkpoint={tmp_path}/ResNet8/0", "--num_epochs=4", "--use_gpu=False"]
    message = fails("train.py", *flags)
    assert "the run has later checkpoints (1, 2)" in message and "--overwrite=True deletes them" in message
    run("train.py", *flags, "--overwrite=True")
    for epoch in (1, 2, 3):  # those of the other branch have gone
        assert read_description(f"{tmp_path}/ResNet8/{epoch}")["args"]["num_epochs"] == 4


def test_odd_lists_and_outputs(birds, trained, tmp_path):
    best = [f"--pretrained_model={trained}/ResNet8/best", "--use_gpu=False"]
    absent = write(tmp_path / "absent.txt", "\nabsent.jpg 3\n")
    message = fails("infer.py", *best, "--input", f"{birds.root}/images", absent)
    assert f"error: {absent}:2: {tmp_path}/absent.jpg: no such image" in message
    assert "a folder, not a list file" in fails("eval.py", *best, f"--val_list={birds.root}")
    (tmp_path / "utf16.txt").write_bytes("a.jpg 1\n".encode("utf-16"))
    assert "UTF-16" in fails("eval.py", *best, f"--val_list={tmp_path}/utf16.txt")
    gallery = f"--gallery_list={birds.train_list}"
    assert "has no image of any class of" in fails("eval.py", *best, f"--val_list={birds.val_list}", gallery)
    assert "--recall_at" in fails("eval.py", *best, *birds.lists, "--recall_at=")
    output = [f"--output_json={tmp_path}"]
    assert "a directory, not a file" in fails("eval.py", *best, *birds.lists, *output)
