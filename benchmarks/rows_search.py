"""The 10 nearest pictures of a gallery, for 1,000 queries: exactly, and by indices of faiss, as infer.py searches.

Features are clustered, 50 of a class, and come from one file that all contenders read. "infer.py --index" computes the
cosines of what an index finds again (retrieval/index.py); faiss alone does not.
"""

import os
import tempfile
import time

import numpy as np

from comparison import Comparison, Speed, Value

QUERIES, K, SIZE, OF_A_CLASS = 1000, 10, 512, 50
NOISE = 1.0  # of the features of a class, as a multiple of that of the centres
EXACT, FLAT = "infer.py --index=exact", "faiss flat"


def comparisons(tiny):
    for count, factory in [(1000, "IVF10,Flat")] if tiny else [(1_000_000, "IVF1000,Flat"), (100_000, "HNSW32")]:
        with tempfile.TemporaryDirectory() as folder:
            size = {"path": os.path.join(folder, "features.npy"), "count": count, "queries": 20 if tiny else QUERIES}
            indexed = f"infer.py --index={factory}"
            yield Comparison(
                f"search of {count} x {SIZE}",
                {
                    EXACT: ("exact", size),
                    FLAT: ("flat", size),
                    indexed: ("by_index", {**size, "factory": factory}),
                },
                [
                    Speed(EXACT, FLAT),
                    Speed(indexed, EXACT),
                    Value(f"{factory}: nearest pictures missed", lambda r, n=indexed: r[n]["missed"], None, " %"),
                    Value(f"{factory}: to build and try", lambda r, n=indexed: r[n]["build"], None, " s"),
                ],
                3,
                size["queries"],
                same="cosine",
            )


def features(path, count, queries):
    """-> gallery float32 [count, SIZE], from a file that is made where it is not there; queries [queries, SIZE]."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((count // OF_A_CLASS, SIZE), np.float32)
    asked = centres[rng.integers(0, len(centres), queries)]
    asked += NOISE * rng.standard_normal(asked.shape, np.float32)
    if not os.path.exists(path):
        file = np.lib.format.open_memmap(path, "w+", np.float32, (count, SIZE))
        for start in range(0, count, 10_000):
            block = centres[rng.integers(0, len(centres), len(file[start : start + 10_000]))]
            file[start : start + 10_000] = block + NOISE * rng.standard_normal(block.shape, np.float32)
        file.flush()
    return np.load(path, mmap_mode="r"), asked


def exact(**size):
    from retrieval import neighbours

    gallery, queries = features(**size)
    return lambda: {"cosine": float(neighbours.nearest(queries, gallery, K).cosine.mean())}


def flat(**size):
    import faiss

    from retrieval import neighbours

    gallery, queries = features(**size)
    index = faiss.IndexFlatIP(SIZE)
    for start in range(0, len(gallery), 10_000):
        index.add(neighbours.unit(gallery[start : start + 10_000]))
    queries = neighbours.unit(queries)
    return lambda: {"cosine": float(index.search(queries, K)[0].mean())}


def by_index(factory, **size):
    from retrieval import features as files_of_features
    from retrieval import index, neighbours
    from retrieval.search import Search

    rows, queries = features(**size)
    gallery = files_of_features.Gallery(rows, None, None, None, None, "")
    start = time.perf_counter()
    made = index.open_index(Search(top_k=K, index=factory), gallery, len(queries))
    build = time.perf_counter() - start
    some = queries[:100]
    least = neighbours.nearest(some, rows, K).cosine[:, -1:] - 1e-6
    missed = float((index.search(made, some, gallery, K).cosine < least).mean())

    def run():
        index.search(made, queries, gallery, K)
        return {"missed": 100 * missed, "build": build}

    return run
