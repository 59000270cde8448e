"""Several processes that train as one, started by `python -m paddle.distributed.launch`, on GPUs (nccl) or CPUs (gloo).

Process 0 is the first; it alone prints and writes. In a process on its own, everything here costs nothing and does the
obvious. Beside Paddle's collectives there is a line from each process to the first. Over it they

* learn at once that one has died, and why, instead of waiting for it for half an hour;
* wait for each other before a collective on the CPU: gloo gives up after 30 seconds, and reading a cold disk, writing a
  checkpoint or computing a recall may take longer.
"""

import contextlib
import functools
import multiprocessing.connection
import os
import queue
import secrets
import socket
import sys
import threading
import time

from utility import UserError

HERE, DONE, FAILED = "here", "done", "failed"


def rank():
    """The number of this process, from 0."""
    return int(os.environ.get("PADDLE_TRAINER_ID") or 0) if world_size() > 1 else 0


def world_size():
    """The number of processes that train together."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or 1)


def local_world_size():
    """How many of them share this machine."""
    return int(os.environ.get("PADDLE_LOCAL_SIZE") or 1)


def is_first():
    return rank() == 0


def share(count):
    """The slice of 0..count-1 that is this process's; all are of one length where the number of processes divides."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


# ---------------------------------------------------------------- start, watch and end

_line = None  # this process's Line, once it has started


def start(gpu):
    """Joins the processes of this run; to be called with paddle's device selected. Silences stdout but for the first.

    Args:
        gpu: False takes gloo, whatever this paddlepaddle is built for.
    """
    global _line
    if world_size() == 1 or _line:
        return
    if not gpu:
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    import paddle.distributed as dist

    os.environ.setdefault("FLAGS_stop_check_timeout", "120")  # how long the first waits for the others to come up
    dist.init_parallel_env()
    _line = Line(gpu)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def end():
    """Waits until all have come to their end. A process that ends without it takes the others with it."""
    if _line:
        _line.meet("the end")
        _line.end()


def is_a_repeat(seconds):
    """Whether a signal that comes `seconds` after another is the same one: the launcher of several processes sends
    SIGTERM three times in a second, and so it does after a Ctrl-C, which the terminal has sent to all already."""
    return world_size() > 1 and seconds < 2


def fail(message):
    """Tells the others why this process is about to end; `end` is then not to be called."""
    if _line:
        _line.fail(f": {message}", rank())


def wait_to_be_ended():
    """For a process whose collective failed: gives the line the time to find out why, and to end this process."""
    if _line:
        time.sleep(5)


class Line:
    """A connection between each process and the first, watched in a thread.

    A process that dies closes its connection, a machine that vanishes is missed by TCP within half a minute; whoever
    sees it says so on stderr and ends its own process with status 1.
    """

    def __init__(self, gpu):
        self.meet_first = not gpu
        self.messages = queue.Queue()
        self.ended = threading.Event()
        host = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")[0].rsplit(":", 1)[0]
        if is_first():
            key = secrets.token_bytes(16)
            try:
                listener = multiprocessing.connection.Listener((host, 0), backlog=world_size())
            except OSError:  # the others know this machine by an address that it does not know itself
                listener = multiprocessing.connection.Listener(("", 0), backlog=world_size())
            from_first((listener.address[1], key))
            self.others = _accept(listener, key, f"{host}:{listener.address[1]}")
        else:
            port, key = from_first(None)
            connection = multiprocessing.connection.Client((host, port), authkey=key)
            connection.send(rank())
            self.others = {connection: 0}
        for connection in self.others:
            _keep_alive(connection)
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        open_lines = dict(self.others)
        while open_lines:
            for connection in multiprocessing.connection.wait(list(open_lines)):
                who = open_lines[connection]
                try:
                    kind, text, number = connection.recv()
                except (EOFError, OSError):
                    kind, text, number = FAILED, " has died: see its log and its machine", who
                if kind == DONE:
                    del open_lines[connection]
                elif kind == FAILED:
                    self.die(text, number)
                else:
                    self.messages.put((who, text))

    def send(self, kind, text="", number=0):
        for connection in self.others:
            with contextlib.suppress(OSError):  # one that is gone is noticed by the watch
                connection.send((kind, text, number))

    def meet(self, what):
        """Returns when every process has come to the same `what`."""
        if is_first():
            for _ in self.others:
                number, there = self.messages.get()
                if there != what:
                    self.die(f" came to {there} when process 0 came to {what}: they do not do the same", number)
            self.send(HERE, what)
        else:
            self.send(HERE, what)
            self.messages.get()

    def end(self):
        self.ended.set()
        self.send(DONE)

    def fail(self, text, number):
        """Tells the others that process `number` has failed."""
        self.ended.set()
        self.send(FAILED, text, number)

    def die(self, text, number):
        """Ends this process because process `number` has failed, and, from the first, all others."""
        if not self.ended.is_set():
            self.fail(text, number)
            print(f"error: process {number} of {world_size()}{text}; the whole run ends", file=sys.stderr, flush=True)
            os._exit(1)


def _accept(listener, key, address):
    """Waits for a connection from each other process; -> {connection: rank}.

    Whoever else connects to the port does not know the key, and may be silent: each is heard in a thread of its own.
    """
    heard = queue.Queue()

    def hear(connection):
        with contextlib.suppress(multiprocessing.AuthenticationError, OSError, EOFError):
            multiprocessing.connection.deliver_challenge(connection, key)
            multiprocessing.connection.answer_challenge(connection, key)
            heard.put((connection, connection.recv()))

    def accept():
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=hear, args=(listener.accept(),), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    others, deadline = {}, time.time() + 60
    while len(others) < world_size() - 1:
        try:
            connection, number = heard.get(timeout=max(0, deadline - time.time()))
        except queue.Empty:
            missing = sorted(set(range(1, world_size())) - set(others.values()))
            raise UserError(
                f"process {missing[0]} of {world_size()} did not connect to {address} within a minute: the machines "
                "must reach each other on all ports"
            ) from None
        others[connection] = number
    listener.close()
    return others


def _keep_alive(connection):
    """Has the system ask every few seconds whether the other machine is still there."""
    with socket.socket(fileno=os.dup(connection.fileno())) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # The last is for a message that is not acknowledged, which keeps the others from being sent.
        options = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000))
        for name, value in options:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# ---------------------------------------------------------------- what they tell each other


def meet(what):
    """Returns when every process has come to `what`, however long that takes."""
    if _line:
        _line.meet(what)


def _before_a_collective(what):
    if _line and _line.meet_first:
        _line.meet(what)


def from_first(value):
    """Rank 0's `value`, a Python object, in every process."""
    if world_size() == 1:
        return value
    import paddle.distributed as dist

    meet("a broadcast")  # on GPUs, too: Paddle would wait there in a way that stops this process's other threads
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def gather_objects(value):
    """[the `value` of each process], in every process."""
    if world_size() == 1:
        return [value]
    import paddle.distributed as dist

    meet("a gathering of objects")
    values = []
    dist.all_gather_object(values, value)
    return values


def largest(value):
    """The largest of the processes' ints (on a GPU this waits for the device)."""
    if world_size() == 1:
        return value
    import paddle
    import paddle.distributed as dist

    _before_a_collective("a maximum")
    tensor = paddle.to_tensor([value], dtype="int64")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.numpy()[0])


def gather(tensor):
    """[n, ...] of each process -> [world_size * n, ...], the same in every process; n must be the same, too.

    With gradient: every process goes on to compute the same loss from the whole, so that the slice of the gradient at
    its own rows is all of its part, and `sum_gradients` then gives the gradient of the one loss.
    """
    if world_size() == 1:
        return tensor
    return _all_gather(tensor) if tensor.stop_gradient else _gather_layer().apply(tensor)


@functools.lru_cache(None)  # made once, and not before paddle is imported
def _gather_layer():
    from paddle.autograd import PyLayer

    class Gather(PyLayer):
        @staticmethod
        def forward(ctx, own):
            return _all_gather(own)

        @staticmethod
        def backward(ctx, gradient):
            return gradient[share(gradient.shape[0])]

    return Gather


def _all_gather(tensor):
    import paddle
    import paddle.distributed as dist

    _before_a_collective("a gathering")
    parts = []
    dist.all_gather(parts, tensor)
    return paddle.concat(parts)


def sum_gradients(parameters):
    """Adds up the gradients of all processes, in every process."""
    parameters = [p for p in parameters if p.grad is not None]
    if world_size() > 1 and parameters:
        from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients_with_group

        _before_a_collective("a sum of gradients")
        fused_allreduce_gradients_with_group(parameters, None, scale=1.0)


def average(tensors):
    """Replaces float32 tensors by their mean over all processes."""
    if world_size() == 1 or not tensors:
        return
    import paddle
    import paddle.distributed as dist

    with paddle.no_grad():
        flat = paddle.concat([tensor.flatten() for tensor in tensors])
        _before_a_collective("a mean")
        dist.all_reduce(flat)
        parts = (flat / world_size()).split([tensor.size for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            paddle.assign(part.reshape(tensor.shape), output=tensor)


class Signalled(Exception):
    """A signal has come to one of the processes; `number` says which."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def collect(items, signals=None):
    """Yields the items of all processes, those of each in their order, to rank 0; nothing to the others.

    An item is a Python object; they go over in rounds of one from each process, so that none has to keep many. (To all
    of them: Paddle 2.6.2 has no gathering of objects in one.)

    Args:
        signals: process.Signals.

    Raises: Signalled in all processes where one has got a signal.
    """
    while True:
        item = next(items, None)
        found = gather_objects((signals.number if signals else 0, item))
        signal = max(number for number, _ in found)
        if signal:
            raise Signalled(signal)
        found = [item for _, item in found if item is not None]
        if not found:
            return
        if is_first():
            yield from found


def average_gradients(parameters):
    """Replaces the gradients by their mean over all processes, which have computed the same ones but for rounding."""
    average([p.grad for p in parameters if p.grad is not None])
