"""Pictures a second of a ResNet50 on the CPU: these scripts against PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/extraction.py --python=VENV/bin/python

Everybody gets the same uint8 pictures [N, 224, 224, 3] and the same random weights, normalises the pictures, and
returns the pooled features, which are compared first. Each runs in a process of its own with all cores, one after the
other, in rounds; what is printed is the median over the rounds and, against the best of the others at the same
precision, the median and the range of the rounds' ratios. What is not installed is left out: --python names an
interpreter that has torch, onnxruntime, onnx and openvino, which need no paddle beside them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = {"ours": "float32", "ours bf16": "bf16", "paddle eager": "float32"}
OTHERS = {
    "PyTorch eager": "float32",
    "PyTorch channels_last": "float32",
    "ONNX Runtime": "float32",
    "OpenVINO": "float32",
    "PyTorch bf16": "bf16",
    "OpenVINO bf16": "bf16",
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that the others are installed in")
    parser.add_argument("--batch_sizes", default="8,32", help="pictures at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count the CPU seconds of each process: for one thread on a machine that others use, too",
    )
    parser.add_argument("--only", default="", help="names with commas between them: just these")
    parser.add_argument("--output_json", default="")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        return serve(args.worker, args.folder, args.threads, time.process_time if args.cpu_time else time.perf_counter)
    names = args.only.split(",") if args.only else [*OURS, *OTHERS]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--worker=weights", f"--folder={folder}"], check=True)
        workers = start(names, args, folder)
        try:
            result = measure(workers, args)
        finally:
            for worker in workers.values():
                worker.kill()
    if args.output_json:
        with open(args.output_json, "w") as file:
            json.dump(result, file, indent=1)


# ---------------------------------------------------------------- measuring


def start(names, args, folder):
    """-> {name: process that waits for orders}, of those that can run and compute the right features."""
    workers, wanted = {}, None
    for name in names:
        python = sys.executable if name in OURS else args.python
        command = [python, __file__, f"--worker={name}", f"--folder={folder}", f"--threads={args.threads}"]
        command += ["--cpu_time"] if args.cpu_time else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        if name in OTHERS:
            environment.pop("MKL_DEBUG_CPU_TYPE", None)
        with open(os.path.join(folder, "log"), "w") as log:
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        try:
            features = np.array(ask(worker, "features"))
        except (EOFError, ValueError, OSError):
            worker.kill()
            with open(os.path.join(folder, "log")) as log:
                print(f"{name}: left out ({(log.read().strip().splitlines() or ['no answer'])[-1][:150]})")
            continue
        wanted = features if wanted is None else wanted
        error = np.linalg.norm(features - wanted) / np.linalg.norm(wanted)
        assert error < (1e-4 if {**OURS, **OTHERS}[name] == "float32" else 0.1), f"{name}: features are off by {error}"
        workers[name] = worker
    return workers


def ask(worker, order):
    worker.stdin.write(order + "\n")
    worker.stdin.flush()
    while line := worker.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)["answer"]
    raise EOFError


def measure(workers, args):
    """Prints a table for each batch size; -> {batch size: {name: [pictures a second in each round]}}"""
    result = {}
    for batch in (int(size) for size in args.batch_sizes.split(",")):
        speeds = {name: [] for name in workers}
        for worker in workers.values():
            ask(worker, f"run {batch} 0")
        for _ in range(args.rounds):
            for name, worker in workers.items():
                speeds[name].append(ask(worker, f"run {batch} {args.seconds}"))
                time.sleep(0.3)  # until the threads of the last one have gone to sleep
        print(
            f"\nbatch {batch}, {args.threads} threads, {args.rounds} rounds of {args.seconds} {'CPU ' * args.cpu_time}s"
        )
        for precision in ("float32", "bf16"):
            table = {name: rates for name, rates in speeds.items() if {**OURS, **OTHERS}[name] == precision}
            others = {name: rates for name, rates in table.items() if name in OTHERS}
            if not others:
                others = table
            if not table:
                continue
            best = max(others, key=lambda name: statistics.median(others[name]))
            print(f"{precision:24} img/s   against {best}")
            for name, rates in table.items():
                ratios = [a / b for a, b in zip(rates, table[best])]
                print(
                    f"  {name:22} {statistics.median(rates):6.1f}   {statistics.median(ratios):.2f} "
                    f"({min(ratios):.2f} to {max(ratios):.2f})"
                )
        result[batch] = speeds
    return result


def serve(name, folder, threads, clock):
    """The process of one competitor: reads orders from stdin, answers in JSON lines on stdout."""
    if name == "weights":
        return write_weights(folder)
    run = BUILDERS[name](folder, threads)
    pictures = np.random.default_rng(0).integers(0, 256, (64, SIDE, SIDE, 3), np.uint8)
    for line in sys.stdin:
        order = line.split()
        if order[0] == "features":
            answer = run(pictures[:2]).tolist()
        else:
            batch, seconds = pictures[: int(order[1])], float(order[2])
            run(batch)
            count, begin = 0, clock()
            while count < 2 or clock() - begin < seconds:
                run(batch)
                count += 1
            answer = count * len(batch) / (clock() - begin)
        print(json.dumps({"answer": answer}), flush=True)


# ---------------------------------------------------------------- ours


def our_network():
    import models
    import utility

    paddle = utility.start_paddle(seed=0)
    network = models.build_model("ResNet50", 0, "avg")
    network.eval()
    return paddle, network


def write_weights(folder):
    """Random weights for everybody, with statistics that keep the features' size: a file of arrays."""
    _, network = our_network()
    rng = np.random.default_rng(0)
    for name, value in network.state_dict().items():
        if name.endswith(("_mean", ".bias")):
            value.set_value(rng.normal(0, 0.1, value.shape).astype(np.float32))
        elif name.endswith("_variance"):
            value.set_value(rng.uniform(0.5, 1.5, value.shape).astype(np.float32))
    np.savez(os.path.join(folder, "weights.npz"), **{k: v.numpy() for k, v in network.state_dict().items()})


def build_ours(precision):
    def build(folder, threads):
        paddle, network = our_network()
        with np.load(os.path.join(folder, "weights.npz")) as weights:
            network.set_state_dict({name: paddle.to_tensor(weights[name]) for name in weights.files})
        if precision == "eager":
            return paddle.no_grad()(lambda pictures: network(paddle.to_tensor(pictures))[0].numpy())
        import engine

        run = engine.compile_network(network, [3, SIDE, SIDE], precision)
        return lambda pictures: run(pictures)[0]

    return build


# ---------------------------------------------------------------- PyTorch, ONNX Runtime, OpenVINO


def torch_network(folder):
    import torch
    from torch import nn

    def conv_norm(i, o, kernel, stride=1):
        return [nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o)]

    class Block(nn.Module):
        def __init__(self, i, width, stride):
            super().__init__()
            self.conv1, self.bn1 = conv_norm(i, width, 1)
            self.conv2, self.bn2 = conv_norm(width, width, 3, stride)
            self.conv3, self.bn3 = conv_norm(width, 4 * width, 1)
            changed = i != 4 * width or stride > 1
            self.downsample = nn.Sequential(*conv_norm(i, 4 * width, 1, stride)) if changed else nn.Identity()

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = torch.relu(self.bn2(self.conv2(y)))
            return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv_norm(3, 64, 7, 2)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            channels = 64
            for stage, blocks in enumerate((3, 4, 6, 3)):
                width, layers = 64 << stage, []
                for block in range(blocks):
                    layers.append(Block(channels, width, 2 if stage and not block else 1))
                    channels = 4 * width
                setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            self.register_buffer("scale", 1 / (255 * torch.tensor(STD)))
            self.register_buffer("shift", -torch.tensor(MEAN) / torch.tensor(STD))

        def forward(self, pictures):
            x = (pictures.float() * self.scale + self.shift).permute(0, 3, 1, 2)
            x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
            return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))

    network = Network().eval()
    with np.load(os.path.join(folder, "weights.npz")) as weights:
        names = {"._mean": ".running_mean", "._variance": ".running_var"}
        state = {}
        for name in weights.files:
            there = name.replace("backbone.", "")
            for paddle_name, torch_name in names.items():
                there = there.replace(paddle_name, torch_name)
            state[there] = torch.from_numpy(weights[name])
    left = network.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all("num_batches" in n or n in ("scale", "shift") for n in left.missing_keys)
    return network


def build_torch(channels_last, bf16):
    def build(folder, threads):
        import torch

        torch.set_num_threads(threads)
        network = torch_network(folder)
        if channels_last:
            network = network.to(memory_format=torch.channels_last)

        @torch.inference_mode()
        def run(pictures):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                pictures = torch.from_numpy(pictures)
                if not channels_last:
                    x = (pictures.float() * network.scale + network.shift).permute(0, 3, 1, 2).contiguous()
                    x = network.maxpool(torch.relu(network.bn1(network.conv1(x))))
                    x = network.layer4(network.layer3(network.layer2(network.layer1(x)))).mean(dim=(2, 3))
                    return x.float().numpy()
                return network(pictures).float().numpy()

        return run

    return build


def onnx_file(folder):
    import torch

    path = os.path.join(folder, f"network{os.getpid()}.onnx")
    torch.onnx.export(
        torch_network(folder),
        (torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8),),
        path,
        input_names=["pictures"],
        dynamic_axes={"pictures": {0: "n"}},
        opset_version=17,
        dynamo=False,
    )
    return path


def build_onnxruntime(folder, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx_file(folder), options, providers=["CPUExecutionProvider"])
    return lambda pictures: session.run(None, {"pictures": pictures})[0]


def build_openvino(precision):
    def build(folder, threads):
        import openvino

        compiled = {}
        core = openvino.Core()
        model = core.read_model(onnx_file(folder))
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}

        def run(pictures):
            # A fixed shape for each batch size is what OpenVINO is fastest with.
            if len(pictures) not in compiled:
                fixed = model.clone()
                fixed.reshape(list(pictures.shape))
                compiled[len(pictures)] = core.compile_model(fixed, "CPU", hints)
            return compiled[len(pictures)]([pictures])[0].astype(np.float32)

        return run

    return build


BUILDERS = {
    "ours": build_ours("float32"),
    "ours bf16": build_ours("bf16"),
    "paddle eager": build_ours("eager"),
    "PyTorch eager": build_torch(channels_last=False, bf16=False),
    "PyTorch channels_last": build_torch(channels_last=True, bf16=False),
    "ONNX Runtime": build_onnxruntime,
    "OpenVINO": build_openvino("f32"),
    "PyTorch bf16": build_torch(channels_last=True, bf16=True),
    "OpenVINO bf16": build_openvino("bf16"),
}

if __name__ == "__main__":
    main()
