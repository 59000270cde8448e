"""Reading weights that somebody else may have written."""

import collections
import io
import os
import pickle
import re

import numpy as np

from utility import CHECKPOINT_FILE, WEIGHTS_FILE, UserError, read_checkpoint_state

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")


def _empty_array(subtype, shape, typecode):
    if subtype is not _ARRAY or tuple(shape) != (0,):
        raise pickle.UnpicklingError("an array that is not built the way NumPy does")
    return np.ndarray.__new__(np.ndarray, (0,), "b")  # its content follows


def _dtype(name, *flags):
    if not (isinstance(name, str) and _DTYPE.fullmatch(name)):
        raise pickle.UnpicklingError(f"an array of {name!r}")
    return np.dtype(name, *flags)


def _encode(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoding {encoding!r}")
    return text.encode("latin1")


# A pickle can name any function and have it called with any arguments. These are the names that Paddle and NumPy write
# into .pdparams and .pdopt files, each with a stand-in that takes no other arguments than they do: NumPy's own would
# allocate whatever size a file asks for. No other name is looked up.
_ARRAY = "the class of arrays"
_STAND_INS = {
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,  # with which protocol 2 writes bytes
}


class _Unpickler(pickle._Unpickler):
    """The one written in Python: the C one allocates by the numbers in the file before it looks whether they are true.

    It is as fast here, where the bulk of a file is a few large blocks of bytes.
    """

    def find_class(self, module, name):
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"the forbidden object {module}.{name}")
        return _STAND_INS[module, name]


def read_pickle(path):
    """What a .pdparams or .pdopt file holds, without running anything that hides in it.

    Returns: {name: np.ndarray}; entries that are no arrays are left out.
    Raises: UserError where the file is missing, broken, or holds anything but arrays, dicts, lists and numbers.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(io.BytesIO(file.read())).load()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: not a plain file of weights ({error})") from None
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: broken or no file of weights ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    return {name: value for name, value in content.items() if isinstance(value, np.ndarray)}


def find_checkpoint(path):
    """The checkpoint directory that `path` (the directory or the weights file in it) belongs to, or None."""
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    return directory if os.path.exists(os.path.join(directory, CHECKPOINT_FILE)) else None


def read_state(path):
    """The description stored with the weights at `path`, or None where train.py did not write them."""
    directory = find_checkpoint(path)
    return read_checkpoint_state(directory) if directory else None


Weights = collections.namedtuple("Weights", "tensors file_name state")


def read_weights(path):
    """Reads weights: a checkpoint directory, a .pdparams file, or such a file's path without the suffix.

    Returns: Weights; `tensors` are arrays under this project's names, `state` is what train.py stored beside them or
        None.
    """
    candidates = (os.path.join(path, WEIGHTS_FILE), path, f"{path}.pdparams")
    file_name = next((name for name in candidates if os.path.isfile(name)), None)
    if file_name is None:
        raise UserError(f"{path}: no weights there (looked for a checkpoint directory, this file, and {path}.pdparams)")
    return Weights(_own_names(read_pickle(file_name)), file_name, read_state(path))


def load_weights(network, weights, model, head="fit"):
    """Loads `weights` into an EmbeddingNet.

    Args:
        weights: what `read_weights` returned.
        model: the network's name, for messages.
        head: "fit" loads the pooling's power, embedding layer and head where their shapes fit and skips them
            otherwise, as fine-tuning wants; "must" takes it for an error if they don't.

    Returns: one line that says what was loaded.
    Raises: UserError naming the first missing or misshapen tensors; nothing is loaded then.
    """
    wanted = network.state_dict()
    wrong, skipped = {}, {}
    for name, tensor in wanted.items():
        there, here = weights.tensors.get(name), list(tensor.shape)
        if there is not None and list(there.shape) == here:
            continue
        what = f"{name} (missing)" if there is None else f"{name} ({list(there.shape)} there, {here} here)"
        (wrong if head == "must" or name.startswith("backbone.") else skipped)[name] = what
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{weights.file_name}: not the weights of {model}: {', '.join(list(wrong.values())[:5])}{more}")
    for name, tensor in wanted.items():
        if name not in skipped:
            tensor.set_value(weights.tensors[name].astype("float32"))
    loaded = sum(name.startswith("backbone.") for name in wanted)
    rest = f"; skipped: {', '.join(skipped.values())}" if skipped else ""
    return f"loaded {loaded} of {loaded} backbone tensors from {weights.file_name}{rest}"


def _own_names(weights):
    """Weights under this project's names: paddle.vision calls the backbone's layers the same, and the head `fc`."""
    if any(name.startswith("backbone.") for name in weights):
        return weights
    return {f"head.{n[3:]}" if n.startswith("fc.") else f"backbone.{n}": value for n, value in weights.items()}
