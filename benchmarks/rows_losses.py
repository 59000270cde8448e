"""Each loss, forward and backward to the embedding, on one batch, K = 4 images a class; alone, and beside a memory."""

import itertools
import math
import time

import numpy as np

from comparison import Comparison, Speed

K = 4
# What pytorch-metric-learning has in their place. Its random triplets are drawn for each anchor, as many as it has
# positives; its semi-hard miner takes all semi-hard negatives of a pair, not the closest. Losses of a head are measured
# with it. Its memory is compared with the batch alone, not the batch with itself as well.
COUNTERPARTS = {
    ("tripletloss", "random"): "TripletMarginLoss, random",
    ("tripletloss", "semihard"): "TripletMarginLoss, semi-hard",
    ("tripletloss", "hard"): "TripletMarginLoss, batch-hard",
    ("tripletloss", "distance"): "TripletMarginLoss, distance-weighted",
    ("quadrupletloss", None): None,
    ("emlloss", None): "GeneralizedLiftedStructureLoss (a relative)",
    ("npairsloss", None): "NPairsLoss",
    ("marginloss", None): "MarginLoss, distance-weighted",
    ("contrastiveloss", None): "ContrastiveLoss",
    ("multisimilarityloss", None): "MultiSimilarityLoss and miner",
    ("supconloss", None): "SupConLoss",
    ("circleloss", None): "CircleLoss",
    ("proxyanchorloss", None): "ProxyAnchorLoss",
    ("arcmarginloss", None): "ArcFaceLoss",
    ("normsoftmax", None): "NormalizedSoftmaxLoss",
    ("softmax", None): "PyTorch's cross_entropy",
}
WITH_MEMORY = [
    ("tripletloss", "semihard"), ("tripletloss", "distance"), ("marginloss", None), ("contrastiveloss", None),
    ("multisimilarityloss", None), ("supconloss", None), ("circleloss", None),
]  # fmt: skip
ORIGINAL = ("tripletloss", "quadrupletloss", "emlloss")  # beside these stands the limit, too
HEADS = ("arcmarginloss", "normsoftmax")
PRODUCT = "matrix product, float32"


def comparisons(tiny):
    # As many classes for heads and proxies as CUB-200 and SOP train on.
    for count, dimension, classes in [(16, 8, 10)] if tiny else [(120, 2048, 100), (1024, 512, 11318)]:
        for (name, mining), counterpart in COUNTERPARTS.items():
            yield compare(name, mining, counterpart, {"count": count, "dimension": dimension, "classes": classes})
    count, dimension, memory = (16, 8, 64) if tiny else (120, 512, 8192)
    for name, mining in WITH_MEMORY:
        size = {"count": count, "dimension": dimension, "memory": memory}
        yield compare(name, mining, COUNTERPARTS[name, mining], size)


def compare(name, mining, counterpart, size):
    """The Comparison of a loss with its counterpart and with the products that it can't do without."""
    ours = f"{name}, {mining}" if mining else name
    contenders = {ours: ("ours", {"name": name, "mining": mining, **size})}
    if counterpart:
        contenders[counterpart] = ("theirs", {"name": counterpart, **size})
    rows = [Speed(ours, counterpart, 1.0)] if counterpart else []
    memory = f", memory {size['memory']}" if "memory" in size else ""
    if name in ORIGINAL and not memory:
        contenders[PRODUCT] = ("product", size)
        rows.append(Speed(ours, PRODUCT))
    return Comparison(f"loss, batch {size['count']} x {size['dimension']}{memory}", contenders, rows, 9)


def draw(count, dimension, memory=0):
    """-> embeddings float32 [N, D] such as pooled features are, labels int64 [B, N].

    Beside a memory the labels are those of B batches, which share no class: with so many classes as SOP has, a memory
    holds few images of each.
    """
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(count // K), K)
    centres = rng.standard_normal((count // K, dimension))
    features = np.abs(centres[labels] + rng.standard_normal((count, dimension)))
    batches = np.arange(memory // count + 1)[:, None] * (count // K)
    return features.astype(np.float32), labels + batches


def ours(name, mining, count, dimension, classes=100, memory=0):
    from runtime import process

    paddle = process.start_paddle(seed=0)
    import losses
    from models.embedding_net import CosineHead

    # The margins that the counterparts have, too.
    margin = {"margin": 0.1} if name == "tripletloss" else {}
    settings = losses.LossSettings(name, memory_size=memory, options={**margin, "triplet_mining": mining})
    own = losses.build_loss(settings, num_classes=classes, embedding_size=dimension)
    head = CosineHead(dimension, classes, losses.row(name).flags["head_scale"]) if name in HEADS else None
    loss = own or losses.build_head_loss(settings)
    features, labels = draw(count, dimension, memory)
    x = paddle.to_tensor(features, stop_gradient=False)
    batches = itertools.cycle([paddle.to_tensor(label) for label in labels])
    learned = [x, *(p for layer in (loss, head) if layer for p in layer.parameters())]

    def run():
        loss(head(x) if head else x, next(batches)).backward()
        for tensor in learned:
            tensor.clear_grad()

    for _ in labels[1:]:  # fills the memory
        run()
    return repeated(run)


def theirs(name, count, dimension, classes=100, memory=0):
    import torch
    from pytorch_metric_learning import losses, miners

    weighted = miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)
    loss, miner = {
        "TripletMarginLoss, random": lambda: (losses.TripletMarginLoss(margin=0.1, triplets_per_anchor=K - 1), None),
        "TripletMarginLoss, semi-hard": lambda: (
            losses.TripletMarginLoss(margin=0.1), miners.TripletMarginMiner(margin=0.1, type_of_triplets="semihard")
        ),
        "TripletMarginLoss, batch-hard": lambda: (losses.TripletMarginLoss(margin=0.1), miners.BatchHardMiner()),
        "TripletMarginLoss, distance-weighted": lambda: (losses.TripletMarginLoss(margin=0.1), weighted),
        "GeneralizedLiftedStructureLoss (a relative)": lambda: (losses.GeneralizedLiftedStructureLoss(), None),
        "NPairsLoss": lambda: (losses.NPairsLoss(), None),
        "MarginLoss, distance-weighted": lambda: (losses.MarginLoss(margin=0.2, learn_beta=True), weighted),
        "ContrastiveLoss": lambda: (losses.ContrastiveLoss(pos_margin=0, neg_margin=1), None),
        "MultiSimilarityLoss and miner": lambda: (
            losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), miners.MultiSimilarityMiner(epsilon=0.1)
        ),
        "SupConLoss": lambda: (losses.SupConLoss(temperature=0.1), None),
        "CircleLoss": lambda: (losses.CircleLoss(m=0.4, gamma=80), None),
        "ProxyAnchorLoss": lambda: (losses.ProxyAnchorLoss(classes, dimension, margin=0.1, alpha=32), None),
        "ArcFaceLoss": lambda: (losses.ArcFaceLoss(classes, dimension, margin=math.degrees(0.15), scale=80), None),
        "NormalizedSoftmaxLoss": lambda: (losses.NormalizedSoftmaxLoss(classes, dimension, temperature=1 / 20), None),
        "PyTorch's cross_entropy": lambda: (torch.nn.functional.cross_entropy, None),
    }[name]()  # fmt: skip
    learned = list(loss.parameters()) if isinstance(loss, torch.nn.Module) else []
    if memory:
        loss, miner = losses.CrossBatchMemory(loss, dimension, memory_size=memory, miner=miner), None
    features, labels = draw(count, dimension, memory)
    x, batches = torch.from_numpy(features).requires_grad_(), itertools.cycle(torch.from_numpy(labels))

    def run():
        label = next(batches)
        (loss(x, label, miner(x, label)) if miner else loss(x, label)).backward()
        for tensor in (x, *learned):
            tensor.grad = None

    for _ in labels[1:]:
        run()
    return repeated(run)


def product(count, dimension, classes):
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
