"""Exact retrieval: recall@1..8, and MAP@R, of as many features as the test sets of CUB-200-2011 and SOP have."""

import numpy as np

from comparison import Comparison, Speed, Value

RECALL_AT = (1, 2, 4, 8)
GIB = 2**30


def comparisons(tiny):
    sizes = [(300, 64, 10, 2.0, 1)] if tiny else [(5924, 2048, 100, 5.2, 7), (60502, 512, 11316, 2.4, 3)]
    for count, dimension, classes, noise, rounds in sizes:
        size = {"count": count, "dimension": dimension, "classes": classes, "noise": noise}
        yield Comparison(
            f"recall@1..8, {count} x {dimension}",
            {
                "metrics.py": ("recall", size),
                "faiss flat search": ("faiss_search", size),
                "half a matrix product": ("product", size),
            },
            [
                Speed("metrics.py", "faiss flat search", 1.5),
                Speed("metrics.py", "half a matrix product"),
                Value("GiB beyond the features", lambda r: r["metrics.py"]["memory"] / GIB, 0.5, " GiB"),
            ],
            rounds,
            same="recall@1",
        )
        yield Comparison(
            f"MAP@R and recall, {count} x {dimension}",
            {
                "metrics.py": ("ranked", size),
                "pytorch-metric-learning's calculator": ("calculator", size),
                "faiss flat search": ("faiss_search", size),
            },
            [
                Speed("metrics.py", "pytorch-metric-learning's calculator", 1.5),
                Speed("metrics.py", "faiss flat search"),
                Value("GiB beyond the features", lambda r: r["metrics.py"]["memory"] / GIB, 0.5, " GiB"),
            ],
            rounds,
            same="recall@1",
        )
        # Of two processes the first measures, with threads in the place of the other (metrics._multiply).
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        yield Comparison(
            f"all figures of eval.py, {count} x {dimension}",
            {
                "one process": ("evaluation", size),
                "two processes": ("evaluation", size, {**threads, "PADDLE_LOCAL_SIZE": "2"}),
            },
            [
                Speed("two processes", "one process"),
                Value("GiB beyond the features", lambda r: r["one process"]["memory"] / GIB, 0.5, " GiB"),
            ],
            min(rounds, 3),
            same="recall@1",
        )


def draw(count, dimension, classes, noise):
    """-> features float32, labels: clusters with so much noise that recall@1 is about 60 %."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, classes, count))
    features = rng.standard_normal((classes, dimension), dtype=np.float32)[labels]
    features += noise * rng.standard_normal(features.shape, dtype=np.float32)
    shuffled = rng.permutation(count)
    return features[shuffled], labels[shuffled]


def recall(**size):
    from retrieval import metrics

    features, labels = draw(**size)
    return lambda: metrics.recall(features, labels, RECALL_AT)


def ranked(**size):
    from retrieval import metrics

    features, labels = draw(**size)
    return lambda: metrics.summarise(metrics.rank(features, labels), RECALL_AT)


def evaluation(**size):
    from retrieval import figures

    features, labels = draw(**size)
    return lambda: {"recall@1": figures.measure(figures.Search(features, labels), RECALL_AT).figures["recall@1"]}


def faiss_search(**size):
    import faiss

    features, labels = draw(**size)

    def run():
        unit = features.copy()
        faiss.normalize_L2(unit)
        index = faiss.IndexFlatIP(unit.shape[1])
        index.add(unit)
        nearest = index.search(unit, max(RECALL_AT) + 1)[1]
        # The image itself is the nearest or, where another is equal, the one after that.
        itself = nearest == np.arange(len(unit))[:, None]
        itself[~itself.any(axis=1), -1] = True
        hit = labels[nearest[~itself].reshape(len(unit), -1)] == labels[:, None]
        return {f"recall@{k}": float(hit[:, :k].any(axis=1).mean()) for k in RECALL_AT}

    return run


def calculator(**size):
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    features, labels = (torch.from_numpy(array) for array in draw(**size))
    names = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    # k: as many neighbours as MAP@R needs; by default it keeps all.
    measure = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))

    def run():
        # It measures Euclidean distances: normalised, that is the order of the cosines.
        unit = torch.nn.functional.normalize(features)
        found = measure.get_accuracy(unit, labels)
        return {"recall@1": float(found["precision_at_1"]), "MAP@R": float(found["mean_average_precision_at_r"])}

    return run


def product(**size):
    """What can't be avoided: each similarity once."""
    features, _ = draw(**size)
    half = features[: len(features) // 2 + 1].T
    rows = 4096
    block = np.empty((rows, half.shape[1]), np.float32)

    def run():
        for start in range(0, len(features), rows):
            part = features[start : start + rows]
            np.matmul(part, half, out=block[: len(part)])

    return run
