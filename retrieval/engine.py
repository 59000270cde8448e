"""Feature extraction on the CPU through Paddle's inference engine (oneDNN).

    network = engine.prepare(network, options, image_shape, pictures)      # what extraction.extract is then given

The network is traced once. What comes of it, a model in the format of `paddle.jit.save`, is kept in this user's cache
folder, so that the next run need not trace it again:

    <cache>/inference/<hash of their path>/<hash of the weights>_<hash of all else>/
    with model.json (2.x: model.pdmodel), model.pdiparams and sums.json

where <cache> is weights.imagenet.cache_folder(). Nothing beside the weights is read, written or removed.

A kept model is a program that Paddle parses and runs in this process, and its parsers trust what they read. So

* the folders are this user's, no links, and nobody else may write them;
* both files must be those that were written here: sums.json holds the program's SHA-256 and the times of the files'
  last changes, which no copy, archive or backup brings along. There is no list of operators that a program may hold:
  who can set these times can change the scripts as well;
* the parameters must be the network's own, byte for byte;
* while it is read, a mark lies beside it: one that has ended a process is not read again, but made anew;
* what it says of the run's own pictures is compared with the network, of some that are drawn anew each time.

Everything here has a way out: a model that can't be traced, written, read or is not as exact as it should be costs one
line on stderr, and the network is run as it is; once features that may be wrong have been given away, the run ends.
Importing this file does not import paddle.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time

import numpy as np

import files
from retrieval import exported_run, extraction
from runtime import gpu, parallel, process
from utility import UserError
from weights.imagenet import cache_folder
from weights.raw import hash_of_arrays

# Tracing, loading and trying a ResNet50 takes 1.5 seconds on two cores; the engine saves 11 ms a picture of 224 x 224.
# Networks that are faster to trace are for small pictures.
MIN_PIXELS = 128 * 224 * 224
MODEL, SUMS, MARK = "model", "sums.json", "being_read"
KEPT = 4  # models of the same weights, as for several picture sizes
# Relative errors that the engine may have in any picture's outputs.
TOLERANCE = {"float32": 1e-4, "bf16": 0.2}
# What Paddle calls the values of --precision.
TYPES = {"float32": "float32", "bf16": "bfloat16", "float16": "float16"}
# Pictures that the network looks at, too: of the first batch, and of all others this share, which costs half a percent.
FIRST, SHARE = 2, 1 / 256


# ---------------------------------------------------------------- for the scripts


def add_engine_arguments(parser):
    """Adds the flags with which eval.py and infer.py choose how a network runs on the CPU."""
    add = parser.add_argument_group("speed").add_argument
    add(
        "--engine",
        choices=("auto", "inference", "eager"),
        default="auto",
        help="inference: trace the network and run it in Paddle's inference engine, which takes a second or two to "
        "start and about 100 MB in ~/.cache/deep_metric_learning to start faster the next time; eager: run it "
        f"as it is; auto: inference for {MIN_PIXELS // 224**2} pictures of 224 x 224 or more, or as many pixels of "
        "other sizes. Features are equal but for rounding (relative 1e-4 at most). A GPU always runs it as it is",
    )
    add(
        "--precision",
        choices=("float32", "bf16", "float16"),
        default="float32",
        help="bf16: twice as fast on a CPU that has instructions for it (avx512_bf16 or amx_bf16), features differ by "
        "about 2%%; on a GPU both are mixed precision, float16 the more exact and for those before Ampere, too; where "
        "there is no such thing it stays with float32, and a line says so",
    )


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How a network runs, in the flags' words."""

    engine: str = "auto"
    precision: str = "float32"


def prepare(network, options, image_shape, pictures, weights_file=""):
    """What is to run `network` over `pictures` pictures: itself, or a function as of `compile_network`, under watch.

    Args:
        network: an EmbeddingNet, or what refine.refined made of one; a function, as over an exported model, stays.
        options: EngineOptions.
        image_shape: [3, H, W].
        weights_file: where its weights are from; "" for random ones, of which nothing is kept.

    Raises: UserError where flags contradict each other. So does the function, see `_watched`.
    """
    import paddle

    if not isinstance(network, paddle.nn.Layer):
        return network
    if options.precision == "bf16" and options.engine == "eager" and not process.on_gpu():
        raise UserError("--precision=bf16 is the inference engine's: leave out --engine=eager")
    precision = precision_in_use(options.precision)
    if precision != options.precision and parallel.is_first():
        print(f"note: --precision={options.precision}, but {lacks(options.precision)}: running in float32",
              file=sys.stderr)  # fmt: skip
    if process.on_gpu():
        network.eval()
        return extraction.OnGpu(network, TYPES[precision])
    _, height, width = image_shape
    small = pictures * height * width < MIN_PIXELS
    if options.engine == "eager" or (options.engine == "auto" and small and precision == "float32"):
        return network
    start = time.time()
    try:
        run = compile_network(network, image_shape, precision, model_folders(weights_file))
    except Exception as error:  # whatever it is: the network itself can still be run
        if parallel.is_first():
            _warn(error)
        return network
    print(f"inference engine: {precision}, {run.threads} threads, {run.source}, {time.time() - start:.1f} sec")
    return _watched(run, network, precision)


def _warn(error):
    print(f"warning: running without the inference engine, slower: {gpu.first_line(error)}", file=sys.stderr)


def _watched(run, network, precision):
    """The function `run`, of which some pictures' outputs are compared with the network's.

    Where they differ in the first batch, or `run` fails, the network takes over and a line says so. The function raises
    a UserError where they differ later: nobody knows which of the features before are wrong. The model is not kept.
    """
    draw = np.random.default_rng()
    eager = extraction.eager(network)
    use, first = run, True

    def watched(pictures):
        nonlocal use, first
        if use is eager:
            return eager(pictures)
        rows = draw.permutation(len(pictures))[: FIRST if first else draw.binomial(len(pictures), SHARE)]
        failed = wrong = ""
        try:
            outputs = run(pictures)
            if {len(x) for x in outputs if x is not None} != {len(pictures)}:
                raise RuntimeError("it has other outputs")
            if len(rows):
                wrong = difference(eager(pictures[rows]), [x if x is None else x[rows] for x in outputs], precision)
        except Exception as error:  # Paddle's have many types
            failed = error
        if not (failed or wrong):
            first = False
            return outputs
        if run.folder:
            files.remove_folder(run.folder, _PARTS)
        if wrong and not first:
            raise UserError(f"the inference engine was right at first, but now {wrong}: give --engine=eager")
        _warn(failed or wrong)
        use = eager
        return eager(pictures)

    return watched


def precision_in_use(precision):
    """The precision that --precision means on this machine."""
    return "float32" if lacks(precision) else precision


def lacks(precision):
    """Why a value of --precision would not be faster here than float32, or "" where it is, or is float32."""
    if precision == "float32":
        return ""
    if process.on_gpu():
        import paddle

        can = gpu.computes_in(paddle, TYPES[precision])
        return "" if can else f"this GPU can't compute in {TYPES[precision]}"
    if precision == "float16":
        return "that is for a GPU"
    return "" if process.cpu_flags() & {"avx512_bf16", "amx_bf16"} else "this CPU has no instructions for it"


def model_folders(weights_file):
    """Where to keep the models of `weights_file`: in this user's cache alone; [] for random weights."""
    if not weights_file:
        return []
    elsewhere = hashlib.sha256(os.fsencode(os.path.realpath(weights_file))).hexdigest()[:16]
    return [os.path.join(cache_folder(), "inference", elsewhere)]


# ---------------------------------------------------------------- compiling


def compile_network(network, image_shape, precision="float32", folders=()):
    """Compiles an EmbeddingNet for the CPU.

    Args:
        image_shape: [3, H, W].
        precision: float32 or bf16.
        folders: where the model may be kept, the best first; where none is this user's or can be written to, it is not.

    Returns: function uint8 [N, H, W, 3] -> (embedding float32 [N, D], logits float32 [N, C] or None), NumPy arrays, for
        any N; its `source` says in words where the model is from, its `threads` how many it takes, and its `folder` is
        that in which the model is kept, or None.
    Raises: any exception where that is impossible or the outputs are not the network's.
    """
    network.eval()
    key = model_key(network, image_shape)
    folders = [folder for folder in folders if _is_private(folder)]
    for folder in folders:
        path = os.path.join(folder, key)
        if files.foreign_entry(path, _PARTS):  # also where there is none
            continue
        # Whatever is wrong with it, it can be made again.
        with contextlib.suppress(Exception), _marked(path):
            _check_sums(path)
            _check_parameters(path, network)
            run = _tried(path, network, image_shape, precision)
            run.source, run.folder = f"as kept in {folder}", path
            return run
        files.remove_folder(path, _PARTS)
    for folder in [*folders, None]:
        try:
            return _make(network, image_shape, precision, folder, key)
        except Exception:  # also what Paddle makes of a full disk
            if folder is None:
                raise


def _make(network, image_shape, precision, folder, key):
    """Traces and loads a model; keeps it in `folder` unless that is None."""
    if folder:
        needed = 1.5 * sum(value.size * 4 for value in network.state_dict().values())
        if shutil.disk_usage(folder).free < needed + 2**20:
            raise OSError(f"{folder}: the disk is full")  # Paddle would not notice
    with files.temporary_folder(os.path.join(folder or tempfile.gettempdir(), key)) as temporary:
        with silence():
            trace(network, temporary, image_shape)
        run = _tried(temporary, network, image_shape, precision)
        run.source, run.folder = "compiled", None
        if folder:
            _write_sums(temporary)
            run.folder = os.path.join(folder, key)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(temporary, run.folder)
            _remove_old(folder, key)
            run.source += f" and kept in {folder}"
        return run


def _tried(folder, network, image_shape, precision):
    with silence():
        run = load(folder, precision)
        check(run, network, image_shape, precision)
    return run


def load(folder, precision):
    """The function over a model that `trace` has written; see compile_network."""
    threads = _threads()
    config = exported_run.make_config(program_file(folder), _parameter_file(folder), threads)
    if not config.mkldnn_enabled():
        raise RuntimeError("this paddlepaddle has no oneDNN")
    if precision == "bf16":
        config.enable_mkldnn_bfloat16()
    model = exported_run.make_function(config)

    def run(pictures):
        embedding, *logits = model(pictures)
        return embedding, logits[0] if logits else None

    run.threads, run.names = threads, model.names
    return run


def _threads():
    try:
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    except (KeyError, ValueError):  # unset, or 4,2 for nested loops
        return max(1, process.cpu_count() // parallel.local_world_size())


def check(run, network, image_shape, precision):
    """Tries a function against the network, on pictures that nobody knows before: one of noise, one of large squares.

    The engine's code depends on the processor, and not all were tested. Raises: RuntimeError where its outputs differ.
    """
    _, height, width = image_shape
    draw = np.random.default_rng()
    pictures = draw.integers(0, 256, (2, height, width, 3), np.uint8)
    pictures[1] = pictures[1, ::16, ::16].repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    if wrong := difference(extraction.eager(network)(pictures), run(pictures), precision):
        raise RuntimeError(wrong)


def difference(wanted, found, precision):
    """What is wrong with the outputs `found`, in words; "" where each picture's are those wanted within TOLERANCE.

    Args:
        wanted, found: arrays [N, ...] or None, the outputs for the same pictures.
    """
    wanted, found = ([output for output in outputs if output is not None] for outputs in (wanted, found))
    if [output.shape for output in wanted] != [output.shape for output in found]:
        return "it has other outputs"
    for here, there in zip(wanted, found):
        with np.errstate(all="ignore"):
            error = np.linalg.norm(here - there, axis=1) / np.maximum(np.linalg.norm(here, axis=1), 1e-12)
        if not np.all(error <= TOLERANCE[precision]):  # NaN included
            return f"its outputs are off by {error.max():.2g}"
    return ""


def trace(network, folder, image_shape, normalise=False):
    """Writes `model.json` (3.x) or `model.pdmodel` (2.x) and `model.pdiparams` to `folder`.

    Args:
        network: an EmbeddingNet in evaluation mode.
        normalise: the model's only output is the embedding at length 1; else embedding and, with a head, logits.
    """
    import paddle

    from models.embedding_net import Unit

    whole = Unit(network) if normalise else network
    whole.eval()
    try:
        spec = [paddle.static.InputSpec([None, *image_shape[1:], 3], "uint8", "image")]
        # The default backend of 3.x is a compiler that CPU wheels lack.
        static = paddle.jit.to_static(whole, input_spec=spec, backend=None, full_graph=True)
        paddle.jit.save(static, os.path.join(folder, MODEL))
        with contextlib.suppress(OSError):  # 2.x: what paddle.jit.load needs for training
            os.remove(os.path.join(folder, f"{MODEL}.pdiparams.info"))
    finally:
        # Tracing leaves each layer with a `forward` of its own, before the class's.
        for layer in whole.sublayers(include_self=True):
            vars(layer).pop("forward", None)


@contextlib.contextmanager
def silence():
    """Keeps off the terminal what Paddle's C++ prints, to both streams, about passes, operators and executors."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        with open(os.devnull, "w") as nothing:
            for number, _ in kept:
                os.dup2(nothing.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


# ---------------------------------------------------------------- what is kept


def model_key(network, image_shape):
    """The name of a model's folder: <hash of the tensors>_<hash of all else that the model depends on>.

    The precision is not part of it: it is chosen when a model is loaded, and does not change the files.
    """
    import paddle

    tensors = [*network.state_dict().items(), *network.named_buffers()]
    weights = hash_of_arrays((name, value.numpy()) for name, value in tensors)
    rest = hashlib.sha256(f"{network} {list(image_shape)} {paddle.__version__}".encode())
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for path in [os.path.abspath(__file__), *sorted(glob.glob(os.path.join(here, "models", "*.py")))]:
        with open(path, "rb") as file:
            rest.update(file.read())
    return f"{weights[:16]}_{rest.hexdigest()[:16]}"


def program_file(folder):
    """The path of a model's program: of 3.x where there is one, else of 2.x."""
    path = os.path.join(folder, f"{MODEL}.json")
    return path if os.path.exists(path) else os.path.join(folder, f"{MODEL}.pdmodel")


def _parameter_file(folder):
    return os.path.join(folder, f"{MODEL}.pdiparams")


def _sums(folder):
    with files.open_file(program_file(folder), files.MOST_JSON) as file:
        digest = hashlib.sha256(file.read()).hexdigest()
        paths = file.fileno(), _parameter_file(folder)
        return {"sha256": digest, "changed": [os.stat(path).st_ctime_ns for path in paths]}


def _write_sums(folder):
    with files.atomic_write(os.path.join(folder, SUMS)) as file:
        json.dump(_sums(folder), file)


def _check_sums(folder):
    """Raises ValueError or OSError where program and parameters are not the files that `_write_sums` has seen."""
    if files.read_json(os.path.join(folder, SUMS)) != _sums(folder):
        raise ValueError(f"{folder}: damaged")


def _check_parameters(folder, network):
    """Raises an exception where a model's parameters are not, byte for byte, the network's tensors in some order.

    The file has, for each: 16 bytes 0, the size of what follows as int32, its type (float32) and lengths as a protobuf
    message, and its data.
    """
    tensors = dict([*network.state_dict().items(), *network.named_buffers()])
    left = {}
    for tensor in tensors.values():
        array = tensor.numpy()
        lengths = b"\x08\x05" + b"".join(b"\x10" + _varint(length) for length in array.shape)
        left.setdefault(bytes(16) + len(lengths).to_bytes(4, "little") + lengths, []).append(array.tobytes())
    with files.open_file(_parameter_file(folder)) as file:
        while head := file.read(20):
            same = left[head + file.read(min(head[-4], 99))]
            same.remove(file.read(len(same[0])))
    if any(left.values()):
        raise ValueError(f"{folder}: tensors are missing")


def _varint(number):
    """A number >= 0 as protobuf writes it: 7 bits a byte, the lowest first, the high bit set in all but the last."""
    low = bytes([number & 127 | (128 if number > 127 else 0)])
    return low + _varint(number >> 7) if number > 127 else low


@contextlib.contextmanager
def _marked(folder):
    """Has a mark in a kept model's folder until the block has come to its end, and locks it against other processes.

    Raises: RuntimeError where there is one that nobody has locked: a process has died over this model, or was ended.
    """
    path = os.path.join(folder, MARK)
    with open(path, "ab") as file:
        if not _locked(file):  # another process is reading it, and will say how that ends
            yield
            return
        if file.tell():
            print("note: an earlier run ended while it read a kept model of the engine: made anew", file=sys.stderr)
            raise RuntimeError("an earlier run ended")
        file.write(b"x")
        file.flush()
        yield
        file.truncate(0)  # for who has opened it by now
        with contextlib.suppress(OSError):
            os.remove(path)


def _locked(file):
    """Locks an open file until it is closed; -> False where another process has. True where there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def _is_private(folder):
    """Makes a folder and the one around it, for this user alone; -> whether they are, and are no links.

    In what lies around these two others may write: they can put no folder there that is this user's.
    """
    try:
        os.makedirs(os.path.dirname(os.path.dirname(folder)), exist_ok=True)
        for path in (os.path.dirname(folder), folder):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            status = os.lstat(path)
            mine = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
            if not (stat.S_ISDIR(status.st_mode) and mine):
                return False
        return True
    except OSError:
        return False


def _remove_old(folder, key):
    """Deletes the models of other weights, all but the newest of these, and what ended processes have left."""
    weights = key.split("_")[0]
    with contextlib.suppress(OSError):  # other processes may do the same
        names = [name for name in os.listdir(folder) if _KEY.fullmatch(name) and name != key]  # the others are not ours
        paths = [os.path.join(folder, name) for name in names]
        paths.sort(key=os.path.getmtime, reverse=True)
        same = [p for p in paths if os.path.basename(p).startswith(f"{weights}_") and ".tmp" not in p]
        for path in paths:
            leftover = ".tmp" in os.path.basename(path)
            old = os.path.getmtime(path) < time.time() - 3600 if leftover else path not in same[: KEPT - 1]
            if old:
                files.remove_folder(path, _PARTS)


# The names of our folders, whole or being written, and of what they hold.
_KEY = re.compile(r"[0-9a-f]{16}_[0-9a-f]{16}((\.old)?\.tmp\w+)?")
_PARTS = re.compile(r"model\.(json|pdmodel|pdiparams|pdiparams\.info)|sums\.json(\.tmp\w+)?|being_read")
