"""What people type after a run, from wherever they are, and what they see."""

import csv
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from conftest import FORKS, ROOT, TINY, draw_birds, read_rows, run
from test_faults import start as start_run
from test_faults import wait_for_steps

import eval as evaluation
import utility
from retrieval import extraction, metrics
from training import log, run_settings, start
from training.log import RunLog
from training.run import Progress
from utility import UserError

QUICK = [*TINY, "--num_epochs=1"]


def run_in(folder, script, *flags, status=0):
    """Runs a script of the checkout with `folder` as the working folder."""
    result = FORKS.run([sys.executable, os.path.join(ROOT, script), *map(str, flags)], folder)
    assert result.returncode == status, f"{result.stdout}\n{result.stderr}"
    return result


# ---------------------------------------------------------------- the end of a run


def test_the_summary_says_what_came_out_and_what_to_type(trained, birds, tmp_path):
    out = (trained / "stdout.txt").read_text()
    recalls = {
        epoch: float(value) for epoch, value in re.findall(r"^Pass (-?\d+), recall@1 ([\d.]+)", out, re.MULTILINE)
    }
    assert f"recall@1 on {birds.val_list}\n    untrained       {recalls['-1']:6.1%}" in out
    assert f"    best, pass 0    {recalls['0']:6.1%}" in out
    best = f"{trained}/ResNet8/best"
    assert f"checkpoint    {best}\n" in out and f"log           {trained}/ResNet8/train_log.jsonl\n" in out
    commands = re.findall(r"^    python (\S+\.py) (.*)$", out, re.MULTILINE)
    assert [script for script, _ in commands] == ["eval.py", "infer.py", "infer.py"]
    # The commands run as they stand; eval.py needs no list.
    assert f"recall@1: {recalls['0']:.4f}" in run("eval.py", *commands[0][1].split()).stdout
    words = commands[1][1].replace("<pictures>", f"{birds.root}/images").replace("features.npz", f"{tmp_path}/f.npz")
    run("infer.py", *words.split())
    assert len(np.load(tmp_path / "f.npz")["paths"]) == 96
    run("infer.py", *commands[2][1].replace("exported", str(tmp_path / "exported")).split())
    assert "README.md" in os.listdir(tmp_path / "exported")


def test_the_log_has_all_flags_and_the_configuration_what_differs(trained):
    out = (trained / "stdout.txt").read_text()
    frame = re.search(r"-  Configuration Arguments -+\n(.*?)\n-{48}\n", out, re.DOTALL)[1].splitlines()
    flags = json.loads(read_rows(trained / "ResNet8" / "train_log.jsonl")[0])["args"]
    shown = dict(row.split(": ", 1) for row in frame[:-1])
    assert {"lr": "0.01", "model": "ResNet8", "train_batch_size": "8", "margin": "0.1"}.items() <= shown.items()
    assert "optimizer" not in shown and flags["optimizer"] == "momentum"
    assert frame[-1].startswith(f"and {len(flags) - len(shown)} others at their defaults: {trained}/ResNet8/train_log")


def on_a_terminal(*command):
    """What a command prints where stdout and stderr are one terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 50, 200, 0, 0))
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 2**16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode()


def test_a_terminal_has_the_original_lines_and_a_bar(birds, tmp_path):
    command = [sys.executable, "train.py", *birds.lists, *QUICK, f"--model_save_dir={tmp_path}"]
    text = on_a_terminal(*command)
    original = r"Pass 0, trainbatch \d, lr \S+, loss_metric \S+, loss_cls \S+, acc1 \S+, acc5 \S+, time \S+ sec\r?\n"
    assert len(re.findall(original, text)) == 6
    assert re.search(r"Pass 0: +\d+%\|.*img/s, data wait .*, left 0:00:\d\d\]", text)
    quiet = on_a_terminal(*command, "--overwrite=True", "--quiet")
    assert "trainbatch" not in quiet and "%|" not in quiet and "Configuration" not in quiet
    assert re.search(r"^Pass 0, recall@1 ", quiet, re.MULTILINE) and "what to type next" in quiet


def test_what_is_left_counts_evaluations():
    settings = run_settings.RunSettings(num_epochs=6, eval_every=2)
    log = RunLog(None, settings, None)
    progress = Progress(steps=10, epoch=1, step=4)
    assert log.left(progress, 0.5) == 0.5 * (6 + 4 * 10)  # before one has been timed
    log.evaluation = 100.0
    assert log.left(progress, 0.5) == 0.5 * 46 + 3 * 100  # after the epochs 1, 3 and 5


def test_quiet_figures_and_features(trained, birds, tmp_path):
    best = f"--pretrained_model={trained}/ResNet8/best"
    result = run("eval.py", best, f"--val_list={birds.train_list}", "--quiet")
    assert "Testbatch" not in result.stdout and "Configuration" not in result.stdout
    assert re.search(r"^acc1: ", result.stdout, re.MULTILINE)
    assert result.stderr.startswith("warning: 48 of 48 images are training images; the first: ")
    out = run("infer.py", best, "--quiet=True", f"--feature_file={tmp_path}/f.npz").stdout
    assert "Test-" not in out and len(out.splitlines()) == 2  # what was loaded, what was written
    assert run("infer.py", best, "--quiet", "--input", birds.val_list).stdout.count("Test-") == 48  # what is asked for


# ---------------------------------------------------------------- lists from the checkpoint


def test_lists_of_the_run_are_found_from_anywhere(tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    draw_birds(str(home / "set"), classes=4, images=4)
    other.mkdir()
    run_in(home, "data/split.py", "set", "--name=birds")
    relative = ["--train_list=set/birds_train.txt", "--val_list=set/birds_val.txt"]
    flags = [*QUICK, "--train_batch_size=4"]
    run_in(home, "train.py", *relative, *flags, "--model_save_dir=out/a")
    absolute = f"--model_save_dir={other}/out"
    run_in(home, "train.py", *relative, *flags, absolute)
    figures = []
    for folder, checkpoint in (
        (home, "out/a/ResNet8/best"),
        (other, f"{home}/out/a/ResNet8/best"),
        (other, "out/ResNet8/best"),
    ):
        out = run_in(folder, "eval.py", f"--pretrained_model={checkpoint}").stdout
        figures.append(re.findall(r"^(?:recall|MAP|R-).*", out, re.MULTILINE))
        assert len(figures[-1]) == 7 and figures[-1] == figures[0]
        run_in(folder, "infer.py", f"--pretrained_model={checkpoint}", "--quiet")
    out = run_in(other, "train.py", f"--checkpoint={home}/out/a/ResNet8/latest", "--num_epochs=2").stdout
    assert f"train_list: {home}/set/birds_train.txt" in out
    # All moved together: the folder that the checkpoint names is no more.
    moved = tmp_path / "moved"
    home.rename(moved)
    out = run_in(other, "train.py", f"--checkpoint={moved}/out/a/ResNet8/latest", "--num_epochs=3", status=2)
    assert "set/birds_train.txt: cannot read this list file" in out.stderr  # absolute by now, and gone
    again = ["train.py", f"--checkpoint={moved}/out/a/ResNet8/latest", "--num_epochs=3"]
    run_in(other, *again, *(flag.replace("=", f"={moved}/") for flag in relative))
    out = run_in(other, "eval.py", f"--pretrained_model={other}/out/ResNet8/best", status=2)
    assert "birds_val.txt: cannot read this list file" in out.stderr


def test_a_list_of_the_run_that_is_another_now(birds, trained, tmp_path):
    """Split again in place, or of another project in the folder that one is in."""
    names = {part: os.path.basename(getattr(birds, f"{part}_list")) for part in ("train", "val")}
    shutil.copytree(birds.root, tmp_path, dirs_exist_ok=True)
    flags = [f"--{part}_list={name}" for part, name in names.items()]
    run_in(tmp_path, "train.py", *flags, *QUICK, "--total_images=8")
    best = "--pretrained_model=output/ResNet8/best"
    assert "not what it was" not in run_in(tmp_path, "eval.py", best).stderr
    for part, name in names.items():
        rows = read_rows(tmp_path / name)
        (tmp_path / name).write_text("\n".join(rows[::-1]))
        err = run_in(tmp_path, "eval.py", best).stderr
        assert f"warning: {name}: not what it was when the run had it as --{part}_list" in err
        assert "not what it was" not in run_in(tmp_path, "eval.py", best, *flags).stderr  # that is what is asked for
        (tmp_path / name).write_text("\n".join(rows))


def test_data_dir_of_the_run_is_that_of_its_training_list_alone(tmp_path, monkeypatch):
    """--val_list is typed, and names its pictures on its own; the run's list counts from the run's --data_dir."""
    for name in ("train.txt", "mine.txt", "checkpoint.json"):
        (tmp_path / name).write_text("")
    of_run = {"train_list": f"{tmp_path}/train.txt", "val_list": "v.txt", "data_dir": str(tmp_path)}
    monkeypatch.setattr(extraction, "read_description", lambda path, names: {"args": of_run})
    flags = {"pretrained_model": str(tmp_path), "data_dir": None, "val_list": None, "train_list": None, "model": None}
    for typed, wanted in (
        ({}, (of_run, str(tmp_path))),
        ({"val_list": "mine.txt"}, ({**of_run, "val_list": "mine.txt", "data_dir": None}, str(tmp_path))),
        ({"val_list": "v.txt", "data_dir": "d"}, ({**of_run, "data_dir": "d"}, str(tmp_path))),
        (
            {"train_list": "mine.txt", "val_list": "v.txt", "data_dir": "d"},
            ({"train_list": "mine.txt", "val_list": "v.txt", "data_dir": "d"}, "d"),
        ),
        ({"train_list": "mine.txt"}, ({**of_run, "train_list": "mine.txt"}, str(tmp_path))),
        ({"data_dir": "d"}, ({**of_run, "data_dir": "d"}, str(tmp_path))),  # of pictures that were moved
    ):
        found, data_dir = extraction.lists_of_run({**flags, **typed}, set(typed))
        names = {name: found[name] for name in of_run}
        assert (names, data_dir) == wanted
    of_run["data_dir"] = f"{tmp_path}/moved"  # is no more
    assert extraction.lists_of_run({**flags, "val_list": "v", "data_dir": "d"}, {"val_list", "data_dir"})[1] == "d"


def test_a_run_that_was_moved_with_its_lists(tmp_path):
    home = tmp_path / "home"
    draw_birds(str(home / "set"), classes=4, images=4)
    run_in(home, "data/split.py", "set", "--name=birds")
    relative = ["--train_list=set/birds_train.txt", "--val_list=set/birds_val.txt"]
    run_in(home, "train.py", *relative, *QUICK, "--train_batch_size=4", "--model_save_dir=./out/")
    moved = tmp_path / "moved"
    home.rename(moved)
    checkpoint = f"{moved}/out/ResNet8"
    assert "queries: 8" in run_in(tmp_path, "eval.py", f"--pretrained_model={checkpoint}/best").stdout
    out = run_in(tmp_path, "train.py", f"--checkpoint={checkpoint}/latest", "--num_epochs=2").stdout
    assert f"val_list: {moved}/set/birds_val.txt" in out


def test_checkpoints_that_are_none_and_one_that_is(trained, birds, tmp_path):
    run_dir = f"{trained}/ResNet8"
    for named, found in (
        (trained, f"{run_dir}/latest"),
        (run_dir, f"{run_dir}/latest"),
        (f"{run_dir}/0/model.pdparams", f"{run_dir}/0"),
        (f"{run_dir}/latest/model.pdopt", f"{run_dir}/latest"),
        ("best", f"{run_dir}/best"),
        ("0", f"{run_dir}/0"),
    ):
        flags = [f"--checkpoint={named}", "--num_epochs=2", f"--model_save_dir={trained}"]
        message = run("train.py", *flags, status=2).stderr
        assert message == f"error: --checkpoint={named}: not a checkpoint directory of train.py; {found} is one\n"
    message = run("train.py", "--checkpoint=latest", "--model=ResNet50", f"--model_save_dir={trained}", status=2).stderr
    assert f"no checkpoint to continue; {run_dir}/latest is one, of --model=ResNet8\n" in message
    # Nothing says which list to measure on: what is wrong with the weights is said first.
    for named, wanted in ((trained, "no weights there: "), ("https://x.org/w.pdparams", "an address, not a file")):
        result = run_in(tmp_path, "eval.py", f"--pretrained_model={named}", "--model=ResNet8", status=2)
        assert wanted in result.stderr and "CUB200" not in result.stderr
    message = run("train.py", f"--checkpoint={run_dir}/latest", "--num_epochs=1", status=2).stderr
    assert "a larger --num_epochs than 1 goes on" in message


def test_fewer_epochs_than_are_done(birds, tmp_path):
    flags = [*birds.lists, *TINY, f"--model_save_dir={tmp_path}", "--total_images=8"]
    run("train.py", *flags, "--num_epochs=3")
    message = run("train.py", *flags, "--num_epochs=2", "--checkpoint=latest", status=2).stderr
    assert "has all of its 3 epochs: a larger --num_epochs than 3 goes on" in message


def test_an_epoch_beyond_the_last_one(birds, tmp_path):
    """The run was ended in the middle of pass 1, of which --num_epochs=1 has no more."""
    process = start_run(birds, tmp_path, "--num_epochs=3", "--total_images=400")
    assert wait_for_steps(process, 52)
    process.terminate()
    assert process.wait() == 143
    message = run("train.py", f"--model_save_dir={tmp_path}", "--checkpoint=latest", "--num_epochs=1", status=2).stderr
    assert "in the middle of pass 1: a --num_epochs above it goes on" in message


# ---------------------------------------------------------------- nothing is silent


def test_flags_without_effect_are_noted(capsys):
    import train

    parser = train.build_parser()
    defaults = {"checkpoint": "", "loss_name": "tripletloss"}
    settled = {"head": "linear", "embedding_size": 0}
    for words, noted in (
        ("--lr_epochs=2 --lr_strategy=cosine_decay", "--lr_epochs (--lr_strategy=cosine_decay)"),
        ("--patience=3 --eval_every=0", "--patience (--eval_every=0)"),
        ("--label_smoothing=0.1 --alpha=0", "--label_smoothing (--alpha=0)"),
        ("--head_lr_scale=10 --alpha=0", "--head_lr_scale (--alpha=0)"),
        ("--head_lr_scale=10 --alpha=0 --embedding_size=8", None),  # whose layer has this rate, too
        ("--head_scale=9 --loss_name=softmax", "--head_scale (the head is linear)"),
        ("--head_scale=9 --head=cosine", None),
        ("--zero_init_residual=True --pretrained_model=x", "--zero_init_residual (--pretrained_model has the blocks'"),
        ("--warmup_head_epochs=2 --alpha=0", "nothing trains in the epochs of --warmup_head_epochs"),
        ("--warmup_head_epochs=2 --alpha=0 --loss_name=proxyanchorloss", None),  # its proxies do
        ("--label_smoothing=0.1 --loss_name=softmax --alpha=0", "on softmax: --alpha"),
        ("--head_scale=9", "--head_scale (the head is linear)"),
        ("--memory_size=8 --loss_name=marginloss --memory_start_epoch=200", "(after the last of 120 epochs)"),
        ("--margin=1 --loss_name=emlloss", "on emlloss: --margin"),
        ("--triplet_mining=hard --loss_name=emlloss", "on emlloss: --triplet_mining"),
        ("--alpha=1 --loss_name=softmax", "on softmax: --alpha"),
        ("--batch_size=8 --train_batch_size=9", "--batch_size (--train_batch_size overrides it)"),
        ("--weights=model", "--weights (no --pretrained_model)"),
        ("--warmup_epochs=121", "the rate never comes to --lr: --warmup_epochs=121 of 120 epochs"),
        ("--warmup_epochs=120", None),
        ("--force=True", "--force (no run to go on with)"),
        ("--checkpoint=x --allow_partial=True", "--allow_partial (the run has started before)"),
        ("--warmup_head_epochs=120", "the backbone never trains: --warmup_head_epochs=120 of 120 epochs"),
        ("--margin=1 --lr=1 --patience=3 --lr_epochs=3 --batch_size=8 --warmup_epochs=3", None),
    ):
        args = vars(parser.parse_args(words.split()))
        args["train_batch_size"] = args["train_batch_size"] or args["batch_size"]
        settled_args = {name: value for name, value in settled.items() if args[name] is None}
        run_settings.report_idle(
            {**defaults, **args, **settled_args}, {word[2:].partition("=")[0] for word in words.split()}
        )
        out = capsys.readouterr().out
        assert (noted in out and out.count("note: ") == 1) if noted else out == "", out


def test_rest_of_random_weights_is_told(capsys):
    import train

    parser = train.build_parser()
    for words, end in (("", ""), ("--freeze_stages=1", ", and --freeze_stages keeps a part of them as they are")):
        start.new_run(vars(parser.parse_args(["--loss_name=softmax", *words.split()])), set())
        assert f"training starts from random weights{end}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="--freeze_bn would keep them so"):
        start.new_run(vars(parser.parse_args(["--zero_init_residual=True", "--freeze_bn=True"])), set())


def test_flags_without_effect_on_figures(trained, birds):
    best = f"--pretrained_model={trained}/ResNet8/best"
    flags = ["--exclude_self=True", "--whiten_size=9", "--seed=1"]
    out = run("eval.py", best, *flags).stdout
    idle = re.search(r"^note: without effect here: (.*)$", out, re.MULTILINE)[1]
    assert all(flag.partition("=")[0] + " (" in idle for flag in flags)
    assert "--input is given" in run("infer.py", best, "--input", birds.val_list, "--val_list=x").stdout


def test_a_logit_that_is_no_number_is_no_hit():
    head = evaluation.HeadFigures(np.array([0, 1]), quiet=True)
    head.add(np.array([0, 1]), np.array([[np.nan, 1, 0], [0, 2, 1]], np.float32))
    assert head.result()["acc1"] == 0.5


def test_recalls_of_another_list_are_not_told():
    first, second = ({"epoch": epoch, "eval": {"recall@1": recall}} for epoch, recall in ((-1, 0.9), (1, 0.5)))
    lists = [{"args": {"val_list": name}} for name in ("a", "b")]
    assert log.recalls_by_epoch([lists[0], first, lists[0], second]) == {-1: 0.9, 1: 0.5}
    assert log.recalls_by_epoch([lists[0], first, lists[1], second]) == {1: 0.5}


def test_figures_that_need_a_word():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 4)).astype(np.float32)
    labels = np.array([1, 1, 2, 2, 3, 3])

    def words(features, labels, gallery=(None, None)):
        result = metrics.summarise(metrics.rank(features, labels, *gallery), (1,))
        return " | ".join(metrics.remarks(features, labels, result, gallery[1]))

    assert words(features, labels) == ""
    assert words(features, np.array([1, 1, 2, 2, 3, 4])).startswith(
        "2 of 6 queries have no other image of their class in"
    )
    assert words(features, np.ones(6, int)).startswith("all images to be found are of one class")
    for equal in (np.ones((6, 4), np.float32), np.zeros((6, 4), np.float32), np.arange(1, 7)[:, None] * features[:1]):
        assert words(equal.astype(np.float32), labels).startswith("all embeddings are equal")
    almost = np.ones((6, 4), np.float32)
    almost[3, 2] = 1.01
    assert words(almost, labels) == ""
    one = (features[:2], labels[:2])
    assert words(features, labels, one).startswith("4 of 6 queries have no other image of their class in the gallery")
    assert "of one class" in words(features, labels, one)


def test_remarks_stand_where_the_figures_are(birds, trained, tmp_path):
    rows = [f"{birds.root}/{row}" for row in read_rows(birds.val_list)]
    (tmp_path / "one.txt").write_text("\n".join(row for row in rows if row.endswith(" 7")))
    (tmp_path / "lone.txt").write_text("\n".join(rows[:17]))
    for name in ("a", "b", "c", "d"):
        shutil.copy(f"{birds.root}/images/001.Bird_1/Bird_1_0000.jpg", tmp_path / f"{name}.jpg")
    (tmp_path / "same.txt").write_text("a.jpg 1\nb.jpg 1\nc.jpg 2\nd.jpg 2\n")
    best = f"--pretrained_model={trained}/ResNet8/best"
    out = run("eval.py", best, f"--val_list={tmp_path}/one.txt").stdout
    assert "recall@1: 1.0000" in out and "note: all images to be found are of one class" in out
    out = run("eval.py", best, f"--val_list={tmp_path}/same.txt").stdout
    assert (
        "recall@1: 0.0000" in out and "note: all embeddings are equal: the network tells no image from another" in out
    )
    out = run(
        "train.py", *birds.lists, *QUICK, f"--val_list={tmp_path}/lone.txt", f"--model_save_dir={tmp_path}"
    ).stdout
    assert re.search(r"^Pass 0, recall@1 .*\nnote: 1 of 17 queries have no other image", out, re.MULTILINE)


def test_pictures_and_classes_that_two_lists_share(birds, trained, tmp_path):
    train_rows = [f"{birds.root}/{row}" for row in read_rows(birds.train_list)]
    rows = [f"{birds.root}/{row}" for row in read_rows(birds.val_list)]
    with open(train_rows[3].rpartition(" ")[0], "rb") as file:
        (tmp_path / "copy.jpg").write_bytes(file.read())
    (tmp_path / "val.txt").write_text("\n".join([*rows, train_rows[0], f"{tmp_path}/copy.jpg 1"]))
    flags = [*birds.lists, *QUICK, f"--val_list={tmp_path}/val.txt", f"--model_save_dir={tmp_path}"]
    result = run("train.py", *flags)
    assert "warning: 2 of 50 images are training images, too, 1 under another name; the first: " in result.stderr
    assert f"note: 1 of the 7 classes of {tmp_path}/val.txt are trained on" in result.stdout
    (tmp_path / "query.txt").write_text("\n".join([*rows, f"{tmp_path}/copy.jpg 1"]))
    (tmp_path / "gallery.txt").write_text("\n".join([*rows, *train_rows]))
    best = f"--pretrained_model={trained}/ResNet8/best"
    result = run("eval.py", best, f"--val_list={tmp_path}/query.txt", f"--gallery_list={tmp_path}/gallery.txt")
    assert "warning: 1 of 49 queries find a copy in the gallery under another name" in result.stderr
    assert "48 of 49 queries are in the gallery themselves" in result.stdout
    result = run("eval.py", best, f"--val_list={tmp_path}/query.txt", f"--whiten={tmp_path}/gallery.txt")
    assert "warning: 49 of 49 images are learned from by --whiten, 1 under another name; the first: " in result.stderr


def test_all_bad_pictures_are_in_the_files(birds, trained, tmp_path):
    rows = [f"{birds.root}/{row}" for row in read_rows(birds.val_list)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(b"no picture")
    bad = [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]
    (tmp_path / "list.txt").write_text("\n".join([f"{bad[0]} 7", *rows, f"{bad[1]} 8"]))
    flags = [f"--val_list={tmp_path}/list.txt", "--on_bad_image=skip"]
    best = f"--pretrained_model={trained}/ResNet8/best"
    gallery = f"--gallery_list={tmp_path}/list.txt"
    run("eval.py", best, *flags, gallery, f"--output_json={tmp_path}/e.json")
    figures = json.loads((tmp_path / "e.json").read_text())
    for name in ("bad_images", "bad_gallery_images"):
        assert [path for path, _ in figures[name]] == bad and all(reason for _, reason in figures[name])
    run("eval.py", best, *flags, f"--output_json={tmp_path}/e.json")  # is replaced: it is known as a file of figures
    train_rows = [f"{birds.root}/{row}" for row in read_rows(birds.train_list)]
    (tmp_path / "train.txt").write_text("\n".join([f"{bad[0]} 1", *train_rows, f"{bad[1]} 2"]))
    more = [f"--train_list={tmp_path}/train.txt", "--loss_name=softmax", "--train_batch_size=5"]
    run("train.py", *birds.lists, *QUICK, *flags, *more, f"--model_save_dir={tmp_path}")
    records = [json.loads(row) for row in read_rows(tmp_path / "ResNet8" / "train_log.jsonl")]
    listed = [[path for path, _ in record["bad_images"]] for record in records if "bad_images" in record]
    assert listed == [bad, bad]  # of training, of evaluation


# ---------------------------------------------------------------- files


def test_features_as_a_table(trained, birds, tmp_path):
    best = f"--pretrained_model={trained}/ResNet8/best"
    for end in ("npz", "csv", "csv"):  # an earlier file of features is replaced
        run("infer.py", best, f"--feature_file={tmp_path}/f.{end}", "--quiet")
    arrays = np.load(tmp_path / "f.npz")
    with open(tmp_path / "f.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", "label", *(f"f{n}" for n in range(64))]
    assert [row[0] for row in rows] == arrays["paths"].tolist()
    assert [int(row[1]) for row in rows] == arrays["labels"].tolist()
    assert np.array_equal(np.array([row[2:] for row in rows], np.float32), arrays["features"])  # to the last bit
    run("infer.py", best, "--input", f"{birds.root}/images", f"--feature_file={tmp_path}/f.csv", "--quiet")
    (tmp_path / "mine.csv").write_text("path,price\n")
    message = run("infer.py", best, f"--feature_file={tmp_path}/mine.csv", status=2).stderr
    assert "mine.csv: is there already and is not a feature file" in message


def test_labels_from_class_folders(trained, birds, tmp_path):
    for name in ("red/1.jpg", "red/2.jpg", "blue/deep sea/1.jpg", "blue/1.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{birds.root}/images/001.Bird_1/Bird_1_0000.jpg", tmp_path / "in" / name)
    flags = [f"--pretrained_model={trained}/ResNet8/best", "--quiet", f"--feature_file={tmp_path}/f.npz"]
    run("infer.py", *flags, "--input", str(tmp_path / "in"))
    arrays = np.load(tmp_path / "f.npz")
    names = [os.path.relpath(os.path.dirname(path), tmp_path / "in") for path in arrays["paths"]]
    assert list(zip(names, arrays["labels"].tolist())) == [("blue", 1), ("blue/deep sea", 2), ("red", 3), ("red", 3)]
    for inputs in (["red"], ["red", "blue"]):  # one folder of pictures; two inputs, whose numbers would not agree
        run("infer.py", *flags, "--input", *(str(tmp_path / "in" / name) for name in inputs))
        assert "labels" not in np.load(tmp_path / "f.npz")


def test_classes_have_the_names_of_their_folders(trained, birds):
    out = run("infer.py", f"--pretrained_model={trained}/ResNet8/best", "--input", birds.val_list).stdout
    found = sorted({int(label) for label in re.findall(r", class \[(\d+)\]", out)})
    names = re.findall(r"^\[(\d+)\] = (.*)$", out, re.MULTILINE)
    assert names == [(str(label), f"{label:03d}.Bird_{label}") for label in found]


@pytest.mark.parametrize("script", ["train.py", "eval.py", "infer.py", "data/make_sample.py"])
def test_missing_packages_are_one_line(script):
    command = [sys.executable, "-S", script, "--help"]  # -S: without what is installed
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: not installed in this Python (") and result.stderr.count("\n") == 1
    assert "numpy" in result.stderr and "pip install -r requirements.txt" in result.stderr


def test_aliases_are_of_flags_that_exist():
    import infer
    import train

    flags = [{action.dest for action in script.build_parser()._actions} for script in (train, evaluation, infer)]
    assert set(utility.ALIASES.values()) <= set().union(*flags)
    # The name of a flag of one script may be an alias in another, which has the other flag.
    for known in flags:
        assert not [alias for alias, flag in utility.ALIASES.items() if alias in known and flag in known]


@pytest.mark.parametrize("script", ["train", "eval", "infer"])
def test_tab_completion(script, tmp_path):
    pytest.importorskip("shtab")
    command = [sys.executable, "-m", "shtab", "--shell=bash", f"--prog={script}.py", f"{script}.build_parser"]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (tmp_path / "completion").write_text(written)
    typed = f"COMP_WORDS=({script}.py --poo); COMP_CWORD=1"
    code = f"source {tmp_path}/completion; {typed}; _shtab_{script}; echo ${{COMPREPLY[@]}}"
    shell = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert shell.stdout.split() == ["--pooling"]
    assert os.access(os.path.join(ROOT, f"{script}.py"), os.X_OK)  # completion is by the script's own name
