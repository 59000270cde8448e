"""Safe readers of the file formats that weights come in: arrays by name, and no more memory than the file is long.

Nothing here knows what a network is. Every reader checks the sizes that a file claims against the bytes it has before
it allocates, and raises UserError with one line that names the file.
"""

import collections
import io
import os
import pickle
import re

import numpy as np

import files
from utility import UserError, plain

# ---------------------------------------------------------------- any file


def read_tensors(path):
    """The arrays of one file, which is recognised by its first bytes: Paddle's pickle, safetensors or Keras' HDF5.

    Returns: {name: np.ndarray}
    Raises: UserError where it is neither, broken, or holds anything but plain data.
    """
    with _opened(path) as file:
        start = file.read(512)
    if start[:8] == b"\x89HDF\r\n\x1a\n":
        return read_hdf5(path)
    if start[:1] == b"\x80":
        return read_pickle(path)
    # 8 bytes with the length of a header in JSON. Its highest bytes are 0, or it would be longer than any disk.
    if start[6:8] == b"\0\0" and start[8:9] == b"{":
        return read_safetensors(path)
    raise UserError(f"{path}: {_guess(start)}")


def _guess(start):
    """What a file that is none of ours seems to be."""
    if not start:
        return "an empty file"
    if start[:4] == b"PK\3\4":
        return (
            "a PyTorch or NumPy archive, which is not read here: save the state_dict with safetensors.torch.save_file "
            "and give that file"
        )
    if start[:12] == bytes(12):
        return (
            "one variable of a fluid model, or all of them joined without their names: give the directory that "
            "save_vars wrote with one file a variable"
        )
    if start[:4] in (b"\x1f\x8b\x08\0", b"\x1f\x8b\x08\x08") or start[257:262] == b"ustar":
        return "an archive: unpack it first"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights: the download went wrong"
    what = "a text file" if all(byte >= 32 or byte in b"\t\n\r\f" for byte in start) else "an unknown format"
    return f"{what}, neither Paddle's .pdparams, safetensors nor Keras' .h5"


def _opened(path):
    try:
        return files.open_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def _read(path):
    with _opened(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot read: {error.strerror}") from None


def _array(data, dtype, shape):
    """An array of `shape` over the bytes `data`, whose number must fit: ValueError."""
    if len(shape) > 32:
        raise ValueError(f"{len(shape)} dimensions")
    size = np.dtype(dtype).itemsize
    for length in shape:
        size *= length  # as Python's integers, which don't wrap around
    if any(length < 0 for length in shape) or size != len(data):
        raise ValueError(f"shape {list(shape)} does not fit {len(data)} bytes of {np.dtype(dtype).name}")
    return np.frombuffer(data, dtype).reshape(shape)


def bfloat16_to_float32(bits):
    """The values of bfloat16 numbers, which NumPy lacks: the upper halves of float32. uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------- pickles: .pdparams, .pdopt

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


class _Dtype:
    """Stands for numpy.dtype while a pickle is read."""

    def __init__(self, name, *flags):
        if not (isinstance(name, str) and _DTYPE.fullmatch(name)):
            raise pickle.UnpicklingError(f"an array of {name!r}")
        self.dtype = np.dtype(name)

    def set_state(self, state):
        # (version, byte order, then what only structured dtypes have)
        if state[1] not in ("<", ">", "|", "=") or any(item not in (None, -1, 0) for item in state[2:]):
            raise pickle.UnpicklingError("an array of structures")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray while a pickle is read; `value` is the array, empty until its state follows."""

    value = np.zeros(0, np.int8)

    def set_state(self, state):
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote bytes as text
        if not (isinstance(dtype, _Dtype) and isinstance(data, bytes)):
            raise pickle.UnpicklingError("an array of objects")
        order = shape[::-1] if fortran else shape
        array = _array(data, dtype.dtype, order)
        self.value = array.T if fortran else array


def _reconstruct(subtype, shape, typecode):
    if subtype is not _Array or shape != (0,):
        raise pickle.UnpicklingError("an array that is not built the way NumPy does")
    return _Array()


def _scalar(dtype, data):
    if not (isinstance(dtype, _Dtype) and isinstance(data, bytes)):
        raise pickle.UnpicklingError("a number that is not built the way NumPy does")
    return _array(data, dtype.dtype, ())[()]


def _encode(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes():
    return b""  # how protocols 2 and 3 write the content of an empty array


def _named_array(*arguments):
    """Paddle writes a tensor inside a nested object as the call tuple((name, array))."""
    pair = arguments[0] if len(arguments) == 1 else None
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], _Array)):
        raise pickle.UnpicklingError("the forbidden object builtins.tuple")
    return pair[1]


def _evaluated(*arguments):
    """Paddle's static mode writes a tensor as the call eval("data", {"data": array}). Nothing is evaluated."""
    code, names = arguments if len(arguments) == 2 else (None, None)
    if code != "data" or not (isinstance(names, dict) and isinstance(names.get("data"), _Array)):
        raise pickle.UnpicklingError("the forbidden object builtins.eval")
    return names["data"]


# A pickle can name any function and have it called with any arguments. These are the names that Paddle and NumPy write
# into .pdparams and .pdopt files, each with a stand-in that takes no other arguments than they do: NumPy's own would
# allocate whatever size a file asks for. No other name is looked up.
_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): lambda *items: dict(*items),
    ("_codecs", "encode"): _encode,  # with which protocol 2 writes bytes
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _STAND_INS[_module, "_reconstruct"] = _reconstruct
    _STAND_INS[_module, "scalar"] = _scalar
for _module in ("builtins", "__builtin__"):
    _STAND_INS[_module, "bytes"] = _no_bytes
    _STAND_INS[_module, "tuple"] = _named_array
    _STAND_INS[_module, "eval"] = _evaluated


class _Unpickler(pickle._Unpickler):
    """The one written in Python: the C one allocates by the numbers in the file before it looks whether they are true.

    It is as fast here, where the bulk of a file is a few large blocks of bytes.
    """

    def find_class(self, module, name):
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"the forbidden object {module}.{name}")
        return _STAND_INS[module, name]

    def load_build(self):
        # The original would set attributes of whatever lies on the stack, our functions included.
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Array, _Dtype)):
            raise pickle.UnpicklingError("an object with a state")
        self.stack[-1].set_state(state)

    def load_reduce(self):
        arguments = self.stack.pop()
        if self.stack[-1] not in _STAND_INS.values():
            raise pickle.UnpicklingError(f"a call of {type(self.stack[-1]).__name__}")
        self.stack[-1] = self.stack[-1](*arguments)

    def refuse(self):
        raise pickle.UnpicklingError("an instruction that Paddle does not write")

    # Other ways to make objects, and the one instruction that allocates by a number in the file.
    _refused = (pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ, pickle.BYTEARRAY8, pickle.NEXT_BUFFER)
    _refused += (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BINPERSID)
    dispatch = {  # noqa: RUF012  (as in the base class)
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        **dict.fromkeys((instruction[0] for instruction in _refused), refuse),
    }


def read_pickle(path):
    """What a .pdparams or .pdopt file holds, without running anything that hides in it.

    Returns: {name: np.ndarray}; entries that are no arrays are left out. Where a dict holds the state dict under some
        key ({"model": ..., "epoch": 3}), that one is returned.
    Raises: UserError where the file is missing, broken, or holds anything but arrays, dicts, lists and numbers.
    """
    data = _read(path)
    if data[:1] != b"\x80":
        raise UserError(f"{path}: {_guess(data[:512])}")
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: not a plain file of weights ({plain(error)})") from None
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: broken or truncated ({type(error).__name__}: {plain(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    tensors = _arrays(content)
    if not tensors:
        inner = [found for value in content.values() if isinstance(value, dict) and (found := _arrays(value))]
        tensors = inner[0] if len(inner) == 1 else {}
    try:
        return _join_parts(content, tensors)
    except Exception as error:
        raise UserError(f"{path}: broken: parts of a large array do not fit ({type(error).__name__})") from None


def _arrays(content):
    return {n: v.value for n, v in content.items() if isinstance(n, str) and isinstance(v, _Array)}


def _join_parts(content, tensors):
    """Undoes how Paddle cuts arrays of 1 GiB and more under pickle protocols 2 and 3."""
    for name, how in content.get("UnpackBigParamInfor@@", {}).items():
        parts = [tensors.pop(part) for part in how["slices"]]
        tensors[name] = np.concatenate(parts).reshape([int(length) for length in how["OriginShape"]])
    return tensors


# ---------------------------------------------------------------- safetensors

_SAFETENSORS_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "?",
}  # fmt: skip


def read_safetensors(path):
    """The arrays of a .safetensors file; bfloat16 is returned as its bits in uint16, as Paddle's own arrays have it.

    The library checks the header. Its `safetensors.numpy` is not used because NumPy lacks bfloat16.

    Raises: UserError where the file is broken.
    """
    try:
        import safetensors
    except ImportError:
        raise UserError(f"{path}: reading safetensors needs the package: pip install safetensors") from None
    data = _read(path)
    try:
        found = safetensors.deserialize(data)
        return {
            name: _array(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]], tensor["shape"])
            for name, tensor in found
            if tensor["dtype"] in _SAFETENSORS_DTYPES
        }
    except Exception as error:
        raise UserError(f"{path}: broken or truncated safetensors ({plain(error)})") from None


# ---------------------------------------------------------------- fluid: one file a variable

# Numbers of framework.proto's VarType.Type.
_FLUID_DTYPES = {
    0: "?", 1: "<i2", 2: "<i4", 3: "<i8", 4: "<f2", 5: "<f4", 6: "<f8", 20: "<u1", 21: "<i1", 22: "<u2",
}  # fmt: skip


def read_fluid_variable(path):
    """The array in a file of Paddle's `save_vars`.

    uint32 version 0; uint64 number of LoD levels, for each its length in bytes as uint64 and its data; uint32 version
    0; int32 length of a TensorDesc protobuf (field 1: data type, field 2: dimensions); the data. Little-endian.

    Raises: UserError where the file is something else or broken.
    """
    try:
        return _fluid_variable(_read(path))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path}: no variable of a fluid model, or truncated ({error})") from None


def _fluid_variable(data):
    position = 0

    def take(count):
        nonlocal position
        if not 0 <= count <= len(data) - position:
            raise ValueError(f"{count} bytes announced, {len(data) - position} there")
        position += count
        return data[position - count : position]

    def integer(size):
        return int.from_bytes(take(size), "little")

    if integer(4) != 0:
        raise ValueError("unknown version")
    for _ in range(min(integer(8), len(data))):
        take(integer(8))
    if integer(4) != 0:
        raise ValueError("unknown version of the tensor")
    dtype, shape = _tensor_desc(take(integer(4)))
    if dtype not in _FLUID_DTYPES:
        raise ValueError(f"data type {dtype}")
    return _array(data[position:], _FLUID_DTYPES[dtype], shape)


def _tensor_desc(message):
    """(data type, dimensions) of a TensorDesc: protobuf's wire format, dimensions packed or not."""
    numbers, position = collections.defaultdict(list), 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value if value < 2**63 else value - 2**64
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            numbers[key >> 3].append(varint())
        elif key & 7 == 2:
            end = varint() + position
            if end > len(message) or end < position:
                raise ValueError("a field beyond the end of the description")
            while position < end:
                numbers[key >> 3].append(varint())
        else:
            raise ValueError("not a description of a tensor")
    if len(numbers[1]) != 1 or len(numbers[2]) > 8:
        raise ValueError("not a description of a tensor")
    return numbers[1][0], numbers[2]


def read_fluid_directory(path, names):
    """{variable name: array} of those files in the directory `path` whose names the regular expression matches."""
    files = {name: os.path.join(path, name) for name in sorted(os.listdir(path)) if names.fullmatch(name)}
    return {name: read_fluid_variable(file) for name, file in files.items() if os.path.isfile(file)}


# ---------------------------------------------------------------- HDF5 of Keras: .h5

_KERAS_VALUE = re.compile(
    r"(?:.*_)?(kernel|gamma|beta|moving_mean|moving_variance|running_mean|running_std|bias|W|b)(?:_\d)?(?::0)?"
)


def read_hdf5(path):
    """The weights in a file of Keras: {"<layer>/<value>": array}, such as "conv1_conv/kernel".

    Raises: UserError without h5py, or where the file is broken.
    """
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: a file of Keras, which is read with h5py: pip install h5py") from None
    found, size = {}, os.path.getsize(path)

    def add(name, item):
        layer = name.removeprefix("model_weights/").split("/")[0]
        value = _KERAS_VALUE.fullmatch(name.rsplit("/", 1)[-1])
        if isinstance(item, h5py.Dataset) and value and item.dtype.kind == "f":
            if item.size * item.dtype.itemsize > size:
                raise ValueError(f"{plain(name)} is larger than the file")
            found[f"{layer}/{value[1]}"] = item[()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(add)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: not readable as a file of Keras: {plain(error)}") from None
    return found
