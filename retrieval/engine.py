"""Feature extraction on the CPU through Paddle's inference engine (oneDNN).

    network = engine.prepare(network, options, image_shape, pictures)      # what extraction.extract is then given

The network is traced once. What comes of it, a model in the format of `paddle.jit.save`, is kept in this user's cache
folder, so that the next run need not trace it again:

    <cache>/inference/<hash of their path>/<hash of the weights>_<hash of all else>/
    with model.json (2.x: model.pdmodel), model.pdiparams and sums.json

where <cache> is weights.imagenet.cache_folder(). Nothing beside the weights is read, written or removed.

Everything here has a way out: a model that can't be traced, written, read or is not as exact as it should be costs one
line on stderr, and the network is run as it is. Importing this file does not import paddle.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time

import numpy as np

import files
from runtime import gpu, parallel, process
from utility import UserError
from weights.imagenet import cache_folder

# Tracing, loading and trying a ResNet50 takes 1.5 seconds on two cores; the engine saves 11 ms a picture of 224 x 224.
# Networks that are faster to trace are for small pictures.
MIN_PIXELS = 128 * 224 * 224
MODEL, SUMS = "model", "sums.json"
KEPT = 4  # models of the same weights, as for several picture sizes
# Relative errors that the engine may have on the pictures it is tried with before it is used.
TOLERANCE = {"float32": 1e-4, "bf16": 0.2}


# ---------------------------------------------------------------- for the scripts


def add_engine_arguments(parser):
    """Adds the flags with which eval.py and infer.py choose how a network runs on the CPU."""
    add = parser.add_argument_group("speed on the CPU").add_argument
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
        choices=tuple(TOLERANCE),
        default="float32",
        help="bf16: twice as fast on a CPU that has instructions for it (avx512_bf16 or amx_bf16), features differ by "
        "about 2%%; others stay with float32, and a line says so",
    )


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How a network runs on the CPU, in the flags' words."""

    engine: str = "auto"
    precision: str = "float32"


def prepare(network, options, image_shape, pictures, weights_file=""):
    """What is to run `network` over `pictures` pictures: itself, or a function as of `compile_network`.

    Args:
        options: EngineOptions.
        image_shape: [3, H, W].
        weights_file: where its weights are from; "" for random ones, of which nothing is kept.

    Raises: UserError where flags contradict each other.
    """
    precision = options.precision
    if precision == "bf16" and options.engine == "eager":
        raise UserError("--precision=bf16 is the inference engine's: leave out --engine=eager")
    if precision == "bf16" and (why := no_bf16()):
        if parallel.is_first():
            print(f"note: --precision=bf16, but {why}: running in float32", file=sys.stderr)
        precision = "float32"
    _, height, width = image_shape
    small = pictures * height * width < MIN_PIXELS
    if process.on_gpu() or options.engine == "eager" or (options.engine == "auto" and small and precision == "float32"):
        return network
    start = time.time()
    try:
        run = compile_network(network, image_shape, precision, model_folders(weights_file))
    except Exception as error:  # whatever it is: the network itself can still be run
        if parallel.is_first():
            print(f"warning: running without the inference engine, slower: {gpu.first_line(error)}", file=sys.stderr)
        return network
    print(f"inference engine: {precision}, {run.threads} threads, {run.source}, {time.time() - start:.1f} sec")
    return run


def no_bf16():
    """Why bfloat16 would not be faster here, or "" where it is."""
    if process.on_gpu():
        return "it is for the CPU"
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
        folders: where the model may be kept, the best first; where none can be written to, it is not.

    Returns: function uint8 [N, H, W, 3] -> (embedding float32 [N, D], logits float32 [N, C] or None), NumPy arrays, for
        any N; its `source` says in words where the model is from, its `threads` how many it takes.
    Raises: any exception where that is impossible or the outputs are not the network's.
    """
    network.eval()
    key = model_key(network, image_shape)
    with silence():
        for folder in folders:
            path = os.path.join(folder, key)
            if os.path.islink(folder):
                continue
            if files.foreign_entry(path, _PARTS):  # also where there is none
                continue
            # Whatever is wrong with it, it can be made again.
            with contextlib.suppress(Exception):
                _check_sums(path)
                run = load(path, precision)
                check(run, network, image_shape, precision)
                run.source = f"as kept in {folder}"
                return run
            files.remove_folder(path, _PARTS)
        for folder in [*(folder for folder in folders if not os.path.islink(folder)), None]:
            try:
                return _make(network, image_shape, precision, folder, key)
            except Exception:  # also what Paddle makes of a full disk
                if folder is None:
                    raise


def _make(network, image_shape, precision, folder, key):
    """Traces and loads a model; keeps it in `folder` unless that is None."""
    if folder:
        os.makedirs(folder, exist_ok=True)
        needed = 1.5 * sum(value.size * 4 for value in network.state_dict().values())
        if shutil.disk_usage(folder).free < needed + 2**20:
            raise OSError(f"{folder}: the disk is full")  # Paddle would not notice
    with files.temporary_folder(os.path.join(folder or tempfile.gettempdir(), key)) as temporary:
        trace(network, temporary, image_shape)
        run = load(temporary, precision)
        check(run, network, image_shape, precision)
        run.source = "compiled"
        if folder:
            _write_sums(temporary)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(temporary, os.path.join(folder, key))
            _remove_old(folder, key)
            run.source += f" and kept in {folder}"
        return run


def load(folder, precision):
    """The function over a model that `trace` has written; see compile_network."""
    from paddle import inference

    program = os.path.join(folder, f"{MODEL}.json")
    if not os.path.exists(program):
        program = os.path.join(folder, f"{MODEL}.pdmodel")
    config = inference.Config(program, os.path.join(folder, f"{MODEL}.pdiparams"))
    config.disable_glog_info()
    config.disable_gpu()
    config.enable_mkldnn()
    if not config.mkldnn_enabled():
        raise RuntimeError("this paddlepaddle has no oneDNN")
    if precision == "bf16":
        config.enable_mkldnn_bfloat16()
    if hasattr(config, "enable_new_ir"):  # 3.x: without both, the memory optimisation fails
        config.enable_new_ir(True)
        config.enable_new_executor(True)
    config.enable_memory_optim()
    threads = _threads()
    config.set_cpu_math_library_num_threads(threads)
    predictor = inference.create_predictor(config)
    image = predictor.get_input_handle(predictor.get_input_names()[0])
    outputs = [predictor.get_output_handle(name) for name in predictor.get_output_names()]

    def run(pictures):
        pictures = np.ascontiguousarray(pictures)
        image.reshape(pictures.shape)
        image.copy_from_cpu(pictures)
        predictor.run()
        embedding, *logits = (output.copy_to_cpu() for output in outputs)
        return embedding, logits[0] if logits else None

    run.threads = threads
    run.names = predictor.get_input_names() + predictor.get_output_names()
    return run


def _threads():
    try:
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    except (KeyError, ValueError):  # unset, or 4,2 for nested loops
        return max(1, process.cpu_count() // parallel.local_world_size())


def check(run, network, image_shape, precision):
    """Tries the function against the network: the engine's code depends on the processor, and not all were tested.

    Raises: RuntimeError where its outputs are others.
    """
    import paddle

    pictures = np.random.default_rng(0).integers(0, 256, (2, *image_shape[1:], 3), np.uint8)
    with paddle.no_grad():
        wanted = [output.numpy() for output in network(paddle.to_tensor(pictures)) if output is not None]
    found = [output for output in run(pictures) if output is not None]
    for here, there in zip(wanted, found):
        error = np.linalg.norm(here - there) / max(np.linalg.norm(here), 1e-12) if here.shape == there.shape else np.inf
        if not error <= TOLERANCE[precision]:  # NaN included
            raise RuntimeError(f"its outputs are off by {error:.2g}")
    if len(wanted) != len(found):
        raise RuntimeError("it has other outputs")


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

    weights = hashlib.sha256()
    for name, value in [*network.state_dict().items(), *network.named_buffers()]:
        array = np.ascontiguousarray(value.numpy())
        weights.update(f"{name} {array.dtype} {array.shape} ".encode())
        weights.update(array)
    rest = hashlib.sha256(f"{network} {list(image_shape)} {paddle.__version__}".encode())
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for path in [os.path.abspath(__file__), *sorted(glob.glob(os.path.join(here, "models", "*.py")))]:
        with open(path, "rb") as file:
            rest.update(file.read())
    return f"{weights.hexdigest()[:16]}_{rest.hexdigest()[:16]}"


def _sums(folder):
    sums = {}
    for name in sorted(os.listdir(folder)):
        if name.startswith(MODEL):
            with open(os.path.join(folder, name), "rb") as file:
                data = file.read()
            sums[name] = hashlib.sha256(data).hexdigest()
    return sums


def _write_sums(folder):
    with files.atomic_write(os.path.join(folder, SUMS)) as file:
        json.dump(_sums(folder), file)


def _check_sums(folder):
    """Raises ValueError or OSError where the folder is not as `_write_sums` left it."""
    with open(os.path.join(folder, SUMS)) as file:
        if json.load(file) != _sums(folder):
            raise ValueError(f"{folder}: damaged")


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
_PARTS = re.compile(r"model\.(json|pdmodel|pdiparams|pdiparams\.info)|sums\.json(\.tmp\w+)?")
