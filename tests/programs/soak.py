"""Ends training runs in every way and at random moments, for a given time, and checks that each of them, continued as
often as it takes, comes to the weights, log and best recall of a run that was never interrupted.

    python tests/programs/soak.py --minutes=30
"""

import argparse
import collections
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import conftest
import test_faults
from programs.ring_checkout import make_checkout

OPTIONS = [
    ["--loss_name=tripletloss", "--triplet_mining=random"],
    ["--loss_name=tripletloss", "--triplet_mining=distance", "--pooling=gem", "--embedding_size=16"],
    ["--loss_name=quadrupletloss", "--optimizer=adam", "--lr=0.001"],
    ["--loss_name=emlloss", "--alpha=100", "--freeze_bn=True", "--lr=0.0001"],
    ["--loss_name=softmax", "--optimizer=adamw", "--lr=0.001", "--weight_decay=0.01"],
    ["--loss_name=proxyanchorloss", "--embedding_norm=layer", "--optimizer=adamw", "--lr=0.001"],
    ["--loss_name=marginloss", "--memory_size=20", "--memory_start_epoch=1", "--head=cosine"],
    ["--ema_decay=0.9", "--warmup_head_epochs=1", "--freeze_stages=1", "--clip_norm=1", "--random_erasing=0.5"],
    ["--loss_name=ringloss", "--ring_size=20", "--optimizer=adamw", "--lr=0.001"],  # with parameters and a memory
    ["--with_mem_opt=True", "--lr_strategy=cosine_decay", "--warmup_epochs=1"],
    ["--model=SE_ResNeXt50_32x4d", "--train_batch_size=8", "--total_images=16", "--lr=0.0001"],  # with dropout
]
ENDS = ["SIGKILL", "SIGTERM", "SIGINT", "SIGTERM twice", "full disk"]


def make_birds(root):
    conftest.draw_birds(root, classes=12, images=8)
    conftest.run("data/split.py", root, "--name=birds", "--train_classes=6")
    lists = [os.path.join(root, f"birds_{part}.txt") for part in ("train", "val")]
    return conftest.Birds(root, *lists, [f"--train_list={lists[0]}", f"--val_list={lists[1]}"])


def interrupt(rng, process, folder, how):
    """Ends a running process; False where it was done before."""
    if not test_faults.wait_for_steps(process, rng.randint(1, 12)):
        return False
    time.sleep(rng.uniform(0, 0.1))
    filler = None
    if how == "full disk":
        filler = os.path.join(folder, "filler")
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError:
                pass
        time.sleep(rng.uniform(0, 0.3))
        process.kill()  # where it has not come to write anything
    elif how == "SIGTERM twice":
        process.send_signal(signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGTERM)
    else:
        process.send_signal(getattr(signal, how))
    out, err = process.communicate()
    wanted = {"SIGKILL": (-9,), "SIGTERM": (143,), "SIGINT": (130,), "SIGTERM twice": (-15, 143), "full disk": (2, -9)}
    # The signal may come when the run is over.
    assert process.returncode in wanted[how] or "done: " in out, f"{how}: exit status {process.returncode}\n{err}"
    assert "Traceback" not in err, err
    if filler:
        os.remove(filler)
    return True


def one_run(rng, birds, folder, disk, scripts):
    """Trains once without and once with interruptions, and compares; -> Counter of the interruptions."""
    flags = [*rng.choice(OPTIONS), f"--num_epochs={rng.randint(3, 8)}", f"--eval_every={rng.randint(1, 3)}"]
    flags += [f"--keep={rng.randint(1, 3)}", f"--seed={rng.randint(0, 999)}"]
    process = test_faults.start(birds, f"{folder}/whole", *flags, root=scripts)
    _, err = process.communicate()
    assert process.returncode == 0, f"{flags}\n{err}"
    flags += [f"--save_every={rng.randint(0, 3)}", "--checkpoint=auto"]
    counts = collections.Counter()
    for _ in range(100):
        process = test_faults.start(birds, f"{disk}/run", *flags, root=scripts)
        how = rng.choice(ENDS if os.path.ismount(disk) else ENDS[:-1])
        # After some interruptions it may run to its end: an epoch that is never saved in between would not come to one.
        if sum(counts.values()) >= 6 or not interrupt(rng, process, disk, how):
            _, err = process.communicate()
            assert process.returncode == 0 or "has all of its" in err, f"{flags}\n{err}"
            break
        counts[how] += 1
    model = os.path.basename(glob.glob(f"{folder}/whole/*")[0])
    for path in (f"{folder}/whole", f"{disk}/run"):
        os.rename(f"{path}/{model}", f"{path}/ResNet8")  # where the comparison looks
    name = re.search(r"--num_epochs=(\d+)", " ".join(flags))[1]
    test_faults.assert_same_run(f"{folder}/whole", f"{disk}/run", str(int(name) - 1))
    leftovers = glob.glob(f"{disk}/run/ResNet8/**/*.tmp*", recursive=True)
    assert not leftovers, leftovers
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="other moments and options")
    args = parser.parse_args()
    rng, end = random.Random(args.seed), time.time() + 60 * args.minutes
    counts, runs = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as root:
        birds = make_birds(f"{root}/birds")
        disk = f"{root}/disk"
        os.mkdir(f"{root}/scripts")
        make_checkout(f"{root}/scripts")
        os.mkdir(disk)
        mounted = (
            shutil.which("mount")
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", disk], capture_output=True, check=False
            ).returncode
        )
        if not mounted:
            print("no full disks: this process may not mount a file system")
        try:
            while time.time() < end:
                folder = f"{root}/{runs}"
                os.mkdir(folder)
                counts += one_run(rng, birds, folder, disk, f"{root}/scripts")
                runs += 1
                shutil.rmtree(folder)
                shutil.rmtree(f"{disk}/run")
                print(f"{runs} runs, {sum(counts.values())} interruptions: {dict(counts)}", flush=True)
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", disk], check=True)
    print(f"{runs} runs, each the same as the uninterrupted one")


if __name__ == "__main__":
    sys.exit(main())
