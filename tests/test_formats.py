"""Files of weights in every format, and files that are broken or worse."""

import codecs
import collections
import contextlib
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import paddle
import pytest
import safetensors.numpy
from test_models import scramble

import models
import weights
from utility import UserError
from weights import formats


def small_weights(seed=0):
    return {n: v.numpy() for n, v in scramble(models.build_model("ResNet8", 3), seed).state_dict().items()}


def same(read, written):
    assert list(read) == list(written)
    for name, value in written.items():
        assert read[name].dtype == value.dtype and np.array_equal(read[name], value)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_whatever_paddle_save_writes(tmp_path, protocol):
    path = str(tmp_path / "w.pdparams")
    arrays = {**small_weights(), "half": np.ones((2, 0, 3), np.float16), "number": np.array(5, np.int64)}
    arrays["columns"] = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    tensors = {name: paddle.to_tensor(value) for name, value in arrays.items()}
    nested = {"model": tensors, "epoch": 3, "best": np.float64(0.5), "lr": {"last_lr": 0.1, "steps": [1, (2,), None]}}
    inside = {f"model.{name}": value for name, value in arrays.items()}
    for content, wanted in ((tensors, arrays), (arrays, arrays), (nested, inside), ({"model": arrays}, inside)):
        paddle.save(content, path, protocol=protocol)
        same(formats.read_tensors(path), wanted)


def test_large_arrays_in_parts_and_pickles_of_python_2(tmp_path):
    path = tmp_path / "w.pdparams"
    array = np.arange(10, dtype=np.float32)
    parts = {"a@@.0": array[:6], "a@@.1": array[6:], "b": array}
    parts["UnpackBigParamInfor@@"] = {"a": {"OriginShape": (2, 5), "slices": ["a@@.0", "a@@.1"]}}
    path.write_bytes(pickle.dumps(parts, 2))
    same(formats.read_pickle(str(path)), {"b": array, "a": array.reshape(2, 5)})

    # Python 2 wrote the bytes of an array as a string: take the instruction that says so.
    data = array.tobytes()
    call = b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01K\n\x85"
    dtype = b"cnumpy\ndtype\nU\x02f4K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    path.write_bytes(call + dtype + b"\x89U" + bytes([len(data)]) + data + b"tbs.")
    same(formats.read_pickle(str(path)), {"w": array})


def fluid_variable(array, lod=(), packed=False, dtype=5):
    """A variable as save_vars writes it, from the description of the format."""
    if packed:
        dims = b"".join(varint(n) for n in array.shape)
        desc = b"\x08" + varint(dtype) + b"\x12" + varint(len(dims)) + dims
    else:
        desc = b"\x08" + varint(dtype) + b"".join(b"\x10" + varint(n) for n in array.shape)
    levels = b"".join(struct.pack("<Q", 8 * len(level)) + struct.pack(f"<{len(level)}Q", *level) for level in lod)
    head = struct.pack("<IQ", 0, len(lod)) + levels + struct.pack("<Ii", 0, len(desc))
    return head + desc + array.tobytes()


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


@pytest.mark.parametrize("packed", [False, True])
def test_fluid_variables(tmp_path, packed):
    path, array = tmp_path / "v", np.arange(300 * 2, dtype=np.float32).reshape(300, 2)
    path.write_bytes(fluid_variable(array, lod=[(0, 3, 300), (0, 1)], packed=packed))
    assert np.array_equal(formats.read_fluid_variable(str(path)), array)
    for dtype in ("float16", "float64", "int64"):
        paddle.save(paddle.to_tensor(array.astype(dtype)), str(path), use_binary_format=True)
        assert formats.read_fluid_variable(str(path)).dtype == dtype


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is text",
        fluid_variable(np.ones((2, 3), np.float32))[:-1],
        fluid_variable(np.ones((2, 3), np.float32)) + b"0",
        fluid_variable(np.ones((2, 3), np.float32), dtype=7),
        fluid_variable(np.ones(0, np.float32).reshape(0, 10**9)) + b"0000",
        fluid_variable(np.empty((10**9,), np.dtype([])), dtype=5),  # a billion numbers announced, none there
        fluid_variable(np.ones(1, np.float32), lod=[(0,)])[:20],
        struct.pack("<IQ", 0, 2**63) + b"\0" * 100,
        struct.pack("<IQIi", 0, 0, 0, -5) + b"\0" * 100,
        struct.pack("<IQ", 0, 10**6) + b"\0" * 8 * 10**6 + fluid_variable(np.ones(1, np.float32))[12:],
        struct.pack("<IQIi", 0, 0, 0, 10**6) + b"\x08\x05" + b"\x18\x01" * (5 * 10**5 - 1) + b"0000",
        struct.pack("<IQIi", 0, 0, 0, 100) + b"\xff" * 100,
        struct.pack("<IQIi", 0, 0, 0, 4) + b"\x08\x05\x12\xff" + b"\0" * 100,
    ],
)
def test_broken_fluid_variables(tmp_path, content):
    (tmp_path / "conv2d_0.w_0").write_bytes(content)
    with pytest.raises(UserError, match=r"conv2d_0.w_0: no variable of a fluid model, or truncated \("):
        weights.read_weights(str(tmp_path))


def test_safetensors(tmp_path):
    from test_layouts import loaded  # which imports this file

    path = str(tmp_path / "w.safetensors")
    arrays = small_weights()
    safetensors.numpy.save_file(arrays, path)
    network, line = loaded(path, "ResNet8", 3, head="must")
    assert line.endswith("w.safetensors (this project ResNet8); head loaded: 3 classes")
    same({name: network.state_dict()[name].numpy() for name in arrays}, arrays)

    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + b"\x80\x3f\x20\xc0")
    assert formats.bfloat16_to_float32(formats.read_tensors(path)["a"]).tolist() == [1.0, -2.5]


class Call:
    """Pickled, it asks for a call of `function` when it is read."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("suffix", ["pdparams", "pdopt"])
def test_a_pickle_that_runs_a_command_is_refused(tmp_path, protocol, suffix):
    marker, path = tmp_path / "marker", tmp_path / f"bad.{suffix}"
    code = f"__import__('os').mkdir({str(marker)!r})"
    for call, name in ((Call(os.mkdir, str(marker)), r"\w+.mkdir"), (Call(eval, code), "builtins.eval")):
        path.write_bytes(pickle.dumps({"w": call}, protocol))
        wanted = f"refused: not a plain file of weights .the forbidden object {name}" if protocol else "a text file"
        for read in (weights.read_weights, weights.read_pickle):
            with pytest.raises(UserError, match=rf"bad.{suffix}: {wanted}"):
                read(str(path))
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the file was a real one


@pytest.mark.parametrize(
    "content",
    [
        {"w": Call(np.zeros(1).__reduce__()[0], np.ndarray, (10**12,), b"d")},
        {"w": Call(np.ndarray, (10**10,))},
        {"w": Call(np.dtype, "S1000000000")},
        {"w": Call(tuple, range(3))},
        {"w": Call(eval, "data", {"data": 1})},
        {"w": np.zeros(3, "O")},
        {"w": np.zeros(3, [("a", "f4")])},
        {"w": bytearray(10)},
        {"w": models.UserError()},
    ],
    ids=lambda content: type(content).__name__,
)
def test_a_pickle_with_anything_but_plain_arrays_is_refused(tmp_path, content):
    path = tmp_path / "big.pdparams"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match=r"big\.pdparams: (refused|broken)"):
            weights.read_weights(str(path))


@pytest.mark.parametrize(
    "content",
    [
        # a bytearray, bytes, text and a frame of 2**40 bytes
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x",
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"x",
        # attributes of one of our own functions
        b"\x80\x02}U\x01wc_codecs\nencode\n}U\x0c__defaults__K\x01sbs.",
        b"\x80\x02}U\x01wcnumpy\nndarray\n)\x81s.",
        b"\x80\x04",
        pickle.dumps({"w": np.zeros(100)})[:-50],
        pickle.dumps([1, 2]),
        pickle.dumps({1: np.zeros(3)}),
    ],
)
def test_broken_pickles_allocate_nothing(tmp_path, content):
    path = tmp_path / "broken.pdparams"
    path.write_bytes(content)
    with (
        measured_memory() as memory,
        pytest.raises(UserError, match=r"broken\.pdparams: (refused|broken|holds|cut off)"),
    ):
        weights.read_weights(str(path))
    assert memory() < 4e6


class State:
    """Pickled, it is an array of bytes with this shape and content."""

    def __init__(self, shape, data):
        self.state = (1, shape, np.dtype("u1"), False, data)

    def __reduce__(self):
        return np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


def nested(depth):
    """A tuple of 2**depth numbers, which takes `depth` instructions in a file."""
    items = (1,)
    for _ in range(depth):
        items = (items, items)
    return items


def shared_dicts(depth):
    """A dict with 2**depth paths to one array."""
    content = {"w": np.ones(1)}
    for _ in range(depth):
        content = {"a": content, "b": content}
    return content


def deep_dict(depth):
    content = {"w": np.ones(1)}
    for _ in range(depth):
        content = {"a": content}
    return content


LONG_TEXT, PAIRS, ARRAY = "x" * 100_000, [(str(n), n) for n in range(9000)], np.ones(100_000, np.uint8)
ALIASES = {str(n): ARRAY for n in range(1000)}
PARTS = {"w": {"OriginShape": (10**8,), "slices": list(ALIASES)}}
MIXED = {"w": {"OriginShape": (100_009,), "slices": ["0", "1"]}}  # as float64 all take 8 bytes
SAME_HASH = b"".join(b"\x8a\x0c" + ((2**61 - 1) * (2**30 + n)).to_bytes(12, "little") + b"N" for n in range(60_000))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        # What is hashed, shown or compared: by a stack that overflows, in time that doubles with each instruction.
        (b"\x80\x02})" + b"\x85" * 150_000 + b"K\x01s.", "refused.*a tuple for a name"),
        ({nested(20): 1}, "refused.*a tuple for a name"),
        ({"w": Call(collections.OrderedDict, [(nested(20), 1)])}, "refused.*a tuple for a name"),
        ({"w": frozenset([nested(20)])}, "refused.*(an instruction|forbidden)"),
        ({"w": Call(codecs.encode, "a", nested(20))}, "refused.*an encoding other than latin1"),
        ({"w": Call(np.dtype, nested(20))}, "refused.*an array of objects"),
        ({"w": State(nested(20), b"")}, "broken.*a shape"),
        ({"UnpackBigParamInfor@@": {"w": {"slices": [nested(20)]}}}, "broken: parts"),
        # What is repeated.
        ({"w": State(("a", 10**8), b"a")}, "broken.*a shape"),
        ({"w": State(((None,), 10**8), b"a")}, "broken.*a shape"),
        ({"w": State((True,), b"a")}, "broken.*a shape"),
        ({"w": State((1,) * 33, b"a")}, "broken.*a shape"),
        ({"w": State((2**63, 0), b"")}, "broken.*a shape"),
        ({"w": State((1,), nested(20))}, "refused.*an array of objects"),
        ({"w": [Call(codecs.encode, LONG_TEXT, "latin1") for _ in range(1000)]}, "refused.*more memory"),
        ({"w": [State((100_000,), LONG_TEXT) for _ in range(1000)]}, "refused.*more memory"),
        ({"w": [Call(collections.OrderedDict, PAIRS) for _ in range(100)]}, "refused.*more memory"),
        ({"w": [Call(collections.OrderedDict, dict(PAIRS)) for _ in range(100)]}, "refused.*an ordered dict"),
        ({**ALIASES, "UnpackBigParamInfor@@": PARTS}, "broken: parts"),
        ({"0": ARRAY, "1": np.ones(9), "UnpackBigParamInfor@@": MIXED}, "broken: parts"),
        ({"w": "x" * 2_000_000 + "\U0001f600"}, "refused.*more memory"),
        # Dicts inside each other, whose keys go in front of names.
        (shared_dicts(30), "names of no known network"),
        (deep_dict(40), "refused.*more dicts inside each other"),
        ({"x" * 2000: {"w": ARRAY}}, "refused.*longer keys"),
        ({"x" * 900: dict.fromkeys(map(str, range(20_000)), np.ones(1))}, "refused.*more memory"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, "refused.*two arrays are called a.b"),
        # Objects of 60 to 200 bytes for each byte.
        (b"\x80\x04}" + b"\x94" * 10**6 + b".", "refused.*too many small objects"),
        (b"\x80\x04(" + b"}" * 10**6 + b"t.", "refused.*too many small objects"),
        # Numbers that are slow to read or, as names, to tell apart.
        (b"\x80\x02}(" + SAME_HASH + b"u.", "holds no tensors"),
        (b"\x80\x02}U\x01wL" + b"9" * 10**6 + b"L\ns.", "refused.*an instruction"),
        (b"\x80\x02}U\x01wI" + b"9" * 10**6 + b"\ns.", "refused.*a long name"),
        (b"\x80\x02}U\x01wF" + b"9" * 10**6 + b"\ns.", "refused.*an instruction"),
        (b"\x80\x02}U\x01wc" + b"x" * 10**6 + b"\nx\n)Rs.", "refused.*a long name"),
    ],
)
def test_a_pickle_takes_time_and_memory_as_it_is_long(tmp_path, content, wanted):
    path = tmp_path / "w.pdparams"
    written = [content] if isinstance(content, bytes) else [pickle.dumps(content, protocol) for protocol in (2, 4)]
    for data in written:
        path.write_bytes(data)
        start = time.process_time()
        with measured_memory() as memory, pytest.raises(UserError, match=rf"w\.pdparams: {wanted}"):
            weights.read_weights(str(path))
        assert memory() < 4 * path.stat().st_size + 30e6
        assert time.process_time() - start < 10  # twenty times what it takes


@contextlib.contextmanager
def measured_memory():
    """-> a function with the most bytes that were in use since."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_a_pickle_take_their_bytes(tmp_path, protocol):
    path = tmp_path / "w.pdparams"
    array = np.random.default_rng(0).integers(0, 256, 10**7, np.uint8)
    paddle.save({"a": array, "shared": array, "b": array.copy()}, str(path), protocol=protocol)
    with measured_memory() as memory:
        tensors = formats.read_pickle(str(path))
        assert memory() < (1.05 if protocol > 2 else 3.2) * path.stat().st_size
    assert all(np.array_equal(value, array) for value in tensors.values())
    assert list(tensors) == ["a", "shared", "b"]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (
            b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(40_000)),
            "bytes",
        ),
        (b'{"a":{"dtype":"F32","shape":[0' + b",1" * 400_000 + b'],"data_offsets":[0,0]}', "a shape"),
        (b'{"a":' * 1000, "recursion limit"),
    ],
)
def test_a_header_of_safetensors_is_limited(tmp_path, content, wanted):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(content) + 1) + content + b"}")
    with pytest.raises(UserError, match=rf"w\.safetensors: .*{wanted}"):
        weights.read_weights(str(path))


def test_a_fluid_directory_is_read_as_it_is_long(tmp_path, monkeypatch):
    first, array = tmp_path / "conv2d_0.w_0", np.ones(10**6, np.float32)
    first.write_bytes(fluid_variable(array))
    for n in range(1, 100):
        (tmp_path / f"conv2d_{n}.w_0").symlink_to(first.name)
    with measured_memory() as memory:
        assert len(formats.read_fluid_directory(str(tmp_path), weights.layouts.FLUID_NAMES)) == 100
        assert memory() < 3 * array.nbytes
    monkeypatch.setattr(formats, "MOST_NAMES", 99)
    with pytest.raises(UserError, match="100 variables, more than any"):
        weights.read_weights(str(tmp_path))


def chain(h5py, file):
    for _ in range(300):
        file = file.create_group("a")


def pieces(h5py, file):
    layout = h5py.VirtualLayout((5,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "a", (5,))
    file.create_virtual_dataset("a/kernel", layout)


@pytest.mark.parametrize(
    ("write", "wanted"),
    [
        (lambda h5py, file: file.create_dataset("a/kernel", (10**7,), "f4"), "larger than the file"),
        (lambda h5py, file: file.create_dataset("a/kernel", (10**7,), "f4", compression="gzip"), "compressed"),
        (lambda h5py, file: file.create_dataset("a/kernel", (3,), "f4", external=[("/dev/zero", 0, 12)]), "another"),
        (lambda h5py, file: file.create_dataset("a/kernel", data=h5py.Empty("f4")), "Keras never writes"),
        (pieces, "another file"),
        (chain, "inside each other"),
        (lambda h5py, file: [file.__setitem__(f"a{n}", file) for n in range(101)], "more objects"),
    ],
)
def test_hdf5_is_read_as_it_is_long(tmp_path, monkeypatch, write, wanted):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(formats, "MOST_NAMES", 100)
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        write(h5py, file)
    with pytest.raises(UserError, match=rf"w\.h5: not readable as a file of Keras: .*{wanted}"):
        weights.read_weights(str(path))


def test_files_of_keras_3_are_said_to_be_none_that_is_read(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "k3.weights.h5", "w") as file:
        file.create_dataset("layers/conv2d/vars/0", data=np.ones((3, 3), np.float32))
    with pytest.raises(UserError, match=r"keras\.applications, but layers/conv2d/vars/0: files that Keras 3 saves as "):
        weights.read_weights(str(tmp_path / "k3.weights.h5"))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 102530333\n"


def zipped(name):
    """A zip archive of one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, bytes(200))
    return buffer.getvalue()


@pytest.mark.parametrize("size", [1, 2, 20, 500, 10_000, -1])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_was_cut_off_says_so(tmp_path, protocol, size):
    path = tmp_path / "w.pdparams"
    paddle.save({"model": small_weights(), "epoch": 3}, str(path), protocol=protocol)
    data = path.read_bytes()[:size]
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"w\.pdparams: cut off: {len(data)} bytes are there; download or copy it"):
        weights.read_weights(str(path))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "an empty file: download or copy it again"),
        (bytes(1000), "zeros: its content never arrived"),
        (LFS, "a Git LFS pointer, which stands for the file of 102530333 bytes: git lfs pull"),
        (b"<!DOCTYPE html><html>404", "a web page, not weights"),
        (b"\xef\xbb\xbf\n <!-- 404 --><html>", "a web page, not weights"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page, not weights"),
        (b"404: Not Found\n\x1b", "an unknown format"),
        (b"404: Not Found\nmore", r"a text file \(404: Not Found \.\.\.\), neither Paddle's .pdparams, safeten"),
        (b"1234567", "7 bytes, too few for weights: cut off"),
        (zipped("archive/data.pkl"), "a file of PyTorch.*convert.*docs/weights.md.*safetensors.torch.save_file"),
        (zipped("resnet50/.format_version"), "a file of PyTorch"),
        (zipped("resnet50/data.pkl")[:60], "a file of PyTorch"),
        (zipped("conv1.weight.npy"), "an archive of NumPy.*safetensors.numpy.save_file"),
        (zipped("metadata.json"), "a .keras archive"),
        (zipped("a\x1b/model.pdparams"), r"a zip archive \(a\\x1b/model.pdparams ...\): unpack it first"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "a file of PyTorch"),
        (b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n)Rs.", "a file of PyTorch"),
        (fluid_variable(np.ones(3, np.float32)), "one variable of a fluid model.*give the directory"),
        (b"\x1f\x8b\x08\x00" + b"0" * 50, "an archive: unpack it first"),
        (
            np.random.default_rng(0).bytes(7) + b"\xff" + b"{" + np.random.default_rng(1).bytes(40),
            "an unknown format|a text file",
        ),
        (struct.pack("<Q", 10**9) + b'{"a":', "cut off: 13 bytes are there; download"),
        (struct.pack("<Q", 500) + b'{"a":', "cut off: 13 bytes are there of 508; download"),
        (safetensors.numpy.save({"a": np.ones(9)})[:-1], "cut off: 135 bytes are there of 136; download or copy"),
        (safetensors.numpy.save({"a": np.ones(9)}) + b"0", "broken or truncated safetensors"),
        (safetensors.numpy.save({"a": np.ones(9)}).replace(b"[9]", b"[8]"), "broken or truncated safetensors"),
        (pickle.dumps({"linear.weight": np.ones(9)}), r"names of no known network \(linear.weight ...\); known are"),
        (pickle.dumps({"a\n\x1b[2Jb": np.ones(9)}), r"names of no known network \(a\\n\\x1b\[2Jb ...\); known are"),
        (pickle.dumps({"fc.w/moment1": np.ones(9)}), "the state of an optimizer, not weights"),
        (pickle.dumps({"opt": {"linear_0.w_0_velocity_0": np.ones(9)}, "epoch": 3}), "the state of an optimizer, not"),
        (pickle.dumps({"opt": {"master_weights": {"conv2d_0.w_0": np.ones(9)}}}), "the state of an optimizer, not"),
        (pickle.dumps({"epoch": 3}), "holds no tensors"),
        # an array whose content never follows
        (b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87Rs.", "names of no"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, wanted):
    path = tmp_path / "any.name"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"any.name: ({wanted})"):
        weights.read_weights(str(path))
