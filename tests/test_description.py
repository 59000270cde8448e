"""checkpoint.json as somebody else may have written it: values are such as train.py writes, or one line says not."""

import json
import os
import shutil

import pytest

import train
from retrieval import extraction
from training import start
from utility import UserError
from weights import checkpoint, read_weights

HOSTILE = (
    *(None, True, 10**400, -1, 0, 7, 2**31, 2**70, 1.5, -0.01, 1e308, "", "x", "7", "/dev/zero", "a\x1b[31m\nb" * 99),
    *([], [-1, 5], [[[]]], [2**63], ["a"], {}, {"epoch": -1, "recall@1": "x"}, {"a": {"b": []}}),
)


@pytest.fixture
def folder(trained, tmp_path):
    """A checkpoint of its own, inside a run."""
    path = tmp_path / "ResNet8" / "0"
    shutil.copytree(os.path.realpath(f"{trained}/ResNet8/latest"), path)
    (tmp_path / "ResNet8" / "train_log.jsonl").write_text("")
    return path


def write(folder, description):
    (folder / "checkpoint.json").write_text(json.dumps(description))


def one_line(call, *arguments):
    """What `call` returns; None where it raises a UserError, which must be a short one."""
    try:
        return call(*arguments)
    except UserError as error:
        assert len(str(error)) < 1000
        return None


def test_the_description_itself(folder):
    whole = checkpoint.read_description(str(folder))
    for key in whole:
        for value in HOSTILE:
            write(folder, {**whole, key: value})
            one_line(checkpoint.read_description, str(folder))
            one_line(checkpoint.described_name, str(folder))
            weights = one_line(read_weights, str(folder))
            one_line(extraction.list_that_chose, weights.state if weights else None)
    for key, wrong in (("epoch", -1), ("labels", [3, 2]), ("labels", [True]), ("best", {"epoch": 0}), ("step", 10**9)):
        write(folder, {**whole, key: wrong})
        with pytest.raises(UserError, match=key):
            checkpoint.read_description(str(folder))


@pytest.mark.parametrize("part", ["settings", "args"])
def test_flags_in_it_have_the_flags_types(folder, monkeypatch, part):
    whole = checkpoint.read_description(str(folder))
    monkeypatch.setattr("sys.argv", ["train.py", f"--checkpoint={folder}"])
    parser = train.build_parser()
    args, typed = train.parse(parser)
    assert start.find_start(dict(vars(args), num_epochs=9), typed | {"num_epochs"}, parser).before["epoch"] == 0
    for name in whole[part]:
        for value in HOSTILE:
            write(folder, {**whole, part: {**whole[part], name: value}})
            one_line(start.find_start, dict(vars(args), num_epochs=9), typed | {"num_epochs"}, parser)
    for name, value in (("lr", -0.01), ("keep", -3), ("train_list", 0), ("seed", "7"), ("seed", None)):
        write(folder, {**whole, "args": {**whole["args"], name: value}})
        with pytest.raises(UserError, match=f"checkpoint.json: .*{name}"):
            start.find_start(dict(vars(args)), typed, parser)
    changed = {"max_pixels": 10**18, "model": "ResNet50", "image_shape": None, "train_batch_size": None}
    write(folder, {**whole, "args": {**whole["args"], **changed}})
    flags = start.find_start(dict(vars(args), num_epochs=9), typed | {"num_epochs"}, parser).flags
    assert flags["max_pixels"] == args.max_pixels and flags["model"] == "ResNet8"
    assert flags["image_shape"] == whole["settings"]["image_shape"] and flags["train_batch_size"]
    for part_lacks in ({"settings": {}}, {"process": None}, {"best": {"epoch": 0, "recall@1": 10**400}}):
        write(folder, {**whole, **part_lacks})
        with pytest.raises(UserError):
            checkpoint.read_description(str(folder))
    for key in ("steps", "best", "process"):
        write(folder, {name: value for name, value in whole.items() if name != key})
        with pytest.raises(UserError, match=f"it lacks '{key}'"):
            start.find_start(dict(vars(args)), typed, parser)
    for name, value in (("image_shape", [3, 20000, 20000]), ("model", "os"), ("embedding_size", 10**9)):
        write(folder, {**whole, "settings": {**whole["settings"], name: value}})
        with pytest.raises(UserError, match=f"checkpoint.json: {name} is "):
            checkpoint.read_description(str(folder))


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"{}", b"[]", b'{"format": NaN}', b"\xff\xfe", b"9" * 100_000]
)
def test_what_is_no_description(folder, content):
    (folder / "checkpoint.json").write_bytes(content)
    with pytest.raises(UserError):
        checkpoint.read_description(str(folder))


def test_special_files_in_its_place(folder):
    (folder / "checkpoint.json").unlink()
    (folder / "checkpoint.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="a device, not a file"):
        checkpoint.read_description(str(folder))
    (folder / "checkpoint.json").unlink()
    os.mkfifo(folder / "checkpoint.json")
    with pytest.raises(UserError, match="a pipe, not a file"):
        checkpoint.read_description(str(folder))


@pytest.mark.parametrize("part", ["model.pdparams", "model.pdopt"])
def test_changed_parts_are_seen(folder, monkeypatch, part):
    data = bytearray((folder / part).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / part).write_bytes(data)
    whole = checkpoint.read_description(str(folder))
    with pytest.raises(UserError, match=f"{part}: damaged or replaced"):
        checkpoint.check_sum(str(folder / part), whole)
    if part == "model.pdparams":
        with pytest.raises(UserError, match="damaged or replaced"):
            read_weights(str(folder))
    del whole["sums"]  # as in older checkpoints
    write(folder, whole)
    checkpoint.check_sum(str(folder / part), checkpoint.read_description(str(folder)))


def test_sizes_are_compared_before_anything_is_built(tmp_path, monkeypatch):
    """A bias of 20 million values is 20 MB in a file; the layer that it belongs to would have 80 GB."""
    import numpy as np
    import paddle

    import models

    network = models.build_model("ResNet8", 3)
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    monkeypatch.setattr(models.Settings, "build", lambda self: pytest.fail("built"))
    asked = dict.fromkeys((*models.SETTLED, "class_dim"), None) | {"model": "ResNet8"}
    for layer, arrays in (
        ("head", {"bias": np.zeros(20_000_000, bool)}),
        ("head", {"weight": np.zeros((0, 10**9), np.float32)}),
        ("head", {"weight": np.zeros((1, 10**6), np.float16), "bias": np.zeros(10**6, np.float16)}),
        ("embedding", {"bias": np.zeros(20_000_000, bool)}),
        ("embedding", {"weight": np.zeros((1, 10**6), np.float16)}),
    ):
        kept = {name: value for name, value in state.items() if not name.startswith("head.")}
        paddle.save({**kept, **{f"{layer}.{name}": value for name, value in arrays.items()}}, f"{tmp_path}/a.pdparams")
        with pytest.raises(UserError, match=f"{layer}.weight is"):
            extraction.open_network(asked, f"{tmp_path}/a.pdparams")
