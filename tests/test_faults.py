"""Kills, signals and what is not finite. Nothing that was saved is lost, and a run that goes on is the one that was
never interrupted."""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types

import numpy as np
import paddle
import pytest
from conftest import ROOT, TINY, read_rows, run

import models
import weights
from training import job, optimizers
from training.parts import Parts, arrays
from training.run import LOG_FILE, Progress, Run
from weights import checkpoint


def start(birds, folder, *flags, root=ROOT):
    """Starts the train.py in `root`; -> subprocess.Popen with pipes."""
    command = [sys.executable, "train.py", *birds.lists, *TINY, f"--model_save_dir={folder}", *flags]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process, count):
    """Reads what a run prints until it has logged `count` more steps; False where it ended before."""
    for line in process.stdout:
        count -= "trainbatch" in line
        if count <= 0:
            return True
    return False


def figures(folder):
    """The log without times and starts, as it must be whatever came between."""
    with open(os.path.join(folder, "ResNet8", LOG_FILE)) as file:
        records = [json.loads(line) for line in file]
    times = ("sec", "img_per_sec", "data_wait", "peak_memory")
    return [{k: v for k, v in record.items() if k not in times} for record in records if "epoch" in record]


def assert_same_run(folder, other, name):
    parts = sorted(os.listdir(os.path.join(folder, "ResNet8", name)))
    assert parts == sorted(os.listdir(os.path.join(other, "ResNet8", name)))
    for file_name in set(parts) - {checkpoint.DESCRIPTION}:
        a, b = (weights.read_pickle(os.path.join(f, "ResNet8", name, file_name)) for f in (folder, other))
        assert list(a) == list(b) and all(np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes() for key in a)
    assert figures(folder) == figures(other)
    a, b = (checkpoint.read_description(os.path.join(f, "ResNet8", name)) for f in (folder, other))
    assert a["best"] == b["best"] and a["evaluated"] and b["evaluated"]
    assert os.readlink(os.path.join(folder, "ResNet8", "best")) == os.readlink(os.path.join(other, "ResNet8", "best"))


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_twenty_kills_change_nothing(birds, tmp_path, optimizer):
    """Ten kills for each optimizer at random moments, most of them near a save, for every step is saved."""
    flags = [
        f"--optimizer={optimizer}",
        "--num_epochs=14",
        "--eval_every=2",
        "--lr=0.003",
        "--lr_strategy=cosine_decay",
    ]
    flags += ["--pooling=gem", "--embedding_size=8"]
    process = start(birds, tmp_path / "whole", *flags)
    assert process.wait() == 0, process.stderr.read()
    rng = random.Random(optimizer)
    kills = 0
    while kills < 10:
        process = start(birds, tmp_path / "killed", *flags, "--save_every=1", "--checkpoint=auto")
        assert wait_for_steps(process, rng.randint(1, 8)), process.stderr.read()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        kills += 1
    process = start(birds, tmp_path / "killed", *flags, "--save_every=1", "--checkpoint=auto")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "killed", "13")
    assert sorted(os.listdir(tmp_path / "killed" / "ResNet8")) == sorted(os.listdir(tmp_path / "whole" / "ResNet8"))


@pytest.fixture
def heeded_hangup():
    """Where the tests run under nohup, what they start would ignore SIGHUP, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeded_hangup")
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_a_signal_saves_in_the_middle_of_an_epoch(birds, tmp_path, number, status):
    bad = [f"{tmp_path}/bad{n}.jpg {n}" for n in range(1, 7)]  # the log has those of the whole epoch, all the same
    rows = [f"{birds.root}/{row}" for row in read_rows(birds.train_list)]
    (tmp_path / "list.txt").write_text("\n".join(rows + bad))
    flags = [f"--train_list={tmp_path}/list.txt", "--on_bad_image=skip", "--num_epochs=2", "--total_images=80"]
    process = start(birds, tmp_path / "whole", *flags)
    assert process.wait() == 0, process.stderr.read()
    counts = [len(record["bad_images"]) for record in figures(tmp_path / "whole") if "bad_images" in record]
    assert len(counts) == 2 and set(counts) <= {4, 5, 6}
    process = start(birds, tmp_path / "stopped", *flags)
    assert wait_for_steps(process, 5)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == status
    saved = re.search(r"^stopped: saved (\S+); --checkpoint=latest goes on from there$", err, re.MULTILINE)[1]
    assert re.search(r"ResNet8/[01]_\d+$", saved) and os.path.exists(f"{saved}/{checkpoint.WEIGHTS_FILE}")
    assert os.path.samefile(saved, tmp_path / "stopped" / "ResNet8" / "latest")
    run("eval.py", *birds.lists, f"--pretrained_model={saved}", "--use_gpu=False")
    run("train.py", f"--checkpoint={saved}")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", "1")


def test_a_signal_ends_a_run_whose_epochs_have_one_step(birds, tmp_path):
    process = start(birds, tmp_path, "--num_epochs=100000", "--total_images=8", "--eval_every=0")
    assert wait_for_steps(process, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and re.search(r"^stopped: saved \S+/ResNet8/\d+; ", err, re.MULTILINE)


@pytest.mark.usefixtures("heeded_hangup")
def test_a_lost_terminal_costs_nothing(birds, tmp_path):
    pid, terminal = pty.fork()
    if not pid:
        flags = [*birds.lists, *TINY, "--num_epochs=100", "--log_every=1", f"--model_save_dir={tmp_path}"]
        os.execv(sys.executable, [sys.executable, os.path.join(ROOT, "train.py"), *flags])
    said = b""
    while said.count(b"trainbatch") < 3:
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert checkpoint.read_description(tmp_path / "ResNet8" / "latest")["step"] > 0


def test_a_reader_that_leaves_costs_nothing(birds, tmp_path):
    process = start(birds, tmp_path, "--num_epochs=100", "--log_every=1", "--total_images=800")
    assert wait_for_steps(process, 3)
    process.stdout.close()
    assert process.wait() == 141 and re.fullmatch(
        r"stopped: saved .*0_\d+; .*\n", process.stderr.read().splitlines(True)[-1]
    )
    assert checkpoint.read_description(tmp_path / "ResNet8" / "latest")["step"] >= 3


def test_a_second_signal_stops_at_once(birds, tmp_path):
    process = start(birds, tmp_path, "--num_epochs=100", "--total_images=800000", "--train_batch_size=480",
                    "--samples_each_class=80", "--small_classes=repeat")  # fmt: skip
    assert wait_for_steps(process, 1)
    process.send_signal(signal.SIGINT)
    assert "SIGINT: stopping after this step; once more stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM


def test_a_run_killed_in_its_evaluation_makes_up_for_it(birds, tmp_path):
    """The checkpoint of an epoch is there before its recall: a run that goes on from it measures that first."""
    process = start(birds, tmp_path / "whole", "--num_epochs=2")
    assert process.wait() == 0, process.stderr.read()
    process = start(birds, tmp_path / "killed", "--num_epochs=2")
    assert process.wait() == 0, process.stderr.read()
    path = tmp_path / "killed" / "ResNet8" / "1"
    with open(path.parent / LOG_FILE) as file:
        lines = file.readlines()
    assert '"eval"' in lines[-1]
    changes = {"evaluated": False, "best": None, "log_bytes": len("".join(lines[:-1]))}
    checkpoint.update_description(path, changes)
    os.remove(path.parent / "best")
    run("train.py", f"--model_save_dir={tmp_path}/killed", "--checkpoint=latest")
    with open(path.parent / LOG_FILE) as file:
        assert sum('"eval"' in line for line in file) == 2
    assert os.readlink(path.parent / "best") == "1"
    assert "has all of its 2 epochs" in run("train.py", f"--checkpoint={path}", status=2).stderr
    auto = run("train.py", f"--model_save_dir={tmp_path}/killed", "--checkpoint=auto")
    assert auto.stderr == f"done before: {path}\n"


def network_and_optimizer():
    paddle.seed(1)
    network = paddle.nn.Sequential(paddle.nn.Linear(3, 3), paddle.nn.BatchNorm1D(3))
    optimizer = paddle.optimizer.Momentum(0.1, parameters=network.parameters())
    network(paddle.ones([2, 3])).sum().backward()
    optimizer.step()
    return network, optimizer


def die_after(count, run_dir, work):
    """Does `work` in a process that ends when it has done `count` things to files of `run_dir`; -> its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate")

    def die(event, arguments):
        nonlocal count
        if event in changes or (event == "open" and run_dir in str(arguments[0])):
            count -= 1
            if count < 0:
                os._exit(9)

    sys.addaudithook(die)
    try:
        work()
    except BaseException:  # must not go on as a second pytest; the status fails the test
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def test_ended_at_any_system_call_the_last_checkpoint_is_there(tmp_path):
    """A process that ends, as by kill -9, before each single thing that saving, recording and cleaning do to files."""
    network, optimizer = network_and_optimizer()
    run = Run(tmp_path / "run")
    run_dir = run.path
    parts = Parts(network, paddle.nn.Layer(), optimizer, paddle.amp.GradScaler(enable=False))
    description = {"settings": {"model": "ResNet8"}}
    settings = types.SimpleNamespace(keep=1)
    work_job = types.SimpleNamespace(run=run, parts=parts, settings=settings, description=description)

    def work():
        """What a run does to its folder, from its start after a kill."""
        run.lock()
        run.remove_leftovers()
        with open(os.path.join(run_dir, LOG_FILE), "a") as file:
            file.write("line\n")
        for epoch, step in ((1, 2), (1, 4), (2, 1)):
            progress = Progress(4, epoch, step)
            job.save(work_job, progress)
            if step == 4:
                job.record_recall(work_job, progress.with_recall(0.5))

    deaths = 0
    while True:
        shutil.rmtree(run_dir, ignore_errors=True)
        os.makedirs(run_dir)
        run.save(arrays(parts), job.describe(work_job, Progress(4, 0, 4)))
        status = die_after(deaths, run_dir, work)
        assert status in (0, 9)
        names = run.names()
        assert names
        for name in names:  # all that look whole are whole
            path = os.path.join(run_dir, name)
            assert checkpoint.checkpoint_name(checkpoint.read_description(path)) == name
            for file_name in (checkpoint.WEIGHTS_FILE, checkpoint.PART_FILES["optimizer"]):
                weights.read_pickle(os.path.join(path, file_name))
        latest = os.path.join(run_dir, "latest")
        assert not os.path.lexists(latest) or os.path.exists(os.path.join(latest, checkpoint.DESCRIPTION))
        work()  # the next start
        assert sorted(os.listdir(run_dir)) == ["1", "2_1", "best", "latest", LOG_FILE]
        if status == 0:
            break
        deaths += 1
    assert deaths > 40


def test_one_run_at_a_time_in_a_folder(birds, tmp_path):
    process = start(birds, tmp_path, "--num_epochs=100", "--total_images=80000")
    assert wait_for_steps(process, 1)
    second = start(birds, tmp_path)
    _, err = second.communicate()
    assert second.returncode == 2
    assert err.splitlines()[-1] == (
        f"error: {tmp_path}/ResNet8: another train.py is writing here: take another --model_save_dir"
    )
    process.kill()
    process.communicate()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_what_is_not_finite_is_seen(value, place):
    x = paddle.to_tensor([1.0, 2.0, 3.0], stop_gradient=False)
    (x * x).sum().backward()
    loss = paddle.to_tensor(1.0)
    assert optimizers.all_finite([loss, x.grad])
    if place == "loss":
        loss = paddle.to_tensor(value)
    else:
        (x * paddle.to_tensor([0.0, value, 0.0])).sum().backward()
    assert not optimizers.all_finite([loss, x.grad])


def test_an_infinite_gradient_reaches_neither_weights_nor_checkpoint(birds, tmp_path):
    """Features of 3e38 and a head of 1e-38: the loss is ordinary, and the head's gradient is beyond float32."""
    weights = {name: value.numpy() for name, value in models.build_model("ResNet8", 6).state_dict().items()}
    for name in ("bn2.weight", "downsample.1.weight", "downsample.1.bias"):
        weights[f"backbone.layer3.0.{name}"][:] = 0
    weights["backbone.layer3.0.bn2.bias"][:] = 3e38
    weights["head.weight"] = np.random.default_rng(0).uniform(-1e-38, 1e-38, (64, 6)).astype(np.float32)
    paddle.save(weights, str(tmp_path / "w.pdparams"))
    network = models.build_model("ResNet8", 6, pooling="max")
    network.set_state_dict(weights)
    network.eval()
    _, logits = network(paddle.zeros([8, 32, 32, 3], dtype="uint8"))
    loss = paddle.nn.functional.cross_entropy(logits, paddle.to_tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    loss = 1000 * loss  # --alpha
    loss.backward()
    assert 100 < loss.item() < 1e6 and not np.isfinite(network.head.weight.grad.numpy()).all()  # as it says
    process = start(birds, tmp_path / "out", f"--pretrained_model={tmp_path}/w.pdparams", "--freeze_bn=True",
                    "--num_epochs=1", "--eval_every=0", "--save_every=1", "--pooling=max", "--alpha=1000")  # fmt: skip
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert "a gradient became NaN or infinite in pass 0, trainbatch 0; last good checkpoint: none yet" in err, err
    assert Run(tmp_path / "out" / "ResNet8").names() == []


def test_a_run_without_a_seed_logs_the_one_it_drew(birds, tmp_path):
    flags = [flag for flag in TINY if not flag.startswith("--seed")]
    out = run("train.py", *birds.lists, *flags, f"--model_save_dir={tmp_path}/a", "--num_epochs=1").stdout
    seed = re.search(r"^seed: (\d+)$", out, re.MULTILINE)[1]
    with open(tmp_path / "a" / "ResNet8" / LOG_FILE) as file:
        assert json.loads(file.readline())["args"]["seed"] == int(seed)
    run("train.py", *birds.lists, *flags, f"--model_save_dir={tmp_path}/b", "--num_epochs=1", f"--seed={seed}")
    assert_same_run(tmp_path / "a", tmp_path / "b", "0")
