"""From the command to the first output: --help, and the first batch of a small network on small pictures.

`import paddle` alone is the limit. It is done in the environment that the scripts set, MKL and threads included.
"""

import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from comparison import Comparison, Speed, Value

IMPORT = "python -c 'import paddle'"
# A checkpoint, which eval.py and infer.py need, comes from train.py.
TINY = ["--model=ResNet8", "--image_shape=3,32,32", "--train_batch_size=8", "--test_batch_size=8", "--num_epochs=1"]


def comparisons(tiny):
    scripts = ["train.py"] if tiny else ["train.py", "eval.py", "infer.py"]
    for script in scripts:
        yield Comparison(
            f"start-up of {script}",
            {
                "--help": ("command", {"arguments": [script, "--help"], "until": ""}),
                "first batch": ("first_batch", {"script": script}),
                IMPORT: ("command", {"arguments": ["-c", "import paddle; print(1, flush=True)"], "until": "1"}),
            },
            [
                Value("seconds of --help", lambda r: r["--help"]["seconds"], 0.3, " s"),
                Speed("--help", IMPORT),
                Value(
                    f"first batch over {IMPORT}", lambda r: r["first batch"]["seconds"] / r[IMPORT]["seconds"], 1.5, "x"
                ),
            ],
            7,
        )


def command(arguments, until):
    """The time until `until` is printed, or to the end where it is empty."""

    def run():
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for line in process.stdout:
            if until and line.startswith(until):
                seconds = time.perf_counter() - start
                process.kill()
                process.wait()
                return {"seconds": seconds}
        if process.wait() or until:
            raise RuntimeError(f"{arguments} failed")
        return {"seconds": time.perf_counter() - start}

    return run


def first_batch(script):
    import cv2

    folder = tempfile.mkdtemp()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(16):
        cv2.imwrite(os.path.join(folder, f"{i}.jpg"), rng.integers(0, 256, (48, 48, 3), np.uint8))
        lines.append(f"{i}.jpg {i // 4}\n")
    images = os.path.join(folder, "list.txt")
    with open(images, "w") as file:
        file.writelines(lines)
    lists = [f"--train_list={images}", f"--val_list={images}"]
    output = os.path.join(folder, "output")
    train = ["train.py", *lists, *TINY, f"--model_save_dir={output}", "--log_every=1", "--overwrite=True", "--seed=0"]
    if script == "train.py":
        return command(["-u", *train], "Pass 0, trainbatch 0,")
    subprocess.run([sys.executable, *train], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    weights = f"--pretrained_model={os.path.join(output, 'ResNet8', 'best')}"
    # Trained and measured on one list, so that the head knows its classes.
    return command(
        ["-u", script, *lists[1:], weights, "--batch_size=8"], "Test-0-" if script == "infer.py" else "Testbatch 0,"
    )
