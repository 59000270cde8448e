"""Measures features of the size of Stanford Online Products' test: how long that takes, and how much memory.

    python benchmarks/sop_size.py
    python -m paddle.distributed.launch --nproc_per_node=2 benchmarks/sop_size.py

60,502 features of 2,048 values, drawn around 11,316 centres, 2 to 12 for each. Everything that eval.py --protocol=sop
does with features is done; that of several processes the first measures alone is as there, too.
"""

import os
import resource
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from retrieval import figures, protocols
from runtime import parallel, process

IMAGES, CLASSES, SIZE = 60502, 11316, 2048
SPREAD = 4.0  # of the features of a class, as a multiple of that of the centres


def draw(rng):
    """-> features float32 [IMAGES, SIZE], labels int64 [IMAGES]."""
    counts = np.full(CLASSES, 2)
    while (missing := IMAGES - counts.sum()) > 0:
        chosen = rng.permutation(np.flatnonzero(counts < 12))[:missing]
        more = chosen[rng.random(len(chosen)) < 0.5]
        counts[more if len(more) else chosen] += 1
    labels = np.repeat(np.arange(CLASSES) + 11319, counts)
    features = np.empty((IMAGES, SIZE), np.float32)
    for start, count in zip(np.cumsum(counts) - counts, counts):
        rows = rng.standard_normal((count, SIZE), np.float32)
        features[start : start + count] = rng.standard_normal(SIZE, np.float32) + SPREAD * rows
    return features, labels


def main():
    process.start_paddle(use_gpu=False)
    if not parallel.is_first():
        return
    features, labels = draw(np.random.default_rng(0))
    begun = time.time()
    measured = figures.measure(figures.Search(features, labels), protocols.PROTOCOLS["sop"].recall_at, in_place=True)
    seconds, peak = time.time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for name, value in measured.figures.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    print(f"{seconds:.0f} seconds, at most {peak / 1e9:.2f} GB, of which the features are {features.nbytes / 1e9:.2f}")


if __name__ == "__main__":
    process.run_script(main)
