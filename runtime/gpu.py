"""Whether a GPU can be used, and which of Paddle's wheels has code for it. Importing this does not import paddle."""

import os
import re
import subprocess

from utility import UserError

# Paddle's own wheels of 3.3.1, the best first, and the least and the newest compute capability that they have code for.
WHEELS = {"cu126": (7.5, 9.0), "cu129": (7.5, 12.1), "cu118": (6.0, 9.0)}


OLD_DRIVER = 525  # below it a driver runs nothing that was built with CUDA 12


def paddle_index(capabilities, driver=""):
    """The address from which pip takes the paddlepaddle-gpu for GPUs of these compute capabilities; "" for none.

    Args:
        capabilities: of all GPUs, such as ["7.5", "8.6"]; what else nvidia-smi may print is left out.
        driver: its version, such as "535.104.05"; "": not known.
    """
    found = [float(text) for text in capabilities if re.fullmatch(r"\d+\.\d+", text)]
    for name, (least, newest) in WHEELS.items():
        if is_old(driver) and name.startswith("cu12"):
            continue
        if found and least <= min(found) and max(found) <= newest:
            return f"https://www.paddlepaddle.org.cn/packages/stable/{name}/"
    return ""


def is_old(driver):
    """Whether a version such as "470.57.02" is of a driver that runs nothing of CUDA 12; False where it is none."""
    number = re.match(r"(\d+)\.", driver)
    return bool(number) and int(number[1]) < OLD_DRIVER


def count(paddle):
    """How many GPUs paddle finds.

    Raises: UserError where it finds none, for the driver of one that nothing hides is too old.
    """
    try:
        number = paddle.device.cuda.device_count()
    except Exception:  # some versions raise for a driver that does not fit, or none
        number = 0
    name = "" if number else listed()
    if not name or not paddle.version.cuda().startswith("12"):
        return number
    capability, driver = ask_nvidia_smi("compute_cap"), ask_nvidia_smi("driver_version")
    if not is_old(driver):
        return 0
    index = paddle_index([capability], driver)
    other = f", or pip install --force-reinstall paddlepaddle-gpu==3.3.1 -i {index}" if index else ""
    raise UserError(
        f"nvidia-smi lists a GPU ({name}, driver {driver}), of which paddlepaddle-gpu {paddle.__version__} of CUDA "
        f"{paddle.version.cuda()} finds none: CUDA 12 needs a driver of {OLD_DRIVER} or newer: install one{other}; "
        "--use_gpu=False goes on without it"
    )


def listed():
    """The name of the first GPU that nvidia-smi lists; "" where there is none, or CUDA_VISIBLE_DEVICES hides all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    hidden = visible == "NoDevFiles" or not re.match(r"[0-9A-Za-z]", visible)  # the first by Slurm
    return "" if hidden else ask_nvidia_smi("name")


def ask_nvidia_smi(what):
    """What nvidia-smi says of the first GPU; "" where there is none, or no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = found.stdout.strip().splitlines()
    return lines[0].strip() if lines and not found.returncode else ""


def computes_in(paddle, kind):
    """Whether the GPU computes in float16 or bfloat16; under auto_cast, where Paddle asks for more than to have it."""
    has = getattr(paddle.amp, f"is_{kind}_supported")()
    return bool(has and paddle.device.cuda.get_device_capability() >= (7, 0))


def try_gpu(paddle):
    """Selects the GPU and has it compute something. Raises: UserError, with what is wrong and what mends it."""
    try:
        paddle.set_device("gpu")
        cudnn = paddle.device.get_cudnn_version()
        if cudnn is None:
            why = "it finds no cuDNN"
        else:
            one = paddle.ones([1, 1, 3, 3])
            nine = paddle.nn.functional.conv2d(one, one).sum()  # NumPy 2.4 makes a number of no other shape
            why = "" if float(nine) == 9 else "a convolution comes out wrong"
    except Exception as error:  # Paddle's have many types
        why = first_line(error)
    if not why:
        return
    try:
        name = paddle.device.cuda.get_device_name()
        capability = "{}.{}".format(*paddle.device.cuda.get_device_capability())
    except Exception:  # what is wrong is in `why`; this only describes the GPU
        name, capability = "unknown", "unknown"
    index = paddle_index([capability])
    mend = "nvidia-smi says whether its driver works"
    if "out of memory" in why.lower():
        mend = "other programs have filled it: nvidia-smi names them"
    elif index:
        install = f"pip install --force-reinstall paddlepaddle-gpu==3.3.1 -i {index}"
        mend = f"{install} has all that this GPU needs but its driver"
    raise UserError(
        f"paddlepaddle-gpu {paddle.__version__} can't use the GPU ({name}, compute capability {capability}): {why}; "
        f"{mend}; --use_gpu=False goes on without it"
    )


def describe(paddle):
    """What the last bits of a result depend on where the current device is a GPU: {name: value}."""
    flags = paddle.get_flags(["FLAGS_cudnn_deterministic", "FLAGS_cudnn_exhaustive_search"])
    return {
        "gpu": paddle.device.cuda.get_device_name(),
        "cuda": paddle.version.cuda(),
        "cudnn": paddle.device.get_cudnn_version(),
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE"),
        **flags,
    }


def first_line(error):
    """The sentence of an exception that says what was wrong; Paddle's begin with a stack, and may have a headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    headlines = [number for number, line in enumerate(lines, 1) if line.startswith("Error Message Summary")]
    lines = lines[headlines[-1] :] if headlines else lines
    telling = [number for number, line in enumerate(lines) if re.search(r"Error:( |$)", line)]
    lines = lines[telling[0] :] if telling else lines
    line = (lines or [type(error).__name__])[0]
    if line.endswith("Error:"):  # what it says is on the next one
        line = " ".join(lines[:2])
    return line if len(line) <= 200 else f"{line[:200]}..."
