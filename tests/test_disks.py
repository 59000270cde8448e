"""Full and read-only disks."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run
from test_faults import assert_same_run, start, wait_for_steps

from training.run import LOG_FILE, Run
from utility import UserError

sys.path.insert(0, os.path.join(ROOT, "data"))

import listing


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
    deadline = time.time() + 60
    while not os.path.exists(small_disk / "ResNet8" / "latest"):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    while subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True, check=False).returncode:
        assert time.time() < deadline  # busy as long as a file is open for writing
    _, err = process.communicate()
    assert process.returncode == 2 and "Read-only file system" in err.splitlines()[-1], err
    run("eval.py", *birds.lists, f"--pretrained_model={small_disk}/ResNet8/latest", "--use_gpu=False")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    newest = Run(small_disk / "ResNet8").names()[-1]
    run("train.py", f"--model_save_dir={small_disk}", "--checkpoint=latest", f"--num_epochs={int(newest) + 2}")
    assert not [name for name in os.listdir(small_disk / "ResNet8") if ".tmp" in name]


def test_a_full_disk_under_lists(small_disk):
    """All of them are as they were."""
    before = {str(small_disk / name): f"{name} 1\n" for name in ("a.txt", "b.txt")}
    listing.write_lists(before)
    with open(small_disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(UserError, match="cannot write: No space left on device"):
        listing.write_lists(dict.fromkeys(before, "new 1\n"))
    assert {str(path): path.read_text() for path in small_disk.glob("*.txt*")} == before
