"""A GPU that is none: the scripts take every branch that they take on one, while the CPU computes.

Places, copies and events are stand-ins; mixed precision is one that gives what leaves a pooling, a linear layer or the
network the half type, as autocast does on a GPU, and computes in float32. The loss scaling is Paddle's own.

What is noted: copies to and from the device, and every read of a tensor's value, which on a GPU waits for the device.
"""

import contextlib
import sys
import types

import numpy as np
import paddle
from paddle.amp import grad_scaler

from models.embedding_net import Pooling
from training.run import Run

# What hands a tensor's value to Python.
READS = (
    *("numpy", "item", "tolist", "cpu", "__array__", "__bool__", "__float__", "__int__", "__index__", "__len__"),
    *("__format__", "__str__", "__repr__"),
)
FREE = ("__len__",)  # of the shape alone


def is_paddle(frame):
    """Whether a frame is Paddle's own, which has no kernels for what it would do on a GPU."""
    return frame.f_globals.get("__name__", "").split(".")[0] == "paddle"


class StandInGpu:
    """A GPU for as long as `patch`, a MonkeyPatch, lasts.

    `notes` is a list of ("read", method, who), ("pinned", shape), ("pageable", shape), ("fetched", shape),
    ("waited",), and whatever a test adds; `who` is the file and the function that asked.
    """

    def __init__(self, patch, name="NVIDIA Stand-in", count=1):
        self.notes, self.flags, self.device, self.amp = [], {}, "cpu", None
        self.reading = False
        self.patch, self.name, self.count = patch, name, count
        self.real = types.SimpleNamespace(
            to_tensor=paddle.to_tensor, set_device=paddle.set_device, set_flags=paddle.set_flags,
            get_flags=paddle.get_flags,
        )  # fmt: skip
        self._install_device()
        self._install_copies()
        self._install_amp()
        self._install_reads()

    def set(self, owner, name, value):
        self.patch.setattr(owner, name, value, raising=False)

    def call(self, script, *flags):
        """Runs the main of a script, an imported module, in this process."""
        self.set(Run, "lock", lambda run: None)  # which would last until the process ends
        self.set(sys, "argv", [script.__file__, *(str(flag) for flag in flags)])
        script.main()

    # ------------------------------------------------------------ the device

    def _install_device(self):
        cuda = paddle.device.cuda
        for module, name, value in (
            (paddle, "is_compiled_with_cuda", lambda: not is_paddle(sys._getframe(1))),
            (paddle, "set_device", self.set_device),
            (paddle, "get_device", lambda: self.device),
            (paddle, "set_flags", self.set_flags),
            (paddle, "get_flags", self.get_flags),
            (paddle.device, "get_cudnn_version", lambda: 8900),
            (paddle.version, "cuda", lambda: "12.6"),
            (cuda, "device_count", lambda: self.count),
            (cuda, "get_device_name", lambda *_: self.name),
            (cuda, "get_device_capability", lambda *_: (8, 6)),
            (cuda, "max_memory_allocated", lambda *_: 2**30),
            (cuda, "synchronize", lambda *_: None),
            (cuda, "Event", lambda: Event(self)),
            (paddle.nn.Layer, "to", lambda layer, *_, **__: layer),
        ):
            self.set(module, name, value)

    def set_device(self, name):
        self.device = "gpu:0" if name.startswith("gpu") else name
        return self.real.set_device("cpu")

    def set_flags(self, flags):
        self.flags.update({name: value for name, value in flags.items() if "cudnn" in name})
        self.real.set_flags({name: value for name, value in flags.items() if "cudnn" not in name})

    def get_flags(self, names):
        if is_paddle(sys._getframe(1)):
            return self.real.get_flags(names)
        return {name: self.flags.get(name, False) for name in names}

    # ------------------------------------------------------------ copies

    def _install_copies(self):
        self.set(paddle, "CUDAPinnedPlace", lambda: "pinned")
        self.set(paddle, "to_tensor", self.to_tensor)
        self.set(paddle.Tensor, "cuda", lambda *args, **options: self.cuda(*args, **options))
        self.set(paddle.Tensor, "pin_memory", lambda *args, **options: self.pin_memory(*args, **options))

    def to_tensor(self, data, dtype=None, place=None, stop_gradient=True):
        if self.device == "gpu:0" and not isinstance(data, paddle.Tensor):
            self.notes.append(("pinned" if place == "pinned" else "pageable", np.shape(data)))
        return self.real.to_tensor(data, dtype, None if place == "pinned" else place, stop_gradient)

    def cuda(self, tensor, device_id=None, blocking=True):
        assert not blocking, "a copy to the device that waits"
        return tensor

    def pin_memory(self, tensor, blocking=True):
        assert not blocking, "a copy from the device that waits"
        assert tensor.dtype in (paddle.float32, paddle.int64), f"{tensor.dtype} has no type in NumPy"
        self.notes.append(("fetched", tuple(tensor.shape)))
        return tensor.clone()

    # ------------------------------------------------------------ mixed precision

    def _install_amp(self):
        tracer = types.SimpleNamespace(_expected_place=types.SimpleNamespace(is_gpu_place=lambda: True))
        self.set(grad_scaler, "_dygraph_tracer", lambda: tracer)
        self.set(paddle.amp, "is_float16_supported", lambda: True)
        self.set(paddle.amp, "is_bfloat16_supported", lambda: True)
        self.set(paddle.amp, "auto_cast", self.auto_cast)

    @contextlib.contextmanager
    def auto_cast(self, enable=True, *_, dtype="float16", **__):
        before, self.amp = self.amp, dtype if enable else None
        grad_scaler.amp_global_state().amp_dtype = dtype  # which Paddle's does not set back
        forwards = {layer: layer.forward for layer in (Pooling, paddle.nn.Linear, paddle.nn.LayerNorm)}
        try:
            if enable and before is None:  # not always: 2.6.2 can't trace what is a function of a function
                for layer, forward in forwards.items():
                    layer.forward = self.cast_around(forward, layer is not paddle.nn.LayerNorm)
            yield
        finally:
            self.amp = before
            for layer, forward in forwards.items():
                layer.forward = forward

    def cast_around(self, forward, halves):
        """A layer's forward that computes in float32; where `halves` and under auto_cast it gives the half type."""

        def cast(layer, x):
            if self.amp is None:
                return forward(layer, x)
            y = forward(layer, x.astype("float32"))
            return y.astype(self.amp) if halves and getattr(layer, "kind", "") != "gem" else y

        return cast

    # ------------------------------------------------------------ reads

    def _install_reads(self):
        for name in READS:
            if name not in FREE and hasattr(paddle.Tensor, name):
                self.set(paddle.Tensor, name, self.noted(name, getattr(paddle.Tensor, name)))

    def noted(self, name, method):
        def read(tensor, *args, **options):
            if self.reading or self.device == "cpu":  # the outermost counts
                return method(tensor, *args, **options)
            caller = sys._getframe(1)
            self.notes.append(("read", name, f"{caller.f_code.co_filename}:{caller.f_code.co_name}"))
            self.reading = True
            try:
                return method(tensor, *args, **options)
            finally:
                self.reading = False

        return read


class Event:
    """The first question after it comes before the device has."""

    def __init__(self, gpu):
        self.gpu, self.asked = gpu, None

    def record(self, stream=None):
        self.asked = 0

    def query(self):
        assert self.asked is not None, "an event that was not recorded"
        self.asked += 1
        if self.asked == 1:
            self.gpu.notes.append(("waited",))
        return self.asked > 1
