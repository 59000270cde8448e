"""Whether a GPU can be used, and which of Paddle's wheels has code for it. Importing this does not import paddle."""

import os
import re

from utility import UserError

# Paddle's own wheels of 3.3.1, the best first, and the least and the newest compute capability that they have code for.
WHEELS = {"cu126": (7.5, 9.0), "cu129": (7.5, 12.1), "cu118": (6.0, 9.0)}


def paddle_index(capabilities):
    """The address from which pip takes the paddlepaddle-gpu for GPUs of these compute capabilities; "" for none.

    Args:
        capabilities: of all GPUs, such as ["7.5", "8.6"]; what else nvidia-smi may print is left out.
    """
    found = [float(text) for text in capabilities if re.fullmatch(r"\d+\.\d+", text)]
    for name, (least, newest) in WHEELS.items():
        if found and least <= min(found) and max(found) <= newest:
            return f"https://www.paddlepaddle.org.cn/packages/stable/{name}/"
    return ""


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
    mend = (
        f"pip install --force-reinstall paddlepaddle-gpu==3.3.1 -i {index} has all that this GPU needs but its driver"
        if index
        else "nvidia-smi says whether its driver works"
    )
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
    """The sentence of an exception that says what was wrong; Paddle's begin with a stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error: " in line or "Error Message Summary" in line]
    line = (telling or lines or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:200]}..."
