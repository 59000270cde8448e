"""Safe readers of the file formats that weights come in: arrays by name, from files that anybody may have made.

Nothing here knows what a network is. Every reader checks the sizes that a file claims against the bytes it has before
it allocates, and raises UserError with one line that names the file. What a file is read in grows with its length and
with nothing else that stands in it: at most four times its bytes and 50 MB. An honest file takes once its bytes as a
pickle of protocol 3 or 4 or as HDF5, twice in the other formats.
"""

import collections
import contextlib
import math
import os
import pickle
import re
import struct

import numpy as np

import files
from utility import UserError, plain

# More files of a fluid model, or names in a file of Keras, than any network has. Each takes time.
MOST_NAMES = 20_000

# Dicts around a tensor, and letters of their keys.
DEEPEST, MOST_AROUND = 32, 1000

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
    """What a file that is none of ours seems to be, by its first bytes."""
    if not start:
        return "an empty file: download or copy it again"
    if start[:4] == b"PK\3\4":
        return _guess_zip(start)
    if start[: len(_OLD_TORCH)] == _OLD_TORCH:
        return _TORCH
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"\nsize (\d{1,15})\n", start)
        whole = f" of {int(size[1])} bytes" if size else ""
        return f"a Git LFS pointer, which stands for the file{whole}: git lfs pull fetches it"
    if start[:12] == bytes(12) and start.strip(b"\0"):
        return (
            "one variable of a fluid model, or all of them joined without their names (.pdiparams): give the directory "
            "that save_vars wrote with one file a variable, or the .pdparams that the model was exported from"
        )
    if not start.strip(b"\0"):
        return "zeros: its content never arrived; download or copy it again"
    if start[:4] in (b"\x1f\x8b\x08\0", b"\x1f\x8b\x08\x08") or start[257:262] == b"ustar":
        return "an archive: unpack it first"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<script", b"<!--", b"<?xml")):
        return "a web page, not weights: the download went wrong; fetch the file itself"
    if len(start) < 9:
        return f"{len(start)} bytes, too few for weights: cut off; download or copy it again"
    known = "neither Paddle's .pdparams, safetensors nor Keras' .h5"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        line = plain(text[:60].decode("utf-8", "replace").strip().split("\n")[0], 60)
        return f"a text file ({line} ...), {known}"
    return f"an unknown format, {known}"


# The number with which torch.save began before it wrote zip archives.
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TORCH = (
    "a file of PyTorch, which is not read here: convert it where PyTorch is, as docs/weights.md says "
    '(safetensors.torch.save_file(torch.load("x.pth"), "x.safetensors")), and give that file'
)


def _guess_zip(start):
    """What a zip archive seems to be, by the name of its first file."""
    name = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    if name.endswith(b".npy"):
        return (
            "an archive of NumPy, which is not read here: convert it "
            '(safetensors.numpy.save_file(dict(numpy.load("x.npz")), "x.safetensors")), and give that file'
        )
    if name in (b"metadata.json", b"config.json", b"model.weights.h5"):
        return "a .keras archive of Keras 3, which is not read here: the .h5 files of keras.applications are"
    if re.fullmatch(rb"[^/]+/(data\.pkl|\.format_version|\.data/.*|byteorder|version|constants\.pkl|code/.*)", name):
        return _TORCH
    return f"a zip archive ({plain(name.decode('utf-8', 'replace'), 60)} ...): unpack it first"


def _cut_off(path, size, whole=None):
    there = f"{size} bytes are there" + (f" of {whole}" if whole else "")
    return UserError(f"{path}: cut off: {there}; download or copy it again")


@contextlib.contextmanager
def _opened(path):
    """The open file. Raises: UserError where it can't be opened or read."""
    try:
        with files.open_file(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def _read(path):
    with _opened(path) as file:
        return file.read()


def _array(data, dtype, shape):
    """An array of `shape` over the bytes `data`, whose number must fit: ValueError."""
    shape = _shape(shape)
    # Python's integers don't wrap around.
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise ValueError(f"shape {list(shape)} does not fit {len(data)} bytes of {np.dtype(dtype).name}")
    return np.frombuffer(data, dtype).reshape(shape)


def _shape(shape):
    """The lengths of an array's dimensions as a tuple, if they are what NumPy can have: ValueError."""
    if type(shape) not in (tuple, list) or len(shape) > 32:
        raise ValueError("a shape that is no list of at most 32 numbers")
    if not all(type(length) is int and 0 <= length < 2**63 for length in shape):
        raise ValueError("a shape with something other than lengths in it")
    return tuple(shape)


def bfloat16_to_float32(bits):
    """The values of bfloat16 numbers, which NumPy lacks: the upper halves of float32. uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------- pickles: .pdparams, .pdopt

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


class _Dtype:
    """Stands for numpy.dtype while a pickle is read."""

    def __init__(self, name, *flags):
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"an array of {plain(name) if isinstance(name, str) else 'objects'}")
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
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array of objects")
        shape = _shape(shape)
        array = _array(_bytes(data), dtype.dtype, shape[::-1] if fortran else shape)
        self.value = array.T if fortran else array


def _bytes(data):
    """The content of an array: bytes, or what Python 2 wrote as text."""
    if not isinstance(data, (bytes, str)):
        raise pickle.UnpicklingError("an array of objects")
    return data.encode("latin1") if isinstance(data, str) else data


def _reconstruct(subtype, shape, typecode):
    if subtype is not _Array or shape != (0,):
        raise pickle.UnpicklingError("an array that is not built the way NumPy does")
    return _Array()


def _scalar(dtype, data):
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("a number that is not built the way NumPy does")
    return _array(_bytes(data), dtype.dtype, ())[()]


def _encode(text, encoding):
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("an encoding other than latin1")
    return text.encode("latin1")


def _no_bytes():
    return b""  # how protocols 2 and 3 write the content of an empty array


def _ordered_dict(pairs=None):
    """Python 3 calls it without arguments, Python 2 with a list of pairs."""
    if not isinstance(pairs, (list, type(None))):
        raise pickle.UnpicklingError("an ordered dict that is not built the way Python does")
    content = {}
    for name, value in pairs or ():
        _put(content, name, value)
    return content


def _put(content, name, value):
    """One entry of a dict. Only text is ever hashed, as hashing a tuple can take for ever, end the process, or meet
    numbers that were chosen to be slow. No tensor has a number for a name, so such entries are left out."""
    if type(content) is not dict:
        raise pickle.UnpicklingError("an entry of what is no dict")
    if isinstance(name, str):
        content[name] = value
    elif not isinstance(name, (int, float, np.generic)):
        raise pickle.UnpicklingError(f"a {type(name).__name__} for a name")


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
    ("collections", "OrderedDict"): _ordered_dict,
    ("_codecs", "encode"): _encode,  # with which protocol 2 writes bytes
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _STAND_INS[_module, "_reconstruct"] = _reconstruct
    _STAND_INS[_module, "scalar"] = _scalar
for _module in ("builtins", "__builtin__"):
    _STAND_INS[_module, "bytes"] = _no_bytes
    _STAND_INS[_module, "tuple"] = _named_array
    _STAND_INS[_module, "eval"] = _evaluated


class _OfTorch(Exception):
    """Raised where a pickle names functions of PyTorch."""


class _Unpickler:
    """Runs the instructions that Paddle and NumPy write, from Python 2 on in pickle's protocols 2 to 4, and no others.

    Pickle's own reader allocates by numbers in the file before it looks whether they are true, hashes whatever a file
    makes a key, and copies as often as a file asks. Here no instruction takes longer than it takes to read it and what
    it is about, and all that memory goes to is limited: the bytes of the file, the number of instructions, and the
    bytes that are copied to make texts and to call stand-ins.
    """

    def __init__(self, file, size):
        self.file = file
        self.left = size  # bytes that are still to be read
        # An array takes some 30 instructions, and each, of one byte, may make an object of 100 bytes.
        self.instructions = 200_000 + size // 200
        # Protocol 2 writes the bytes of an array as text and has them encoded.
        self.copies = 2 * size + 2**20
        self.stack, self.marks, self.memo = [], [], {}

    def load(self):
        for _ in range(self.instructions):
            instruction = self.take(1)
            if instruction == pickle.STOP:
                return self.stack.pop()
            if instruction in _VALUES:
                self.stack.append(_VALUES[instruction](self))
            elif instruction in _ACTIONS:
                _ACTIONS[instruction](self)
            else:
                raise pickle.UnpicklingError("an instruction that Paddle does not write")
        raise pickle.UnpicklingError("too many small objects")

    # What follows an instruction in the file.

    def take(self, count):
        if count > self.left:
            raise EOFError
        self.left -= count
        return self.file.read(count)

    def number(self, size, signed=False):
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self):
        line = self.file.readline(80)
        self.left -= len(line)
        if line[-1:] != b"\n" and not self.left:
            raise EOFError
        if line[-1:] != b"\n":
            raise pickle.UnpicklingError("a long name")
        return line[:-1].decode("ascii")

    def text(self, length, encoding="utf-8"):
        data = self.take(length)
        # One character beyond latin1 has all of a text take 2 bytes each, or 4.
        highest = np.frombuffer(data, np.uint8).max(initial=0) if encoding == "utf-8" else 0
        self.count_copy(length * (4 if highest > 0xEF else 2 if highest > 0xC3 else 1))
        return str(data, encoding, "surrogatepass")

    def count_copy(self, size):
        self.copies -= size
        if self.copies < 0:
            raise pickle.UnpicklingError("more memory asked for than the file is long")

    # What is on the stack.

    def pop(self, count):
        if count > len(self.stack):
            raise IndexError("too few objects")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return tuple(items)

    def pop_marked(self):
        return self.pop(len(self.stack) - self.marks.pop())

    def append(self, items):
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("an item of what is no list")
        self.stack[-1].extend(items)

    def put(self, items):
        for name, value in zip(items[::2], items[1::2]):
            _put(self.stack[-1], name, value)

    # Calls of stand-ins.

    def stand_in(self, module, name):
        if not (isinstance(module, str) and isinstance(name, str)):
            raise pickle.UnpicklingError("an object without a name")
        if module.partition(".")[0] == "torch":
            raise _OfTorch
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"the forbidden object {plain(module)}.{plain(name)}")
        return _STAND_INS[module, name]

    def call(self):
        function, arguments = self.pop(2)
        if not callable(function):  # which nothing is but what stand_in() has returned
            raise pickle.UnpicklingError(f"a call of {type(function).__name__}")
        self.check_arguments(arguments)
        return function(*arguments)

    def build(self):
        target, state = self.pop(2)
        if not isinstance(target, (_Array, _Dtype)):
            raise pickle.UnpicklingError("an object with a state")
        self.check_arguments(state)
        target.set_state(state)
        self.stack.append(target)

    def check_arguments(self, arguments):
        """Counts what a call may copy of its arguments, which a file may name many times: texts, entries of dicts."""
        if type(arguments) is not tuple or len(arguments) > 9:  # the most are those of a dtype
            raise pickle.UnpicklingError("a call that is not made the way Paddle does")
        for value in arguments:
            if isinstance(value, (str, list)):
                self.count_copy(len(value) * (1 if isinstance(value, str) else 100))


# What each instruction pushes, and what it does without pushing.
_VALUES = {
    pickle.NONE: lambda self: None,
    pickle.NEWTRUE: lambda self: True,
    pickle.NEWFALSE: lambda self: False,
    pickle.BININT: lambda self: self.number(4, signed=True),
    pickle.BININT1: lambda self: self.number(1),
    pickle.BININT2: lambda self: self.number(2),
    pickle.LONG1: lambda self: self.number(self.number(1), signed=True),
    pickle.INT: lambda self: int(self.line()),  # Python 2, from 2**31 on
    pickle.BINFLOAT: lambda self: struct.unpack(">d", self.take(8))[0],
    pickle.SHORT_BINSTRING: lambda self: self.text(self.number(1), "latin1"),
    pickle.BINSTRING: lambda self: self.text(self.number(4), "latin1"),
    pickle.SHORT_BINUNICODE: lambda self: self.text(self.number(1)),
    pickle.BINUNICODE: lambda self: self.text(self.number(4)),
    pickle.BINUNICODE8: lambda self: self.text(self.number(8)),
    pickle.SHORT_BINBYTES: lambda self: self.take(self.number(1)),
    pickle.BINBYTES: lambda self: self.take(self.number(4)),
    pickle.BINBYTES8: lambda self: self.take(self.number(8)),
    pickle.EMPTY_LIST: lambda self: [],
    pickle.EMPTY_DICT: lambda self: {},
    pickle.EMPTY_TUPLE: lambda self: (),
    pickle.TUPLE1: lambda self: self.pop(1),
    pickle.TUPLE2: lambda self: self.pop(2),
    pickle.TUPLE3: lambda self: self.pop(3),
    pickle.TUPLE: lambda self: self.pop_marked(),
    pickle.BINGET: lambda self: self.memo[self.number(1)],
    pickle.LONG_BINGET: lambda self: self.memo[self.number(4)],
    pickle.GLOBAL: lambda self: self.stand_in(self.line(), self.line()),
    pickle.STACK_GLOBAL: lambda self: self.stand_in(*self.pop(2)),
    pickle.REDUCE: lambda self: self.call(),
}
_ACTIONS = {
    pickle.PROTO: lambda self: self.take(1),
    pickle.FRAME: lambda self: self.take(8),  # a hint how much to read at once
    pickle.MARK: lambda self: self.marks.append(len(self.stack)),
    pickle.BINPUT: lambda self: self.memo.update({self.number(1): self.stack[-1]}),
    pickle.LONG_BINPUT: lambda self: self.memo.update({self.number(4): self.stack[-1]}),
    pickle.MEMOIZE: lambda self: self.memo.update({len(self.memo): self.stack[-1]}),
    pickle.APPEND: lambda self: self.append(self.pop(1)),
    pickle.APPENDS: lambda self: self.append(self.pop_marked()),
    pickle.SETITEM: lambda self: self.put(self.pop(2)),
    pickle.SETITEMS: lambda self: self.put(self.pop_marked()),
    pickle.BUILD: lambda self: self.build(),
}


def read_pickle(path):
    """What a .pdparams or .pdopt file holds, without running anything that hides in it.

    Returns: {name: np.ndarray}. An array in a dict or list inside has the keys around it in front of its name:
        "model.conv1.weight" of {"model": {"conv1.weight": ...}, "epoch": 3}. What is no array is left out.
    Raises: UserError where the file is missing, broken, or holds anything but arrays, dicts, lists and numbers.
    """
    with _opened(path) as file:
        content, size = _content(path, file), os.fstat(file.fileno()).st_size
    if not isinstance(content, (dict, list, tuple)):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    try:
        tensors = _Arrays(content, size).found
    except ValueError as error:
        raise UserError(f"{path}: refused: not a plain file of weights ({error})") from None
    try:
        return _join_parts(content, tensors, size)
    except Exception as error:
        raise UserError(f"{path}: broken: parts of a large array do not fit ({type(error).__name__})") from None


def _content(path, file):
    start = file.read(512)
    if start[:1] != b"\x80" or start.startswith(_OLD_TORCH):
        raise UserError(f"{path}: {_guess(start)}")
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    try:
        return _Unpickler(file, size).load()
    except EOFError:
        raise _cut_off(path, size) from None
    except _OfTorch:
        raise UserError(f"{path}: {_TORCH}") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: not a plain file of weights ({plain(error)})") from None
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: broken or truncated ({type(error).__name__}: {plain(error)})") from None


class _Arrays:
    """{name: array} of the arrays in dicts and lists inside each other.

    Each container is looked at once: a file may name one as often as it likes, also inside itself. Names that are put
    together are limited as what is copied while it is read.
    """

    def __init__(self, content, size):
        self.found, self.seen, self.left = {}, set(), 2 * size + 2**20
        self.add(content, "", 0)

    def add(self, content, around, depth):
        self.seen.add(id(content))
        if depth > DEEPEST or len(around) > MOST_AROUND:
            raise ValueError("more dicts inside each other, or longer keys of them, than any network has")
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(value, _Array):
                name = f"{around}{key}" if around else str(key)
                self.left -= len(around) * (1 if name.isascii() else 4)
                if self.left < 0:
                    raise ValueError("more memory asked for than the file is long")
                if name in self.found:
                    raise ValueError(f"two arrays are called {plain(name, 60)}")
                self.found[name] = value.value
            elif isinstance(value, (dict, list, tuple)) and id(value) not in self.seen:
                self.add(value, f"{around}{str(key)[: MOST_AROUND + 1]}.", depth + 1)


def _join_parts(content, tensors, size):
    """Undoes how Paddle cuts arrays of 1 GiB and more under pickle protocols 2 and 3, in a file of `size` bytes."""
    cut = content.get("UnpackBigParamInfor@@", {}) if isinstance(content, dict) else {}
    for name, how in cut.items():
        if not all(isinstance(part, str) for part in how["slices"]):
            raise ValueError("a part without a name")
        parts = [tensors.pop(part) for part in how["slices"]]
        size -= sum(part.nbytes for part in parts)
        if size < 0 or len({part.dtype for part in parts}) > 1:
            raise ValueError("one array under many names, or of several types")
        tensors[name] = np.concatenate(parts).reshape(_shape(how["OriginShape"]))
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
    header = int.from_bytes(data[:8], "little")
    if header + 8 > len(data):
        raise _cut_off(path, len(data), header + 8 if header < 2**20 else None)
    if header > 2**20:
        # The library takes some 30 bytes for each of them. A network has about 100 for each tensor.
        raise UserError(f"{path}: a header of {header} bytes; up to {2**20} are read")
    whole = header + 8 + _announced(data[8 : 8 + header])
    if whole > len(data):
        raise _cut_off(path, len(data), whole)
    try:
        found = safetensors.deserialize(data)
        return {
            name: _array(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]], tensor["shape"])
            for name, tensor in found
            if tensor["dtype"] in _SAFETENSORS_DTYPES
        }
    except Exception as error:
        raise UserError(f"{path}: broken or truncated safetensors ({plain(error)})") from None


def _announced(header):
    """How many bytes of arrays a header of safetensors announces; 0 where it is none: the library complains."""
    ends = re.findall(rb'"data_offsets"\s*:\s*\[\s*\d{1,15}\s*,\s*(\d{1,15})\s*\]', header)
    return max((int(end) for end in ends), default=0)


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
    levels = integer(8)
    if levels > 16:
        raise ValueError(f"{levels} levels of LoD")
    for _ in range(levels):
        take(integer(8))
    if integer(4) != 0:
        raise ValueError("unknown version of the tensor")
    length = integer(4)
    if length > 1000:
        raise ValueError(f"{length} bytes to describe a tensor")
    dtype, shape = _tensor_desc(take(length))
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
    """{variable name: array} of those files in the directory `path` whose names the regular expression matches.

    Raises: UserError, also for more than MOST_NAMES of them.
    """
    try:
        found = sorted(name for name in os.listdir(path) if names.fullmatch(name))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    if len(found) > MOST_NAMES:
        raise UserError(f"{path}: {len(found)} variables, more than any network has")
    tensors, arrays = {}, {}
    for name in found:
        file = os.path.join(path, name)
        if os.path.isfile(file):
            # Many names may be links to one file, which is read once.
            status = os.stat(file)
            key = status.st_dev, status.st_ino
            tensors[name] = arrays[key] = arrays[key] if key in arrays else read_fluid_variable(file)
    return tensors


# ---------------------------------------------------------------- HDF5 of Keras: .h5

_KERAS_VALUE = re.compile(
    r"(?:.*_)?(kernel|gamma|beta|moving_mean|moving_variance|running_mean|running_std|bias|W|b)(?:_\d)?(?::0)?"
)


def read_hdf5(path):
    """The weights in a file of Keras: {"<layer>/<value>": array}, such as "conv1_conv/kernel", or of a model in a model
    "resnet50/conv1_conv/kernel".

    Raises: UserError without h5py, or where the file is broken.
    """
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: a file of Keras, which is read with h5py: pip install h5py") from None
    found, left = {}, os.path.getsize(path)
    try:
        with h5py.File(path, "r") as file:
            for name, item in _datasets(h5py, file, set(), iter(range(MOST_NAMES))):
                *around, last = name.removeprefix("model_weights/").split("/")
                # Keras repeats a layer's name: conv1_conv/conv1_conv/kernel:0. A model may stand in a model.
                layer = "/".join(one for one, other in zip(around, (*around[1:], None)) if one != other)
                value = _KERAS_VALUE.fullmatch(last)
                if value and item.dtype.kind == "f":
                    _check_plain(h5py, item)
                    left -= item.nbytes  # of all of them, as several may lie on the same bytes
                    if left < 0:
                        raise ValueError(f"{plain(name)} is larger than the file")
                    found[f"{layer}/{value[1]}"] = item[()]
    except Exception as error:  # the library raises nearly anything for a broken file
        cut = re.search(r"truncated file: eof = (\d+),.* stored_eof = (\d+)", str(error))
        if cut:
            raise _cut_off(path, cut[1], cut[2]) from None
        raise UserError(f"{path}: not readable as a file of Keras: {plain(error)}") from None
    return found


def _datasets(h5py, group, seen, names, prefix=""):
    """(path, dataset) of all in a group and those below it, without links to elsewhere and what is `seen` already.

    `names` runs out after the most names that are looked at. HDF5's own visit takes minutes for a few thousand groups
    inside each other; Keras has five.
    """
    for name in group:
        if next(names, None) is None or prefix.count("/") > 16:
            raise ValueError("more objects, or more of them inside each other, than any network has")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen:
            continue
        seen.add(address)
        if isinstance(item, h5py.Dataset):
            yield f"{prefix}{name}", item
        elif isinstance(item, h5py.Group):
            yield from _datasets(h5py, item, seen, names, f"{prefix}{name}/")


def _check_plain(h5py, item):
    """Refuses values that are not simply there in the file: compressed ones are of any size, others in other files."""
    layout = item.id.get_create_plist().get_layout()
    if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or item.external or item.shape is None:
        raise ValueError(f"{plain(item.name)} is compressed, in pieces or in another file, as Keras never writes it")
