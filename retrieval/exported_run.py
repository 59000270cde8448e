"""Pictures -> embeddings of length 1, by the exported model in this file's folder, without the project that trained it.

    python run.py a.jpg b.png                            a line a picture: its path, a tab, and the numbers
    python run.py a.jpg b.png --output=embeddings.npz    features float32 [N, D] and paths [N]

It needs numpy, opencv-python-headless (4.11 or later), pillow and paddlepaddle, and the .py files that came with it. In
an exported folder it is run.py; in the project it is retrieval/exported_run.py, with which eval.py and infer.py open
such a folder, too.
"""

import os
import sys

if __name__ == "__main__":  # the modules beside it, also where Python is isolated; no other file is to appear there
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    sys.dont_write_bytecode = True

import json
import warnings
import zipfile

import numpy as np
from PIL import Image

import files
import transforms
import utility
from transforms import MAX_PIXELS, TEST_TRANSFORMS, BadImage
from utility import UserError, number, plain

DESCRIPTION = "description.json"
PROGRAMS, PARAMETERS = ("model.json", "model.pdmodel"), "model.pdiparams"
MOST_SIDE = 4096  # pixels of a picture's side


def parse_args():
    parser = utility.make_parser(__doc__)
    # fmt: off
    add = parser.add_argument
    add("pictures", nargs="+", help="files of pictures")
    add("--output", default="", help="write the embeddings to this .npz file rather than to the terminal")
    add("--batch_size", type=number(int, low=1), default=32, help="pictures at once; changes no embedding")
    add("--on_bad_image", choices=("fail", "skip"), default="fail",
        help="what a missing or broken picture does: end the run, or be counted and left out")
    add("--max_pixels", type=number(int, low=1, high=2**30), default=MAX_PIXELS,
        help="a picture with more counts as a broken one")
    # fmt: on
    return parser.parse_args()


def main():
    args = parse_args()
    if args.output:
        if not args.output.endswith(".npz"):
            raise UserError(f"--output={args.output}: must end in .npz")
        files.check_output(args.output, is_feature_file, "a file of embeddings")
    Image.MAX_IMAGE_PIXELS = None  # --max_pixels is in its place
    warnings.filterwarnings("ignore", module="PIL")  # on odd EXIF data, palettes, and sizes that are still accepted
    folder = os.path.dirname(os.path.abspath(__file__))
    description = read_description(folder)
    embed, features, paths, bad = None, [], [], []
    for start in range(0, len(args.pictures), args.batch_size):
        names = args.pictures[start : start + args.batch_size]
        good, images = read_pictures(names, description, args.max_pixels, bad if args.on_bad_image == "skip" else None)
        if not good:
            continue
        embed = embed or open_model(folder, description)  # not before a mistake in the first pictures is said
        embedding = embed(images)
        if not args.output:
            for name, row in zip(good, embedding):
                print(plain(name, 1000), " ".join(f"{value:.8g}" for value in row), sep="\t")
            continue
        paths += good
        features.extend(embedding)
    if bad:
        print(f"warning: skipped {len(bad)} bad images; the first: {plain(bad[0], 2000)}", file=sys.stderr)
    if len(bad) == len(args.pictures):
        raise UserError("not one image could be read")
    if args.output:
        with files.atomic_write(args.output, "wb") as file:
            np.savez(file, features=np.stack(features), paths=np.array(paths), folder=np.array([os.getcwd()]))
        print(f"wrote {len(paths)} features of size {len(features[0])} to {plain(args.output, 1000)}")


def read_pictures(paths, description, max_pixels, bad=None):
    """Reads and prepares pictures as the model wants them; -> (paths of the good ones, uint8 RGB [N, H, W, 3]).

    Args:
        description: as of `read_description`.
        bad: a list that a text for each bad picture is added to; None: the first is a UserError.
    """
    height, width = description["input"]["shape"][1:3]
    transform = TEST_TRANSFORMS[description["transform"]["name"]]
    good, images = [], []
    for path in paths:
        try:
            images.append(transform(transforms.load(path, max_pixels), (height, width)))
            good.append(path)
        except BadImage as error:
            if bad is None:
                raise UserError(f"{plain(path, 1000)}: {error} (--on_bad_image=skip goes on without)") from None
            bad.append(f"{plain(path, 1000)}: {error}")
    return good, np.array(images, np.uint8)


_IN_FEATURES = {"features", "paths", "labels", "classes", "made_by", "folder"}


def is_feature_file(path):
    """Whether a file is one of features that infer.py or this has written before."""
    try:
        with np.load(path) as file:
            return {"features", "paths"} <= set(file.files) <= _IN_FEATURES
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError, TypeError):
        return False


# ---------------------------------------------------------------- an exported folder


def is_exported(folder):
    """Whether a folder holds an exported model, by the names in it."""
    return all(os.path.lexists(os.path.join(folder, name)) for name in (DESCRIPTION, PARAMETERS))


def read_description(folder):
    """The description of an exported model, whose values that are used have the types and ranges that `export` writes.

    Raises: UserError
    """
    path = os.path.join(folder, DESCRIPTION)
    try:
        description = files.read_json(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not readable as an exported model's description: {why}") from None
    for names, is_right in _RIGHT.items():
        value = description
        for name in names.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not is_right(value):
            found = plain(json.dumps(value), 50)
            raise UserError(f"{path}: not readable as an exported model's description: {names} is {found}")
    return description


def _is_text(value):
    return isinstance(value, str)


def _is_count(value, most=2**31 - 1):
    return type(value) is int and 1 <= value <= most


def _is_input(value):
    """Whether a value is ["N", height, width, 3]."""
    if not (isinstance(value, list) and len(value) == 4):
        return False
    return value[0] == "N" and value[3] == 3 and all(_is_count(side, MOST_SIDE) for side in value[1:3])


# What the values of a description must be, nested names with a dot between them. Older exports lack some.
_RIGHT = {
    "model": _is_text,
    "pooling": _is_text,
    "refined": lambda value: value is None or _is_text(value),
    "chosen_on": lambda value: value is None or _is_text(value),
    "made_by": lambda value: value is None or (isinstance(value, list) and all(map(_is_text, value))),
    "paddle": _is_text,
    "files": lambda value: isinstance(value, list) and value in [[program, PARAMETERS] for program in PROGRAMS],
    "input.shape": _is_input,
    "transform.name": lambda value: _is_text(value) and value in TEST_TRANSFORMS,
    "output.shape": lambda value: isinstance(value, list) and len(value) == 2 and _is_count(value[1]),
    "sums": lambda value: value is None or (isinstance(value, dict) and all(map(_is_text, value.values()))),
}


def open_model(folder, description):
    """The exported model in a folder, on the CPU.

    Paddle parses its files and runs what they say in this process: that is to trust them.

    Args:
        description: as of `read_description`.

    Returns: function uint8 RGB [N, H, W, 3] -> embedding float32 [N, D], NumPy arrays, for any N; it raises a UserError
        where the model gives anything else.
    Raises: UserError where the files are not those that were written, or where Paddle can't run them.
    """
    paths = [os.path.join(folder, name) for name in description["files"]]
    for path in paths:
        _check_file(path, description)
    size = description["output"]["shape"][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a compiler's cache that nobody needs here
        from paddle import inference
    try:
        if description["files"][0] == PROGRAMS[0] and not hasattr(inference.Config, "enable_new_ir"):
            raise RuntimeError("it needs version 3")  # of which 2.6 would die
        run = make_function(make_config(*paths, _threads()))
    except Exception as error:  # Paddle's have many types
        raise _failed(folder, description, error) from None

    def embed(pictures):
        try:
            outputs = run(pictures)
        except Exception as error:
            raise _failed(folder, description, error) from None
        found = [(output.dtype.name, list(output.shape)) for output in outputs]
        if found != [("float32", [len(pictures), size])]:
            raise UserError(f"{folder}: {found} comes out of the model in place of one float32 {[len(pictures), size]}")
        return outputs[0]

    embed(np.zeros((1, *description["input"]["shape"][1:]), np.uint8))
    return embed


def _check_file(path, description):
    """Raises a UserError where a file of the model can't be read, or is not the one that was written."""
    wanted = (description.get("sums") or {}).get(os.path.basename(path))
    try:
        with files.open_file(path):
            pass
        if wanted and files.sha256(path) != wanted:
            raise UserError(f"{path}: damaged or replaced: not the file that was written with {DESCRIPTION}")
    except OSError as error:
        raise UserError(f"{path}: cannot read this part of the exported model: {error.strerror}") from None


def _failed(folder, description, error):
    import paddle

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error: " in line]  # Paddle's begin with a stack
    why = plain((telling or lines or [type(error).__name__])[0], 200)
    written = plain(description["paddle"], 50)
    return UserError(f"{folder}: paddlepaddle {paddle.__version__} cannot run it (written by {written}): {why}")


def _threads():
    try:
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    except (KeyError, ValueError):  # unset, or 4,2 for nested loops
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_config(program, parameters, threads):
    """Paddle's inference.Config for a model's two files on the CPU, with oneDNN where this paddlepaddle has it."""
    from paddle import inference

    config = inference.Config(program, parameters)
    config.disable_glog_info()
    config.disable_gpu()
    config.enable_mkldnn()
    if program.endswith(".json"):  # of 3.x: without both, the memory optimisation fails; a .pdmodel fails with them
        config.enable_new_ir(True)
        config.enable_new_executor(True)
    config.enable_memory_optim()
    config.set_cpu_math_library_num_threads(threads)
    return config


def make_function(config):
    """The model of an inference.Config as a function uint8 [N, H, W, 3] -> list of its outputs, NumPy arrays.

    Its `names` are those of its inputs and outputs.
    """
    from paddle import inference

    predictor = inference.create_predictor(config)
    image = predictor.get_input_handle(predictor.get_input_names()[0])
    outputs = [predictor.get_output_handle(name) for name in predictor.get_output_names()]

    def run(pictures):
        pictures = np.ascontiguousarray(pictures)
        image.reshape(pictures.shape)
        image.copy_from_cpu(pictures)
        predictor.run()
        return [output.copy_to_cpu() for output in outputs]

    run.names = predictor.get_input_names() + predictor.get_output_names()
    return run


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that the terminal's encoding lacks ends no run
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {plain(error, 2000)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
