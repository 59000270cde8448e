"""Gives the scripts damaged and odd inputs of every kind, for a given time, and checks what each of them promises:

    no traceback, exit status 0 or 2 and one line with the second; at most 10 seconds and 1.5 GiB; nothing changed but
    the output; and pictures that are taken are those that another decoder sees.

    python tests/programs/fuzz.py --minutes=10 --seed=0

Each case is a process of its own, forked from one that has imported everything. One that fails is kept, with the
command that repeats it.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "data"), os.path.join(ROOT, "tests")]

import conftest
import cv2
import data_sets
import numpy as np
from PIL import Image, ImageOps

import transforms
from files import open_file

SECONDS, BYTES = 10, 1.5 * 2**30
OUTPUTS = ("out", "cache")  # folders of a case that it may change
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
LOSSLESS = ("PNG", "BMP", "GIF", "TIFF", "PPM")

# ---------------------------------------------------------------- mutations


def mutate(rng, data):
    """Bytes with a few of them changed, cut, repeated, moved, or replaced by numbers that mean much somewhere."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 100, 5000))
        how = rng.randrange(7)
        if how == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del data[at : at + length]
        elif how == 2:
            data[at:at] = data[at : at + length]
        elif how == 3:
            del data[at:]
        elif how == 4:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + length]
        elif how == 5:
            number = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 40000, rng.randrange(2**32)))
            size = rng.choice((2, 4, 8))
            data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
        else:
            data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if at < len(data) else b"\0"
    return bytes(data)


ODD = (
    *(None, True, -1, 0, 1.5, 10**18, 2**70, 1e308, "", "x", "/dev/zero", "a\x1b[31m\nerror: b", [], [[]], {}, [2**63]),
    *([3, 20000, 20000], {"epoch": "x"}, "\ud800", "x" * 10**6),
)


def mutate_json(rng, text):
    """A JSON object with a value changed, or mutated as bytes, or nested too deeply."""
    how = rng.randrange(10)
    if how == 0:
        return mutate(rng, text.encode())
    if how == 1:
        return b'{"a": ' * 50_000
    whole = json.loads(text)
    inner = rng.choice([whole] + [value for value in whole.values() if isinstance(value, dict) and value])
    key = rng.choice(list(inner))
    if how == 2:
        del inner[key]
    else:
        inner[key] = rng.choice(ODD)
    return json.dumps(whole).encode()


def odd_name(rng):
    letters = "ab1. \t\n\r\x1b\x85\u3000\u2028\x1c'\"$`\\-é\udcff\ufeff"
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, 6))).replace("/", "") or "a"


def special_file(rng, path):
    """Puts a pipe, a folder, a device or 64 GiB of zeros in the place of a file."""
    if os.path.isfile(path):
        os.remove(path)
    how = rng.randrange(4)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        os.mkdir(path)
    elif how == 2:
        os.symlink("/dev/zero", path)
    else:
        with open(path, "wb") as file:
            file.truncate(2**36)


def replace(rng, path, how=mutate):
    """Mutates a file of a case; now and then it is no file any more."""
    with open(path, "rb") as file:
        data = file.read()
    if rng.randrange(25) == 0:
        return special_file(rng, path)
    changed = how(rng, data.decode() if how is mutate_json else data)
    with open(path, "wb") as file:
        file.write(changed)


# ---------------------------------------------------------------- cases


def script(name, *flags):
    """-> a function that runs a script as a user does."""

    def run():
        sys.argv = [name, *flags]
        runpy.run_path(os.path.join(ROOT, name), run_name="__main__")

    return run


def lists(rng, seeds):
    shutil.copytree(f"{seeds}/birds", "birds")
    path = "birds/birds_val.txt"
    if rng.randrange(5) == 0:
        with open(path, "a", errors="surrogateescape") as file:
            file.write(f"{odd_name(rng)} {rng.choice(('1', '9' * 5000, '1.5', '', 'x' * 10**6))}\n")
    replace(rng, path)
    flags = [f"--pretrained_model={seeds}/out/ResNet8/latest", f"--on_bad_image={rng.choice(('skip', 'fail'))}"]
    if rng.randrange(2):
        return script("eval.py", f"--val_list={path}", *flags)
    return script("infer.py", f"--input={path}", "--feature_file=out/f.npz", *flags)


def pictures(rng, seeds):
    """Twenty at once, and no script: what takes time is to start one."""
    cases = []
    for index in range(20):
        kind = rng.choice(FORMATS)
        with open(f"{seeds}/pictures/{kind}{rng.randrange(2)}", "rb") as file:
            data = file.read()
        cases.append((kind, data if rng.randrange(8) == 0 else mutate(rng, data)))
        with open(f"{index:02d}", "wb") as file:
            file.write(cases[-1][1])

    def run():
        for index, (kind, data) in enumerate(cases):
            try:
                found = transforms.decode(data)
            except transforms.BadImage as error:
                assert "\n" not in str(error) and len(str(error)) < 500, error
                continue
            compare(kind, data, found, index)

    return run


def compare(kind, data, found, index):
    """Raises an AssertionError where a picture is not what Pillow alone makes of it."""
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except OSError:
        assert kind == "JPEG", f"picture {index}: Pillow cannot read it"
        return  # damage with which OpenCV is more patient
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    assert found.shape[:2] == image.size[::-1], f"picture {index}: {found.shape}, not {image.size}"
    if image.mode[0] in "IF":
        return
    off = np.abs(found.astype(int) - np.asarray(image.convert("RGB"))) > (0 if kind in LOSSLESS else 8)
    assert off.mean() < 0.01, f"picture {index}: {off.mean():.3f} of the values differ"


def weights(rng, seeds):
    name = rng.choice(("model.pdparams", "model.safetensors"))
    shutil.copy(f"{seeds}/weights/{name}", name)
    replace(rng, name)
    return script("eval.py", f"--val_list={seeds}/few.txt", f"--pretrained_model={name}", "--model=ResNet8")


def checkpoints(rng, seeds):
    shutil.copytree(f"{seeds}/out", "out", symlinks=True)
    path = "out/ResNet8/0"
    name = rng.choice(["checkpoint.json"] * 4 + os.listdir(path))
    replace(rng, f"{path}/{name}", mutate_json if name.endswith("json") else mutate)
    if rng.randrange(3):
        return script("train.py", f"--checkpoint={path}", "--num_epochs=2", "--eval_every=0", "--use_gpu=False")
    return script("eval.py", f"--val_list={seeds}/few.txt", f"--pretrained_model={path}")


def archives(rng, seeds):
    if rng.randrange(3):
        shutil.copy(f"{seeds}/birds.tgz", "birds.tgz")
        replace(rng, "birds.tgz")
    else:
        with tarfile.open("birds.tgz", f"w:{rng.choice(('', 'gz', 'xz'))}") as archive:
            for _ in range(rng.randint(1, 5)):
                member = tarfile.TarInfo(rng.choice((f"birds/{odd_name(rng)}", "../up", "/etc/up", "birds/a/../../b")))
                member.type, member.linkname = rng.choice((b"0", b"1", b"2", b"3", b"6")), "../../x"
                member.size = rng.choice((0, 10, 2**40))
                archive.addfile(member, io.BytesIO(bytes(10)) if member.size == 10 and member.isreg() else None)

    def run():
        import unpack
        from runtime import process

        process.run_script(lambda: unpack.unpack("birds.tgz", "out/birds", "birds"))

    return run


def caches(rng, seeds):
    """The inference engine's, of which every file is mutated, with sums that fit."""
    shutil.copytree(f"{seeds}/cache", "cache")
    folders = [top for top, _, names in os.walk("cache") if "sums.json" in names]
    names = sorted(os.listdir(folders[0]))
    replace(rng, f"{folders[0]}/{rng.choice(names)}")
    if rng.randrange(2):
        refresh_sums(folders[0])
    os.environ["DEEP_METRIC_LEARNING_CACHE"] = os.path.abspath("cache")
    flags = [f"--pretrained_model={seeds}/out/ResNet8/latest", "--engine=inference"]
    return script("eval.py", f"--val_list={seeds}/few.txt", *flags)


def refresh_sums(folder):
    import hashlib

    sums = {}
    for name in os.listdir(folder):
        if (
            name.startswith("model")
            and os.path.isfile(f"{folder}/{name}")
            and os.path.getsize(f"{folder}/{name}") < 2**30
        ):
            with open(f"{folder}/{name}", "rb") as file:
                sums[name] = hashlib.sha256(file.read()).hexdigest()
    with contextlib.suppress(OSError), open(f"{folder}/sums.json", "w") as file:
        json.dump(sums, file)


def layouts(rng, seeds):
    for number in range(rng.randint(1, 4)):
        folder = f"root/{odd_name(rng)}{number}"
        with contextlib.suppress(OSError, ValueError):
            os.makedirs(folder)
            for _ in range(3):
                shutil.copy(f"{seeds}/pictures/JPEG0", f"{folder}/{odd_name(rng)}.jpg")
            if rng.randrange(4) == 0:
                special_file(rng, f"{folder}/special.jpg")
    os.makedirs("out")
    return script("data/split.py", "root", "--output_dir=out", "--name=birds")


def sets(rng, seeds):
    """A published data set of which a file is damaged, mostly one of its annotations."""
    name, flags = rng.choice(sorted(SETS.items()))
    shutil.copytree(f"{seeds}/sets/{name}", "set")
    found = sorted(os.path.join(top, file) for top, _, files in os.walk("set") for file in files)
    pictures = [path for path in found if path.lower().endswith(".jpg")]
    replace(rng, rng.choice(pictures if rng.randrange(4) == 0 else sorted(set(found) - set(pictures))))
    return script(f"data/{name}.py", "set", "--any_counts", "--output_dir=out", *flags)


def zips(rng, seeds):
    os.makedirs("out")
    shutil.copy(f"{seeds}/sop.zip", "out")
    replace(rng, "out/sop.zip")
    return script("data/sop.py", "out/sop.zip", "--any_counts")


SETS = {"sop": [], "inshop": ["--crop_boxes"], "cub200": ["--crop_boxes", "--box_padding=mean"],
        "cars196": ["--crop_boxes", "--box_margin=0.2", "--box_padding=context"]}  # fmt: skip


def tables(rng, seeds):
    """Tables of Open Metric Learning, with boxes, and now and then a picture that is mutated, too."""
    shutil.copytree(f"{seeds}/birds", "birds")
    path = "birds/birds.csv"
    with open(path) as file:
        head, *rows = file.read().splitlines()
    box = ",".join(str(rng.choice((0, 1, 5, 20, 39))) for _ in range(4)) if rng.randrange(4) == 0 else "1,30,2,20"
    with open(path, "w") as file:
        file.writelines([f"{head},x_1,x_2,y_1,y_2\n", *(f"{row},{box}\n" for row in rows)])
    if rng.randrange(4):
        replace(rng, path)
    else:
        replace(rng, f"birds/{rng.choice(rows).split(',')[0]}")
    return script("data/split.py", path, "--output_dir=out", "--name=birds")


KINDS = (lists, pictures, pictures, weights, checkpoints, checkpoints, archives, caches, layouts, tables, sets, zips)

# ---------------------------------------------------------------- running them


def make_seeds(folder):
    """Whole inputs of every kind, from which cases are made."""
    conftest.draw_birds(f"{folder}/birds", classes=8, images=4)
    conftest.run("data/split.py", f"{folder}/birds", "--name=birds", f"--csv={folder}/birds/birds.csv")
    val = f"{folder}/birds/birds_val.txt"
    with open(val) as file, open(f"{folder}/few.txt", "w") as few:
        few.writelines(f"{folder}/birds/{line}" for line in file)
    flags = [f"--train_list={folder}/birds/birds_train.txt", f"--val_list={val}", *conftest.TINY]
    conftest.run("train.py", *flags, "--num_epochs=1", "--eval_every=0", f"--model_save_dir={folder}/out")
    best = f"--pretrained_model={folder}/out/ResNet8/latest"
    os.environ["DEEP_METRIC_LEARNING_CACHE"] = f"{folder}/cache"
    conftest.run("eval.py", best, f"--val_list={val}", "--engine=inference", "--use_gpu=False")
    with tarfile.open(f"{folder}/birds.tgz", "w:gz") as archive:
        archive.add(f"{folder}/birds", "birds")
    make_sets(folder)
    os.makedirs(f"{folder}/pictures")
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)
    exif = Image.Exif()
    exif[0x112] = 6
    for kind in FORMATS:
        for number, image in enumerate((Image.fromarray(smooth), Image.fromarray(smooth).convert("L"))):
            options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
            image.save(f"{folder}/pictures/{kind}{number}", kind, progressive=bool(number), **options)
    os.makedirs(f"{folder}/weights")
    shutil.copy(f"{folder}/out/ResNet8/0/model.pdparams", f"{folder}/weights")
    from safetensors.numpy import save_file

    from weights import read_pickle

    save_file(read_pickle(f"{folder}/weights/model.pdparams"), f"{folder}/weights/model.safetensors")


def make_sets(folder):
    """The data sets of SETS, and a zip."""
    data_sets.write(f"{folder}/sets/sop", data_sets.sop())
    data_sets.write(f"{folder}/sets/cub200", data_sets.birds_2011())
    for files in data_sets.inshop():
        data_sets.write(f"{folder}/sets/inshop", files)
    data_sets.cars_combined(f"{folder}/sets/cars196")
    with open(f"{folder}/sop.zip", "wb") as file:
        file.write(data_sets.zipped({f"Stanford_Online_Products/{n}": data for n, data in data_sets.sop().items()}))


def inputs(folder):
    """{path: what changes when somebody writes to it} of all that a case must leave alone."""
    found = {}
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if top != folder or name not in OUTPUTS]
        for name in (*names, *folders):
            status = os.lstat(os.path.join(top, name))
            found[os.path.join(top, name)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def child(run):
    """A case's process: runs it, and ends as a script would."""
    output = os.open("stdout", os.O_CREAT | os.O_WRONLY), os.open("stderr", os.O_CREAT | os.O_WRONLY)
    os.dup2(output[0], 1)
    os.dup2(output[1], 2)
    status = 1
    try:
        run()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_case(kind, rng, folder, seeds):
    """-> what is wrong with one case, "" where nothing is; (seconds, bytes) that it took."""
    os.makedirs(folder)
    os.chdir(folder)
    run = kind(rng, seeds)
    open("stdout", "w").close()
    open("stderr", "w").close()
    before, start = (inputs(folder), inputs(seeds)), time.time()
    pid = os.fork()
    if not pid:
        child(run)
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.time() - start > 3 * SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    _, status, usage = ended
    took = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    with open_file("stderr") as file:
        said = file.read().decode(errors="replace")
    after = inputs(folder), inputs(seeds)
    for found in (*before, *after):
        for name in ("stdout", "stderr"):
            found.pop(os.path.join(folder, name), None)
    code = os.waitstatus_to_exitcode(status)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    wrong = {
        f"ended by signal {-code}": code < 0,
        f"exit status {code}": code not in (0, 2) and code > 0,
        "a traceback": "Traceback" in said,
        "not one line of error": code == 2 and (len(errors) != 1 or len(errors[0]) > 3000),
        f"took {took[0]:.0f} seconds": took[0] > SECONDS,
        f"took {took[1] / 2**30:.1f} GiB": took[1] > BYTES,
        "changed its inputs": before != after,
    }
    return ", ".join(what for what, is_so in wrong.items() if is_so), took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="other inputs")
    parser.add_argument("--case", help="<kind> <number>: this one alone, and keep it", nargs=2)
    args = parser.parse_args()
    end, counts, most, bad = time.time() + 60 * args.minutes, collections.Counter(), {}, []
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    root = tempfile.mkdtemp(prefix="fuzz")
    seeds = os.path.join(root, "seeds")
    make_seeds(seeds)
    import paddle  # noqa: F401  (once for all cases)

    number = 0
    while time.time() < end:
        kind = KINDS[number % len(KINDS)]
        if args.case:
            kind, number = globals()[args.case[0]], int(args.case[1])
        folder = os.path.join(root, f"{kind.__name__}{number}")
        wrong, took = run_case(kind, random.Random(f"{args.seed} {number}"), folder, seeds)
        counts[kind.__name__] += 1
        most[kind.__name__] = tuple(max(pair) for pair in zip(took, most.get(kind.__name__, (0, 0))))
        if wrong:
            bad.append(folder)
            print(f"{folder}: {wrong} (--seed={args.seed} --case {kind.__name__} {number})", flush=True)
        elif not args.case:
            os.chdir(root)
            shutil.rmtree(folder, ignore_errors=True)
        number += 1
        if args.case:
            break
    for name, count in sorted(counts.items()):
        print(f"{name}: {count} cases, at most {most[name][0]:.1f} seconds and {most[name][1] / 2**30:.2f} GiB")
    print(f"{sum(counts.values())} cases, {len(bad)} of them wrong" + (f": see {root}" if bad else ""))
    if not bad and not args.case:
        os.chdir("/")
        shutil.rmtree(root, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
