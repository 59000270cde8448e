"""What goes wrong in a run of hours: bad pictures, kills, signals, full and read-only disks. Nothing that was saved is
lost, and a run that goes on is the one that was never interrupted."""

import hashlib
import json
import os
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
from conftest import ROOT, listing, read_rows, run
from PIL import Image

import models
import weights
from training import job, optimizers
from training.parts import Parts, arrays
from training.run import LOG_FILE, Progress, Run
from weights import checkpoint

TINY = ["--model=ResNet8", "--image_shape=3,32,32", "--train_batch_size=8", "--samples_each_class=2", "--lr=0.01",
        "--seed=3", "--use_gpu=False", "--log_every=1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(birds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run("train.py", *birds.lists, *TINY, "--num_epochs=1", f"--model_save_dir={folder}")
    return folder


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


# ---------------------------------------------------------------- kills and signals


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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_in_the_middle_of_an_epoch(birds, tmp_path, number, status):
    flags = ["--num_epochs=2", "--total_images=160"]
    process = start(birds, tmp_path / "whole", *flags)
    assert process.wait() == 0, process.stderr.read()
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


def test_a_second_signal_stops_at_once(birds, tmp_path):
    process = start(birds, tmp_path, "--num_epochs=100", "--total_images=800000", "--train_batch_size=480",
                    "--samples_each_class=80")  # fmt: skip
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
    state = checkpoint.read_description(path)
    with open(path.parent / LOG_FILE) as file:
        lines = file.readlines()
    assert '"eval"' in lines[-1]
    state.update(evaluated=False, best=None, log_bytes=len("".join(lines[:-1])))
    checkpoint.write_description(path, state)
    os.remove(path.parent / "best")
    run("train.py", f"--model_save_dir={tmp_path}/killed", "--checkpoint=latest")
    with open(path.parent / LOG_FILE) as file:
        assert sum('"eval"' in line for line in file) == 2
    assert os.readlink(path.parent / "best") == "1"
    assert "has all of its 2 epochs" in run("train.py", f"--checkpoint={path}", status=2).stderr
    auto = run("train.py", f"--model_save_dir={tmp_path}/killed", "--checkpoint=auto")
    assert auto.stderr == f"done before: {path}\n"


def test_auto_finds_the_model_of_its_run(birds, trained, tmp_path):
    """Where no --model is typed: it is the one of --pretrained_model."""
    flags = [*birds.lists, *TINY[1:], f"--pretrained_model={trained}/ResNet8/best", f"--model_save_dir={tmp_path}"]
    run("train.py", *flags, "--num_epochs=1", "--checkpoint=auto")
    out = run("train.py", *flags, "--num_epochs=2", "--checkpoint=auto").stdout
    assert "Pass 1, " in out and "Pass 0, " not in out


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
    path = tmp_path / "ResNet8" / "0" / checkpoint.OPTIMIZER_FILE
    saved = paddle.load(str(path), return_numpy=True)
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
    description = {"settings": {}}
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
            for file_name in (checkpoint.WEIGHTS_FILE, checkpoint.OPTIMIZER_FILE):
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


# ---------------------------------------------------------------- disks


@pytest.fixture()
def small_disk(tmp_path):
    """A file system of 1 MB; skips where this process may not mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, text=True, check=False
    ) if shutil.which("mount") else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip("needs to mount a tmpfs, which this process may not")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk(birds, tmp_path, small_disk):
    """A checkpoint here has about 0.64 MB, so there is room for one: a second is an error, and the first stays."""
    process = start(birds, small_disk, "--num_epochs=5")
    _, err = process.communicate()
    assert process.returncode == 2
    assert re.fullmatch(
        rf"error: {small_disk}/ResNet8/1: cannot write the checkpoint: .*No space left on device.*",
        err.splitlines()[-1],
    ), err
    assert "Traceback" not in err and sorted(os.listdir(small_disk / "ResNet8")) == sorted(
        ["0", "best", "latest", LOG_FILE]
    )
    run("eval.py", *birds.lists, f"--pretrained_model={small_disk}/ResNet8/latest", "--use_gpu=False")
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    run("train.py", f"--model_save_dir={small_disk}", "--checkpoint=latest")
    process = start(birds, tmp_path / "whole", "--num_epochs=5")
    assert process.wait() == 0
    assert_same_run(tmp_path / "whole", small_disk, "4")


def test_a_full_disk_under_the_log(birds, small_disk):
    process = start(birds, small_disk, "--num_epochs=1", "--total_images=80000", "--eval_every=0")
    assert wait_for_steps(process, 1)
    with open(small_disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.splitlines()[-1] == (f"error: {small_disk}/ResNet8/{LOG_FILE}: cannot write: No space left on device")


def test_a_disk_that_becomes_read_only(birds, small_disk):
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    process = start(birds, small_disk, "--num_epochs=1000", "--log_every=1000000", "--eval_every=0")
    while not os.path.exists(small_disk / "ResNet8" / "latest"):
        time.sleep(0.02)
    deadline = time.time() + 60
    while subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True, check=False).returncode:
        assert time.time() < deadline  # busy as long as a file is open for writing
    _, err = process.communicate()
    assert process.returncode == 2 and "Read-only file system" in err.splitlines()[-1], err
    run("eval.py", *birds.lists, f"--pretrained_model={small_disk}/ResNet8/latest", "--use_gpu=False")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    newest = Run(small_disk / "ResNet8").names()[-1]
    run("train.py", f"--model_save_dir={small_disk}", "--checkpoint=latest", f"--num_epochs={int(newest) + 2}")
    assert not [name for name in os.listdir(small_disk / "ResNet8") if ".tmp" in name]


# ---------------------------------------------------------------- pictures and lists


def faulty_pictures(folder):
    """Writes pictures of every bad and odd kind; -> ({name: reason} of the bad ones, names of the odd but good)."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    half = (folder / "whole.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(half[: len(half) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"no picture")
    (folder / "folder.jpg").mkdir()
    Image.new("1", (15000, 15000)).save(folder / "bomb.png")
    Image.fromarray(noise[:1, :1]).save(folder / "dot.png")
    Image.new("RGB", (1, 30000), (200, 30, 30)).save(folder / "tall.png")
    Image.new("RGB", (30000, 1), (200, 30, 30)).save(folder / "wide.jpg")
    return {
        "half.jpg": "truncated",
        "empty.jpg": "an empty file",
        "text.jpg": "not an image",
        "folder.jpg": "Is a directory",
        "absent.jpg": "No such file",
        "bomb.png": "15000 x 15000 pixels, more than --max_pixels=200000000",
    }, ["dot.png", "tall.png", "wide.jpg"]


def test_bad_pictures_cost_warnings_and_never_the_run(birds, tmp_path):
    bad, odd = faulty_pictures(tmp_path)
    rows = read_rows(birds.train_list)
    rows += [f"{tmp_path}/{name} {label}" for label, name in enumerate([*bad, *odd], 1)]  # some in a class of their own
    (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
    flags = [f"--data_dir={birds.root}", f"--train_list={tmp_path}/list.txt", f"--val_list={tmp_path}/list.txt"]
    flags += ["--on_bad_image=skip", "--num_epochs=2"]
    process = start(birds, tmp_path / "out", *flags)
    out, err = process.communicate()
    assert process.returncode == 0, err
    warnings = re.findall(
        r"^warning: skipped (\d+) bad images; the first: .*list\.txt:\d+: \S+: .+$", err, re.MULTILINE
    )
    assert len(warnings) == 4 and [int(count) for count in warnings[1::2]] == [len(bad)] * 2  # training and evaluation
    assert out.count("trainbatch") == 2 * (len(rows) // 8)
    assert "recall@8 " in out and f"{len(rows) - len(bad)} images of" in out
    assert "recall@1" in out


@pytest.mark.parametrize("name", ["half.jpg", "empty.jpg", "text.jpg", "folder.jpg", "absent.jpg", "bomb.png"])
def test_each_bad_picture_is_named_with_its_line(birds, trained, tmp_path, name):
    reason = faulty_pictures(tmp_path)[0][name]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/whole.jpg 1\n{tmp_path}/{name} 1\n")
    best = f"--pretrained_model={trained}/ResNet8/best"
    err = run("eval.py", best, f"--val_list={tmp_path}/list.txt", "--use_gpu=False", status=2).stderr
    assert err.startswith(f"error: {tmp_path}/list.txt:2: {tmp_path}/{name}: ") and err.count("\n") == 1
    assert (reason if os.path.isfile(tmp_path / name) else "no such image") in err


def test_odd_pictures_are_pictures(birds, trained, tmp_path):
    _, odd = faulty_pictures(tmp_path)
    best = f"--pretrained_model={trained}/ResNet8/best"
    for transform in ("resize", "center_crop"):
        flags = ["--input", *(f"{tmp_path}/{name}" for name in odd), f"--feature_file={tmp_path}/f.npz"]
        run("infer.py", best, *flags, f"--test_transform={transform}", "--use_gpu=False")
        assert np.isfinite(np.load(tmp_path / "f.npz")["features"]).all()
    rows = [f"{tmp_path}/{name} {label}" for name in odd for label in (1, 2, 3, 4)]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    process = start(birds, tmp_path / "out", f"--train_list={tmp_path}/list.txt", "--num_epochs=1", "--eval_every=0")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "list.txt:2: " in err and "is on line 1 with another label, too (9 such lines)" in err


def test_max_pixels(trained, tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.jpg")
    flags = [f"--pretrained_model={trained}/ResNet8/best", "--use_gpu=False", "--input", f"{tmp_path}/a.jpg"]
    run("infer.py", *flags, "--max_pixels=8000")
    err = run("infer.py", *flags, "--max_pixels=7999", status=2).stderr
    assert f"{tmp_path}/a.jpg: 100 x 80 pixels, more than --max_pixels=7999" in err


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_what_is_not_finite_is_seen(value, place):
    x = paddle.to_tensor([1.0, 2.0, 3.0], stop_gradient=False)
    frozen = paddle.to_tensor([1.0], stop_gradient=False)  # no gradient
    (x * x).sum().backward()
    loss = paddle.to_tensor(1.0)
    check = optimizers.FiniteCheck()
    check.add(loss, [x, frozen])
    assert check.is_finite()
    if place == "loss":
        loss = paddle.to_tensor(value)
    else:
        (x * paddle.to_tensor([0.0, value, 0.0])).sum().backward()
    check.add(loss, [x, frozen])
    assert not check.is_finite()
    check.add(paddle.to_tensor(1.0), [])
    assert not check.is_finite()  # what was seen once stays seen


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
