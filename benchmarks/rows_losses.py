"""Each loss, forward and backward to the embedding, on one batch, K = 4 images a class."""

import time

import numpy as np

from comparison import Comparison, Speed, Value

K = 4
# What pytorch-metric-learning has in their place. Its random triplets are drawn for each anchor, as many as it has
# positives; its semi-hard miner takes all semi-hard negatives of a pair, not the closest.
COUNTERPARTS = {
    ("tripletloss", "random"): "TripletMarginLoss, random",
    ("tripletloss", "semihard"): "TripletMarginLoss, semi-hard",
    ("tripletloss", "hard"): "TripletMarginLoss, batch-hard",
    ("tripletloss", "distance"): "TripletMarginLoss, distance-weighted",
    ("quadrupletloss", None): None,
    ("emlloss", None): "GeneralizedLiftedStructureLoss (a relative)",
    ("softmax", None): "PyTorch's cross_entropy",
}
PRODUCT = "matrix product, float32"


def comparisons(tiny):
    for count, dimension in [(16, 8)] if tiny else [(120, 2048), (1024, 512)]:
        size = {"count": count, "dimension": dimension}
        for (name, mining), counterpart in COUNTERPARTS.items():
            ours = f"{name}, {mining}" if mining else name
            contenders = {ours: ("ours", {"name": name, "mining": mining, **size})}
            if counterpart:
                contenders[counterpart] = ("theirs", {"name": counterpart, **size})
            rows = [Speed(ours, counterpart, 1.0)] if counterpart else []
            if name != "softmax":
                contenders[PRODUCT] = ("product", size)
                rows.append(Speed(ours, PRODUCT))
            yield Comparison(f"loss, batch {count} x {dimension}", contenders, rows, 9)
    small, large = (16, 32) if tiny else (1024, 2048)
    for name, mining in COUNTERPARTS:
        if name != "softmax":
            yield Comparison(
                f"memory of {name}, {mining}" if mining else f"memory of {name}",
                {n: ("ours", {"name": name, "mining": mining, "count": n, "dimension": 64}) for n in (small, large)},
                [
                    Value(
                        f"batch {large} over batch {small}, x 64: O(N^2) is 4",
                        lambda r: r[large]["memory"] / max(1, r[small]["memory"]),
                        4.5,
                        "x",
                    )
                ],
                1,
            )


def draw(count, dimension):
    """-> embeddings float32 [N, D] such as pooled features are, labels int64 [N]."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(count // K), K)
    centres = rng.standard_normal((count // K, dimension))
    features = np.abs(centres[labels] + rng.standard_normal((count, dimension)))
    return features.astype(np.float32), labels


def ours(name, mining, count, dimension):
    from runtime import process

    paddle = process.start_paddle(seed=0)
    import losses
    from losses.softmax import SoftmaxLoss

    settings = losses.LossSettings(name, options={"margin": 0.1, "triplet_mining": mining or "random"})
    loss = SoftmaxLoss() if name == "softmax" else losses.build_loss(settings)
    features, labels = draw(count, dimension)
    x, label = paddle.to_tensor(features, stop_gradient=False), paddle.to_tensor(labels)

    def run():
        loss(x, label).backward()
        x.clear_grad()

    return repeated(run)


def theirs(name, count, dimension):
    import torch
    from pytorch_metric_learning import losses, miners

    triplet, miner = losses.TripletMarginLoss(margin=0.1), None
    if name == "TripletMarginLoss, random":
        triplet = losses.TripletMarginLoss(margin=0.1, triplets_per_anchor=K - 1)
    elif name == "TripletMarginLoss, semi-hard":
        miner = miners.TripletMarginMiner(margin=0.1, type_of_triplets="semihard")
    elif name == "TripletMarginLoss, batch-hard":
        miner = miners.BatchHardMiner()
    elif name == "TripletMarginLoss, distance-weighted":
        miner = miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)
    elif name.startswith("GeneralizedLiftedStructureLoss"):
        triplet = losses.GeneralizedLiftedStructureLoss()
    else:
        triplet = torch.nn.functional.cross_entropy
    features, labels = draw(count, dimension)
    x, label = torch.from_numpy(features).requires_grad_(), torch.from_numpy(labels)

    def run():
        loss = triplet(x, label, miner(x, label)) if miner else triplet(x, label)
        loss.backward()
        x.grad = None

    return repeated(run)


def product(count, dimension):
    """x @ x.T and its gradient: three products."""
    from runtime import process

    paddle = process.start_paddle(seed=0)
    x = paddle.to_tensor(draw(count, dimension)[0], stop_gradient=False)

    def run():
        paddle.matmul(x, x, transpose_y=True).sum().backward()
        x.clear_grad()

    return repeated(run)


def repeated(run):
    """For at least a quarter of a second in a measurement: a small batch is done within milliseconds."""

    def measure():
        start, times = time.perf_counter(), 0
        while time.perf_counter() - start < 0.25:
            run()
            times += 1
        return {"seconds": (time.perf_counter() - start) / times}

    return measure
