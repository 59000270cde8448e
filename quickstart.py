"""From nothing to recall@1 on unseen classes in a few minutes: draws the sample birds, measures the untrained network,
trains it, measures it again, writes features, and says where everything is. `make quickstart` runs this.

Each command is printed before it runs; they are what one would type by hand. It takes three to seven minutes, in which
recall@1 rises from about 20 % to 72-76 %, depending on the seed; well below 70 %, something is wrong.
"""

import json
import os
import shlex
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# How the reader of the output calls the same interpreter: in the virtual environment of the Makefile, most often.
PYTHON = os.path.relpath(sys.executable, HERE) if sys.executable.startswith(HERE + os.sep) else sys.executable
OUTPUT = "output_quickstart"
MODEL = "ResNet18"
REPORT = f"--report={OUTPUT}/report.html"
DATA = ["--train_list=data/sample/birds_train.txt", "--val_list=data/sample/birds_val.txt"]
NETWORK = ["--model=ResNet18", "--image_shape=3,64,64", "--test_transform=resize", "--seed=1"]
TRAIN = [
    "--zero_init_residual=True", "--optimizer=adamw", "--lr=0.001", "--lr_strategy=cosine_decay", "--warmup_epochs=1",
    "--num_epochs=20", "--train_batch_size=40", "--samples_each_class=4", "--min_area=0.7",
    "--loss_name=tripletloss", "--margin=0.3", "--eval_every=5", f"--model_save_dir={OUTPUT}", "--overwrite=True",
]  # fmt: skip


def run(*command):
    """Prints and runs `python command...`; ends with its exit status where that is not 0."""
    print(f"\n$ {PYTHON} {shlex.join(command)}", flush=True)
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status:
        sys.exit(status)


def read_json(name):
    with open(os.path.join(OUTPUT, name)) as file:
        return json.load(file)


def main():
    if sys.argv[1:]:
        asked = sys.argv[1] in ("-h", "--help")
        print(__doc__ if asked else "error: quickstart.py takes no flags", file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    os.chdir(HERE)
    start = time.time()
    best = f"{OUTPUT}/{MODEL}/best"
    run("data/make_sample.py", "--overwrite")
    run("eval.py", *DATA, *NETWORK, f"--output_json={OUTPUT}/untrained.json")
    run("train.py", *DATA, *NETWORK, *TRAIN)
    run("eval.py", *DATA, f"--pretrained_model={best}", f"--output_json={OUTPUT}/trained.json", REPORT)
    run("infer.py", *DATA, f"--pretrained_model={best}", f"--feature_file={OUTPUT}/features.npz")

    before, after = (read_json(name)["recall@1"] for name in ("untrained.json", "trained.json"))
    print(
        f"""
------------------------------------------------------------------------
recall@1 on species that training never saw
    untrained network  {before:6.1%}
    trained network    {after:6.1%}      {time.time() - start:.0f} seconds in all

pictures    data/sample/images/
checkpoint  {best}/
features    {OUTPUT}/features.npz
log         {OUTPUT}/{MODEL}/train_log.jsonl
report      {OUTPUT}/report.html, for a browser: where the network fails

next: your own pictures, a folder for each class, in my_images/images/:
    {PYTHON} data/split.py my_images
which ends with the training command for them; or CUB-200: sh data/download_cub200.sh.
The README goes on from there, and has a page for each task.
------------------------------------------------------------------------"""
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
