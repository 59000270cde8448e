"""The folder of a run."""

import errno
import json
import os
import shutil

import paddle
import pytest
from test_optimizers import at, build, same, save, step, values

import files
from training.run import LOG_FILE, MOVED, Run
from utility import UserError
from weights import checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:When training, we now always track", "ignore:The input state dict is empty"
)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    network, optimizer = build()
    save(tmp_path, network, optimizer, at(0))
    old = values(network)
    paddle_save = paddle.save
    for error, raised in ((OSError(errno.ENOSPC, "No space left on device"), UserError), (KeyboardInterrupt(), None)):

        def full(value, path, error=error):
            paddle_save(value, path)
            if path.endswith(checkpoint.PART_FILES["optimizer"]):
                raise error

        monkeypatch.setattr(paddle, "save", full)
        for epoch in (0, 1):
            step(network, optimizer, 0)
            with pytest.raises(raised or type(error)) as caught:
                save(tmp_path, network, optimizer, at(epoch))
            if raised:
                assert str(caught.value) == f"{tmp_path}/{epoch}: cannot write the checkpoint: No space left on device"
            assert sorted(os.listdir(tmp_path)) == ["0", "latest"] and os.readlink(tmp_path / "latest") == "0"
    assert same(paddle.load(f"{tmp_path}/0/{checkpoint.WEIGHTS_FILE}", return_numpy=True), old)
    monkeypatch.undo()
    save(tmp_path, network, optimizer, at(0))  # an epoch that is there is replaced
    assert same(paddle.load(f"{tmp_path}/0/{checkpoint.WEIGHTS_FILE}", return_numpy=True), values(network))


def fake_checkpoints(run_dir, epochs, latest=None, best=None):
    for epoch in epochs:
        os.makedirs(run_dir / str(epoch))
        state = {"format": checkpoint.FORMAT, "epoch": epoch, "step": 5, "steps": 5}
        (run_dir / str(epoch) / checkpoint.DESCRIPTION).write_text(json.dumps(state))
    for link, epoch in (("latest", latest), ("best", best)):
        if epoch is not None:
            Run(run_dir).point_at(link, str(epoch))


def test_point_at(tmp_path):
    fake_checkpoints(tmp_path, [1, 2], latest=1)
    assert os.path.samefile(tmp_path / "latest", tmp_path / "1")
    Run(tmp_path).point_at("latest", "2")
    assert os.path.samefile(tmp_path / "latest", tmp_path / "2")
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "latest"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert os.path.samefile(moved / "latest", moved / "2")  # a run may be moved


@pytest.mark.parametrize("links", [True, False])
def test_with_and_without_links(tmp_path, monkeypatch, links):
    if not links:

        def denied(*args, **kwargs):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "symlink", denied)
    run_dir = str(tmp_path)
    fake_checkpoints(tmp_path, [1, 2, 3], latest=1)
    Run(run_dir).point_at("best", "1")
    Run(run_dir).point_at("latest", "3")
    assert Run(run_dir).read_link("latest") == "3"
    assert os.path.realpath(checkpoint.resolve(str(tmp_path / "latest/"))) == str(tmp_path / "3")
    assert os.path.islink(tmp_path / "latest") == links
    Run(run_dir).remove_old(1)
    assert sorted(os.listdir(tmp_path)) == ["1", "3", "best", "latest"]


def test_links_of_a_copy_that_has_files_in_their_place(tmp_path, monkeypatch):
    """A run that went on elsewhere: a link where files stood, and the other way round."""
    fake_checkpoints(tmp_path, [1, 2])
    (tmp_path / "latest").write_text("1\n")
    Run(tmp_path).point_at("latest", "2")
    assert os.readlink(tmp_path / "latest") == "2"
    monkeypatch.setattr(files, "link", lambda path, target: False)
    Run(tmp_path).point_at("latest", "1")
    assert (tmp_path / "latest").read_text() == "1\n" and not os.path.islink(tmp_path / "latest")
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "latest"] and os.listdir(tmp_path / "2") == ["checkpoint.json"]


def test_what_is_in_the_place_of_a_link_is_kept(tmp_path, capsys):
    for name in ("latest", "best"):
        fake_checkpoints(tmp_path, [3])
        (tmp_path / "3").rename(tmp_path / name)
        (tmp_path / name / "model.pdparams").write_text(name)
    Run(tmp_path).make_way("latest")
    Run(tmp_path).make_way("best")
    assert sorted(os.listdir(tmp_path)) == ["3", "best.kept1"]  # each under its name, for they differ
    assert f"it is now {tmp_path / '3'}" in capsys.readouterr().out
    shutil.copytree(tmp_path / "3", tmp_path / "best")
    Run(tmp_path).make_way("best")  # a copy of what is there
    assert sorted(os.listdir(tmp_path)) == ["3", "best.kept1"]
    for number, what in enumerate(("a file", "a folder", "a link"), 1):
        path = tmp_path / "latest"
        if what == "a file":
            path.write_text("my notes")
        elif what == "a folder":
            path.mkdir()
        else:
            path.symlink_to("../elsewhere")
        Run(tmp_path).make_way("latest")
        assert os.path.lexists(tmp_path / f"latest.kept{number}")
    assert (tmp_path / "latest.kept1").read_text() == "my notes"
    assert os.readlink(tmp_path / "latest.kept3") == "../elsewhere"


def test_what_an_ended_process_has_left_is_deleted(tmp_path):
    fake_checkpoints(tmp_path, [3], latest=3)
    for name in ("best.old.tmp17", "4.tmpab12_xyz", "3_2.old.tmp17"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pdparams").write_text("")
    for name in (f"{LOG_FILE}.tmpab12_xyz", "latest.tmp17"):
        (tmp_path / name).write_text("")
    Run(tmp_path).remove_leftovers()
    assert sorted(os.listdir(tmp_path)) == ["3", "latest"]
    # Beside the list of what was set aside, the same half written.
    Run(tmp_path).set_aside()
    (tmp_path / "replaced" / ".moved_by_train.tmpab12_xyz").write_text("")
    Run(tmp_path).remove_set_aside()
    assert os.listdir(tmp_path) == []


def test_what_is_not_known_to_be_ours_is_not_deleted(tmp_path):
    fake_checkpoints(tmp_path, [0, 1, 2, 3], latest=3)
    (tmp_path / "1" / "notes.txt").write_text("")  # something beside our files
    (tmp_path / "2").rename(tmp_path / "200")  # a copy under a name that it was not written under
    (tmp_path / "notes.tmp1").write_text("")
    (tmp_path / "2024_1").symlink_to("200")
    Run(tmp_path).remove_leftovers()
    Run(tmp_path).remove_old(1)
    assert sorted(os.listdir(tmp_path)) == ["1", "200", "2024_1", "3", "latest", "notes.tmp1"]
    assert Run(tmp_path).newest() == str(tmp_path / "3")
    assert Run(tmp_path).in_the_way(300) == [str(tmp_path / "200")]


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(1, 2, ["2", "11"]), (2, 11, ["10", "11"]), (3, None, ["9", "10", "11"])]
)
def test_remove_old_checkpoints(tmp_path, keep, best, left):
    fake_checkpoints(tmp_path, [0, 2, 9, 10, 11], latest=11, best=best)
    (tmp_path / "notes").mkdir()
    (tmp_path / LOG_FILE).write_text("")
    Run(tmp_path).remove_old(keep)
    names = set(os.listdir(tmp_path))
    assert {name for name in names if name.isdigit()} == set(left)
    assert {"notes", "latest", LOG_FILE} <= names


def test_links_to_what_is_no_more_go(tmp_path):
    fake_checkpoints(tmp_path, [0], latest=0, best=1)
    Run(tmp_path).remove_dangling()
    assert sorted(os.listdir(tmp_path)) == ["0", "latest"]


def test_set_run_aside(tmp_path):
    fake_checkpoints(tmp_path, [0, 11], latest=11, best=0)
    (tmp_path / LOG_FILE).write_text('{"args": {}}\n')
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "holiday.jpg").write_text("not ours")
    (tmp_path / "model.pdparams").write_text("not ours")
    Run(tmp_path).set_aside()
    assert sorted(os.listdir(tmp_path)) == ["2024", "model.pdparams", "replaced"]
    assert sorted(os.listdir(tmp_path / "replaced")) == [MOVED, "0", "11", "best", "latest", LOG_FILE]
    assert os.listdir(tmp_path / "2024") == ["holiday.jpg"]
    # A second try whose own checkpoint never came does not push out what was set aside.
    (tmp_path / LOG_FILE).write_text('{"args": {"second": 1}}\n')
    Run(tmp_path).set_aside()
    assert not (tmp_path / LOG_FILE).exists()
    assert (tmp_path / "replaced" / LOG_FILE).read_text() == '{"args": {}}\n'
    Run(tmp_path / "none").set_aside()


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: not a checkpoint directory of train.py"):
        checkpoint.read_description(str(tmp_path), ("settings",))
    for content, wanted in (
        ("{", "not readable as a checkpoint's description"),
        ("{}", "checkpoint format None, this version reads"),
        ('{"format": 999}', "checkpoint format 999"),
        ("[]", "no JSON object"),
        ('{"format": 1}', "it lacks 'settings'"),
    ):
        (tmp_path / checkpoint.DESCRIPTION).write_text(content)
        with pytest.raises(UserError, match=wanted):
            checkpoint.read_description(str(tmp_path), ("settings",))


def test_log_json(tmp_path):
    records = [{"step": 0, "loss": 0.25}, {"text": "two\nlines"}]
    for record in records:
        Run(tmp_path).log(record)
    with open(tmp_path / LOG_FILE) as file:
        assert [json.loads(line) for line in file] == records


@pytest.mark.parametrize("finished", [False, True])
def test_the_log_of_a_finished_epoch_is_kept(tmp_path, finished):
    """Where its checkpoints are gone; that of a run which never finished one is not worth it."""
    records = [
        {"args": {}},
        {"epoch": -1, "eval": {}},
        {"epoch": 0, "step": 0},
        *([{"epoch": 0, "eval": {}}] * finished),
    ]
    (tmp_path / LOG_FILE).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    Run(tmp_path).make_way_for_log()
    assert (tmp_path / f"{LOG_FILE}.kept1").exists() == finished
    assert finished or (tmp_path / LOG_FILE).read_bytes() == b""
