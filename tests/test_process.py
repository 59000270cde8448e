"""How a process starts and ends."""

import math
import os
import re
import signal
import subprocess
import sys

import paddle
import pytest
from conftest import ROOT

from runtime import packages, process
from utility import UserError


def script(code, **options):
    """Starts a Python process that runs `code` under run_script; -> subprocess.Popen."""
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    head = "import sys\nfrom runtime import process\nfrom utility import UserError\n"
    code = f"{head}def main():\n{indented}process.run_script(main)\n"
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **options}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, env=environment, **pipes)


@pytest.mark.parametrize(
    ("code", "status", "stdout", "stderr"),
    [
        ("print('fine')", 0, "fine\n", ""),
        ("print('so far')\nraise UserError('a.txt:3: no label')", 2, "so far\n", "error: a.txt:3: no label\n"),
        ("raise KeyboardInterrupt", 130, "", "interrupted\n"),
        ("sys.exit(7)", 7, "", ""),
        (
            "raise MemoryError('Out of memory on GPU 0')",
            2,
            "",
            "error: out of memory: Out of memory on GPU 0; fewer "
            "pictures at once need less (--train_batch_size, --test_batch_size, --batch_size)\n",
        ),
    ],
)
def test_exit_status(code, status, stdout, stderr):
    child = script(code)
    assert child.communicate() == (stdout, stderr) and child.returncode == status


def test_a_bug_gets_its_traceback():
    child = script("1 / 0")
    _, stderr = child.communicate()
    assert child.returncode == 1 and "Traceback" in stderr and "ZeroDivisionError" in stderr


def test_ctrl_c():
    # What a shell starts in the background, such as these tests, ignores Ctrl-C, and so does what that starts.
    heed = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    child = script(f"{heed}print('ready', flush=True)\ntime.sleep(60)")
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate() == ("", "interrupted\n") and child.returncode == 130


def test_what_comes_after_is_done_although_nobody_reads(tmp_path):
    block = "with process.even_unread():\n    for i in range(100000):\n        print(i)"
    child = script(f"sys.stdin.readline()\n{block}\nprint('more')\nopen({str(tmp_path / 'done')!r}, 'w')")
    child.stdout.close()
    child.stdin.write("go\n")
    child.stdin.flush()
    assert child.stderr.read() == "" and child.wait() == 0 and (tmp_path / "done").exists()


@pytest.mark.parametrize("lines", [1, 100000])
def test_a_reader_that_has_gone_is_no_failure(lines):
    child = script(f"sys.stdin.readline()\nfor i in range({lines}):\n    print(i)")
    child.stdout.close()
    child.stdin.write("go\n")
    child.stdin.flush()
    assert child.stderr.read() == "" and child.wait() == 141
    child.stdin.close()
    child.stderr.close()


def test_file_names_that_the_terminal_cannot_show():
    child = script("print('\\xe9 \\udce9')", PYTHONIOENCODING="ascii")
    assert child.communicate() == ("\\xe9 \\udce9\n", "") and child.returncode == 0


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
    assert process._mkl_cpu_type(str(tmp_path / "cpuinfo")) == wanted


def test_mkl_path_where_nothing_is_known(tmp_path):
    assert process._mkl_cpu_type(str(tmp_path / "none")) is None
    (tmp_path / "cpuinfo").write_text("processor : 0\nvendor_id : AuthenticAMD\n")
    assert process._mkl_cpu_type(str(tmp_path / "cpuinfo")) is None


def test_start_paddle_sets_what_the_user_left_unset():
    code = """
import os
paddle = process.start_paddle(use_gpu={}, seed=3)
print(os.environ.get("OMP_NUM_THREADS"), os.environ.get("MKL_DEBUG_CPU_TYPE"), paddle.get_device())
print(paddle.rand([1]).item() == (paddle.seed(3), paddle.rand([1]))[1].item())
"""
    unset = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    for use_gpu, given, wanted in (
        (True, {"PADDLE_LOCAL_SIZE": str(process.cpu_count())}, ["1", str(process._mkl_cpu_type())]),
        (False, {"OMP_NUM_THREADS": "3", "MKL_DEBUG_CPU_TYPE": "5"}, ["3", "5"]),
    ):
        if not process._mkl_cpu_type():
            given.pop("MKL_DEBUG_CPU_TYPE", None)
            wanted[1] = "None"
        result = subprocess.run(
            [sys.executable, "-c", "from runtime import process\n" + code.format(use_gpu)],
            cwd=ROOT, capture_output=True, text=True, check=True, env={**unset, **given, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert result.stdout.split() == [*wanted, "cpu", "True"]
        notes = result.stderr.splitlines()
        assert len(notes) == use_gpu and all(note.startswith("note: --use_gpu=True, but ") for note in notes)


@pytest.mark.parametrize(
    ("kind", "supported", "capability", "wanted"),
    [
        ("bfloat16", False, (7, 5), "--amp=float16"),
        ("float16", True, (7, 0), None),
        ("float16", True, (6, 1), "--amp=off"),  # of which auto_cast computes in float32
    ],
)
def test_amp_that_the_gpu_lacks_is_an_error(monkeypatch, kind, supported, capability, wanted):
    """With a stand-in for the GPU."""
    monkeypatch.setattr(process, "on_gpu", lambda: True)
    monkeypatch.setattr(paddle.amp, f"is_{kind}_supported", lambda: supported)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
    if wanted is None:
        assert process.amp_type(kind) == kind
        return
    with pytest.raises(UserError, match=wanted):
        process.amp_type(kind)


@pytest.mark.parametrize(
    ("group", "content", "wanted"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "800000 100000"}, 0.5),
        ("0::/elsewhere\n", {"cpu.max": "300000 100000"}, 3),
        (
            "4:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, math.inf),
        ("4:memory:/a\n", {"a/cpu.max": "100000 100000"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_the_quota_of_a_container(tmp_path, group, content, wanted):
    for name, text in {
        "proc/self/cgroup": group,
        **{f"sys/fs/cgroup/{name}": t for name, t in content.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert process.cpu_quota(str(tmp_path)) == wanted


def test_cpus_are_counted_from_the_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, wanted in ((math.inf, 8), (2.5, 3), (0.1, 1), (64, 8)):
        monkeypatch.setattr(process, "cpu_quota", lambda quota=quota: quota)
        assert process.cpu_count() == wanted


def test_output_that_is_closed_from_the_start(tmp_path):
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{sys.executable} data/split.py {tmp_path}/none {closed}"
        result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert ("no such folder" in result.stderr) == ("2>&-" not in closed)


def test_a_package_that_is_too_old_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(packages.LEAST, "PIL", ((999, 0), ["pillow"]))
    packages.check(("numpy", "cv2"))
    with pytest.raises(SystemExit) as caught:
        packages.check(("numpy", "cv2", "PIL"))
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1
    assert re.search(r"error: too old in this Python .*: pillow [\d.]+ \(needed: 999\.0\); pip install -r", err)
