"""Types the commands of README.md and of docs/ into copies of the project, in their order, as a reader would.

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
import pytest
from conftest import ROOT, draw_birds

import models
from weights import imagenet

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


PAGES = (
    "README.md",
    *sorted(f"docs/{name}" for name in os.listdir(os.path.join(ROOT, "docs")) if name.endswith(".md")),
)


def read(page):
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        return file.read()


def bash_blocks(page):
    return re.findall(r"^```bash\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


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
    """CUB's layout with 32 classes of 4 pictures; -> the environment that passes it off as the real one."""
    draw_birds(folder, classes=32, images=4, size=40)
    path = os.path.join(folder, "images.tgz")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(os.path.join(folder, "images"), "images")
    with open(path, "rb") as file:
        data = file.read()
    return {
        "CUB200_URL": f"file://{path}",
        "CUB200_SIZE": str(len(data)),
        "CUB200_SHA256": hashlib.sha256(data).hexdigest(),
        "CUB200_IMAGES": "128",
    }


def weights_files(folder):
    """Random weights of each model that a command names, as files and in a cache of official ones: {model: path}."""
    cache = os.path.join(folder, "cache")
    os.makedirs(cache)
    resnet = os.path.join(folder, "resnet50")
    paddle.save(paddle.vision.models.resnet50().state_dict(), f"{resnet}.pdparams")
    shutil.copy(f"{resnet}.pdparams", os.path.join(cache, os.path.basename(imagenet.IMAGENET["ResNet50"].url)))
    name = "SE_ResNeXt50_32x4d"
    official = os.path.join(cache, os.path.basename(imagenet.IMAGENET[name].url))
    paddle.save(models.build_model(name, 1000).state_dict(), official)
    return {"ResNet50": resnet, "ResNet50_va": resnet, name: official}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """-> function that types a page's commands; the README's come first: what they leave is there for the others."""
    folder = tmp_path_factory.mktemp("reader")
    project = folder / "project"
    copy_of_the_project(project)
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    files = weights_files(str(folder))
    environment = {
        **os.environ,
        **tiny_archive(str(folder / "archive")),
        "PYTHON": sys.executable,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "DEEP_METRIC_LEARNING_CACHE": str(folder / "cache"),
    }
    typed = []

    def type_commands(page):
        for other in ("README.md", page):
            if other in typed:
                continue
            typed.append(other)
            for block in bash_blocks(other):
                if block not in typed:  # a page may show a command of the README again
                    typed.append(block)
                    type_block(block)
        return project

    def type_block(block):
        model = re.search(r"--model=(\S+)", block)
        environment["path_to_pretrain_model"] = files.get(model[1], "") if model else ""
        result = subprocess.run(
            ["bash", "-e", "-c", block], cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{block}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        if "eval.py" in block:
            assert re.search(r"^recall@1: 0\.\d+$", result.stdout, re.MULTILINE)
        if "train.py" in block and "--nproc_per_node" not in block:
            assert re.search(r"^Pass \d+, trainbatch 0, lr ", result.stdout, re.MULTILINE)

    return type_commands


@pytest.mark.parametrize("page", [page for page in PAGES if bash_blocks(page)])
def test_every_command_runs(reader, page):
    project = reader(page)
    if page == "README.md":
        text = "\n".join(bash_blocks(page))
        for script in ("train.py", "eval.py", "infer.py", "data/download_cub200.sh"):
            assert script in text  # the blocks were found
        assert os.readlink(project / "output_tripletloss" / "ResNet50" / "latest") == "0"
        assert (project / "features.npz").exists() and (project / "exported" / "README.md").exists()


def slug(heading):
    """The anchor that a forge gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, "README_zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        full = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(ROOT, full)), target
        if anchor:
            assert anchor in [slug(heading) for heading in re.findall(r"(?m)^#+ (.*)$", read(full))], target


def test_the_chinese_readme_has_the_same_commands():
    fenced = [re.findall(r"^```\w*\n.*?^```$", read(page), re.M | re.S) for page in ("README.md", "README_zh.md")]
    assert fenced[0] == fenced[1]


def test_the_readme_is_short():
    assert os.path.getsize(os.path.join(ROOT, "README.md")) < 12_000
    assert os.path.getsize(os.path.join(ROOT, "docs", "neighbours.jpg")) < 100_000


def test_the_page_of_flags_is_that_of_the_parsers():
    sys.path.insert(0, os.path.join(ROOT, "docs"))
    import make_flags

    assert make_flags.page() == read("docs/flags.md")  # python docs/make_flags.py writes it anew
