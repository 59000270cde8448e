"""A training step, in float32 and on a GPU in mixed precision, too: triplet loss and softmax head, momentum, on one
batch of uint8 pictures in memory; what flags of train.py save or cost of it; and how much of train.py's own steps goes
elsewhere than forward and backward.

The same networks on both sides: torchvision's resnet50, timm's seresnext50_32x4d (its classifier without the dropout).
"Two processes" share the batch out, as `python -m paddle.distributed.launch --nproc_per_node=2 train.py` does, which
gives the same gradients but for batch norm, which sees each process's pictures (tests/test_parallel.py).
"""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

from comparison import Comparison, Speed, Value

OURS, TWO, EAGER, LAST = "Paddle", "Paddle, two processes", "PyTorch eager", "PyTorch channels_last"
CLASSES = 100


def comparisons(tiny):
    gpu = both_have_a_gpu()
    bars = {OURS: 1.0} if gpu else {OURS: None, TWO: 1.0}  # Paddle's CPU kernels use few threads: processes count
    sizes = [(32, 8)] if tiny else [(224, 20), (96, 60), *([(224, 128)] if gpu else [])]
    names = ["ResNet50"] if tiny else ["ResNet50", "SE_ResNeXt50_32x4d"]
    for (side, batch), model in itertools.product(sizes, names):
        for amp in ("float32", *(usable_types() if gpu else ())):
            size = {"model": model, "side": side, "batch": batch}
            with_gpu = {**size, "gpu": gpu, "amp": amp}
            yield Comparison(
                f"training step, {model}, {side} px, batch {batch}" + (f", {amp}" if gpu else ""),
                {
                    OURS: ("ours", with_gpu),
                    **({} if gpu else {TWO: ("shared_out", size)}),
                    EAGER: ("pytorch", {**with_gpu, "channels_last": False}),
                    LAST: ("pytorch", {**with_gpu, "channels_last": True}),
                },
                [Speed(mine, other, bar) for mine, bar in bars.items() for other in (EAGER, LAST)],
                9 if side == 96 else 5,
                batch,
            )
    # On a GPU the calls return before the work is done: there is nothing to time.
    for side, batch in [] if gpu else [(32, 8)] if tiny else [(96, 60)]:
        size = {"model": "ResNet50", "side": side, "batch": batch}
        resting = {f"--freeze_stages={count} --freeze_bn=True": count for count in (0, 1, 2, 3)}
        frozen = {flag: ("ours", {**size, "freeze": count, "freeze_bn": True}) for flag, count in resting.items()}
        every, *others = frozen
        yield Comparison(
            f"training step, ResNet50, {side} px, batch {batch}",
            {**frozen, "--ema_decay": ("ours", {**size, "ema": True}), "--color_jitter": ("jittered", size)},
            [
                *(Speed(flag, every) for flag in others),
                Value("--ema_decay: share of a step", lambda r: 100 * r["--ema_decay"]["share"], None, " %"),
                Value(
                    "--color_jitter: share of a step's processor time",
                    lambda r: 100 * r["--color_jitter"]["share"], None, " %",
                ),
            ],
            5,
            batch,
        )  # fmt: skip
    for side, batch in [] if gpu else [(32, 8)] if tiny else [(224, 20), (96, 60)]:
        yield Comparison(
            f"train.py, ResNet50, {side} px, batch {batch}",
            {"train.py": ("train_py", {"model": "ResNet50", "side": side, "batch": batch, "steps": 3 if tiny else 8})},
            [Value("share of a step outside forward and backward", lambda r: 100 * r["train.py"]["outside"], 5, " %")],
            3,
        )


def ask(code):
    """What a Python of its own prints, as words; [] where that fails. This process measures nothing itself."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.split() if not result.returncode else []


def both_have_a_gpu():
    """Whether the Paddle and the PyTorch that are installed are builds for GPUs, and both find one."""
    paddle = "paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0"
    return ask(f"import paddle, torch; print({paddle} and torch.cuda.is_available())")[-1:] == ["True"]


def usable_types():
    """The half types that the GPU computes in."""
    kinds = "gpu.computes_in(paddle, 'bfloat16'), gpu.computes_in(paddle, 'float16')"
    words = ask(f"import paddle; from runtime import gpu; print({kinds})")
    return [name for name, word in zip(("bfloat16", "float16"), words[-2:]) if word == "True"]


def draw(side, batch):
    """-> pictures uint8 [B, H, W, 3], labels int64 [B], four of each class."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (batch, side, side, 3), np.uint8), np.arange(batch) // 4


def ours(model, side, batch, gpu=False, amp="float32", freeze=0, freeze_bn=False, ema=False):
    """As train.py has it: of several processes each takes its share, and all have the loss of the whole batch."""
    from runtime import process

    paddle = process.start_paddle(use_gpu=gpu, seed=0, deterministic=False)
    import losses
    import models
    from losses.softmax import SoftmaxLoss
    from runtime import parallel
    from training import optimizers
    from training.ema import Average

    network = models.build_model(model, CLASSES, dropout=0.0)
    network.start_training(freeze_bn, freeze)
    average = Average(network, 0.999) if ema else None
    if parallel.world_size() > 1:  # the rows with one process train batch norm, too
        statistics = network.batch_norm_statistics()
    triplet, softmax = losses.build_loss(losses.LossSettings("tripletloss")), SoftmaxLoss()
    half = {"enable": amp != "float32", "dtype": "float16" if amp == "float32" else amp}
    scaler = paddle.amp.GradScaler(enable=amp == "float16", init_loss_scaling=2.0**14)
    parameters = [p for p in network.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.Momentum(0.001, 0.9, parameters, weight_decay=1e-4, use_multi_tensor=process.on_gpu())
    own = parallel.share(batch)
    pictures, labels = draw(side, batch)
    image, label = paddle.to_tensor(pictures[own]), paddle.to_tensor(labels[own])

    def run():
        start = time.perf_counter()
        whole = parallel.gather(label)
        with paddle.amp.auto_cast(**half):
            outputs = network(image)
        embedding, logits = (parallel.gather(tensor) for tensor in outputs)
        loss = triplet(embedding, whole) + softmax(logits, whole)
        scaler.scale(loss).backward()
        parallel.sum_gradients(parameters)
        if parallel.world_size() > 1:
            parallel.average(statistics)
        scaler.step(optimizer)
        optimizers.update_scale(scaler)
        optimizers.clear_gradients(optimizer)
        loss.item()
        if average:
            stepped = time.perf_counter()
            average.update(network, 100)
            spent = time.perf_counter() - stepped
            return {"share": spent / (stepped - start + spent)}
        return None

    return run


def jittered(model, side, batch):
    """`ours`, and beside it the jitter of its batch of pictures, which train.py's reader does in threads of its own."""
    import transforms

    step = ours(model, side, batch)
    pictures, _ = draw(side, batch)
    rng = np.random.default_rng(0)

    def run():
        begun = time.process_time()
        step()
        stepped = time.process_time()
        for picture in pictures:
            transforms.color_jitter(picture, rng, 0.25)
        spent = time.process_time() - stepped
        return {"share": spent / (stepped - begun + spent)}

    return run


def shared_out(model, side, batch):
    """`ours` in two processes with half of the threads each: this one, and one that it starts."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        master, *endpoints = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in sockets]
    os.environ.update(
        PADDLE_MASTER=master, PADDLE_TRAINERS_NUM="2", PADDLE_LOCAL_SIZE="2", PADDLE_TRAINER_ID="0",
        PADDLE_TRAINER_ENDPOINTS=",".join(endpoints), PADDLE_CURRENT_ENDPOINT=endpoints[0],
        OMP_NUM_THREADS=str(max(1, int(os.environ["OMP_NUM_THREADS"]) // 2)),
    )  # fmt: skip
    os.environ.pop("MKL_NUM_THREADS", None)  # overrides the other
    environment = {**os.environ, "PADDLE_TRAINER_ID": "1", "PADDLE_CURRENT_ENDPOINT": endpoints[1]}
    code = f"import rows_step; rows_step.follow({model!r}, {side}, {batch})"
    folders = os.pathsep.join(path for path in sys.path[:2])
    follower = subprocess.Popen(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": folders}, stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    take_part = ours(model, side, batch)

    def run():
        follower.stdin.write(b"\n")
        follower.stdin.flush()
        take_part()

    return run


def follow(model, side, batch):
    """Takes a step whenever rank 0 says so, for it is not to compute while others have their turn; ends with
    it."""
    run = ours(model, side, batch)
    for _ in sys.stdin:
        run()


def pytorch(model, side, batch, channels_last, gpu=False, amp="float32"):
    import torch
    import torchvision_ops  # noqa: F401
    from torch.nn import functional

    if model == "ResNet50":
        import torchvision

        network = torchvision.models.resnet50(num_classes=CLASSES)
        head, network.fc = network.fc, torch.nn.Identity()
    else:
        import timm

        network = timm.create_model("seresnext50_32x4d", num_classes=0)
        head = torch.nn.Linear(network.num_features, CLASSES)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    device = "cuda" if gpu else "cpu"
    torch.backends.cudnn.benchmark = True
    network, head = network.to(device), head.to(device)
    parameters = [*network.parameters(), *head.parameters()]
    half = {"enabled": amp != "float32", "dtype": getattr(torch, "float16" if amp == "float32" else amp)}
    scaler = torch.amp.GradScaler(device, init_scale=2.0**14, enabled=amp == "float16")
    optimizer = torch.optim.SGD(parameters, 0.001, momentum=0.9, weight_decay=1e-4)
    image, label = (torch.from_numpy(array).to(device) for array in draw(side, batch))
    mean, std = (torch.tensor(v, device=device) * 255 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    same = label[:, None] == label
    positive = same & ~torch.eye(batch, dtype=torch.bool, device=device)

    def triplet(embedding):
        """A random negative for each pair, as losses/tripletloss.py has it."""
        x = functional.normalize(embedding.double())
        d = (2 - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        chosen = torch.multinomial((~same).double(), batch, replacement=True)
        return functional.relu(d + 0.1 - d.gather(1, chosen))[positive].mean().float()

    def run():
        # Pictures lie in memory as [B, H, W, 3]: permuted, that is channels_last already.
        x = ((image.float() - mean) / std).permute(0, 3, 1, 2)
        with torch.autocast(device, **half):
            embedding = network(x if channels_last else x.contiguous())
            logits = head(embedding)
        loss = triplet(embedding) + functional.cross_entropy(logits.float(), label)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()

    return run


def train_py(model, side, batch, steps):
    """Runs train.py's own main with its forward and Paddle's backward under a timer."""
    from runtime import process

    paddle = process.start_paddle(seed=0)
    from rows_reader import PHOTOS, find

    import train
    from models.embedding_net import EmbeddingNet

    folder = tempfile.mkdtemp()
    paths = [os.path.abspath(path) for path in find(PHOTOS, (375, 500), 120, 1)]
    images = os.path.join(folder, "list.txt")
    with open(images, "w") as file:
        file.writelines(f"{path} {i // 4}\n" for i, path in enumerate(paths))
    flags = (
        f"--train_list={images} --model={model} --image_shape=3,{side},{side} --train_batch_size={batch} --lr=0.001 "
        f"--total_images={steps * batch} --num_epochs=1 --eval_every=0 --overwrite=True --seed=0 "
        "--model_save_dir="
    )
    begun, inside = [], []
    forward, backward = EmbeddingNet.forward, paddle.Tensor.backward

    def timed(function, first):
        def call(*args, **options):
            start = time.perf_counter()
            if first:
                begun.append(start)
                inside.append(0.0)
            result = function(*args, **options)
            if inside:  # the optimizer makes its state with a backward of its own
                inside[-1] += time.perf_counter() - start
            return result

        return call

    EmbeddingNet.forward = timed(forward, True)
    paddle.Tensor.backward = timed(backward, False)

    def run():
        begun.clear()
        inside.clear()
        sys.argv = ["train.py", *(flags + tempfile.mkdtemp(dir=folder)).split()]
        train.main()
        # A step lasts from one forward to the next: the first, which waits for the first pictures, counts from there.
        return {"outside": 1 - sum(inside[:-1]) / (begun[-1] - begun[0]), "seconds": begun[-1] - begun[0]}

    return run
