"""Several gloo processes: they compute what one computes, and end together."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, read_rows, run
from programs.parallel_worker import LOSSES

import weights
from training.run import Run

FROZEN = [*TINY, "--train_batch_size=12", "--freeze_bn=True"]


def launch(processes, log_dir, *command, options=()):
    """Starts a command through Paddle's launcher; -> subprocess.Popen whose stdout has all it prints."""
    launcher = [sys.executable, "-m", "paddle.distributed.launch", f"--log_dir={log_dir}", *options]
    return subprocess.Popen(
        [*launcher, f"--nproc_per_node={processes}", *map(str, command)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def kill(process):
    """Kills a launcher and its processes, each of which leads a group of its own."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    for pid in (*map(int, found.split()), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def finish(process, log_dir, fails=False):
    """Waits for the end; -> what it printed."""
    try:
        out, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        kill(process)
        out, _ = process.communicate()
        pytest.fail(f"hangs: {out[-3000:]}")
    logs = "".join(open(os.path.join(log_dir, n)).read() for n in sorted(os.listdir(log_dir)) if "workerlog" in n)  # noqa: SIM115
    assert (process.returncode != 0) == fails, f"{out[-3000:]}\n{logs[-3000:]}"
    return out


def train(processes, birds, folder, *flags, fails=False):
    command = ["train.py", *birds.lists, *FROZEN, f"--model_save_dir={folder}", *flags]
    if processes == 1:
        return run(*command, OMP_NUM_THREADS="1").stdout
    return finish(launch(processes, f"{folder}_log", *command), f"{folder}_log", fails)


def logged(folder):
    with open(os.path.join(folder, "ResNet8", "train_log.jsonl")) as file:
        return [json.loads(line) for line in file]


# ---------------------------------------------------------------- they compute what one computes


@pytest.mark.parametrize("processes", [2, 3])
def test_collectives(tmp_path, processes):
    # One wait longer than gloo's own patience.
    command = ["tests/programs/parallel_worker.py", "collectives", *(["slow"] if processes == 2 else [])]
    assert "all is well" in finish(launch(processes, tmp_path, *command), tmp_path)


@pytest.mark.parametrize("processes", [2, 3])
def test_loss_and_gradients_of_one_step(tmp_path, processes):
    """For every loss a relative difference below 1e-5 in float32, with batch norm frozen."""
    run("tests/programs/parallel_worker.py", "gradients", f"{tmp_path}/one.npz", OMP_NUM_THREADS="1")
    finish(
        launch(processes, tmp_path, "tests/programs/parallel_worker.py", "gradients", f"{tmp_path}/all.npz"), tmp_path
    )
    one, together = np.load(tmp_path / "one.npz"), np.load(tmp_path / "all.npz")
    assert set(one) == set(together)
    for name in LOSSES:
        keys = [key for key in one if key.startswith(f"{name}/") and not key.endswith("/loss")]
        assert len(keys) > 10
        a, b = (np.concatenate([source[key].ravel() for key in keys]).astype(np.float64) for source in (one, together))
        assert np.linalg.norm(a) > 0.01
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a), name
        assert abs(one[f"{name}/loss"] - together[f"{name}/loss"]) < 1e-5 * abs(one[f"{name}/loss"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss_name=tripletloss", "--triplet_mining=distance", "--pooling=gem"],
        ["--loss_name=quadrupletloss", "--optimizer=adam", "--lr=0.001"],
        ["--loss_name=emlloss", "--alpha=500", "--lr=0.00001", "--with_mem_opt=True"],
        ["--loss_name=softmax", "--head_lr_scale=10"],
        ["--loss_name=tripletloss", "--alpha=0"],
    ],
    ids=lambda flags: flags[0].split("=")[1] + flags[1][2:].split("=")[0],
)
def test_twelve_steps(birds, tmp_path, flags):
    """The log of two processes is that of one, to the rounding that a few steps add up."""
    flags = [*flags, "--num_epochs=3"]
    for processes in (1, 2):
        train(processes, birds, tmp_path / str(processes), *flags)
    one, two = ([r for r in logged(tmp_path / folder) if "epoch" in r] for folder in ("1", "2"))
    assert len(one) == len(two) == 3 * (4 + 1)
    for a, b in zip(one, two):
        assert (a["epoch"], a.get("step"), a.get("lr")) == (b["epoch"], b.get("step"), b.get("lr"))
        if "step" in a:
            assert a["loss_metric"] == pytest.approx(b["loss_metric"], rel=1e-3, abs=1e-4)
            assert a["loss_cls"] == pytest.approx(b["loss_cls"], rel=1e-3)
            assert abs(a["acc1"] - b["acc1"]) <= 1 / 12 + 1e-6
    assert one[0]["loss_cls"] == pytest.approx(two[0]["loss_cls"], rel=1e-6)
    assert [record["process"]["processes"] for record in (logged(tmp_path / "1")[0], logged(tmp_path / "2")[0])] == [
        1,
        2,
    ]


def test_batch_norm_that_is_not_frozen(birds, tmp_path):
    """Each process normalises by its own pictures; the running means are those of all, and runs continue exactly."""
    flags = ["--freeze_bn=False", "--lr_strategy=constant", "--eval_every=0"]
    for processes in (1, 2):
        train(processes, birds, tmp_path / str(processes), *flags, "--num_epochs=1", "--total_images=12")
    one, two = (weights.read_pickle(f"{tmp_path}/{n}/ResNet8/0/model.pdparams") for n in (1, 2))
    np.testing.assert_allclose(two["backbone.bn1._mean"], one["backbone.bn1._mean"], rtol=1e-4)
    train(2, birds, tmp_path / "whole", *flags, "--num_epochs=2")
    train(2, birds, tmp_path / "parts", *flags, "--num_epochs=1")
    train(2, birds, tmp_path / "parts", *flags, "--num_epochs=2", "--checkpoint=latest")
    whole, parts = (weights.read_pickle(f"{tmp_path}/{n}/ResNet8/1/model.pdparams") for n in ("whole", "parts"))
    assert list(whole) == list(parts) and all(np.array_equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_is_shared_out_and_exact(birds, tmp_path, processes):
    """46 pictures in batches of 7, one of them broken: no number of processes divides that."""
    train(1, birds, tmp_path / "run", "--num_epochs=1")
    rows = read_rows(birds.val_list)[:45]
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    rows.insert(20, f"{tmp_path}/broken.jpg 7")
    (tmp_path / "list.txt").write_text("\n".join(rows))
    flags = [f"--pretrained_model={tmp_path}/run/ResNet8/best", f"--data_dir={birds.root}", "--use_gpu=False"]
    flags += [f"--val_list={tmp_path}/list.txt", "--on_bad_image=skip", "--batch_size=7"]
    outputs = []
    for count in (1, processes):
        evaluate = ["eval.py", *flags, f"--output_json={tmp_path}/{count}.json", "--recall_at=1,2,4,8"]
        infer = ["infer.py", *flags, f"--feature_file={tmp_path}/{count}.npz"]
        for command in (evaluate, infer):
            if count == 1:
                result = run(*command, OMP_NUM_THREADS="1")
                outputs.append(result.stdout + result.stderr)
            else:
                outputs.append(finish(launch(count, tmp_path / "log", *command), tmp_path / "log"))
    one, together = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, processes))
    assert one["queries"] == 45
    for name in ("recall@1", "recall@2", "recall@4", "recall@8", "MAP@R", "R-precision", "queries"):
        assert one[name] == together[name]
    one, together = (np.load(tmp_path / f"{count}.npz") for count in (1, processes))
    for name in ("features", "paths", "labels"):
        assert np.array_equal(one[name], together[name])
    for output in outputs:
        assert output.count("skipped 1 bad images; the first: ") == 1 and "list.txt:21: " in output
    scores = [re.findall(r"^Test-\d+-score.*$", output, re.MULTILINE) for output in (outputs[1], outputs[3])]
    assert scores[0] == scores[1] and len(scores[0]) == 45


def test_a_run_goes_on_with_any_number_of_processes(birds, tmp_path):
    flags = ["--lr_strategy=constant", "--optimizer=adam", "--lr=0.001"]
    train(1, birds, tmp_path / "whole", *flags, "--num_epochs=3")
    train(2, birds, tmp_path / "parts", *flags, "--num_epochs=1")
    out = train(3, birds, tmp_path / "parts", *flags, "--num_epochs=2", "--checkpoint=latest")
    assert "note: the continued run may differ in the last digits" in out and "processes 3 (was 2)" in out
    train(1, birds, tmp_path / "parts", *flags, "--num_epochs=3", "--checkpoint=latest")
    whole, parts = ([r for r in logged(tmp_path / folder) if "epoch" in r] for folder in ("whole", "parts"))
    assert len(whole) == len(parts)
    for a, b in zip(whole, parts):
        if "step" in a:
            assert a["loss_cls"] == pytest.approx(b["loss_cls"], rel=1e-3)
    assert sorted(os.listdir(tmp_path / "parts" / "ResNet8")) == sorted(os.listdir(tmp_path / "whole" / "ResNet8"))


# ---------------------------------------------------------------- they end together


def start_long_run(birds, folder, *flags):
    """Starts two processes that train until they are ended; -> the launcher, when both have taken steps, and their
    process ids in the order of their ranks."""
    log_dir = f"{folder}_log"
    command = ["train.py", *birds.lists, *FROZEN, f"--model_save_dir={folder}", "--num_epochs=100000", *flags]
    process = launch(2, log_dir, *command)
    try:
        deadline = time.time() + 60
        while not os.path.exists(os.path.join(folder, "ResNet8", "latest")):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.1)
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
        ranks = {}
        for pid in map(int, found.stdout.split()):
            with open(f"/proc/{pid}/environ") as file:
                environment = dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry)
            if "PADDLE_TRAINER_ID" in environment:
                ranks[int(environment["PADDLE_TRAINER_ID"])] = pid
        assert sorted(ranks) == [0, 1]
    except BaseException:
        kill(process)
        raise
    return process, [ranks[0], ranks[1]]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run(birds, tmp_path, victim):
    process, pids = start_long_run(birds, tmp_path / "run")
    start = time.time()
    os.kill(pids[victim], signal.SIGKILL)
    finish(process, tmp_path / "run_log", fails=True)
    assert time.time() - start < 60
    with open(f"{tmp_path}/run_log/workerlog.{1 - victim}") as file:
        line = file.read().splitlines()[-1]
    assert line == f"error: process {victim} of 2 has died: see its log and its machine; the whole run ends"
    # The last checkpoint is whole, and one process goes on from it.
    names = Run(tmp_path / "run" / "ResNet8").names()
    epochs = int(names[-1]) + 2
    train(1, birds, tmp_path / "run", "--checkpoint=latest", f"--num_epochs={epochs}")
    assert os.readlink(tmp_path / "run" / "ResNet8" / "latest") == str(epochs - 1)


def test_a_stop_in_one_process_stops_and_saves_all(birds, tmp_path):
    process, pids = start_long_run(birds, tmp_path / "run", "--total_images=480", "--save_every=3", "--eval_every=0")
    os.kill(pids[1], signal.SIGTERM)
    finish(process, tmp_path / "run_log", fails=True)
    with open(f"{tmp_path}/run_log/workerlog.0") as file:
        saved = re.search(r"^stopped: saved (\S+); --checkpoint=latest goes on", file.read(), re.MULTILINE)[1]
    assert Run(tmp_path / "run" / "ResNet8").names()[-1] == os.path.basename(saved)


@pytest.mark.parametrize("of", ["first", "second", "launcher"])
def test_a_stop_in_the_evaluation(birds, tmp_path, of):
    """A long one: the processes agree where they stop, at once, and the epoch is saved."""
    rows = [f"{birds.root}/{row}" for row in read_rows(birds.val_list)] * 60
    (tmp_path / "long.txt").write_text("\n".join(rows))
    flags = [f"--val_list={tmp_path}/long.txt", "--test_batch_size=1"]
    process, pids = start_long_run(birds, tmp_path / "run", *flags)
    time.sleep(0.5)
    os.kill({"first": pids[0], "second": pids[1], "launcher": process.pid}[of], signal.SIGTERM)
    finish(process, tmp_path / "run_log", fails=True)
    with open(f"{tmp_path}/run_log/workerlog.0") as file:
        assert re.search(r"^stopped: saved \S+/ResNet8/0;", file.read(), re.MULTILINE)  # not 1_n: at once


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch_two_machines(birds, folder, *flags):
    """Two launchers on this machine, each as on a machine of its own; `flags`: a list of flags for each."""
    master = [f"--master=127.0.0.1:{free_port()}", "--nnodes=2"]
    command = ["train.py", *birds.lists, *FROZEN, "--num_epochs=1"]
    return [
        launch(1, folder / f"log{n}", *command, *own, options=[*master, f"--rank={n}"]) for n, own in enumerate(flags)
    ]


def test_two_machines(birds, tmp_path):
    save = f"--model_save_dir={tmp_path}/run"
    processes = launch_two_machines(birds, tmp_path, [save], [save])
    outs = [finish(process, tmp_path / f"log{n}") for n, process in enumerate(processes)]
    assert "Pass 0, recall@1" in outs[0] and "Pass 0" not in outs[1]
    train(1, birds, tmp_path / "one", "--num_epochs=1")
    one, two = ([r for r in logged(tmp_path / name) if "step" in r] for name in ("one", "run"))
    assert [r["loss_cls"] for r in one] == pytest.approx([r["loss_cls"] for r in two], rel=1e-4)


@pytest.mark.parametrize("mistake", ["flag", "checkpoint", "list"])
def test_machines_that_were_not_started_alike(birds, tmp_path, mistake):
    here, there = f"--model_save_dir={tmp_path}/here", f"--model_save_dir={tmp_path}/there"
    wanted = "process 1 was not started as process 0 was: different are "
    if mistake == "flag":
        flags, wanted = ([here], [here, "--lr=5"]), f"{wanted}--lr;"
    elif mistake == "list":
        flags = ([here], [here, f"--train_list={tmp_path}/none.txt"])
        wanted = f"{tmp_path}/none.txt: cannot read this list file"
    else:  # a folder that is not shared
        train(1, birds, tmp_path / "here", "--num_epochs=1")
        flags = ([here, "--checkpoint=auto", "--num_epochs=2"], [there, "--checkpoint=auto", "--num_epochs=2"])
        wanted = f"{wanted}the checkpoint to go on from, the weights to start from;"
    processes = launch_two_machines(birds, tmp_path, *flags)
    out, _ = (finish(process, tmp_path / f"log{n}", fails=True) for n, process in enumerate(processes))
    # Where both see it, either may be the first to say so.
    assert re.search(rf"error: (process 1 of 2: )?{re.escape(wanted)}", out) and "Traceback" not in out


def test_stopping_the_launcher_saves(birds, tmp_path):
    process, _ = start_long_run(birds, tmp_path / "run", "--total_images=480", "--eval_every=0")
    process.send_signal(signal.SIGTERM)
    finish(process, tmp_path / "run_log", fails=True)
    with open(f"{tmp_path}/run_log/workerlog.0") as file:
        assert re.search(r"^stopped: saved \S+; --checkpoint=latest goes on", file.read(), re.MULTILINE)


def test_a_mistake_in_one_process_is_told_by_the_first(birds, tmp_path):
    rows = read_rows(birds.train_list)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    # Only the second process reads it: the classes of a batch are in a random order, its picture is in either half.
    rows += [f"{tmp_path}/broken.jpg {label}" for label in range(1, 7) for _ in range(8)]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    flags = [f"--data_dir={birds.root}", f"--train_list={tmp_path}/list.txt", "--num_epochs=9"]
    out = train(2, birds, tmp_path / "run", *flags, fails=True)
    assert re.search(r"^error: (process 1 of 2: )?\S+list\.txt:\d+: \S+broken\.jpg: not an image", out, re.MULTILINE)
    assert "Traceback" not in out


def test_batches_that_cannot_be_shared(birds, tmp_path):
    out = train(2, birds, tmp_path / "run", "--train_batch_size=6", "--samples_each_class=3", "--num_epochs=1")
    assert "Pass 0, recall@1" in out
    out = train(2, birds, tmp_path / "odd", "--train_batch_size=9", "--samples_each_class=3", fails=True)
    assert re.search(r"error: (process 1 of 2: )?a batch of 9 can't be shared evenly by 2 processes", out)
