"""--log_to=tensorboard: its files, read back record by record, against the run's own log."""

import json
import struct
import sys
import time

import pytest
from conftest import TINY, run

from training import tensorboard
from training.run import Progress
from utility import UserError


def scalars(folder):
    """[(tag, step, value)] of the event files of a folder, and the steps from which on earlier ones are not shown."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found, starts = [], []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:  # length, its checksum, the record, its checksum
            length = struct.unpack("<Q", data[:8])[0]
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            starts += [event.step] if event.HasField("session_log") else []
    return found, starts


def test_events_are_those_of_the_log(birds, tmp_path):
    pytest.importorskip("tensorboardX")
    flags = [*birds.lists, *TINY, f"--model_save_dir={tmp_path}", "--log_to=tensorboard", "--eval_at_start=True"]
    run("train.py", *flags, "--num_epochs=1")
    run("train.py", *flags, "--num_epochs=2", "--checkpoint=latest")
    with open(tmp_path / "ResNet8" / "train_log.jsonl") as file:
        log = [json.loads(line) for line in file]
    steps = 1 + max(row.get("step", 0) for row in log)
    wanted = []
    for row in log:
        if "step" in row:
            step = row["epoch"] * steps + row["step"] + 1
            wanted += [(f"train/{name}", step, value) for name, value in row.items() if name not in ("epoch", "step")]
        elif "eval" in row:
            figures = {name.replace("recall@", "recall_at_"): value for name, value in row["eval"].items()}
            wanted += [(f"eval/{name}", (row["epoch"] + 1) * steps, value) for name, value in figures.items()]
    found, starts = scalars(tmp_path / "ResNet8" / "tensorboard")
    assert [row[:2] for row in found] == [row[:2] for row in wanted] and len(found) > 40
    assert [row[2] for row in found] == pytest.approx([row[2] for row in wanted], rel=1e-6)
    assert starts == [0, steps + 1]


def test_runs_of_one_second_have_files_of_their_own(monkeypatch, tmp_path):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    for epoch in range(2):
        sink = tensorboard.TensorBoard(str(tmp_path), Progress(5, epoch=epoch))
        sink({"epoch": epoch, "step": 0, "lr": epoch})
        sink.writer.close()
    assert scalars(tmp_path / "tensorboard") == ([("train/lr", 1, 0.0), ("train/lr", 6, 1.0)], [0, 6])


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        tensorboard.check_log_to("tensorboard")
    tensorboard.check_log_to(None)


def test_file_in_the_way_is_an_error(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(UserError):
        tensorboard.TensorBoard(str(tmp_path), Progress(5))
    assert (tmp_path / "tensorboard").read_text() == "mine"
