"""Asks the GPU build of Paddle 2.6.2, which no GPU is needed for, whether it has a kernel for every operation and type
that training uses.

    make gpu-kernels      # or: python tests/programs/gpu_kernels.py <a Python that has paddlepaddle-gpu 2.6.2>

What is used is recorded here, with the CPU build of the same version: every loss, mining, pooling and optimizer takes a
step under Paddle's own log of kernels. Exit status 1 where one is missing.
"""

import json
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
LINE = re.compile(r"\] (\w+) API kernel key: \[CPU, .*?, (\w+)\]")
# What mixed precision computes in half types: by Paddle's lists, and what lies between.
HALF = (
    *(
        "conv2d",
        "batch_norm",
        "relu",
        "pool2d",
        "max_pool2d_with_index",
        "add",
        "matmul",
        "multiply",
        "sigmoid",
        "cast",
    ),
    *("transpose", "flatten", "dropout"),
)
# Of the loss scaling and of --num_processes, whose checks of the place keep them off a CPU.
OTHERS = [("check_finite_and_unscale_", "float32"), ("concat", "float32"), ("split", "float32")]
NAMES = {"assign_out_": "assign"}  # whose kernel has another name
ASK = """
import json, sys
from paddle.base import core
found = core._get_registered_phi_kernels("function")
print("kernels", json.dumps({name: keys for name, keys in found.items()}))
"""


def main(python):
    used, known = recorded(), registered(python)
    half = [(op + end, kind) for op in HALF for end in ("", "_grad") for kind in ("float16", "bfloat16")]
    half = [(op, kind) for op, kind in half if (op, "float32") in used]
    pairs = sorted({*used, *OTHERS, *half})
    missing = [f"{op}, {kind}" for op, kind in pairs if not has(known, op, kind)]
    print(
        f"{len(pairs)} pairs of operation and type are used; without a kernel for GPUs: {'; '.join(missing) or 'none'}"
    )
    return 1 if missing or not used else 0


def has(known, op, kind):
    """Whether there is a kernel for GPUs; an operation in place (adam_) has the kernel of the other (adam)."""
    keys = known.get(op) or known.get(op.rstrip("_")) or known.get(NAMES.get(op)) or []
    types = {key.strip("()").split(", ")[-1] for key in keys if key.startswith("(GPU")}
    return bool({kind, "Undefined(AnyType)", "ALL_DTYPE", "undefined"} & types)


def registered(python):
    """{operation: [key]} of a Python's Paddle."""
    result = subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("kernels ")]
    if not lines:
        sys.exit(f"error: {python} has no Paddle whose kernels can be asked for: {result.stderr.strip()[-200:]}")
    return json.loads(lines[0].split(" ", 1)[1])


def recorded():
    """The set of (operation, type) that `use_all` computes."""
    environment = {**os.environ, "GLOG_v": "6", "GLOG_logtostderr": "1"}
    result = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--use"], capture_output=True, text=True, errors="replace",
        check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    if result.returncode or "used all" not in result.stdout:
        sys.exit(f"error: what training uses could not be recorded: {result.stderr.strip()[-300:]}")
    return set(LINE.findall(result.stderr))


def use_all():
    """A step with each loss, mining, pooling and optimizer."""
    sys.path.insert(0, ROOT)
    from runtime import process

    paddle = process.start_paddle(use_gpu=False, seed=0)
    import losses
    import models
    from losses.objective import Objective
    from training import ema, log, optimizers

    ways = [{"loss": name} for name in losses.LOSSES]
    ways += [{"options": {"triplet_mining": mining}} for mining in losses.MINING]
    ways += [{"pooling": pooling} for pooling in ("avg", "max", "gem", "avg+max")]
    ways += [{"optimizer": name} for name in ("momentum", "sgd", "adam", "adamw")]
    ways += [{"clip_norm": 1.0}, {"clip_value": 1.0}, {"memory_size": 12, "embedding_size": 8}]
    process.on_gpu = lambda: True  # for the optimizers of GPUs
    process.to_device = paddle.to_tensor
    for way in ways:
        name = way.get("loss", "tripletloss")
        options = {**losses.row(name).flags, **way.get("options", {})}
        head = losses.row(name).head or "linear"
        network = models.build_model("ResNet8", 4, way.get("pooling", "avg"), way.get("embedding_size", 0), head=head)
        network.train()
        objective = Objective(
            losses.LossSettings(name, memory_size=way.get("memory_size", 0), options=options), 4, network.dimension
        )
        settings = {key: value for key, value in way.items() if key in ("optimizer", "clip_norm", "clip_value")}
        optimizer = optimizers.build_optimizer(optimizers.OptimizerSettings(**settings), network, objective)
        average = ema.Average(network, 0.9)
        label = paddle.arange(8) // 2
        embedding, logits = network(paddle.randint(0, 256, [8, 32, 32, 3]).astype("uint8"))
        figures = objective(embedding, logits, label)
        figures["loss"].backward()
        gradients = [p.grad for p in optimizers.trained_parameters(network, objective) if p.grad is not None]
        optimizers.all_finite([figures["loss"], *gradients])
        optimizer.step()
        optimizers.clear_gradients(optimizer)
        average.update(network, 0)
        log.accuracy(logits, label, 1)
    print("used all", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--use"]:
        use_all()
    else:
        sys.exit(main(sys.argv[1]))
