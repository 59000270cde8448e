"""What the three scripts share beside data and network: process set-up, flags, checkpoints, logs.

Importing this file does not import paddle: `start_paddle` must be able to set the environment first.
"""

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import platform
import shutil
import sys
import time
import warnings

CHECKPOINT_FORMAT = 1
CHECKPOINT_FILE = "checkpoint.json"
WEIGHTS_FILE = "model.pdparams"
OPTIMIZER_FILE = "model.pdopt"
LOG_FILE = "train_log.jsonl"
SET_ASIDE = "replaced"


class UserError(Exception):
    """A mistake that the user can mend; its message is one line that says how. Scripts exit with status 2."""


def run_script(main):
    """Runs `main()` and ends the process: 0, 2 after a UserError (one line on stderr), 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that the terminal's encoding lacks ends no run
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not a failure, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


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


def _mkl_cpu_type(cpuinfo="/proc/cpuinfo"):
    """The MKL_DEBUG_CPU_TYPE that takes Paddle's MKL off its slow path on AMD processors, or None.

    7 is MKL's AVX-512 code, 5 its AVX2 code; asking for instructions the processor lacks kills the process.
    """
    try:
        with open(cpuinfo) as file:
            text = file.read()
    except OSError:
        return None
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    if "AuthenticAMD" not in text or not {"avx2", "fma"} <= flags:
        return None
    return "7" if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags else "5"


def _keep_freed_memory():
    """Has glibc keep what is freed for the next layer: by default every large array goes back to the system and comes
    anew, page by page, which costs a fifth of a network's time on a CPU. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


def start_paddle(use_gpu=False, seed=None):
    """Sets up the process, imports paddle for the first time, and selects the device.

    Returns the paddle module. Everything here that Paddle reads only when it is imported is left alone where
    the user has set it. Asking for a GPU that is not there is said once, and the CPU is used.
    """
    local_processes = int(os.environ.get("PADDLE_LOCAL_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // local_processes)))
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
    paddle.set_device("gpu" if gpu else "cpu")
    if not gpu:
        _keep_freed_memory()
    if seed is not None:
        paddle.seed(seed)
    return paddle


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


# ---------------------------------------------------------------- files


def make_directory(path):
    """Creates `path` and its parents; a UserError where that or writing into it is impossible."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".write_test_{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as error:
        raise UserError(f"{path}: cannot write into this directory: {error.strerror}") from None


def check_output(path):
    """Raises a UserError where a file could not be written to `path`; creates the folders it needs."""
    if os.path.isdir(path):
        raise UserError(f"{path}: a directory, not a file to write")
    make_directory(os.path.dirname(path) or ".")


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Opens a file beside `path` that takes its name only when all was written; a UserError where it can't be."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(run_dir, epoch, network, optimizer, state):
    """Writes `<run_dir>/<epoch>/` beside its final name, renames it, then points `latest` at it.

    Args:
        network: its `state_dict` goes to model.pdparams.
        optimizer: its state goes to model.pdopt, under the parameters' structured names (Paddle's generated
            names depend on everything the process built before).
        state: what else belongs to the run, as plain JSON values.

    Returns: the checkpoint's path.
    Raises: UserError where it can't be written, or where a weight is NaN or infinite.
    """
    import numpy as np
    import paddle

    final = os.path.join(run_dir, str(epoch))
    temporary = f"{final}.tmp{os.getpid()}"
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    broken = [name for name, value in weights.items() if not np.isfinite(value).all()]
    if broken:
        raise UserError(f"{final}: not written: {len(broken)} tensors became NaN or infinite, {broken[0]} among them")
    try:
        os.makedirs(temporary)
        paddle.save(weights, os.path.join(temporary, WEIGHTS_FILE))
        paddle.save(_named_optimizer_state(network, optimizer), os.path.join(temporary, OPTIMIZER_FILE))
        write_checkpoint_state(temporary, epoch, state)
        for name in os.listdir(temporary):
            with open(os.path.join(temporary, name), "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except OSError as error:
        raise UserError(f"{final}: cannot write the checkpoint: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    point_at(run_dir, "latest", epoch)
    return final


def write_checkpoint_state(path, epoch, state):
    """Writes what `read_checkpoint_state` reads into the checkpoint directory `path`."""
    with atomic_write(os.path.join(path, CHECKPOINT_FILE)) as file:
        json.dump({"format": CHECKPOINT_FORMAT, "epoch": epoch, **state}, file, indent=1)


def point_at(run_dir, name, epoch):
    """Makes the link `<run_dir>/<name>` (latest, best) point at the checkpoint of `epoch`, in one step."""
    link = os.path.join(run_dir, name)
    temporary = f"{link}.tmp{os.getpid()}"
    try:
        os.symlink(str(epoch), temporary)
        if os.path.isdir(link) and not os.path.islink(link):
            shutil.rmtree(link)  # a run that was copied without its links
        os.replace(temporary, link)
    except OSError as error:
        raise UserError(f"{link}: cannot make this a link to {epoch}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def checkpoint_epochs(run_dir):
    """The epochs whose checkpoints are in `run_dir`, rising."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    return sorted(int(n) for n in names if n.isdigit() and os.path.exists(os.path.join(run_dir, n, CHECKPOINT_FILE)))


def remove_checkpoints(run_dir, epochs):
    for epoch in epochs:
        shutil.rmtree(os.path.join(run_dir, str(epoch)), ignore_errors=True)


def remove_old_checkpoints(run_dir, keep):
    """Deletes all but the `keep` newest epochs and those that `latest` and `best` point at, and a run set aside."""
    pointed = {os.path.basename(os.path.realpath(os.path.join(run_dir, name))) for name in ("latest", "best")}
    old = checkpoint_epochs(run_dir)[:-keep]
    remove_checkpoints(run_dir, [epoch for epoch in old if str(epoch) not in pointed])
    shutil.rmtree(os.path.join(run_dir, SET_ASIDE), ignore_errors=True)


def set_run_aside(run_dir):
    """Moves the checkpoints and the log of an earlier run, and nothing else, to `<run_dir>/replaced/`.

    There they stay until the new run has a checkpoint of its own. What is there already is kept: then the run to set
    aside is one that never came to its first checkpoint.
    """
    aside = os.path.join(run_dir, SET_ASIDE)
    names = [str(epoch) for epoch in checkpoint_epochs(run_dir)] + ["latest", "best", LOG_FILE]
    names = [name for name in names if os.path.lexists(os.path.join(run_dir, name))]
    try:
        if names and not os.path.isdir(aside):
            os.makedirs(aside)
        for name in names:
            path, target = os.path.join(run_dir, name), os.path.join(aside, name)
            if not os.path.lexists(target):
                os.rename(path, target)
            elif os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot set the earlier run aside: {error.strerror}") from None


def read_checkpoint_state(path):
    """The dict that `save_checkpoint` was given as `state`, of the checkpoint directory `path`."""
    file_name = os.path.join(path, CHECKPOINT_FILE)
    try:
        with open(file_name) as file:
            state = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: not a checkpoint directory of train.py ({error.strerror}: {file_name})") from None
    except ValueError as error:
        raise UserError(f"{file_name}: not readable as a checkpoint's description: {error}") from None
    if state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{file_name}: checkpoint format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}")
    return state


def _named_optimizer_state(network, optimizer):
    """{"<structured parameter name>/<accumulator>": array} of an optimizer."""
    # The longest generated name first, so that no name is mistaken for the beginning of another.
    names = sorted(((p.name, n) for n, p in network.named_parameters()), key=lambda pair: -len(pair[0]))
    named = {}
    for key, value in optimizer.state_dict().items():
        if key == "master_weights":
            continue  # rebuilt from the weights, which are kept in float32
        owner = next((pair for pair in names if key.startswith(pair[0] + "_")), None)
        if owner:
            named[f"{owner[1]}/{key[len(owner[0]) + 1 :]}"] = value.numpy()
    return named


def load_optimizer_state(network, optimizer, named):
    """Puts back what `_named_optimizer_state` wrote."""
    import paddle

    generated = {n: p.name for n, p in network.named_parameters()}
    state = {}
    for key, value in named.items():
        name, accumulator = key.rsplit("/", 1)
        if name not in generated:
            raise UserError(f"the optimizer's state has {name!r}, which this network lacks")
        state[f"{generated[name]}_{accumulator}"] = paddle.to_tensor(value)
    optimizer.set_state_dict(state)


# ---------------------------------------------------------------- progress


def log_json(path, record):
    """Appends one JSON object to the log `path`."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def duration(seconds):
    """Seconds as h:mm:ss."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def progress(items, total, what):
    """Yields `items`; where stderr is a terminal, shows there how many of `total` are done and the time left.

    `len(items[i])` images are counted for each item (a reader.Batch).
    """
    if not sys.stderr.isatty():
        yield from items
        return
    start, done = time.time(), 0
    for item in items:
        yield item
        done += len(item.index)
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


def extract(network, samples, batches, on_batch=None):
    """Runs the network in evaluation mode over `batches` of `samples` (see reader.read_in_order).

    Args:
        on_batch: called as on_batch(batch, logits) after each batch; logits float32 [B, C] or None without a head.

    Returns: embeddings float32 [N, D], and the pictures' positions in the list, int64 [N].
    Raises: UserError where not one picture could be read.
    """
    import numpy as np
    import paddle

    network.eval()
    features, indices = [], []
    with paddle.no_grad():
        for batch in progress(batches, len(samples.paths), "images"):
            embedding, logits = network(paddle.to_tensor(batch.image))
            features.append(embedding.numpy().astype(np.float32, copy=False))
            indices.append(batch.index)
            if on_batch:
                clear_progress()
                on_batch(batch, None if logits is None else logits.numpy().astype(np.float32, copy=False))
    if not features:
        raise UserError("not one image could be read")
    return np.concatenate(features), np.concatenate(indices)
