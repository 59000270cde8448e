"""What a first hour on a real GPU should find out, in a quarter of one: whether the scripts do there what they do on
the CPU, and how fast. No line for GPUs had been run on one when this was written.

    make gpu-check        # or: python benchmarks/gpu_check.py

Prints a table and writes it to gpu_check.md, which says what a report needs to say. A row

    works      is as it should be
    differs    came to its end with other figures
    fails      did not come to its end; the reason is beside it
    -          was left out, or is a figure alone

Everything is written to a temporary folder but for the table. Nothing is fetched.
"""

import contextlib
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

FOLDER = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(FOLDER)
sys.path[:0] = [ROOT, FOLDER]

import files
from runtime import gpu as gpu_facts
from runtime import process
from utility import UserError, plain

SECONDS = 15 * 60
REPORT = "gpu_check.md"
FLOPS = 3 * 2 * 4.09e9  # of a training step of a ResNet50 at 224: forward, and twice that backward, for each picture
SMALL = ["--model=ResNet18", "--image_shape=3,64,64", "--seed=1", "--train_batch_size=40", "--lr=0.01", "--quiet"]


class Check:
    """A machine that is checked: what the steps have in common.

    Args:
        run: function (*command) that runs a script and raises a UserError where it does not end well.
        folder: an empty one, for everything that is written.
        tiny: networks and pictures of toy sizes.
    """

    def __init__(self, run, folder, tiny=False):
        self.run, self.folder, self.tiny = run, folder, tiny
        self.begun, self.rows = time.monotonic(), []
        self.lists = []

    def left(self):
        """Seconds until the check should be over."""
        return SECONDS - (time.monotonic() - self.begun)

    def add(self, what, outcome, detail=""):
        """Prints and keeps a row."""
        self.rows.append(f"| {what} | {outcome} | {plain(detail, 300).replace('|', '/')} |")
        print(self.rows[-1], flush=True)

    def judge(self, what, good, detail):
        self.add(what, "works" if good else "differs", detail)

    @contextlib.contextmanager
    def step(self, what):
        """A row `what` says why, where the block raises an exception or there is no time for it."""
        try:
            yield
        except Exception as error:  # whatever a GPU may do
            self.add(what, "fails", gpu_facts.first_line(error))

    def train(self, name, *flags, launcher=()):
        """Trains a network into the folder `name`; -> the folder of its run."""
        path = os.path.join(self.folder, name)
        small = ["--model=ResNet8", "--image_shape=3,32,32", "--train_batch_size=8", "--samples_each_class=2"]
        sizes = [*SMALL, *(small if self.tiny else ())]
        self.run(
            *launcher, "train.py", *self.lists, *sizes, "--lr_strategy=constant", f"--model_save_dir={path}", *flags
        )
        return os.path.join(path, "ResNet8" if self.tiny else "ResNet18")

    def trained(self):
        """The folder of a run that has trained."""
        if "trained" not in os.listdir(self.folder):
            self.train("trained", "--num_epochs=1", "--eval_every=0", "--use_gpu=True")
        return os.path.join(self.folder, "trained", "ResNet8" if self.tiny else "ResNet18")


def main():
    paddle = start()
    command = lambda *command: run_script(check.left(), *command)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        check = Check(command, folder)
        print("| what | outcome | figures |\n|---|---|---|", flush=True)
        for step in STEPS:
            if check.left() < 0:
                check.add(step.__name__, "-", "the quarter of an hour is over")
                continue
            with check.step(step.__name__):
                step(check, paddle)
        write_report(check)
    print(f"\nwrote {REPORT}: please attach it to a report, also where everything works")


def start():
    """Paddle on the GPU. Raises: UserError where there is none that can be used."""
    paddle = process.start_paddle(use_gpu=False)  # which says nothing of GPUs
    if not paddle.is_compiled_with_cuda() or gpu_facts.count(paddle) == 0:
        why = "finds no GPU" if paddle.is_compiled_with_cuda() else "is built for the CPU only"
        raise UserError(
            f"there is no GPU to check: paddlepaddle {paddle.__version__} {why}; docs/gpu.md says how to install one "
            "that is built for it"
        )
    return process.start_paddle(use_gpu=True, seed=0)


def run_script(seconds, *command):
    """Runs a script in a process of its own. Raises: UserError with its last line where it fails, or takes longer than
    `seconds` and a minute."""
    script = next(word for word in command if word.endswith(".py"))
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, errors="replace"
    )
    try:
        out, err = child.communicate(timeout=max(seconds + 60, 1))
    except BaseException as error:
        child.terminate()  # which a launcher passes on to its processes
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(20)
        child.kill()
        if isinstance(error, subprocess.TimeoutExpired):
            raise UserError(f"{script} did not end within {error.timeout:.0f} seconds") from None
        raise
    if child.returncode:
        said = (err or out).strip()
        line = gpu_facts.first_line(said) if "Error Message Summary" in said else said.rpartition("\n")[2]
        raise UserError(f"{script} ended with status {child.returncode}: {line or 'no output'}")


def write_report(check):
    facts = {**process.describe_process(), "cpus": process.cpu_count(), "platform": sys.platform}
    lines = [f"# make gpu-check, {datetime.date.today()}", "", *(f"* {name}: {plain(v)}" for name, v in facts.items())]
    lines += ["", "| what | outcome | figures |", "|---|---|---|", *check.rows, ""]
    with files.atomic_write(REPORT) as file:
        file.write("\n".join(lines))


# ---------------------------------------------------------------- the steps


def the_gpu(check, paddle):
    facts = gpu_facts.describe(paddle)
    capability = "{}.{}".format(*paddle.device.cuda.get_device_capability())
    half = [name for name in ("bfloat16", "float16") if gpu_facts.computes_in(paddle, name)]
    check.add("the GPU computes", "works", f"{facts['gpu']}, capability {capability}, CUDA {facts['cuda']}, cuDNN "
              f"{facts['cudnn']}, {', '.join(half) or 'no half types'}")  # fmt: skip
    if not check.lists:
        sample = os.path.join(check.folder, "sample")
        check.run("data/make_sample.py", f"--output_dir={sample}", "--species=24", "--images=20")
        check.lists = [f"--{part}_list={sample}/birds_{part}.txt" for part in ("train", "val")]


def losses_and_gradients(check, paddle):
    """Of each loss and each mining, on the GPU against the CPU; what is drawn at random is asked to be finite."""
    import losses

    minings = [("tripletloss", mining) for mining in losses.MINING]
    for name, mining in [*((name, None) for name in losses.LOSSES if name != "tripletloss"), *minings]:
        what = f"{name}{f', {mining}' if mining else ''}"
        with check.step(what):
            found = {}
            for device in ("gpu", "cpu"):
                paddle.set_device(device)
                found[device] = loss_and_gradient(paddle, name, mining)
            if mining in ("random", "distance"):
                good, error = all(np.isfinite(x).all() for x in found["gpu"]), "finite"
            else:
                error = max(relative(here, there) for here, there in zip(*found.values()))
                good, error = error < 1e-3, f"off by {error:.1g}"
            check.judge(f"loss and gradient: {what}", good, error)
    paddle.set_device("gpu")


def loss_and_gradient(paddle, name, mining):
    import losses
    from losses.objective import Objective

    paddle.seed(0)
    rng = np.random.default_rng(0)
    embedding, logits = (
        paddle.to_tensor(rng.standard_normal(shape).astype(np.float32), stop_gradient=False)
        for shape in ((32, 64), (32, 8))
    )
    options = {**losses.row(name).flags, **({"triplet_mining": mining} if mining else {})}
    objective = Objective(losses.LossSettings(name, options=options), 8, 64)
    for number, parameter in enumerate(objective.parameters()):
        values = np.random.default_rng(number).standard_normal(parameter.shape)
        parameter.set_value(values.astype(np.float32))
    loss = objective(embedding, logits, paddle.to_tensor(np.arange(32) // 4))["loss"]
    loss.backward()
    gradients = [x.grad.numpy() for x in (embedding, logits) if x.grad is not None]
    return [np.ravel(loss.numpy()), *gradients]


def relative(found, wanted):
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-12))


def training(check, paddle):
    """Twenty steps of each precision: the first loss as on the CPU, and all of them as in float32."""
    curves, steps = {}, 20 * (8 if check.tiny else 40)
    common = ["--num_epochs=1", "--eval_every=0", f"--total_images={steps}", "--log_every=1"]
    for amp in ("off", "bfloat16", "float16"):
        if amp != "off" and not gpu_facts.computes_in(paddle, amp):
            check.add(f"training, --amp={amp}", "-", "this GPU does not compute in it")
            continue
        with check.step(f"training, --amp={amp}"):
            folder = check.train(f"amp_{amp}", *common, f"--amp={amp}", "--use_gpu=True")
            curves[amp] = losses_of(folder)
            if amp == "off":
                cpu = losses_of(check.train("cpu", *common, "--use_gpu=False", f"--total_images={steps // 20}"))
                error = abs(cpu[0] - curves[amp][0]) / cpu[0]
                check.judge("the first loss of training, against the CPU's", error < 5e-3, f"off by {error:.1g}")
            if "off" in curves:
                wanted = curves["off"]
                error = np.abs(np.subtract(curves[amp], wanted)).mean() / np.mean(wanted)
                good = np.isfinite(curves[amp]).all() and error < 0.1
                check.judge(f"training, --amp={amp}", good, f"loss_cls {curves[amp][0]:.3f} to {curves[amp][-1]:.3f}, "
                            f"off by {error:.1%} from float32")  # fmt: skip


def losses_of(folder):
    with open(os.path.join(folder, "train_log.jsonl")) as file:
        records = [json.loads(line) for line in file]
    return [record["loss_cls"] for record in records if "loss_cls" in record]


def going_on(check, paddle):
    """--deterministic=True: a run that is continued has the bytes of one in one go."""
    import weights

    common = ["--deterministic=True", "--eval_every=0", "--use_gpu=True", f"--total_images={80 if check.tiny else 320}"]
    for more in (["--pooling=avg"], ["--pooling=max", "--triplet_mining=semihard"], ["--pooling=gem", "--amp=float16"]):
        what = f"a continued run to the bit, {' '.join(more)}"
        with check.step(what):
            name = more[0][2:]
            whole = check.train(f"{name}_whole", *common, *more, "--num_epochs=2")
            check.train(f"{name}_parts", *common, *more, "--num_epochs=1")
            parts = check.train(f"{name}_parts", *common, *more, "--num_epochs=2", "--checkpoint=latest")
            both = [weights.read_pickle(os.path.join(run, "1", "model.pdparams")) for run in (whole, parts)]
            different = [key for key in both[0] if both[0][key].tobytes() != both[1][key].tobytes()]
            check.judge(what, not different, f"{len(different)} of {len(both[0])} tensors differ")


def evaluation(check, paddle):
    """eval.py of each precision against the CPU, and the exported model."""
    best, found = f"--pretrained_model={check.trained()}/latest", {}
    flags = {
        "the CPU": ["--use_gpu=False"],
        **{name: [f"--precision={name}"] for name in ("float32", "bf16", "float16")},
    }
    for name, more in flags.items():
        with check.step(f"eval.py, {name}"):
            path = os.path.join(check.folder, f"eval_{name}.json".replace(" ", "_"))
            check.run("eval.py", check.lists[1], best, "--quiet", f"--output_json={path}", *more)
            with open(path) as file:
                found[name] = json.load(file)["recall@1"]
            off = abs(found[name] - found.get("the CPU", found[name]))
            detail = f"recall@1 {found[name]:.4f}"
            if name != "the CPU":
                check.judge(f"eval.py, {name}, against the CPU", off < (1.5e-2 if name == "float32" else 3e-2), detail)
    with check.step("infer.py --export_dir"):
        check.run("infer.py", best, f"--export_dir={check.folder}/exported")
        check.add("infer.py --export_dir", "works")


def two_gpus(check, paddle):
    """Two processes against one, which give the same losses where batch norm does not train."""
    if paddle.device.cuda.device_count() < 2:
        check.add("two GPUs", "-", "there is one")
        return
    # Weights that have trained: their batch norms' statistics are those of pictures, without which nothing is bounded.
    start = ["--freeze_bn=True", f"--pretrained_model={check.trained()}/latest"]
    flags = [*start, "--num_epochs=1", "--eval_every=0", "--total_images=400", "--log_every=1"]
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node=2", f"--log_dir={check.folder}/log"]
    one = check.train("one", *flags, "--use_gpu=True")
    two = check.train("two", *flags, "--use_gpu=True", launcher=launcher)
    error = relative(np.array(losses_of(two)), np.array(losses_of(one)))
    check.judge("two GPUs, the losses of one", error < 1e-2, f"off by {error:.1g}")


def speed(check, paddle):
    """A training step of a ResNet50 at 224 in each precision, beside what the GPU multiplies at most, and PyTorch's."""
    import rows_step

    model, side, batches = ("ResNet8", 32, [8]) if check.tiny else ("ResNet50", 224, [64, 256])
    with_torch = rows_step.both_have_a_gpu()
    for amp, batch in itertools.product(("float32", "bfloat16", "float16"), batches):
        what = f"training steps, {model}, {side} px, batch {batch}, {amp}"
        if amp != "float32" and not gpu_facts.computes_in(paddle, amp):
            check.add(what, "-", "this GPU does not compute in it")
            continue
        with check.step(what):
            size = {"model": model, "side": side, "batch": batch, "gpu": True, "amp": amp}
            limit = multiplications(paddle, amp, 8192)
            ours = batch / fastest(rows_step.ours(**size))
            figures = f"{ours:.0f} img/s, {ours * FLOPS * (side / 224) ** 2 / limit:.0%} of {limit / 1e12:.1f} TFLOP/s"
            if with_torch:
                other = batch / fastest(rows_step.pytorch(**size, channels_last=True))
                figures += f", PyTorch {other:.0f} img/s"
            check.add(what, "-", figures)
        with contextlib.suppress(Exception):
            paddle.device.cuda.empty_cache()


def fastest(step, count=8):
    """Seconds of the fastest of some steps, each of which reads its loss; the first ones choose algorithms."""
    spent = []
    for _ in range(count):
        begun = time.perf_counter()
        step()
        spent.append(time.perf_counter() - begun)
    return min(spent[2:])


def multiplications(paddle, kind, size):
    """Floating-point operations a second of products of square matrices."""
    # clone(), for numpy() of a part would copy the whole from the device.
    x = paddle.ones([size, size]).astype(kind)
    return 2 * size**3 / fastest(lambda: paddle.matmul(x, x)[0, 0].clone().numpy())


STEPS = [the_gpu, losses_and_gradients, training, going_on, evaluation, two_gpus, speed]

if __name__ == "__main__":
    process.run_script(main)
