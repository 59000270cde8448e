"""Checkpoints and the folder of a run: written whole or not at all, found again, and cleaned up after a crash."""

import errno
import json
import os
import shutil

import checkpoints
import numpy as np
import paddle
import pytest
from checkpoints import LOG_FILE

import files
from utility import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:When training, we now always track", "ignore:The input state dict is empty"
)

OPTIMIZERS = {
    "momentum": lambda p: paddle.optimizer.Momentum(0.1, momentum=0.9, parameters=p, weight_decay=1e-3),
    "momentum fused": lambda p: paddle.optimizer.Momentum(0.1, 0.9, p, weight_decay=1e-3, use_multi_tensor=True),
    "adamw": lambda p: paddle.optimizer.AdamW(0.01, parameters=p, weight_decay=0.1),
    "adam": lambda p: paddle.optimizer.Adam(0.01, parameters=p),
    "adam fused": lambda p: paddle.optimizer.Adam(0.01, parameters=p, use_multi_tensor=True),
    "sgd": lambda p: paddle.optimizer.SGD(0.1, parameters=p),
}


def build(optimizer="momentum"):
    """-> a network of so many layers that linear_1's name begins linear_10's, and its optimizer; layer 3 is frozen."""
    layers = [paddle.nn.Linear(3, 3) for _ in range(12)]
    network = paddle.nn.Sequential(*layers, paddle.nn.BatchNorm1D(3))
    network[3].weight.stop_gradient = True
    return network, begin(optimizer, network)


def begin(optimizer, network):
    parameters = [p for p in network.parameters() if not p.stop_gradient]
    optimizer = OPTIMIZERS[optimizer](parameters)
    checkpoints.make_optimizer_state(optimizer, parameters)
    return optimizer


def step(network, optimizer, seed):
    x = paddle.to_tensor(np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32))
    (network(x)[:, 0] * x[:, 1]).sum().backward()
    optimizer.step()
    optimizer.clear_grad()


def state_of(network, optimizer):
    return {key: value.numpy().copy() for key, (_, value) in checkpoints._optimizer_entries(network, optimizer).items()}


def at(epoch, step=8):
    """The state of a run with 8 steps an epoch."""
    return {"epoch": epoch, "step": step, "steps": 8, "evaluated": False}


def values(network):
    return {name: value.numpy() for name, value in network.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_checkpoint_continues_with_the_same_step(tmp_path, optimizer_name):
    network, optimizer = build(optimizer_name)
    for seed in range(3):
        step(network, optimizer, seed)
    path = checkpoints.save_checkpoint(str(tmp_path), network, optimizer, {**at(4), "labels": [3, 5]})
    assert path == f"{tmp_path}/4" and os.readlink(tmp_path / "latest") == "4"
    assert sorted(os.listdir(path)) == ["checkpoint.json", "model.pdopt", "model.pdparams"]
    state = checkpoints.read_checkpoint_state(f"{tmp_path}/latest")
    assert state == {"format": checkpoints.CHECKPOINT_FORMAT, **at(4), "labels": [3, 5]}
    saved = values(network)
    step(network, optimizer, 3)
    wanted = values(network)

    # Another process builds other layers before: the generated names differ.
    paddle.nn.Linear(2, 2)
    again, other_optimizer = build(optimizer_name)
    assert again[0].weight.name != network[0].weight.name
    again.set_state_dict(paddle.load(f"{path}/{checkpoints.WEIGHTS_FILE}"))
    assert same(values(again), saved)
    named = paddle.load(f"{path}/{checkpoints.OPTIMIZER_FILE}", return_numpy=True)
    assert all(isinstance(value, np.ndarray) for value in named.values())
    checkpoints.load_optimizer_state(again, other_optimizer, named, path)
    step(again, other_optimizer, 3)
    assert same(values(again), wanted)

    # Without the optimizer's state it would be another step.
    again.set_state_dict(saved)
    step(again, begin(optimizer_name, again), 3)
    assert same(values(again), wanted) == (optimizer_name == "sgd")


def test_optimizer_state_of_another_network():
    network, optimizer = build()
    step(network, optimizer, 0)
    named = state_of(network, optimizer)
    trained = [name for name, p in network.named_parameters() if not p.stop_gradient]
    assert sorted({name.rsplit("/", 1)[0] for name in named}) == sorted(trained)
    small = paddle.nn.Sequential(paddle.nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"model.pdopt: has '.*', which this network lacks"):
        checkpoints.load_optimizer_state(small, begin("momentum", small), named, "model.pdopt")


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_an_optimizer_with_its_state_made_early_does_the_same_steps(optimizer_name):
    network, optimizer = build(optimizer_name)
    assert all("_pow_" in key or not value.any() for key, value in state_of(network, optimizer).items())
    late, _ = build()
    late.set_state_dict(network.state_dict())
    as_paddle_does = OPTIMIZERS[optimizer_name]([p for p in late.parameters() if not p.stop_gradient])
    for seed in range(3):
        step(network, optimizer, seed)
        step(late, as_paddle_does, seed)
        assert same(values(network), values(late))
        assert same(state_of(network, optimizer), state_of(late, as_paddle_does))


@pytest.mark.parametrize("optimizer_name", sorted(set(OPTIMIZERS) - {"sgd"}))
def test_what_a_saved_optimizer_lacks_is_named_and_nothing_is_loaded(optimizer_name):
    network, optimizer = build(optimizer_name)
    step(network, optimizer, 0)
    whole = state_of(network, optimizer)
    again = begin(optimizer_name, network)
    first = state_of(network, again)
    kind = "moment1_0" if "adam" in optimizer_name else "velocity_0"
    key = f"4.weight/{kind}"
    for saved, message in (
        ({}, f"incomplete: {len(whole)} entries are missing"),
        (
            {name: value for name, value in whole.items() if name != key},
            f"incomplete: 1 entries are missing, such as '{key}'",
        ),
        ({**whole, key: whole[key][:2]}, rf"'{key}' is \[2, 3\] in place of \[3, 3\]"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.load_optimizer_state(network, again, saved, "model.pdopt")
        assert same(state_of(network, again), first)


def test_state_without_an_owner_is_not_dropped():
    network, _ = build()
    proxies = paddle.nn.Linear(2, 2)
    optimizer = begin("momentum", proxies)
    with pytest.raises(RuntimeError, match="of no parameter of the network"):
        checkpoints._optimizer_entries(network, optimizer)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    network, optimizer = build()
    checkpoints.save_checkpoint(str(tmp_path), network, optimizer, at(0))
    old = values(network)
    save = paddle.save
    for error, raised in ((OSError(errno.ENOSPC, "No space left on device"), UserError), (KeyboardInterrupt(), None)):

        def full(value, path, error=error):
            save(value, path)
            if path.endswith(checkpoints.OPTIMIZER_FILE):
                raise error

        monkeypatch.setattr(paddle, "save", full)
        for epoch in (0, 1):
            step(network, optimizer, 0)
            with pytest.raises(raised or type(error)) as caught:
                checkpoints.save_checkpoint(str(tmp_path), network, optimizer, at(epoch))
            if raised:
                assert str(caught.value) == f"{tmp_path}/{epoch}: cannot write the checkpoint: No space left on device"
            assert sorted(os.listdir(tmp_path)) == ["0", "latest"] and os.readlink(tmp_path / "latest") == "0"
    assert same(paddle.load(f"{tmp_path}/0/{checkpoints.WEIGHTS_FILE}", return_numpy=True), old)
    monkeypatch.undo()
    checkpoints.save_checkpoint(str(tmp_path), network, optimizer, at(0))  # an epoch that is there is replaced
    assert same(paddle.load(f"{tmp_path}/0/{checkpoints.WEIGHTS_FILE}", return_numpy=True), values(network))


def test_optimizer_state_of_parameters_whose_names_begin_alike():
    def build():
        names = ["w_moment", "w", "w_moment_1"]
        layers = [paddle.nn.Linear(3, 3, weight_attr=paddle.ParamAttr(name=name), bias_attr=False) for name in names]
        network = paddle.nn.Sequential(*layers)
        return network, OPTIMIZERS["adam"](network.parameters())

    network, optimizer = build()
    step(network, optimizer, 0)
    named = state_of(network, optimizer)
    kinds = {key.split("/")[1] for key in named}
    assert sorted(named) == sorted(f"{layer}.weight/{kind}" for layer in range(3) for kind in kinds)


def fake_checkpoints(run_dir, epochs, latest=None, best=None):
    for epoch in epochs:
        os.makedirs(run_dir / str(epoch))
        state = {"format": checkpoints.CHECKPOINT_FORMAT, "epoch": epoch, "step": 5, "steps": 5}
        (run_dir / str(epoch) / checkpoints.CHECKPOINT_FILE).write_text(json.dumps(state))
    for link, epoch in (("latest", latest), ("best", best)):
        if epoch is not None:
            checkpoints.point_at(str(run_dir), link, str(epoch))


def test_point_at(tmp_path):
    fake_checkpoints(tmp_path, [1, 2], latest=1)
    assert os.path.samefile(tmp_path / "latest", tmp_path / "1")
    checkpoints.point_at(str(tmp_path), "latest", "2")
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
    checkpoints.point_at(run_dir, "best", "1")
    checkpoints.point_at(run_dir, "latest", "3")
    assert checkpoints.read_link(run_dir, "latest") == "3"
    assert os.path.realpath(checkpoints.resolve(str(tmp_path / "latest/"))) == str(tmp_path / "3")
    assert os.path.islink(tmp_path / "latest") == links
    checkpoints.remove_old_checkpoints(run_dir, 1)
    assert sorted(os.listdir(tmp_path)) == ["1", "3", "best", "latest"]


def test_links_of_a_copy_that_has_files_in_their_place(tmp_path, monkeypatch):
    """A run that went on elsewhere: a link where files stood, and the other way round."""
    fake_checkpoints(tmp_path, [1, 2])
    (tmp_path / "latest").write_text("1\n")
    checkpoints.point_at(str(tmp_path), "latest", "2")
    assert os.readlink(tmp_path / "latest") == "2"
    monkeypatch.setattr(files, "link", lambda path, target: False)
    checkpoints.point_at(str(tmp_path), "latest", "1")
    assert (tmp_path / "latest").read_text() == "1\n" and not os.path.islink(tmp_path / "latest")
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "latest"] and os.listdir(tmp_path / "2") == ["checkpoint.json"]


def test_what_is_in_the_place_of_a_link_is_kept(tmp_path, capsys):
    for name in ("latest", "best"):
        fake_checkpoints(tmp_path, [3])
        (tmp_path / "3").rename(tmp_path / name)
        (tmp_path / name / "model.pdparams").write_text(name)
    checkpoints.make_way(str(tmp_path), "latest")
    checkpoints.make_way(str(tmp_path), "best")
    assert sorted(os.listdir(tmp_path)) == ["3", "best.kept1"]  # each under its name, for they differ
    assert f"it is now {tmp_path / '3'}" in capsys.readouterr().out
    shutil.copytree(tmp_path / "3", tmp_path / "best")
    checkpoints.make_way(str(tmp_path), "best")  # a copy of what is there
    assert sorted(os.listdir(tmp_path)) == ["3", "best.kept1"]
    for number, what in enumerate(("a file", "a folder", "a link"), 1):
        path = tmp_path / "latest"
        if what == "a file":
            path.write_text("my notes")
        elif what == "a folder":
            path.mkdir()
        else:
            path.symlink_to("../elsewhere")
        checkpoints.make_way(str(tmp_path), "latest")
        assert os.path.lexists(tmp_path / f"latest.kept{number}")
    assert (tmp_path / "latest.kept1").read_text() == "my notes"
    assert os.readlink(tmp_path / "latest.kept3") == "../elsewhere"


def test_what_is_not_known_to_be_ours_is_not_deleted(tmp_path):
    fake_checkpoints(tmp_path, [0, 1, 2, 3], latest=3)
    (tmp_path / "1" / "notes.txt").write_text("")  # something beside our files
    (tmp_path / "2").rename(tmp_path / "200")  # a copy under a name that it was not written under
    (tmp_path / "notes.tmp1").write_text("")
    (tmp_path / "2024_1").symlink_to("200")
    checkpoints.remove_leftovers(str(tmp_path))
    checkpoints.remove_old_checkpoints(str(tmp_path), 1)
    assert sorted(os.listdir(tmp_path)) == ["1", "200", "2024_1", "3", "latest", "notes.tmp1"]
    assert checkpoints.newest_checkpoint(str(tmp_path)) == str(tmp_path / "3")
    assert checkpoints.in_the_way(str(tmp_path), 300) == [str(tmp_path / "200")]


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(1, 2, ["2", "11"]), (2, 11, ["10", "11"]), (3, None, ["9", "10", "11"])]
)
def test_remove_old_checkpoints(tmp_path, keep, best, left):
    fake_checkpoints(tmp_path, [0, 2, 9, 10, 11], latest=11, best=best)
    (tmp_path / "notes").mkdir()
    (tmp_path / LOG_FILE).write_text("")
    checkpoints.remove_old_checkpoints(str(tmp_path), keep)
    names = set(os.listdir(tmp_path))
    assert {name for name in names if name.isdigit()} == set(left)
    assert {"notes", "latest", LOG_FILE} <= names


def test_links_to_what_is_no_more_go(tmp_path):
    fake_checkpoints(tmp_path, [0], latest=0, best=1)
    checkpoints.remove_dangling(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["0", "latest"]


def test_set_run_aside(tmp_path):
    fake_checkpoints(tmp_path, [0, 11], latest=11, best=0)
    (tmp_path / LOG_FILE).write_text('{"args": {}}\n')
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "holiday.jpg").write_text("not ours")
    (tmp_path / "model.pdparams").write_text("not ours")
    checkpoints.set_run_aside(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["2024", "model.pdparams", "replaced"]
    assert sorted(os.listdir(tmp_path / "replaced")) == ["0", "11", "best", "latest", LOG_FILE]
    assert os.listdir(tmp_path / "2024") == ["holiday.jpg"]
    # A second try whose own checkpoint never came does not push out what was set aside.
    (tmp_path / LOG_FILE).write_text('{"args": {"second": 1}}\n')
    checkpoints.set_run_aside(str(tmp_path))
    assert not (tmp_path / LOG_FILE).exists()
    assert (tmp_path / "replaced" / LOG_FILE).read_text() == '{"args": {}}\n'
    checkpoints.set_run_aside(str(tmp_path / "none"))


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: not a checkpoint directory of train.py"):
        checkpoints.read_checkpoint_state(str(tmp_path))
    for content, wanted in (
        ("{", "not readable as a checkpoint's description"),
        ("{}", "checkpoint format None, this version reads"),
        ('{"format": 999}', "checkpoint format 999"),
    ):
        (tmp_path / checkpoints.CHECKPOINT_FILE).write_text(content)
        with pytest.raises(UserError, match=wanted):
            checkpoints.read_checkpoint_state(str(tmp_path))


def test_log_json(tmp_path):
    records = [{"step": 0, "loss": 0.25}, {"text": "two\nlines"}]
    for record in records:
        checkpoints.log_json(str(tmp_path), record)
    with open(tmp_path / checkpoints.LOG_FILE) as file:
        assert [json.loads(line) for line in file] == records
