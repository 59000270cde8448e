"""The benchmark runs, at toy sizes; what it measures is no test's business."""

import importlib.util
import os
import subprocess
import sys

import pytest

RUN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "benchmarks", "run.py")


def run(*args):
    return subprocess.run([sys.executable, RUN, *args], capture_output=True, text=True, timeout=120)


def test_help_names_the_rows():
    result = run("--help")
    rows = "extraction, growth, losses, memory, reader, recall, search, startup, step"
    assert result.returncode == 0 and rows in " ".join(result.stdout.split())


def test_contenders_that_are_not_installed_are_said_and_skipped():
    """Also with all of them there: every line of the table is whole."""
    result = run("--tiny", "recall")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 9 and all(line.count("|") == 9 for line in lines)
    missing = [n for n in ("faiss", "pytorch_metric_learning") if importlib.util.find_spec(n) is None]
    assert ("not measured" in result.stdout) == bool(missing) == ("cannot be set up" in result.stderr)


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
def test_faiss_and_metrics_find_the_same():
    assert "should be the same" not in run("--tiny", "recall").stderr
