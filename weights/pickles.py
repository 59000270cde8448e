"""A safe reader of pickles, which .pdparams and .pdopt files are: it runs nothing that hides in one.

Python's own reader would call whatever function a file names. This one knows the instructions and the objects that
Paddle and NumPy write, and what it takes grows with the length of the file and with nothing else that stands in it.
"""

import os
import pickle
import re
import struct

import numpy as np

from utility import UserError, plain
from weights.raw import OLD_TORCH, TORCH, array_over, checked_shape, cut_off, guess, opened

# Dicts around a tensor, and letters of their keys.
DEEPEST, MOST_AROUND = 32, 1000

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
        shape = checked_shape(shape)
        array = array_over(_bytes(data), dtype.dtype, shape[::-1] if fortran else shape)
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
    return array_over(_bytes(data), dtype.dtype, ())[()]


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
    with opened(path) as file:
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
    if start[:1] != b"\x80" or start.startswith(OLD_TORCH):
        raise UserError(f"{path}: {guess(start)}")
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    try:
        return _Unpickler(file, size).load()
    except EOFError:
        raise cut_off(path, size) from None
    except _OfTorch:
        raise UserError(f"{path}: {TORCH}") from None
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
        tensors[name] = np.concatenate(parts).reshape(checked_shape(how["OriginShape"]))
    return tensors
