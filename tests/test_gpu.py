"""Whether a GPU can be used, and which wheel has code for it."""

import os
import subprocess
import sys
import types

import numpy as np
import paddle
import pytest
from conftest import ROOT

from runtime import gpu as gpu_check
from utility import UserError


@pytest.mark.parametrize(
    ("capabilities", "wheel"),
    [("7.5", "cu126"), ("8.6", "cu126"), ("9.0 8.0", "cu126"), ("12.0", "cu129"), ("10.0 8.0", "cu129"),
     ("6.1", "cu118"), ("7.0 8.6", "cu118"), ("5.2", ""), ("6.1 12.0", ""), ("", ""),
     ("Field compute_cap is not valid", "")],
)  # fmt: skip
def test_the_wheel_for_all_gpus(capabilities, wheel):
    index = gpu_check.paddle_index(capabilities.split())
    assert index == (f"https://www.paddlepaddle.org.cn/packages/stable/{wheel}/" if wheel else "")


def test_the_wheel_for_an_old_driver():
    for driver, wheel in (("470.57.02", "cu118"), ("535.104.05", "cu126"), ("", "cu126"), ("N/A", "cu126")):
        assert f"/{wheel}/" in gpu_check.paddle_index(["8.6"], driver)
    assert gpu_check.paddle_index(["12.0"], "470.57.02") == ""


@pytest.mark.parametrize("raises", [False, True])
def test_a_driver_that_is_too_old(monkeypatch, tmp_path, raises):
    """Paddle finds no GPU, or raises; nvidia-smi lists one. Where it is hidden, or there is none, nothing is wrong."""

    def device_count():
        if raises:
            raise OSError("ExternalError: CUDA error(35)")
        return 0

    smi = tmp_path / "nvidia-smi"
    answers = '#!/bin/sh\ncase $1 in *name*) echo "Tesla T4";; *cap*) echo 7.5;; *) echo {};; esac\n'
    smi.write_text(answers.format("470.57.02"))
    smi.chmod(0o755)
    cuda = types.SimpleNamespace(device_count=device_count)
    fake = types.SimpleNamespace(device=types.SimpleNamespace(cuda=cuda), __version__="3.3.1")
    fake.version = types.SimpleNamespace(cuda=lambda: "12.6")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"\(Tesla T4, driver 470.57.02\).* of CUDA 12.6 finds none: .*/cu118/; --use"):
        gpu_check.count(fake)
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpu_check.count(fake) == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fake.version.cuda = lambda: "11.8"
    assert gpu_check.count(fake) == 0
    fake.version.cuda = lambda: "12.6"
    for text in (answers.format("550.54"), "#!/bin/sh\nexit 9\n"):  # it is something else, or there is none
        smi.write_text(text)
        assert gpu_check.count(fake) == 0
    fake.device.cuda.device_count = lambda: 2
    assert gpu_check.count(fake) == 2


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this paddlepaddle is built for GPUs")
def test_a_build_for_the_cpu_beside_a_gpu_is_said(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho Tesla T4\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code = "from runtime import process\nprocess.start_paddle({})\nprocess.start_paddle({})"
    for use_gpu, visible, wanted in (
        (None, "0", "note: this paddlepaddle is built for the CPU only (nvidia-smi lists one, Tesla T4: docs/gpu.md)"),
        (None, "-1", ""),
        (False, "0", ""),
    ):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": visible}
        command = [sys.executable, "-c", code.format(use_gpu, use_gpu)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
        assert result.stderr == (f"{wanted}: running on the CPU\n" if wanted else "")


def test_the_sentence_of_an_error():
    stack = "\n----\nC++ Traceback (most recent call last):\n----\n0 paddle::f()\n"
    told = "ResourceExhaustedError: \n\nOut of memory error on GPU 0.\n\n  [Hint: ...] (at a.cc:1)"
    for text, wanted in (
        (
            f"{stack}\n----\nError Message Summary:\n----\n{told}",
            "ResourceExhaustedError: Out of memory error on GPU 0.",
        ),
        (f"{stack}\nExternalError: CUDA error(209), no kernel.", "ExternalError: CUDA error(209), no kernel."),
        ("plain", "plain"),
        ("", "MemoryError"),
    ):
        assert gpu_check.first_line(MemoryError(text)) == wanted


def test_the_makefile_takes_the_wheel_for_all_gpus(tmp_path):
    """As `make -n` shows it, with a stand-in for nvidia-smi."""
    smi = tmp_path / "nvidia-smi"
    for capabilities, driver, wanted in (
        ("8.6 9.0", "560.35.03", "stable/cu126/"),
        ("8.6 9.0", "470.57.02", "stable/cu118/"),
        ("6.1 12.0", "560.35.03", "no wheel"),
        ("", "", "requirements.txt"),
    ):
        answers = f"case $1 in *driver*) echo {driver};; *) printf '%s\\n' {capabilities};; esac"
        smi.write_text(f"#!/bin/sh\n{answers}\n" if capabilities else "#!/bin/sh\nexit 9\n")
        smi.chmod(0o755)
        result = subprocess.run(
            ["make", "-n", f"VENV={tmp_path}/new", f"{tmp_path}/new/installed"], cwd=ROOT, capture_output=True,
            text=True, check=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert wanted in result.stdout and ("cu126" in result.stdout) == (wanted == "stable/cu126/")


class StandInGpu:
    """What `gpu_check.try_gpu` asks of paddle."""

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
        (StandInGpu(answer=MemoryError("Out of memory error on GPU 0")), "on GPU 0; other programs have filled it"),
        (StandInGpu(answer=0.0), "a convolution comes out wrong"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_is_one_line(gpu, wanted):
    if wanted is None:
        gpu_check.try_gpu(gpu)
        return
    with pytest.raises(UserError) as error:
        gpu_check.try_gpu(gpu)
    message = str(error.value)
    assert wanted in message and "--use_gpu=False goes on without" in message and "\n" not in message
