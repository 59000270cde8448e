"""The checkout's root on the import path, Paddle set up as the scripts do, and what whole-script tests need."""

import collections
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import forks

from runtime import process

# What the scripts keep for the next run, they keep here rather than in the cache of whoever runs the tests.
CACHE = tempfile.TemporaryDirectory()
os.environ["DEEP_METRIC_LEARNING_CACHE"] = CACHE.name
# Several test processes share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
process.start_paddle()
FORKS = forks.Server()

# A network and pictures that take no time; and a run of them, whose flags later ones override.
SMALL = ["--model=ResNet8", "--image_shape=3,32,32", "--use_gpu=False"]
TINY = [*SMALL, "--train_batch_size=8", "--samples_each_class=2", "--lr=0.01", "--seed=3", "--log_every=1"]

Birds = collections.namedtuple("Birds", "root train_list val_list lists")


def pytest_make_parametrize_id(val, argname):
    """Bytes give no names to tests: those of an archive hold the time, and two test processes would disagree."""
    return argname if isinstance(val, bytes) else None


def run(script, *flags, status=0, **environment):
    """Runs a script from the checkout's root and checks its exit status; -> subprocess.CompletedProcess.

    With an environment of its own, or as a module (-m), it starts from nothing; else it is a fork of a process that has
    Paddle.
    """
    command = [sys.executable, script, *(str(flag) for flag in flags)]
    if environment or script == "-m":
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}
        )
    else:
        result = FORKS.run(command, ROOT)
    assert result.returncode == status, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def read_rows(path):
    """The lines of a text file."""
    with open(path) as file:
        return file.read().splitlines()


def draw_birds(root, classes, images, size=40):
    """Writes `<root>/images/NNN.Name/*.jpg`: a coloured disc a class, its place and background random."""
    rng = np.random.default_rng(0)
    for c in range(1, classes + 1):
        folder = os.path.join(root, "images", f"{c:03d}.Bird_{c}")
        os.makedirs(folder)
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        for i in range(images):
            image = Image.new("RGB", (size, size), tuple(int(v) for v in rng.integers(0, 256, 3)))
            x, y = rng.integers(0, size // 3, 2)
            ImageDraw.Draw(image).ellipse((x, y, x + size // 2, y + size // 2), fill=colour)
            image.save(os.path.join(folder, f"Bird_{c}_{i:04d}.jpg"), quality=90)


def listing(folder):
    """{path: content} of every file below a folder, where a link points, and None for an empty folder."""
    found = {}
    for top, folders, names in os.walk(folder):
        for name in names + folders:
            path = os.path.join(top, name)
            where = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[where] = f"-> {os.readlink(path)}"
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[where] = file.read()
            elif not os.listdir(path):
                found[where] = None
    return found


@pytest.fixture(scope="session")
def birds(tmp_path_factory):
    """12 classes of 8 pictures, split in halves by data/split.py."""
    root = str(tmp_path_factory.mktemp("birds"))
    draw_birds(root, classes=12, images=8)
    run("data/split.py", root, "--name=birds", "--train_classes=6")
    train_list, val_list = (os.path.join(root, f"birds_{part}.txt") for part in ("train", "val"))
    return Birds(root, train_list, val_list, [f"--train_list={train_list}", f"--val_list={val_list}"])


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU, see stand_in_gpu.py; `gpu.call(script, ...)` runs a script in this process."""
    import stand_in_gpu  # which imports Paddle's parts

    handlers = {number: signal.getsignal(number) for number in process.STOPPING}
    with monkeypatch.context() as patch:
        yield stand_in_gpu.StandInGpu(patch)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    process.start_paddle()


@pytest.fixture
def server():
    """A small web server on this machine: see archives.Handler."""
    import archives  # which imports this file

    with archives.serving() as server:
        yield server


@pytest.fixture
def home(tmp_path):
    """A checkout's data folder, in a place with a space in its name."""
    import archives

    archives.make_checkout(tmp_path / "my checkout")
    return tmp_path / "my checkout"


@pytest.fixture(scope="session")
def trained(birds, tmp_path_factory):
    """The --model_save_dir of a run of one epoch, and in stdout.txt there what it printed. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--num_epochs=1", "--eval_at_start=True", "--log_every=2", f"--model_save_dir={folder}"]
    (folder / "stdout.txt").write_text(run("train.py", *birds.lists, *TINY, *flags).stdout)
    return folder
