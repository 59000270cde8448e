"""Flags, process set-up, files and progress of utility.py."""

import argparse
import collections
import errno
import io
import os
import signal
import subprocess
import sys
import types

import numpy as np
import paddle
import pytest
from conftest import ROOT

import files
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
    # What a shell starts in the background, such as these tests, ignores Ctrl-C, and so does what that starts.
    heed = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = script(f"{heed}print('ready', flush=True)\ntime.sleep(60)")
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
    files.make_directory(str(tmp_path / "a" / "b"))
    files.make_directory(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match=f"{path}: cannot write into this directory: "):
            files.make_directory(str(path))


def test_make_directory_without_permission(tmp_path, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("builtins.open", denied)  # root may write anywhere
    with pytest.raises(UserError, match="cannot write into this directory: Permission denied"):
        files.make_directory(str(tmp_path / "a"))


def test_atomic_write(tmp_path):
    path = tmp_path / "result.json"
    with files.atomic_write(str(path)) as file:
        file.write("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with files.atomic_write(str(path), "wb") as file:
        file.write(b"two")
        file.flush()
        assert path.read_text() == "one"
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), UserError("a mistake")])
def test_atomic_write_leaves_nothing_of_what_failed(tmp_path, error):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(type(error)), files.atomic_write(str(path)) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]


def test_atomic_write_where_it_cannot(tmp_path):
    for path in (tmp_path / "none" / "result.json", tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot write: "), files.atomic_write(str(path)):
            pass
    for error, wanted in ((OSError(errno.ENOSPC, "No space left"), "No space left"), (OSError("odd"), "odd")):
        with pytest.raises(UserError, match=wanted), files.atomic_write(str(tmp_path / "a")):
            raise error
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- progress


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
    features, index = utility.extract(
        Means(head), samples, batches, [], lambda index, logits: seen.append((index, logits))
    )
    wanted = images.reshape(5, -1, 3).mean(axis=1)
    assert features.dtype == np.float32 and np.abs(features - wanted).max() < 0.1
    assert index.tolist() == list(range(5))
    assert [index.tolist() for index, _ in seen] == [[0, 1], [2, 3], [4]]
    if head:
        assert np.allclose(np.concatenate([logits for _, logits in seen]), wanted * 2, rtol=1e-5)
    else:
        assert all(logits is None for _, logits in seen)
    with pytest.raises(UserError, match="not one image could be read"):
        utility.extract(Means(head), samples, [], [])


@pytest.mark.parametrize(
    ("capabilities", "wheel"),
    [("7.5", "cu126"), ("8.6", "cu126"), ("9.0 8.0", "cu126"), ("12.0", "cu129"), ("10.0 8.0", "cu129"),
     ("6.1", "cu118"), ("7.0 8.6", "cu118"), ("5.2", ""), ("6.1 12.0", ""), ("", ""),
     ("Field compute_cap is not valid", "")],
)  # fmt: skip
def test_the_wheel_for_all_gpus(capabilities, wheel):
    index = utility.paddle_index(capabilities.split())
    assert index == (f"https://www.paddlepaddle.org.cn/packages/stable/{wheel}/" if wheel else "")


def test_the_makefile_takes_the_wheel_for_all_gpus(tmp_path):
    """As `make -n` shows it, with a stand-in for nvidia-smi."""
    smi = tmp_path / "nvidia-smi"
    for capabilities, wanted in (("8.6 9.0", "stable/cu126/"), ("6.1 12.0", "no wheel"), ("", "requirements.txt")):
        smi.write_text(f"#!/bin/sh\nprintf '%s\\n' {capabilities}\n" if capabilities else "#!/bin/sh\nexit 9\n")
        smi.chmod(0o755)
        result = subprocess.run(
            ["make", "-n", f"VENV={tmp_path}/new", f"{tmp_path}/new/installed"], cwd=ROOT, capture_output=True,
            text=True, check=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert wanted in result.stdout and ("cu126" in result.stdout) == (wanted == "stable/cu126/")


class StandInGpu:
    """What `utility._try_gpu` asks of paddle."""

    __version__ = "2.6.2"

    def __init__(self, capability=(8, 6), cudnn=8600, answer=9.0, device_error=None):
        self.answer, self.device_error = answer, device_error
        cuda = types.SimpleNamespace(
            get_device_name=lambda: "NVIDIA Something", get_device_capability=lambda: capability
        )
        self.device = types.SimpleNamespace(cuda=cuda, get_cudnn_version=lambda: cudnn)
        self.nn = types.SimpleNamespace(functional=types.SimpleNamespace(conv2d=self.convolve))

    def set_device(self, name):
        if self.device_error:
            raise self.device_error

    def ones(self, shape):
        return np.ones(shape)

    def convolve(self, image, weight):
        if isinstance(self.answer, Exception):
            raise self.answer
        return np.float32(self.answer)


@pytest.mark.parametrize(
    ("gpu", "wanted"),
    [
        (StandInGpu(), None),
        (StandInGpu(cudnn=None), "it finds no cuDNN; pip install --force-reinstall paddlepaddle-gpu==3.3.1 -i https:"),
        (StandInGpu((9, 0), answer=OSError("\n-- C++ Traceback --\nExternalError: CUDA error(209), no kernel image.")),
         "(NVIDIA Something, compute capability 9.0): ExternalError: CUDA error(209), no kernel image.; pip install"),
        (StandInGpu((5, 2), answer=OSError("no kernel image")), "no kernel image; nvidia-smi says whether its driver"),
        (StandInGpu(device_error=RuntimeError("driver is too old")), "driver is too old"),
        (StandInGpu(answer=0.0), "a convolution comes out wrong"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_is_one_line(gpu, wanted):
    if wanted is None:
        utility._try_gpu(gpu)
        return
    with pytest.raises(UserError) as error:
        utility._try_gpu(gpu)
    message = str(error.value)
    assert wanted in message and "--use_gpu=False goes on without" in message and "\n" not in message


@pytest.mark.parametrize(
    ("kind", "supported", "wanted"), [("bfloat16", False, "--amp=float16"), ("float16", True, None)]
)
def test_amp_that_the_gpu_lacks_is_an_error(monkeypatch, kind, supported, wanted):
    """With a stand-in for the GPU."""
    import types

    import train

    monkeypatch.setattr(utility, "on_gpu", lambda: True)
    amp = types.SimpleNamespace(**{f"is_{kind}_supported": lambda: supported})
    if wanted is None:
        train.check_amp(types.SimpleNamespace(amp=amp), types.SimpleNamespace(amp=kind))
        return
    with pytest.raises(utility.UserError, match=wanted):
        train.check_amp(types.SimpleNamespace(amp=amp), types.SimpleNamespace(amp=kind))
