"""A script's process: how it starts, ends and hears signals, and the device that it computes on.

Importing this file does not import paddle: `start_paddle` must be able to set the environment first.
"""

import contextlib
import ctypes
import errno
import io
import math
import os
import platform
import random
import signal
import sys
import time
import warnings

from runtime import gpu, parallel
from utility import UserError, plain


class Stopped(Exception):
    """The run ends here in good order; `status` is the process's exit status, after a signal 128 and its number."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def run_script(main):
    """Runs `main()` and ends the process: 0, 2 after a UserError (one line on stderr), 130 after Ctrl-C."""
    for name in ("stdout", "stderr"):  # None where the caller has closed them
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that the terminal's encoding lacks ends no run
    try:
        main()
        sys.stdout.flush()
        parallel.end()
    except UserError as error:
        message = plain(error, 2000)  # one line, whatever names are in it
        parallel.fail(message)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except Stopped as error:
        parallel.end()
        print(plain(error, 2000), file=sys.stderr)
        sys.exit(error.status)
    except MemoryError as error:
        message = f"out of memory: {plain(gpu.first_line(error), 300)}"
        parallel.fail(message)
        less = "fewer pictures at once need less (--train_batch_size, --test_batch_size, --batch_size)"
        print(f"error: {message}; {less}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError:
        # A collective fails where another process has died, which explains it better than a traceback.
        parallel.wait_to_be_ended()
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not a failure, and nothing more can be said.
        _silence(sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        # The disk under the output: not a bug of ours, and no message of ours has reached it.
        print(f"error: {plain(error.filename or 'the output', 1000)}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _silence(descriptor):
    """What is written to an open file from now on goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


# Ctrl-C, and what schedulers and lost terminals send (SIGUSR1: Slurm's --signal=USR1@120).
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Signals:
    """`number` is that of the signal of STOPPING that has come since `note_signals`, or 0."""

    def __init__(self):
        self.number = 0

    @contextlib.contextmanager
    def note_lost_output(self):
        """Takes it for a signal where the block prints and the reader of our output (head, less) has gone."""
        try:
            yield
        except BrokenPipeError:
            _silence(sys.stdout.fileno())
            self.number = self.number or signal.SIGPIPE


@contextlib.contextmanager
def even_unread():
    """The block prints; where the reader of our output (head, less) has gone, what comes after is done all the same."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout.fileno())


def note_signals():
    """From now on the first signal of STOPPING ends nothing, but is in the Signals that this returns; a second one ends
    the process at once. A SIGHUP that is ignored, as under nohup, stays so.

    To be called after paddle's import, which sets handlers of its own.
    """
    signals, terminals = Signals(), [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    first = 0.0

    def note(number, frame):
        nonlocal first
        if signals.number:
            if not parallel.is_a_repeat(time.time() - first):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        signals.number, first = number, time.time()
        if signal.Signals(number).name == "SIGHUP":
            for descriptor in terminals:  # which are gone: what is said from now on must not end the run
                _silence(descriptor)
        if parallel.world_size() == 1:
            # The system's own handlers end the process even in the middle of a long computation.
            for other in heeded:
                signal.signal(other, signal.SIG_DFL)
        # Not print, which may be what the signal has interrupted.
        os.write(2, f"{signal.Signals(number).name}: stopping after this step; once more stops at once\n".encode())

    hangup = getattr(signal, "SIGHUP", None)
    heeded = [number for number in STOPPING if number != hangup or signal.getsignal(number) != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, note)
    return signals


# ---------------------------------------------------------------- process and device


def cpu_count():
    """CPUs that this process may use: no more than the quota of its container is worth."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(own, cpu_quota())))


def cpu_quota(root="/"):
    """CPUs that the control groups of this process allow it at a time; infinite where there are none, or no limit.

    The smallest limit of the group and of the ones around it counts: cpu.max, or cpu.cfs_quota_us in version 1.

    Args:
        root: the root of the file system.
    """
    quotas = [math.inf]
    for line in _words(root, "proc/self/cgroup"):
        _, controllers, group = f"{line}::".split(":")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = group.strip("/")
        while True:  # in a container, the group's own name may be one outside of it: then there is the root alone
            for mount in ("", "unified", "cpu", "cpu,cpuacct", controllers):
                quotas.append(_quota(os.path.join(root, "sys/fs/cgroup", mount, group)))
            if not group:
                break
            group = os.path.dirname(group)
    return min(quotas)


def _quota(folder):
    words = _words(folder, "cpu.max") or _words(folder, "cpu.cfs_quota_us") + _words(folder, "cpu.cfs_period_us")
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # "max", or no such files
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def _words(folder, name):
    with contextlib.suppress(OSError, UnicodeDecodeError), open(os.path.join(folder, name)) as file:
        return file.read().split()
    return []


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
        use_gpu: True, False, or None for a GPU where there is one. That there is none is said once, where True asks for
            it or paddlepaddle is built for one.
        deterministic: True has cuDNN take algorithms whose results repeat to the last bit, False has it time them and
            take the fastest, None leaves it alone. Without a meaning on the CPU, where results repeat.

    Returns the paddle module. Where several processes were launched, they join here, and draw the same random numbers
    whether there is a seed or not. Everything here that Paddle reads only when it is imported is left alone where
    the user has set it.
    """
    first_call = "paddle" not in sys.modules
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

    built = paddle.is_compiled_with_cuda()
    on_gpu = use_gpu is not False and built and gpu.count(paddle) > 0
    if first_call and not on_gpu and use_gpu is not False:
        asked, name = "--use_gpu=True, but " if use_gpu else "", gpu.listed()
        why = "no GPU found" if built else "this paddlepaddle is built for the CPU only"
        there = f" (nvidia-smi lists one, {name}: docs/gpu.md)" if name else ""
        if use_gpu or built or name:
            print(f"note: {asked}{why}{there}: running on the CPU", file=sys.stderr)
    if not on_gpu:
        paddle.set_device("cpu")
        _keep_freed_memory()
    else:
        if deterministic is not None:
            # Both, for the environment may have set the other one, and Paddle refuses the two together.
            paddle.set_flags(
                {"FLAGS_cudnn_deterministic": deterministic, "FLAGS_cudnn_exhaustive_search": not deterministic}
            )
        gpu.try_gpu(paddle)
    parallel.start(on_gpu)
    paddle.seed(parallel.from_first(random.SystemRandom().randrange(2**31) if seed is None else seed))
    return paddle


def join_early(use_gpu, seed):
    """Where several processes were launched, has them join: then a mistake that one of them meets ends all.

    To be called first of all. In a process on its own a mistake need not wait for paddle's import.
    """
    if parallel.world_size() > 1:
        start_paddle(use_gpu, seed)


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
        **(gpu.describe(paddle) if on_gpu() else {}),
    }


def compare_process(before):
    """Says which of `describe_process` differ from those of the run that is continued."""
    now = describe_process()
    changed = [f"{name} {now.get(name)} (was {value})" for name, value in before.items() if now.get(name) != value]
    if changed:
        found = plain(", ".join(changed), 1000)
        print(f"note: the continued run may differ in the last digits from one in one go: {found}")


def on_gpu():
    """True where the current device is a GPU."""
    import paddle

    return paddle.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")


def amp_type(asked):
    """float16 or bfloat16 where there is mixed precision, else None.

    Raises: UserError where the GPU lacks the type: Paddle would train in float32 after one warning.
    """
    import paddle

    if asked == "off":
        return None
    if not on_gpu():
        print("note: --amp works on a GPU only: training in float32")
        return None
    if not gpu.computes_in(paddle, asked):
        other = "float16" if asked == "bfloat16" else "off"
        raise UserError(f"--amp={asked}: this GPU can't compute in {asked}: take --amp={other}")
    return asked


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
