"""What each command leaves of somebody's folder: every file of it is listed before and after."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import SMALL, TINY, listing, run

from training.run import LOG_FILE

TRAIN = [*TINY, "--total_images=16"]


@pytest.fixture(scope="module")
def two_epochs(birds, tmp_path_factory):
    """The folder of a run with the checkpoints 0 and 1; `best` may be either."""
    folder = tmp_path_factory.mktemp("trained")
    run("train.py", *birds.lists, *TRAIN, "--num_epochs=2", "--keep=2", f"--model_save_dir={folder}")
    return folder / "ResNet8"


def copy_run(two_epochs, target, links=True):
    """Copies a run; without links as scp -r, zip and object stores do: each link becomes what it pointed at."""
    shutil.copytree(two_epochs, target, symlinks=links)
    if not links:
        for name in ("0", "1"):
            shutil.rmtree(target / name)


def kept(before, after, *but):
    """Asserts that all there was is there and the same, but for the paths (of files or folders) in `but`."""
    inside = tuple(f"{name}/" for name in but)
    lost = [name for name in before if name not in after or after[name] != before[name]]
    assert not [name for name in lost if name not in but and not name.startswith(inside)]


MINE = {
    "ResNet8/notes/a.txt": "mine", "ResNet8/2024/holiday.jpg": "mine", "ResNet8/replaced/mine.txt": "mine",
    "ResNet8/best.txt": "mine", "ResNet8/0/mine.txt": "mine", "ResNet8.zip": "mine", "1.tmp12/model.pdparams": "mine",
    "ResNet8/1.tmp12/mine.txt": "mine", "ResNet8/latest.kept1": "mine",
}  # fmt: skip


def add_mine(home):
    for path, text in MINE.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(text)


# ---------------------------------------------------------------- train.py


@pytest.mark.parametrize("flags", [["--checkpoint=latest"], ["--checkpoint=auto"], ["--checkpoint=latest", "--keep=9"]])
def test_going_on_deletes_old_checkpoints_and_nothing_else(birds, two_epochs, tmp_path, flags):
    copy_run(two_epochs, tmp_path / "ResNet8")
    add_mine(tmp_path)
    before = listing(tmp_path)
    out = run("train.py", *SMALL, *flags, f"--model_save_dir={tmp_path}", "--num_epochs=3", "--eval_every=0").stdout
    assert "mine.txt is not train.py's" in out  # the one inside of a checkpoint, which stays for it
    after = listing(tmp_path)
    kept(before, after, "ResNet8/latest", f"ResNet8/{LOG_FILE}", *([] if "--keep=9" in flags else ["ResNet8/1"]))
    assert after[f"ResNet8/{LOG_FILE}"].startswith(before[f"ResNet8/{LOG_FILE}"]) and "ResNet8/2/model.pdopt" in after


def test_overwriting_deletes_the_run_and_nothing_else(birds, two_epochs, tmp_path):
    copy_run(two_epochs, tmp_path / "ResNet8")
    add_mine(tmp_path)
    before = listing(tmp_path)
    flags = [*birds.lists, *TRAIN, f"--model_save_dir={tmp_path}", "--num_epochs=1", "--eval_every=0"]
    run("train.py", *flags, status=2)
    assert listing(tmp_path) == before
    run("train.py", *flags, "--overwrite=True")
    after = listing(tmp_path)
    for part in ("mine.txt", "model.pdparams", "model.pdopt", "checkpoint.json"):  # it stays for the file in it
        assert after[f"ResNet8/replaced/0/{part}"] == before[f"ResNet8/0/{part}"]
    run_files = ("0", "1", "latest", "best", LOG_FILE)
    kept(before, after, *(f"ResNet8/{name}" for name in run_files))
    assert "ResNet8/1/model.pdparams" not in after and "ResNet8/best" not in after
    assert after["ResNet8/latest"] == "-> 0"
    assert {name.split("/")[2] for name in after if name.startswith("ResNet8/replaced/")} == {"0", "mine.txt"}


@pytest.mark.parametrize("checkpoint", ["latest", "auto", "ResNet8/latest", "ResNet8/best"])
def test_a_run_copied_without_links_goes_on_in_place(birds, two_epochs, tmp_path, checkpoint):
    copy_run(two_epochs, tmp_path / "ResNet8", links=False)
    before = listing(tmp_path)
    flags = ["--num_epochs=3", "--keep=9", "--eval_every=0", f"--model_save_dir={tmp_path}"]
    message = run("train.py", *birds.lists, *TRAIN, *flags, status=2).stderr
    assert "holds an earlier run" in message and listing(tmp_path) == before  # as a new run it is refused
    checkpoint = f"{tmp_path}/{checkpoint}" if "/" in checkpoint else checkpoint
    flags += ["--overwrite=True"] if checkpoint.endswith("best") else ["--model=ResNet8"]
    run("train.py", *flags, f"--checkpoint={checkpoint}")
    after = listing(tmp_path)
    for part in ("model.pdparams", "model.pdopt"):
        if not checkpoint.endswith("best"):  # from which to go on is to throw away what came later
            assert after[f"ResNet8/1/{part}"] == before[f"ResNet8/latest/{part}"]
        best = json.loads(before["ResNet8/best/checkpoint.json"])["epoch"]
        assert after[f"ResNet8/{best}/{part}"] == before[f"ResNet8/best/{part}"]
    assert after["ResNet8/latest"] == "-> 2"


def test_a_copy_has_later_checkpoints_although_they_have_no_number(birds, two_epochs, tmp_path):
    copy_run(two_epochs, tmp_path / "ResNet8", links=False)
    shutil.rmtree(tmp_path / "ResNet8" / "best")
    shutil.copytree(two_epochs / "0", tmp_path / "ResNet8" / "best")
    before = listing(tmp_path)
    message = run("train.py", f"--checkpoint={tmp_path}/ResNet8/best", "--num_epochs=3", status=2).stderr
    assert "the run has later checkpoints (1)" in message and listing(tmp_path) == before


def test_nothing_is_deleted_before_all_is_read(birds, two_epochs, tmp_path):
    copy_run(two_epochs, tmp_path / "ResNet8")
    (tmp_path / "ResNet8/0/model.pdopt").write_bytes(b"")
    before = listing(tmp_path)
    flags = [f"--checkpoint={tmp_path}/ResNet8/0", "--overwrite=True", "--num_epochs=3"]
    assert "model.pdopt" in run("train.py", *flags, status=2).stderr
    assert listing(tmp_path) == before


def test_what_only_looks_like_ours_stays(birds, two_epochs, tmp_path):
    """Copies that somebody made, a folder with the name of ours, and a log with a remark."""
    folder = tmp_path / "ResNet8"
    copy_run(two_epochs, folder)
    shutil.copytree(folder / "1", folder / "1.tmp_backup")
    shutil.copytree(folder / "0", folder / "replaced" / "0")
    (folder / "best.tmp_mine").write_text("mine")
    with open(folder / LOG_FILE, "a") as file:
        file.write("# my remark\n")
    before = listing(tmp_path)
    flags = ["--model=ResNet8", "--checkpoint=latest", "--num_epochs=3", "--eval_every=0", "--keep=9"]
    out = run("train.py", *flags, f"--model_save_dir={tmp_path}").stdout
    after = listing(tmp_path)
    kept(before, after, "ResNet8/latest", f"ResNet8/{LOG_FILE}")
    assert after[f"ResNet8/{LOG_FILE}.kept1"] == before[f"ResNet8/{LOG_FILE}"] and f"{LOG_FILE}.kept1" in out


@pytest.mark.parametrize("what", ["log", "run", "checkpoint"])
def test_links_are_not_followed_to_what_is_cut_or_deleted(birds, two_epochs, tmp_path, what):
    copy_run(two_epochs, tmp_path / "elsewhere")
    run_dir = tmp_path / "home" / "ResNet8"
    if what == "run":  # a run's folder may be on another disk
        run_dir.parent.mkdir()
        run_dir.symlink_to(tmp_path / "elsewhere")
    else:
        copy_run(two_epochs, run_dir)
        name = {"log": LOG_FILE, "checkpoint": "1"}[what]
        shutil.rmtree(run_dir / name) if what == "checkpoint" else (run_dir / name).unlink()
        (run_dir / name).symlink_to(tmp_path / "elsewhere" / name)
    before = listing(tmp_path)
    flags = ["--model=ResNet8", "--checkpoint=latest", "--num_epochs=3", "--eval_every=0"]
    result = run("train.py", *flags, f"--model_save_dir={tmp_path}/home", status=2 if what == "log" else 0)
    after = listing(tmp_path)
    if what == "log":
        assert f"{run_dir / LOG_FILE}: a link" in result.stderr and after == before
    else:
        own = "elsewhere" if what == "run" else "home/ResNet8"
        worse = {"0": "1", "1": "0"}[before[f"{own}/best"].split()[1]]
        kept(before, after, *(f"{own}/{name}" for name in ("latest", LOG_FILE, worse)))
        assert f"{own}/2/model.pdopt" in after


# ---------------------------------------------------------------- a file system that can do less

LESS = """
import errno, os
def refuse(*arguments, **more):
    raise OSError(errno.{code}, os.strerror(errno.{code}))
for name in {names!r}:
    setattr(os, name, refuse)
if {no_locks}:
    import fcntl
    fcntl.flock = refuse
"""


def less(folder, names, code="EPERM", no_locks=False):
    """-> the environment in which Python finds a file system that refuses these functions of os."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(LESS.format(names=names, code=code, no_locks=no_locks))
    return {"PYTHONPATH": str(folder)}


def test_without_links_locks_and_flushing(birds, two_epochs, tmp_path):
    """The run says so at its start and does the same; all scripts read what stands in the place of the links."""
    environment = less(tmp_path / "site", ["symlink", "fsync"], "ENOTSUP", no_locks=True)
    flags = [*birds.lists, *TRAIN, f"--model_save_dir={tmp_path}/run", "--keep=2"]
    out = run("train.py", *flags, "--num_epochs=1", **environment).stdout
    start = out[: out.index("Pass 0")]
    assert "no symbolic links: latest and best are small files" in start
    assert "no locks here" in start and "no flushing" in start
    run("train.py", *flags, "--num_epochs=2", "--checkpoint=auto", **environment)
    folder = tmp_path / "run" / "ResNet8"
    assert (folder / "latest").read_text() == "1\n" and not (folder / "latest").is_symlink()
    assert (folder / "best").read_text().strip() in ("0", "1")
    assert (folder / "1/model.pdparams").stat().st_size == (two_epochs / "1/model.pdparams").stat().st_size
    weights = [f"--pretrained_model={folder}/latest", "--use_gpu=False"]
    evaluated = [run("eval.py", *birds.lists, f"--pretrained_model={folder}/{name}").stdout for name in ("latest", "1")]
    figures = [[line for line in out.splitlines() if line.startswith("recall@1")] for out in evaluated]
    assert figures[0] == figures[1] and figures[0]
    run("infer.py", *birds.lists, *weights, f"--feature_file={tmp_path}/f.npz")
    run("train.py", f"--checkpoint={folder}/latest", "--num_epochs=3")  # where there are links again
    assert os.readlink(folder / "latest") == "2"


def test_where_modes_cannot_be_changed(birds, tmp_path):
    environment = less(tmp_path / "site", ["chmod"])
    flags = [*birds.lists, *TRAIN, f"--model_save_dir={tmp_path}/run", "--num_epochs=1"]
    assert "done: " in run("train.py", *flags, **environment).stdout


def test_without_renaming_a_run_ends_before_its_first_step(birds, tmp_path):
    environment = less(tmp_path / "site", ["rename", "replace"])
    (tmp_path / "home").mkdir()
    flags = [*birds.lists, *TRAIN, f"--model_save_dir={tmp_path}/home"]
    result = run("train.py", *flags, "--num_epochs=1", status=2, **environment)
    assert "can't be renamed and replaced here (Operation not permitted)" in result.stderr
    assert result.stderr.count("\n") == 1 and "Pass 0" not in result.stdout
    assert set(listing(tmp_path / "home")) <= {"ResNet8"}


# ---------------------------------------------------------------- eval.py, infer.py and the lists


def test_outputs_replace_only_earlier_outputs(birds, two_epochs, tmp_path):
    weights = [*birds.lists, f"--pretrained_model={two_epochs}/1", "--use_gpu=False"]
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "table.json").write_text('{"mine": 1}')
    np.savez(tmp_path / "mine.npz", mine=1)
    (tmp_path / "linked.json").symlink_to(tmp_path / "figures" / "one.json")
    for script, flag, paths in (
        ("eval.py", "--output_json", ["thesis.txt", "table.json", "mine.npz", "."]),
        ("infer.py", "--feature_file", ["thesis.txt", "table.json", "mine.npz", "."]),
    ):
        for path in paths:
            before = listing(tmp_path)
            message = run(script, *weights, f"{flag}={tmp_path}/{path}", status=2).stderr
            assert str(tmp_path) in message and message.count("\n") == 1 and listing(tmp_path) == before
    before = listing(tmp_path)
    for _ in range(2):
        run("eval.py", *weights, f"--output_json={tmp_path}/linked.json")
        run("infer.py", *weights, f"--feature_file={tmp_path}/features.npz")
    after = listing(tmp_path)
    kept(before, after)
    assert set(after) - set(before) == {"figures/one.json", "features.npz"}


def test_an_output_is_no_input_and_no_other_output(birds, two_epochs, tmp_path):
    """Each would replace what it has just read, or written."""
    flags = [f"--pretrained_model={two_epochs}/latest", "--use_gpu=False", "--input", birds.val_list]
    gallery = f"{tmp_path}/g.npz"
    run("infer.py", *flags, f"--feature_file={gallery}")
    before = listing(tmp_path)
    for more, wanted in (
        ([f"--gallery={gallery}", f"--feature_file={tmp_path}/./g.npz"], "g.npz: that is --gallery"),
        ([f"--whiten={gallery}", f"--feature_file={gallery}"], "g.npz: that is --whiten"),
        ([f"--feature_file={tmp_path}/x.csv", f"--neighbours_file={tmp_path}/x.csv"], "x.csv: that is --feature_file"),
    ):
        assert wanted in run("infer.py", *flags, *more, status=2).stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize("content", ["description", "other", "export and more", "link"])
def test_an_export_replaces_an_export_only(birds, two_epochs, tmp_path, content):
    target = tmp_path / "exported"
    command = ["infer.py", f"--pretrained_model={two_epochs}/1", "--use_gpu=False", f"--export_dir={target}"]
    if content in ("export and more", "link"):
        run(*command)
        (target / ("mine.txt" if content == "export and more" else "more")).write_text("mine")
    else:
        target.mkdir()
        (target / "description.json").write_text("{}" if content == "other" else '{"paddle": "x", "mine": true}')
        (target / "data.csv").write_text("mine")
    if content == "link":
        (target / "more").unlink()
        (tmp_path / "link").symlink_to(target)
        before = listing(tmp_path)
        run(*command[:-1], f"--export_dir={tmp_path}/link")
        assert set(listing(tmp_path)) == set(before) and (tmp_path / "link").is_symlink()
        return
    before = listing(tmp_path)
    assert "holds other files" in run(*command, status=2).stderr
    assert listing(tmp_path) == before


def test_the_engine_touches_its_cache_only(birds, two_epochs, tmp_path):
    """Beside weights nothing is read or removed, and of the cache what has the engine's names and contents."""
    weights = tmp_path / "mine" / "bird.pdparams"
    weights.parent.mkdir()
    shutil.copy(two_epochs / "1/model.pdparams", weights)
    precious = tmp_path / "precious" / "0123456789abcdef_0123456789abcdef"
    precious.mkdir(parents=True)
    (precious / "model.json").write_text("mine")
    (tmp_path / "mine" / "bird.pdparams.inference").symlink_to(tmp_path / "precious")
    cache = tmp_path / "cache"
    command = ["eval.py", *birds.lists, *SMALL, f"--pretrained_model={weights}", "--engine=inference"]
    run(*command, DEEP_METRIC_LEARNING_CACHE=str(cache))
    (folder,) = (cache / "inference").iterdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / precious.name).symlink_to(precious)
    (folder / f"{precious.name}.tmp1").mkdir()
    (folder / f"{precious.name}.tmp1" / "mine.txt").write_text("mine")
    before = listing(tmp_path)
    run(*command[:-1], "--engine=inference", "--image_shape=3,40,40", DEEP_METRIC_LEARNING_CACHE=str(cache))
    kept(before, listing(tmp_path))


def test_a_sample_replaces_a_sample_only(tmp_path):
    flags = ["--species=2", "--images=2", "--size=32", f"--output_dir={tmp_path}/birds"]
    run("data/make_sample.py", *flags)
    once = listing(tmp_path)
    run("data/make_sample.py", *flags, "--overwrite")
    assert listing(tmp_path) == once
    (tmp_path / "birds" / "images" / "mine.jpg").write_text("mine")
    before = listing(tmp_path)
    assert "mine.jpg" in run("data/make_sample.py", *flags, "--overwrite", status=2).stderr
    assert listing(tmp_path) == before
