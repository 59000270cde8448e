"""Types the README's commands into a copy of the project, in their order, as a reader would.

Every ```bash block runs to the letter. What is made small is around them: the downloaded archive is a tiny one, the
weights are random, and a stand-in for `python` appends flags for small pictures and few steps.
"""

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile

import paddle
from conftest import ROOT, draw_birds

import models

PYTHON = """#!/bin/sh
case "$1" in
train.py)
    epochs=1
    case "$*" in *--checkpoint=latest*) epochs=2 ;; esac
    exec {python} "$@" --image_shape=3,32,32 --num_epochs=$epochs --total_images=40 ;;
-m) exec {python} "$@" --image_shape=3,32,32 --num_epochs=1 --total_images=40 ;;
eval.py | infer.py) exec {python} "$@" --image_shape=3,32,32 ;;
data/make_sample.py) exec {python} "$@" --species=4 --images=2 ;;
*) exec {python} "$@" ;;
esac
"""


def bash_blocks():
    with open(os.path.join(ROOT, "README.md")) as file:
        return re.findall(r"^```bash\n(.*?)^```$", file.read(), re.MULTILINE | re.DOTALL)


def copy_of_the_project(root):
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    for name in tracked or [n for n in os.listdir(ROOT) if not n.startswith(".venv")]:
        source, target = os.path.join(ROOT, name), os.path.join(root, name)
        if os.path.isdir(source):
            shutil.copytree(source, target)
        elif os.path.exists(source):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(source, target)


def tiny_archive(folder):
    """CUB's layout with 32 classes of 3 pictures; -> the environment that passes it off as the real one."""
    draw_birds(folder, classes=32, images=3, size=40)
    path = os.path.join(folder, "images.tgz")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(os.path.join(folder, "images"), "images")
    with open(path, "rb") as file:
        data = file.read()
    return {
        "CUB200_URL": f"file://{path}",
        "CUB200_SIZE": str(len(data)),
        "CUB200_SHA256": hashlib.sha256(data).hexdigest(),
        "CUB200_IMAGES": "96",
    }


def weights_files(folder):
    """Random weights of each model that a command names: {model: path}."""
    resnet = os.path.join(folder, "resnet50")
    paddle.save(paddle.vision.models.resnet50().state_dict(), f"{resnet}.pdparams")
    se_resnext = os.path.join(folder, "se_resnext50.pdparams")
    paddle.save(models.build_model("SE_ResNeXt50_32x4d", 1000).state_dict(), se_resnext)
    return {"ResNet50": resnet, "ResNet50_va": resnet, "SE_ResNeXt50_32x4d": se_resnext}


def test_every_command_of_the_readme_runs(tmp_path):
    blocks = bash_blocks()
    text = "\n".join(blocks)
    for script in ("train.py", "eval.py", "infer.py", "data/split.py", "data/download_cub200.sh"):
        assert script in text  # the blocks were found
    project = tmp_path / "project"
    copy_of_the_project(project)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    weights = weights_files(str(tmp_path))
    environment = {
        **os.environ,
        **tiny_archive(str(tmp_path / "archive")),
        "PYTHON": sys.executable,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    for block in blocks:
        model = re.search(r"--model=(\S+)", block)
        environment["path_to_pretrain_model"] = weights.get(model[1], "") if model else ""
        result = subprocess.run(
            ["bash", "-e", "-c", block], cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{block}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        if "eval.py" in block:
            assert re.search(r"^recall@1: 0\.\d+$", result.stdout, re.MULTILINE)
        if "train.py" in block:
            assert re.search(r"^Pass \d+, trainbatch 0, lr ", result.stdout, re.MULTILINE)
    assert sorted(os.readlink(project / "output_tripletloss" / "ResNet50" / n) for n in ("best", "latest"))[1] == "1"
    assert (project / "features.npz").exists() and (project / "data" / "sample" / "birds_val.txt").exists()
