"""Flags, process set-up, files, checkpoints and progress of utility.py."""

import argparse
import collections
import errno
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import ROOT

import reader
import utility
from utility import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:When training, we now always track", "ignore:The input state dict is empty"
)

# ---------------------------------------------------------------- ends of a run


def script(code, **options):
    """Starts a Python process that runs `code` under run_script; -> subprocess.Popen."""
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    code = f"import sys, utility\ndef main():\n{indented}utility.run_script(main)\n"
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **options}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, env=environment, **pipes)


@pytest.mark.parametrize(
    ("code", "status", "stdout", "stderr"),
    [
        ("print('fine')", 0, "fine\n", ""),
        ("print('so far')\nraise utility.UserError('a.txt:3: no label')", 2, "so far\n", "error: a.txt:3: no label\n"),
        ("raise KeyboardInterrupt", 130, "", "interrupted\n"),
        ("sys.exit(7)", 7, "", ""),
    ],
)
def test_exit_status(code, status, stdout, stderr):
    process = script(code)
    assert process.communicate() == (stdout, stderr) and process.returncode == status


def test_a_bug_gets_its_traceback():
    process = script("1 / 0")
    _, stderr = process.communicate()
    assert process.returncode == 1 and "Traceback" in stderr and "ZeroDivisionError" in stderr


def test_ctrl_c():
    process = script("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "interrupted\n") and process.returncode == 130


@pytest.mark.parametrize("lines", [1, 100000])
def test_a_reader_that_has_gone_is_no_failure(lines):
    process = script(f"sys.stdin.readline()\nfor i in range({lines}):\n    print(i)")
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stderr.read() == "" and process.wait() == 141
    process.stdin.close()
    process.stderr.close()


def test_file_names_that_the_terminal_cannot_show():
    process = script("print('\\xe9 \\udce9')", PYTHONIOENCODING="ascii")
    assert process.communicate() == ("\\xe9 \\udce9\n", "") and process.returncode == 0


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (utility.boolean, {"True": True, "true": True, "1": True, "FALSE": False, "no": False, "0": False},
         {"": "True or False", "2": "not '2'", "maybe": "not 'maybe'"}),
        (utility.number(int), {"3": 3, "-3": -3, "+3": 3}, {"": "expected int", "3.5": "expected int, not '3.5'"}),
        (utility.number(int, low=1), {"1": 1}, {"0": "0 is out of range: must be at least 1"}),
        (utility.number(int, low=0, high=9), {"0": 0, "9": 9}, {"10": "at least 0 and at most 9", "-1": "at least 0"}),
        (utility.number(float), {"1e-3": 0.001, "-2": -2.0},
         {"x": "expected float", "nan": "must be finite", "inf": "must be finite", "-inf": "finite", "1e999": ""}),
        (utility.number(float, above=0, high=1), {"1": 1.0, "1e-9": 1e-9},
         {"0": "above 0", "1.01": "at most 1", "nan": "out of range"}),
        (utility.number(float, low=0), {"0": 0.0},
         {"nan": "at least 0", "-1e-9": "at least 0", "inf": "at least 0 and finite"}),
        (utility.comma_separated(utility.number(int, low=1)), {"1,2, 4": [1, 2, 4], "8": [8], "8,": [8]},
         {"1,0": "0 is out of range", "1;2": "expected int, not '1;2'"}),
    ],
)  # fmt: skip
def test_flag_types(parse, good, bad):
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is type(value)
    for text, message in bad.items():
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert message in str(error.value)


def test_parser():
    parser = utility.make_parser("First line.\n\n    python train.py --lr=1\n")
    parser.add_argument("--lr", type=utility.number(float, low=0), default=0.25, help="the rate")
    parser.add_argument("--list", help="what else there is")
    parser.add_argument("--name", default="", help="how it is called")
    text = parser.format_help()
    assert "\n    python train.py --lr=1\n" in text  # line breaks are kept
    assert "the rate (default: 0.25)" in text
    assert "default: None" not in text and "how it is called (" not in text
    assert vars(parser.parse_args(["--lr=1"])) == {"lr": 1.0, "list": None, "name": ""}
    for flags, message in (
        (["--lr=x"], "argument --lr: expected float, not 'x' (see "),
        (["--lr=-1"], "must be at least 0"),
        (["--nam=x"], "unrecognized arguments: --nam=x"),
        (["--lr"], "expected one argument"),
    ):
        with pytest.raises(UserError) as error:
            parser.parse_args(flags)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_print_arguments(capsys):
    utility.print_arguments(argparse.Namespace(model="ResNet50", lr=0.1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "-----------  Configuration Arguments -----------"
    assert lines[1:3] == ["lr: 0.1", "model: ResNet50"] and lines[3] == "-" * 48


# ---------------------------------------------------------------- process and device

AVX512 = "avx512f avx512dq avx512bw avx512vl"


@pytest.mark.parametrize(
    ("vendor", "flags", "wanted"),
    [
        ("AuthenticAMD", f"fpu sse fma avx2 {AVX512}", "7"),
        ("AuthenticAMD", "fpu sse fma avx2", "5"),
        ("AuthenticAMD", "fpu sse fma avx2 avx512f avx512dq avx512bw", "5"),
        ("AuthenticAMD", f"fpu sse avx {AVX512}", None),
        ("AuthenticAMD", "fpu sse avx2", None),
        ("AuthenticAMD", "fpu sse avx fma avx2_other", None),
        ("AuthenticAMD", "", None),
        ("GenuineIntel", f"fpu sse fma avx2 {AVX512}", None),
    ],
)
def test_mkl_path_for_amd(tmp_path, vendor, flags, wanted):
    block = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: some\nflags\t\t: {flags}\nbugs\t\t: none\n\n"
    (tmp_path / "cpuinfo").write_text(block * 2)
    assert utility._mkl_cpu_type(str(tmp_path / "cpuinfo")) == wanted


def test_mkl_path_where_nothing_is_known(tmp_path):
    assert utility._mkl_cpu_type(str(tmp_path / "none")) is None
    (tmp_path / "cpuinfo").write_text("processor : 0\nvendor_id : AuthenticAMD\n")
    assert utility._mkl_cpu_type(str(tmp_path / "cpuinfo")) is None


def test_start_paddle_sets_what_the_user_left_unset():
    code = """
import os
paddle = utility.start_paddle(use_gpu={}, seed=3)
print(os.environ.get("OMP_NUM_THREADS"), os.environ.get("MKL_DEBUG_CPU_TYPE"), paddle.get_device())
print(paddle.rand([1]).item() == (paddle.seed(3), paddle.rand([1]))[1].item())
"""
    unset = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    for use_gpu, given, wanted in (
        (True, {"PADDLE_LOCAL_SIZE": str(utility.cpu_count())}, ["1", str(utility._mkl_cpu_type())]),
        (False, {"OMP_NUM_THREADS": "3", "MKL_DEBUG_CPU_TYPE": "5"}, ["3", "5"]),
    ):
        if not utility._mkl_cpu_type():
            given.pop("MKL_DEBUG_CPU_TYPE", None)
            wanted[1] = "None"
        result = subprocess.run(
            [sys.executable, "-c", "import utility\n" + code.format(use_gpu)],
            cwd=ROOT, capture_output=True, text=True, check=True, env={**unset, **given, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert result.stdout.split() == [*wanted, "cpu", "True"]
        notes = result.stderr.splitlines()
        assert len(notes) == use_gpu and all(note.startswith("note: --use_gpu=True, but ") for note in notes)


# ---------------------------------------------------------------- files


def test_make_directory(tmp_path):
    utility.make_directory(str(tmp_path / "a" / "b"))
    utility.make_directory(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match=f"{path}: cannot write into this directory: "):
            utility.make_directory(str(path))


def test_make_directory_without_permission(tmp_path, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("builtins.open", denied)  # root may write anywhere
    with pytest.raises(UserError, match="cannot write into this directory: Permission denied"):
        utility.make_directory(str(tmp_path / "a"))


def test_atomic_write(tmp_path):
    path = tmp_path / "result.json"
    with utility.atomic_write(str(path)) as file:
        file.write("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with utility.atomic_write(str(path), "wb") as file:
        file.write(b"two")
        file.flush()
        assert path.read_text() == "one"
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), UserError("a mistake")])
def test_atomic_write_leaves_nothing_of_what_failed(tmp_path, error):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(type(error)), utility.atomic_write(str(path)) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]


def test_atomic_write_where_it_cannot(tmp_path):
    for path in (tmp_path / "none" / "result.json", tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot write: "), utility.atomic_write(str(path)):
            pass
    for error, wanted in ((OSError(errno.ENOSPC, "No space left"), "No space left"), (OSError("odd"), "odd")):
        with pytest.raises(UserError, match=wanted), utility.atomic_write(str(tmp_path / "a")):
            raise error
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- checkpoints

OPTIMIZERS = {
    "momentum": lambda p: paddle.optimizer.Momentum(0.1, momentum=0.9, parameters=p, weight_decay=1e-3),
    "adamw": lambda p: paddle.optimizer.AdamW(0.01, parameters=p, weight_decay=0.1),
    "adam": lambda p: paddle.optimizer.Adam(0.01, parameters=p),
    "sgd": lambda p: paddle.optimizer.SGD(0.1, parameters=p),
}


def build(optimizer="momentum"):
    """-> a network of so many layers that linear_1's name begins linear_10's, and its optimizer; layer 3 is frozen."""
    layers = [paddle.nn.Linear(3, 3) for _ in range(12)]
    network = paddle.nn.Sequential(*layers, paddle.nn.BatchNorm1D(3))
    network[3].weight.stop_gradient = True
    return network, OPTIMIZERS[optimizer]([p for p in network.parameters() if not p.stop_gradient])


def step(network, optimizer, seed):
    x = paddle.to_tensor(np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32))
    (network(x)[:, 0] * x[:, 1]).sum().backward()
    optimizer.step()
    optimizer.clear_grad()


def values(network):
    return {name: value.numpy() for name, value in network.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_checkpoint_continues_with_the_same_step(tmp_path, optimizer_name):
    network, optimizer = build(optimizer_name)
    for seed in range(3):
        step(network, optimizer, seed)
    path = utility.save_checkpoint(str(tmp_path), 4, network, optimizer, {"best": None, "labels": [3, 5]})
    assert path == f"{tmp_path}/4" and os.readlink(tmp_path / "latest") == "4"
    assert sorted(os.listdir(path)) == ["checkpoint.json", "model.pdopt", "model.pdparams"]
    state = utility.read_checkpoint_state(f"{tmp_path}/latest")
    assert state == {"format": utility.CHECKPOINT_FORMAT, "epoch": 4, "best": None, "labels": [3, 5]}
    saved = values(network)
    step(network, optimizer, 3)
    wanted = values(network)

    # Another process builds other layers before: the generated names differ.
    paddle.nn.Linear(2, 2)
    again, other_optimizer = build(optimizer_name)
    assert again[0].weight.name != network[0].weight.name
    again.set_state_dict(paddle.load(f"{path}/{utility.WEIGHTS_FILE}"))
    assert same(values(again), saved)
    named = paddle.load(f"{path}/{utility.OPTIMIZER_FILE}", return_numpy=True)
    assert all(isinstance(value, np.ndarray) for value in named.values())
    utility.load_optimizer_state(again, other_optimizer, named)
    step(again, other_optimizer, 3)
    assert same(values(again), wanted)

    # Without the optimizer's state it would be another step.
    again.set_state_dict(saved)
    step(again, OPTIMIZERS[optimizer_name]([p for p in again.parameters() if not p.stop_gradient]), 3)
    assert same(values(again), wanted) == (optimizer_name == "sgd")


def test_optimizer_state_of_another_network():
    network, optimizer = build()
    step(network, optimizer, 0)
    named = utility._named_optimizer_state(network, optimizer)
    trained = [name for name, p in network.named_parameters() if not p.stop_gradient]
    assert sorted({name.rsplit("/", 1)[0] for name in named}) == sorted(trained)
    small = paddle.nn.Sequential(paddle.nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"the optimizer's state has '.*', which this network lacks"):
        utility.load_optimizer_state(small, OPTIMIZERS["momentum"](small.parameters()), named)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    network, optimizer = build()
    utility.save_checkpoint(str(tmp_path), 0, network, optimizer, {})
    old = values(network)
    save = paddle.save
    for error, raised in ((OSError(errno.ENOSPC, "No space left on device"), UserError), (KeyboardInterrupt(), None)):

        def full(value, path, error=error):
            save(value, path)
            if path.endswith(utility.OPTIMIZER_FILE):
                raise error

        monkeypatch.setattr(paddle, "save", full)
        for epoch in (0, 1):
            step(network, optimizer, 0)
            with pytest.raises(raised or type(error)) as caught:
                utility.save_checkpoint(str(tmp_path), epoch, network, optimizer, {})
            if raised:
                assert str(caught.value) == f"{tmp_path}/{epoch}: cannot write the checkpoint: No space left on device"
            assert sorted(os.listdir(tmp_path)) == ["0", "latest"] and os.readlink(tmp_path / "latest") == "0"
    assert same(paddle.load(f"{tmp_path}/0/{utility.WEIGHTS_FILE}", return_numpy=True), old)
    monkeypatch.undo()
    utility.save_checkpoint(str(tmp_path), 0, network, optimizer, {})  # an epoch that is there is replaced
    assert same(paddle.load(f"{tmp_path}/0/{utility.WEIGHTS_FILE}", return_numpy=True), values(network))


def test_optimizer_state_of_parameters_whose_names_begin_alike():
    def build():
        names = ["w_moment", "w", "w_moment_1"]
        layers = [paddle.nn.Linear(3, 3, weight_attr=paddle.ParamAttr(name=name), bias_attr=False) for name in names]
        network = paddle.nn.Sequential(*layers)
        return network, OPTIMIZERS["adam"](network.parameters())

    network, optimizer = build()
    step(network, optimizer, 0)
    named = utility._named_optimizer_state(network, optimizer)
    kinds = {key.split("/")[1] for key in named}
    assert sorted(named) == sorted(f"{layer}.weight/{kind}" for layer in range(3) for kind in kinds)


def fake_checkpoints(run_dir, epochs, latest=None, best=None):
    for epoch in epochs:
        os.makedirs(run_dir / str(epoch))
        (run_dir / str(epoch) / utility.CHECKPOINT_FILE).write_text("{}")
    for name, epoch in (("latest", latest), ("best", best)):
        if epoch is not None:
            utility.point_at(str(run_dir), name, epoch)


def test_point_at(tmp_path):
    fake_checkpoints(tmp_path, [1, 2], latest=1)
    assert os.path.samefile(tmp_path / "latest", tmp_path / "1")
    utility.point_at(str(tmp_path), "latest", 2)
    assert os.path.samefile(tmp_path / "latest", tmp_path / "2")
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "latest"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert os.path.samefile(moved / "latest", moved / "2")  # a run may be moved


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(1, 2, ["2", "11"]), (2, 11, ["10", "11"]), (3, None, ["9", "10", "11"])]
)
def test_remove_old_checkpoints(tmp_path, keep, best, left):
    fake_checkpoints(tmp_path, [0, 2, 9, 10, 11], latest=11, best=best)
    (tmp_path / "notes").mkdir()
    (tmp_path / utility.LOG_FILE).write_text("")
    utility.remove_old_checkpoints(str(tmp_path), keep)
    names = set(os.listdir(tmp_path))
    assert {name for name in names if name.isdigit()} == set(left)
    assert {"notes", "latest", utility.LOG_FILE} <= names


def test_set_run_aside(tmp_path):
    fake_checkpoints(tmp_path, [0, 11], latest=11, best=0)
    (tmp_path / utility.LOG_FILE).write_text("")
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "holiday.jpg").write_text("not ours")
    (tmp_path / "model.pdparams").write_text("not ours")
    utility.set_run_aside(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["2024", "model.pdparams", "replaced"]
    assert sorted(os.listdir(tmp_path / "replaced")) == ["0", "11", "best", "latest", utility.LOG_FILE]
    assert os.listdir(tmp_path / "2024") == ["holiday.jpg"]
    # A second try whose own checkpoint never came does not push out what was set aside.
    (tmp_path / utility.LOG_FILE).write_text("second")
    utility.set_run_aside(str(tmp_path))
    assert not (tmp_path / utility.LOG_FILE).exists()
    assert (tmp_path / "replaced" / utility.LOG_FILE).read_text() == ""
    utility.set_run_aside(str(tmp_path / "none"))


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: not a checkpoint directory of train.py"):
        utility.read_checkpoint_state(str(tmp_path))
    for content, wanted in (
        ("{", "not readable as a checkpoint's description"),
        ("{}", "checkpoint format None, this version reads"),
        ('{"format": 999}', "checkpoint format 999"),
    ):
        (tmp_path / utility.CHECKPOINT_FILE).write_text(content)
        with pytest.raises(UserError, match=wanted):
            utility.read_checkpoint_state(str(tmp_path))


# ---------------------------------------------------------------- progress


def test_log_json(tmp_path):
    path = str(tmp_path / "log.jsonl")
    records = [{"step": 0, "loss": 0.25}, {"text": "two\nlines"}]
    for record in records:
        utility.log_json(path, record)
    with open(path) as file:
        assert [json.loads(line) for line in file] == records


def test_duration():
    assert [utility.duration(s) for s in (0, 59.9, 61, 3600, 90061)] == [
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "1:00:00",
        "25:01:01",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


Item = collections.namedtuple("Item", "index")
ITEMS = [Item(range(4)), Item(range(4)), Item(range(2))]


def test_progress_is_for_terminals_only(monkeypatch):
    for stderr, wanted in ((io.StringIO(), 0), (Terminal(), 3)):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert list(utility.progress(iter(ITEMS), 10, "images")) == ITEMS
        shown = [text for text in stderr.getvalue().split("\r") if text]
        assert len(shown) == wanted
    assert shown[0].startswith("images [" + "#" * 12 + "." * 18 + "] 4/10, 0:00:0")
    assert shown[-1].startswith("images [" + "#" * 30 + "] 10/10, 0:00:00 left") and shown[-1].endswith("\n")


# ---------------------------------------------------------------- running a network


class Means(paddle.nn.Layer):
    """Embeds a picture as its colours' means, once in float16, and has a head only where told to."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, image):
        assert not self.training and not paddle.is_grad_enabled()
        embedding = image.astype("float32").mean(axis=[1, 2])
        return embedding.astype("float16"), embedding * 2 if self.head else None


@pytest.mark.parametrize("head", [True, False])
def test_extract(head):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    batches = [reader.Batch(images[i : i + 2], None, np.arange(i, min(i + 2, 5))) for i in (0, 2, 4)]
    samples = reader.Samples([""] * 5, None, None, None)
    seen = []
    features, index = utility.extract(Means(head), samples, batches, lambda batch, logits: seen.append((batch, logits)))
    wanted = images.reshape(5, -1, 3).mean(axis=1)
    assert features.dtype == np.float32 and np.abs(features - wanted).max() < 0.1
    assert index.tolist() == list(range(5))
    assert [batch.index.tolist() for batch, _ in seen] == [[0, 1], [2, 3], [4]]
    if head:
        assert np.allclose(np.concatenate([logits for _, logits in seen]), wanted * 2, rtol=1e-5)
    else:
        assert all(logits is None for _, logits in seen)
    with pytest.raises(UserError, match="not one image could be read"):
        utility.extract(Means(head), samples, [])
