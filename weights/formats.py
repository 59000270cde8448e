"""Safe readers of the file formats that weights come in: arrays by name, from files that anybody may have made.

Nothing here knows what a network is. Every reader checks the sizes that a file claims against the bytes it has before
it allocates, and raises UserError with one line that names the file. What a file is read in grows with its length and
with nothing else that stands in it: at most four times its bytes and 50 MB. An honest file takes once its bytes as a
pickle of protocol 3 or 4 or as HDF5, twice in the other formats.
"""

import collections
import os
import re

import numpy as np

from utility import UserError, plain
from weights.pickles import read_pickle
from weights.raw import array_over, cut_off, guess, opened, read

# More files of a fluid model, or names in a file of Keras, than any network has. Each takes time.
MOST_NAMES = 20_000

# ---------------------------------------------------------------- any file


def read_tensors(path):
    """The arrays of one file, which is recognised by its first bytes: Paddle's pickle, safetensors or Keras' HDF5.

    Returns: {name: np.ndarray}
    Raises: UserError where it is neither, broken, or holds anything but plain data.
    """
    with opened(path) as file:
        start = file.read(512)
    if start[:8] == b"\x89HDF\r\n\x1a\n":
        return read_hdf5(path)
    if start[:1] == b"\x80":
        return read_pickle(path)
    # 8 bytes with the length of a header in JSON. Its highest bytes are 0, or it would be longer than any disk.
    if start[6:8] == b"\0\0" and start[8:9] == b"{":
        return read_safetensors(path)
    raise UserError(f"{path}: {guess(start)}")


def bfloat16_to_float32(bits):
    """The values of bfloat16 numbers, which NumPy lacks: the upper halves of float32. uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


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
    data = read(path)
    header = int.from_bytes(data[:8], "little")
    if header + 8 > len(data):
        raise cut_off(path, len(data), header + 8 if header < 2**20 else None)
    if header > 2**20:
        # The library takes some 30 bytes for each of them. A network has about 100 for each tensor.
        raise UserError(f"{path}: a header of {header} bytes; up to {2**20} are read")
    whole = header + 8 + _announced(data[8 : 8 + header])
    if whole > len(data):
        raise cut_off(path, len(data), whole)
    try:
        found = safetensors.deserialize(data)
        return {
            name: array_over(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]], tensor["shape"])
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
        return _fluid_variable(read(path))
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
    return array_over(data[position:], _FLUID_DTYPES[dtype], shape)


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
    found, others, left = {}, [], os.path.getsize(path)
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
                else:
                    others.append(name)
    except Exception as error:  # the library raises nearly anything for a broken file
        cut = re.search(r"truncated file: eof = (\d+),.* stored_eof = (\d+)", str(error))
        if cut:
            raise cut_off(path, cut[1], cut[2]) from None
        raise UserError(f"{path}: not readable as a file of Keras: {plain(error)}") from None
    if others and not found:
        raise UserError(
            f"{path}: no layer under a name of keras.applications, but {plain(others[0], 100)}: files that Keras 3 "
            "saves as .weights.h5 are not read"
        )
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
