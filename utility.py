"""What the three scripts share beside data and network: process set-up, flags, checkpoints, logs.

Importing this file does not import paddle: `start_paddle` must be able to set the environment first.
"""

import argparse
import contextlib
import ctypes
import errno
import io
import math
import os
import platform
import random
import re
import signal
import sys
import time
import warnings

import parallel


class UserError(Exception):
    """A mistake that the user can mend; its message is one line that says how. Scripts exit with status 2."""


class Stopped(Exception):
    """The run ends here in good order; `status` is the process's exit status: 143 or 130 after SIGTERM or Ctrl-C."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def run_script(main):
    """Runs `main()` and ends the process: 0, 2 after a UserError (one line on stderr), 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that the terminal's encoding lacks ends no run
    try:
        main()
        sys.stdout.flush()
        parallel.end()
    except UserError as error:
        parallel.fail(str(error))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as error:
        parallel.end()
        print(error, file=sys.stderr)
        sys.exit(error.status)
    except RuntimeError:
        # A collective fails where another process has died, which explains it better than a traceback.
        parallel.wait_to_be_ended()
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not a failure, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        # The disk under the output: not a bug of ours, and no message of ours has reached it.
        print(f"error: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def note_signals():
    """From now on the first SIGTERM or Ctrl-C ends nothing; a second one ends the process at once.

    To be called after paddle's import, which sets handlers of its own.

    Returns: a dict in which "signal" is the number of the signal that came, or 0; "agreed" the one that all processes
        know of.
    """
    noted = {"signal": 0, "agreed": 0}
    first = 0.0

    def note(number, frame):
        nonlocal first
        if noted["signal"]:
            if not parallel.is_a_repeat(time.time() - first):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        noted["signal"], first = number, time.time()
        if parallel.world_size() == 1:
            # The system's own handlers end the process even in the middle of a long computation.
            for other in (signal.SIGTERM, signal.SIGINT):
                signal.signal(other, signal.SIG_DFL)
        # Not print, which may be what the signal has interrupted.
        os.write(2, f"{signal.Signals(number).name}: stopping after this step; once more stops at once\n".encode())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return noted


# ---------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser(description):
    """An ArgumentParser whose --help shows defaults and keeps line breaks, and whose errors are UserErrors."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            # A default of None or "" is explained by the help text itself.
            return action.help if action.default in (None, "") else super()._get_help_string(action)

    return _Parser(description=description, formatter_class=Formatter, allow_abbrev=False)


def parse_typed(parser):
    """-> (the flags of the command line, the names of those that were typed and not left at their default)"""
    args = parser.parse_args()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return args, set(vars(parser.parse_args()))


def boolean(text):
    """The type of a True/False flag."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return values[text.lower()]


def number(kind, low=None, above=None, high=None):
    """The type of a numeric flag: `kind` is int or float, the range `low <= x`, `above < x`, `x <= high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, not {text!r}") from None
        finite = kind is int or math.isfinite(value)
        if (
            not finite
            or (low is not None and value < low)
            or (above is not None and value <= above)
            or (high is not None and value > high)
        ):
            limits = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (above is not None)
            limits += [f"at most {high}"] * (high is not None) + ["finite"] * (not finite)
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {' and '.join(limits)}")
        return value

    return parse


def comma_separated(parse):
    """The type of a flag that takes a list, such as 1,2,4,8."""

    def parse_list(text):
        values = [parse(item) for item in text.split(",") if item.strip()]
        if not values:
            raise argparse.ArgumentTypeError("expected numbers with commas between them")
        return values

    return parse_list


def print_arguments(args):
    """Prints the arguments in force, as the original scripts did."""
    print("-----------  Configuration Arguments -----------")
    for name, value in sorted(vars(args).items()):
        print(f"{name}: {value}")
    print("------------------------------------------------", flush=True)


# ---------------------------------------------------------------- process and device


def cpu_count():
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_flags(cpuinfo="/proc/cpuinfo"):
    """The instruction sets that the processor has, in Linux's words, and its vendor; empty where that is not known."""
    try:
        with open(cpuinfo) as file:
            lines = file.read().splitlines()
    except OSError:
        return set()
    return {
        word for key in ("flags", "vendor_id") for word in next((x for x in lines if x.startswith(key)), "").split()
    }


def _mkl_cpu_type(cpuinfo="/proc/cpuinfo"):
    """The MKL_DEBUG_CPU_TYPE that takes Paddle's MKL off its slow path on AMD processors, or None.

    7 is MKL's AVX-512 code, 5 its AVX2 code; asking for instructions the processor lacks kills the process.
    """
    flags = cpu_flags(cpuinfo)
    if not {"AuthenticAMD", "avx2", "fma"} <= flags:
        return None
    return "7" if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags else "5"


def _keep_freed_memory():
    """Has glibc keep what is freed for the next layer: by default every large array goes back to the system and comes
    anew, page by page, which costs a fifth of a network's time on a CPU. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


def start_paddle(use_gpu=False, seed=None, deterministic=None):
    """Sets up the process, imports paddle for the first time, and selects the device.

    Args:
        deterministic: True has cuDNN take algorithms whose results repeat to the last bit, False has it time them and
            take the fastest, None leaves it alone. Without a meaning on the CPU, where results repeat.

    Returns the paddle module. Where several processes were launched, they join here, and draw the same random numbers
    whether there is a seed or not. Everything here that Paddle reads only when it is imported is left alone where
    the user has set it. Asking for a GPU that is not there is said once, and the CPU is used.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // parallel.local_world_size())))
    mkl = _mkl_cpu_type()
    if mkl:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", mkl)
    # Paddle warns about the thread count that we set on purpose, and about a compiler cache that nobody needs here.
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import paddle
    finally:  # where the import fails, what Paddle says is the explanation
        for line in said.getvalue().splitlines():
            if "OMP_NUM_THREADS" not in line and "ccache" not in line and "warnings.warn" not in line:
                print(line, file=sys.stderr)

    # Paddle says this once a process, about the running statistics that every user expects.
    warnings.filterwarnings("ignore", message="When training, we now always track global mean")
    # Plain SGD has no state, which is no news when a checkpoint is written.
    warnings.filterwarnings("ignore", message="The input state dict is empty")

    gpu = use_gpu and paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if use_gpu and not gpu:
        why = "no GPU found" if paddle.is_compiled_with_cuda() else "this paddlepaddle is built for the CPU only"
        print(f"note: --use_gpu=True, but {why}: running on the CPU", file=sys.stderr)
    if not gpu:
        paddle.set_device("cpu")
        _keep_freed_memory()
    else:
        if deterministic is not None:
            # Both, for the environment may have set the other one, and Paddle refuses the two together.
            paddle.set_flags(
                {"FLAGS_cudnn_deterministic": deterministic, "FLAGS_cudnn_exhaustive_search": not deterministic}
            )
        _try_gpu(paddle)
    parallel.start(gpu)
    paddle.seed(parallel.from_first(random.SystemRandom().randrange(2**31) if seed is None else seed))
    return paddle


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


def _try_gpu(paddle):
    """Selects the GPU and has it compute something. Raises: UserError, with what is wrong and what mends it."""
    try:
        paddle.set_device("gpu")
        cudnn = paddle.device.get_cudnn_version()
        if cudnn is None:
            why = "it finds no cuDNN"
        else:
            one = paddle.ones([1, 1, 3, 3])
            why = "" if float(paddle.nn.functional.conv2d(one, one)) == 9 else "a convolution comes out wrong"
    except Exception as error:  # Paddle's have many types
        why = first_line(error)
    if not why:
        return
    try:
        name = paddle.device.cuda.get_device_name()
        capability = "{}.{}".format(*paddle.device.cuda.get_device_capability())
    except Exception:
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


def join_early(args):
    """Where several processes were launched, has them join: then a mistake that one of them meets ends all.

    To be called first of all. In a process on its own a mistake need not wait for paddle's import.
    """
    if parallel.world_size() > 1:
        start_paddle(args.use_gpu, args.seed)


def first_line(error):
    """The sentence of an exception that says what was wrong; Paddle's begin with a stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error: " in line or "Error Message Summary" in line]
    line = (telling or lines or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:200]}..."


def describe_process():
    """What the last bits of a result depend on beside the flags: threads, MKL's code path, versions, device."""
    import numpy as np
    import paddle

    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "MKL_DEBUG_CPU_TYPE": os.environ.get("MKL_DEBUG_CPU_TYPE"),
        "paddle": paddle.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": paddle.get_device(),
        "processes": parallel.world_size(),
    }


def compare_process(before):
    """Says which of `describe_process` differ from those of the run that is continued."""
    now = describe_process()
    changed = [f"{name} {now.get(name)} (was {value})" for name, value in before.items() if now.get(name) != value]
    if changed:
        print(f"note: the continued run may differ in the last digits from one in one go: {', '.join(changed)}")


def on_gpu():
    """True where the current device is a GPU."""
    import paddle

    return paddle.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")


def to_device(array):
    """A NumPy array as a tensor on the current device; on a GPU the copy goes on while the caller does."""
    import paddle

    if not on_gpu():
        return paddle.to_tensor(array)
    # Paddle itself keeps the memory that is copied from until the copy is done.
    return paddle.to_tensor(array, place=paddle.CUDAPinnedPlace()).cuda(blocking=False)


def peak_memory():
    """The most memory this process has held, in bytes: of the GPU where it runs on one, else of the machine."""
    if on_gpu():
        import paddle

        return paddle.device.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):  # Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0


# ---------------------------------------------------------------- progress


def duration(seconds):
    """Seconds as h:mm:ss."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def progress(items, total, what):
    """Yields `items`; where stderr is a terminal, shows there how many of `total` are done and the time left.

    An item is a tuple that begins with the indices of its images.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    start, done = time.time(), 0
    for item in items:
        yield item
        done += len(item[0])
        left = (time.time() - start) / done * (total - done)
        filled = 30 * done // max(total, 1)
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r{what} [{bar}] {done}/{total}, {duration(left)} left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def clear_progress():
    """Wipes the line that `progress` has drawn, so that another can be printed."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- running a network


def extract(network, samples, batches, bad, on_batch=None, noted=None):
    """Runs the network in evaluation mode over `batches` of `samples` (see reader.read_in_order).

    Several processes bring their batches together in the first one.

    Args:
        network: an EmbeddingNet, or what engine.prepare made of one.
        bad: the list of bad pictures that is filled while `batches` are read; gets those of the other processes.
        on_batch: called as on_batch(index, logits) after each batch; logits float32 [B, C] or None without a head.
        noted: from note_signals: a signal ends this between two batches.

    Returns: embeddings float32 [N, D], and the pictures' positions in the list, int64 [N]; (None, None) in all but the
        first process, and after a signal.
    Raises: UserError where not one picture could be read.
    """
    import numpy as np
    import paddle

    def eager(image):
        return (
            None if x is None else x.numpy().astype(np.float32, copy=False) for x in network(paddle.to_tensor(image))
        )

    def run():
        for batch in batches:
            embedding, logits = run_network(batch.image)
            yield batch.index, embedding, logits if on_batch else None

    run_network = network
    if isinstance(network, paddle.nn.Layer):
        network.eval()
        run_network = eager
    features, indices = [], []
    with paddle.no_grad():
        for index, embedding, logits in progress(parallel.collect(run(), noted), len(samples.paths), "images"):
            indices.append(index)
            features.append(embedding)
            if on_batch:
                clear_progress()
                on_batch(index, logits)
    bad[:] = sorted(picture for part in parallel.gather_objects(bad) for picture in part)
    if not parallel.is_first() or (noted and noted["agreed"]):
        return None, None
    if not features:
        raise UserError("not one image could be read")
    index = np.concatenate(indices)
    order = np.argsort(index, kind="stable")
    return np.concatenate(features)[order], index[order]
