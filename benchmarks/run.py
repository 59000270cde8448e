"""Measures the scripts against what people would use instead, and against the limit of the machine, in one run.

    python benchmarks/run.py                   # all rows
    python benchmarks/run.py reader recall     # some: the names of the files rows_*.py
    python benchmarks/run.py --tiny            # everything at toy sizes, to see that it runs

Prints a table of ratios. Each contender lives in a process of its own with the same number of threads, does the work
once to warm up, and then takes its turn with the others: A, B, C, A, B, C, ... A ratio is taken within a round, where
both sides met the same machine, and the table gives the median over the rounds with the smallest and the largest.

A file rows_<name>.py defines `comparisons(tiny)`, which yields Comparisons, and the functions that they name: each sets
something up, once, and returns a function without arguments that does the work once. What that returns is a dict of
further results, or None. Beside these a result has "seconds", "cpu" (the processor's, in all threads) and "memory": how
far, in bytes, the process has grown at most since it was set up (0 where there is no /proc).
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import select
import statistics
import subprocess
import sys
import time

FOLDER = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(FOLDER)
sys.path[:0] = [ROOT, FOLDER]

from comparison import Speed

LIMIT = 600  # seconds for a measurement: a loader that hangs is a result, too
ENOUGH = 120  # seconds after which a comparison begins no further round


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(re.fullmatch(r"rows_(\w+)\.py", name)[1] for name in os.listdir(FOLDER) if name.startswith("rows_"))
    parser.add_argument("rows", nargs="*", choices=[*known, []], help=f"which rows: {', '.join(known)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, one round")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], json.loads(args.worker[1]))
        return
    print(describe_machine(), end="\n\n")
    print("| work | measured against | ours | other | ratio or value | spread | to reach | |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.rows or known:
        for comparison in importlib.import_module(f"rows_{name}").comparisons(args.tiny):
            print(f"{comparison.what}: {', '.join(map(str, comparison.contenders))}", file=sys.stderr)
            rounds = 1 if args.tiny else comparison.rounds
            for line in table_rows(comparison, measure(comparison, f"rows_{name}", rounds)):
                print(line, flush=True)


# ---------------------------------------------------------------- the workers


def work(function, arguments):
    """The life of a worker: sets up, then measures for each line on stdin and answers with a line of JSON."""
    # What libraries and scripts print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module, name = function.split(":")
    run = getattr(importlib.import_module(module), name)(**arguments)
    before = memory("VmRSS")
    reset_peak()
    answers.write("{}\n")
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        result = run() or {}
        spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        answers.write(json.dumps({**spent, "memory": memory("VmHWM") - before, **result}) + "\n")


def reset_peak():
    """Linux: has VmHWM, the peak of the process's memory, begin again at what it holds now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def memory(name):
    """VmRSS or VmHWM of this process in bytes; 0 where there is no /proc."""
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(rf"{name}:\s+(\d+)", file.read())[1])
    except OSError:
        return 0


def environment():
    """The environment of all workers: as many threads as CPUs, and for each library the kernels that suit this CPU."""
    from runtime import process

    threads = {f"{name}_NUM_THREADS": str(process.cpu_count()) for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    mkl = process._mkl_cpu_type()
    variables = {**os.environ, **threads, **({"MKL_DEBUG_CPU_TYPE": mkl} if mkl else {})}
    # faiss brings an OpenBLAS of 2021, which takes a newer AMD processor for one of 2007: several times slower.
    variables.pop("OPENBLAS_L2_SIZE", None)
    variables.pop("OPENBLAS_CORETYPE", None)
    if mkl:
        variables["OPENBLAS_CORETYPE"] = {"7": "SkylakeX", "5": "Haswell"}[mkl]
    return variables


def start(function, arguments, variables=None):
    """A worker that is setting up; variables: of its environment, beside those that all have."""
    command = [sys.executable, os.path.join(FOLDER, "run.py"), "--worker", function, json.dumps(arguments)]
    pipe = subprocess.PIPE
    variables = {**environment(), **(variables or {})}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=variables)


def answer(worker):
    """The next answer of a worker; None where it has died or hangs."""
    if not select.select([worker.stdout], [], [], LIMIT)[0]:
        worker.kill()
    line = worker.stdout.readline()
    return json.loads(line) if line else None


def measure(comparison, module, rounds):
    """-> list of {contender: result}, one for each round, without those contenders that failed."""
    workers, results = {}, []
    try:
        for name, (function, *rest) in comparison.contenders.items():  # in turn: setting up is work, too
            workers[name] = start(f"{module}:{function}", *rest)
            if answer(workers[name]) is None:
                print(f"warning: {comparison.what}: {name} cannot be set up", file=sys.stderr)
                workers.pop(name).wait()
        begun = time.monotonic()
        for turn in range(1 + rounds):
            if turn > 2 and time.monotonic() - begun > ENOUGH:
                break
            results.append({})
            for name, worker in list(workers.items()):
                with contextlib.suppress(BrokenPipeError):  # it has died, as the missing answer will show
                    worker.stdin.write("\n")
                    worker.stdin.flush()
                result = answer(worker)
                if result is None:
                    print(f"warning: {comparison.what}: {name} failed in round {turn}", file=sys.stderr)
                    workers.pop(name).wait()
                else:
                    results[-1][name] = result
    finally:
        for worker in workers.values():
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
            worker.wait()
    found = {name: result[comparison.same] for name, result in results[0].items() if comparison.same in result}
    if found and max(found.values()) - min(found.values()) > 1e-3:
        print(f"warning: {comparison.what}: {comparison.same} should be the same: {found}", file=sys.stderr)
    # The first round was to warm up, which seconds of work need not.
    return results if all(result["seconds"] > 5 for result in results[0].values()) else results[1:]


# ---------------------------------------------------------------- the table


def table_rows(comparison, results):
    """Yields the lines of the table for a comparison; results: see `measure`."""
    for row in comparison.rows:
        if isinstance(row, Speed):
            both = [(r[row.ours][row.by], r[row.other][row.by]) for r in results if {row.ours, row.other} <= set(r)]
            figures = [other / ours for ours, other in both]
            shown = [speed(statistics.median(side), comparison.items) for side in zip(*both)]
            what, unit, good = f"{comparison.what}: {row.ours}", "x", lambda x, bar: x >= bar
            against, bar = row.other, None if row.bar is None else f">= {row.bar}x"
        else:
            figures = [row.figure(r) for r in results if len(r) == len(comparison.contenders)]
            shown, what, unit, good = ["", ""], comparison.what, row.unit, lambda x, bar: x <= bar
            against, bar = row.against, None if row.bar is None else f"<= {row.bar}{row.unit}"
        if not figures:
            yield f"| {what} | {against} | | | not measured | | {bar or '-'} | |"
            continue
        middle = statistics.median(figures)
        reached = "" if row.bar is None else "reached" if good(middle, row.bar) else "below"
        spread = f"{min(figures):.2f}..{max(figures):.2f}"
        yield f"| {what} | {against} | {' | '.join(shown)} | {middle:.2f}{unit} | {spread} | {bar or '-'} | {reached} |"


def speed(seconds, items):
    """Seconds for so many items, as people say it."""
    if items > 1:
        return f"{items / seconds:.1f}/s" if items < 100 * seconds else f"{items / seconds:.0f}/s"
    return f"{1000 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def describe_machine():
    """What the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    from runtime import process

    try:
        with open("/proc/cpuinfo") as file:
            processor = re.search(r"model name\s*: (.*)", file.read())[1]
    except (OSError, TypeError):
        processor = platform.processor()
    versions = []
    for name in (
        "paddlepaddle", "paddlepaddle-gpu", "torch", "torchvision", "timm", "pytorch-metric-learning", "faiss-cpu",
        "simplejpeg", "opencv-python-headless", "pillow", "numpy",
    ):  # fmt: skip
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions += [f"no {name}"] if "paddle" not in name else []  # there is one of the two
    chosen = {
        n: v for n, v in environment().items() if n in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "OPENBLAS_CORETYPE")
    }
    load = f", load {os.getloadavg()[0]:.1f} when it began" if hasattr(os, "getloadavg") else ""
    return (
        f"{process.cpu_count()} CPUs, {processor}{load}; Python {platform.python_version()}, {', '.join(versions)}; "
        + ", ".join(f"{name}={value}" for name, value in chosen.items())
    )


if __name__ == "__main__":
    main()
