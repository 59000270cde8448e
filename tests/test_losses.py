"""Each loss against plain NumPy loops written from its formula, values and gradients, on random, tied and degenerate
batches."""

import math

import numpy as np
import paddle
import pytest

import losses
from losses import LossSettings, tripletloss
from losses.distances import distances, pair_masks
from losses.softmax import SoftmaxLoss
from utility import UserError

METRIC = [("tripletloss", mining) for mining in losses.MINING] + [("quadrupletloss", None), ("emlloss", None)]
IDS = [f"{name}-{mining}" if mining else name for name, mining in METRIC]


def build(name, mining, margin=0.1):
    options = {"margin": margin, "triplet_mining": mining or "random"}
    return losses.build_loss(LossSettings(name, options=options))


def value_and_gradient(loss, x, label, seed=5):
    x = paddle.to_tensor(np.asarray(x, np.float32), stop_gradient=False)
    paddle.seed(seed)
    value = loss(x, paddle.to_tensor(np.asarray(label, np.int64)))
    value.backward()
    assert value.shape == [] and value.dtype == paddle.float32
    return value.item(), x.grad.numpy()


def chosen_negatives(mining, x, label, seed=5):
    """The columns that the loss draws or picks with this seed, [N, N]."""
    x = paddle.to_tensor(np.asarray(x, np.float32))
    d, (_, negative) = distances(x), pair_masks(paddle.to_tensor(np.asarray(label, np.int64)))
    paddle.seed(seed)
    choose = {"random": "draw_evenly", "semihard": "semihard", "distance": "draw_by_distance"}[mining]
    return getattr(tripletloss, choose)(d, negative, x.shape[1]).numpy()


# ---------------------------------------------------------------- the formulas again, as loops


def unit(x):
    return [v / max(math.sqrt((v * v).sum()), 1e-20) for v in x]


def distance(a, b):
    return math.sqrt(max(((a - b) ** 2).sum(), 1e-12))


def loop_triplet(x, label, margin, mining, chosen):
    x, n, terms = unit(x), len(label), []
    for a in range(n):
        positives = [p for p in range(n) if p != a and label[p] == label[a]]
        negatives = [j for j in range(n) if label[j] != label[a]]
        if not positives or not negatives:
            continue
        to = {j: distance(x[a], x[j]) for j in range(n)}
        if mining == "hard":
            terms.append(max(0, max(to[p] for p in positives) + margin - min(to[j] for j in negatives)))
            continue
        for p in positives:
            if mining == "semihard":
                beyond = [to[j] for j in negatives if to[j] > to[p] + 1e-8]
                to_negative = min(beyond) if beyond else max(to[j] for j in negatives)
            else:
                to_negative = to[chosen[a, p]]
            terms.append(max(0, to[p] + margin - to_negative))
    return sum(terms) / len(terms) if terms else 0.0


def loop_quadruplet(x, label, margin):
    x, n = unit(x), len(label)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    positive = [distance(x[i], x[j]) for i, j in pairs if label[i] == label[j]]
    negative = [distance(x[i], x[j]) for i, j in pairs if label[i] != label[j]]
    return max(0.0, max(positive) - min(negative) + margin) if positive and negative else 0.0


def loop_eml(x, label, b=100000.0):
    """The two-branch form with explicit exponentials, summed in the log domain."""
    terms, n = [], len(label)
    for i in range(n):
        to = [((x[i] - x[j]) ** 2).sum() for j in range(n)]
        positives = [to[j] for j in range(n) if j != i and label[j] == label[i]]
        negatives = [to[j] for j in range(n) if label[j] != label[i]]
        if positives and negatives:
            exponents = [dp - dn for dp in positives for dn in negatives]
            top = max(exponents)
            log_mean = top + math.log(sum(math.exp(e - top) for e in exponents) / len(exponents))
            terms.append(np.logaddexp(0, math.log(b) + log_mean) / math.log(1 + b))
    return sum(terms) / len(terms) if terms else 0.0


def loop(name, mining, x, label, margin=0.1, chosen=None):
    if name == "tripletloss":
        return loop_triplet(x, label, margin, mining, chosen)
    return loop_quadruplet(x, label, margin) if name == "quadrupletloss" else loop_eml(x, label)


def numeric_gradient(f, x, step=1e-6):
    gradient = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        low, high = x.copy(), x.copy()
        low[i] -= step
        high[i] += step
        gradient[i] = (f(high) - f(low)) / (2 * step)
    return gradient


# ---------------------------------------------------------------- values and gradients

LABELS = {
    "balanced": [0, 0, 0, 1, 1, 1, 2, 2, 2, 7, 7, 7],
    "shuffled": [7, 1, 0, 2, 1, 7, 0, 2, 2, 1, 0, 7],
    "unequal": [3, 3, 3, 3, 3, 1, 1, 5, 2, 2, 2, 9],
    "negative numbers": [-5, 4, -5, 4, -5, 4, 0, 0, 0, 0, 2**40, 2**40],
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("name", "mining"), METRIC, ids=IDS)
def test_equals_the_loops(name, mining, labels):
    label = np.array(LABELS[labels])
    for seed, margin, scale in ((0, 0.1, 1.0), (1, 0.6, 0.3)):
        rng = np.random.default_rng(seed)
        # Classes that overlap, so that some triplets are violated and others are not. float32, so that both sides
        # start from the same numbers.
        x = (rng.normal(size=(len(label), 6)) + 0.5 * rng.normal(size=(100, 6))[label % 97]) * scale
        x = x.astype(np.float32).astype(np.float64)
        draws = mining in ("random", "distance")
        chosen = chosen_negatives(mining, x, label) if draws else None
        value, gradient = value_and_gradient(build(name, mining, margin), x, label)
        assert value == pytest.approx(loop(name, mining, x, label, margin, chosen), rel=1e-5, abs=1e-7)
        wanted = numeric_gradient(lambda z: loop(name, mining, z, label, margin, chosen), x)  # noqa: B023
        np.testing.assert_allclose(gradient, wanted, rtol=2e-4, atol=1e-6)
        assert value > 0 and np.abs(gradient).max() > 0


@pytest.mark.parametrize(("name", "mining"), METRIC, ids=IDS)
def test_tied_distances(name, mining):
    """Corners of a square and of a cross: many equal distances. The value does not depend on which one is taken."""
    x = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1], [1, 0], [0, 1], [-1, 0], [0, -1]], np.float64)
    label = np.array([0, 0, 1, 1, 0, 2, 2, 1])
    chosen = chosen_negatives(mining, x, label) if mining in ("random", "distance") else None
    value, gradient = value_and_gradient(build(name, mining, 0.9), x, label)
    assert value == pytest.approx(loop(name, mining, x, label, 0.9, chosen), rel=1e-5) and value > 0
    assert np.isfinite(gradient).all()


def test_the_hardest_pair_of_quadrupletloss_gets_its_gradient_once():
    """Both (i, j) and (j, i) hold the largest distance; counted twice, the gradient would be twice the true one."""
    x = np.array([[1.0, 0.0], [0.8, 0.6], [0.1, 1.0], [-0.9, 0.5]])
    label = [0, 0, 1, 1]
    _, gradient = value_and_gradient(build("quadrupletloss", None, 0.5), x, label)
    wanted = numeric_gradient(lambda z: loop_quadruplet(z, label, 0.5), x)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- degenerate batches


def degenerate_batches():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(8, 5))
    y = [0, 0, 1, 1, 2, 2, 3, 3]
    yield "duplicate images", np.repeat(x[:4], 2, axis=0), y
    yield "duplicates in other classes", np.concatenate([x[:4], x[:4]]), y
    yield "one class", x, [4] * 8
    yield "no positives", x, list(range(8))
    yield "one image", x[:1], [0]
    yield "all equal", np.ones((8, 5)), y
    yield "all zero", np.zeros((8, 5)), y
    yield "one zero", np.concatenate([x[:7], np.zeros((1, 5))]), y
    yield "norm 1e-8", 1e-8 * x / np.linalg.norm(x, axis=1, keepdims=True), y
    yield "norm 1e4", 1e4 * x / np.linalg.norm(x, axis=1, keepdims=True), y
    yield "one dimension", x[:, :1], y
    yield "opposite", np.concatenate([x[:4], -x[:4]]), y
    yield "a class alone", x, [0, 0, 1, 1, 2, 2, 2, 9]


@pytest.mark.parametrize(
    ("what", "x", "label"), list(degenerate_batches()), ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize(("name", "mining"), METRIC, ids=IDS)
def test_finite_and_right_on_degenerate_batches(name, mining, what, x, label):
    value, gradient = value_and_gradient(build(name, mining), x, label)
    assert math.isfinite(value) and np.isfinite(gradient).all()
    x = np.asarray(x, np.float32).astype(np.float64)
    chosen = chosen_negatives(mining, x, label) if mining in ("random", "distance") else None
    assert value == pytest.approx(loop(name, mining, x, label, 0.1, chosen), rel=1e-4, abs=2e-6)
    if what in ("one class", "no positives", "one image"):
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize(("name", "mining"), METRIC, ids=IDS)
def test_features_that_lie_close_together_at_a_large_norm(name, mining):
    """Where |a|^2 + |b|^2 - 2ab in float32 would be all rounding."""
    rng = np.random.default_rng(4)
    label = np.repeat(np.arange(4), 3)
    x = (1e4 * np.ones((12, 16)) + rng.normal(size=(12, 16))).astype(np.float32).astype(np.float64)
    chosen = chosen_negatives(mining, x, label) if mining in ("random", "distance") else None
    value, gradient = value_and_gradient(build(name, mining), x, label)
    assert value == pytest.approx(loop(name, mining, x, label, 0.1, chosen), rel=1e-4)
    assert np.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize(("name", "mining"), METRIC, ids=IDS)
def test_half_precision_is_only_cast(name, mining):
    rng = np.random.default_rng(6)
    label = paddle.to_tensor(np.repeat(np.arange(4), 2))
    half = paddle.to_tensor(rng.normal(size=(8, 4)).astype(np.float16))
    loss = build(name, mining)
    paddle.seed(1)
    from_half = loss(half, label)
    paddle.seed(1)
    assert from_half.dtype == paddle.float32 and from_half.item() == loss(half.astype("float32"), label).item()


# ---------------------------------------------------------------- mining


def mining_batch(dimension=8):
    rng = np.random.default_rng(7)
    return rng.normal(size=(10, dimension)), np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("mining", ["random", "distance", "semihard"])
def test_mined_negatives_are_negatives_of_the_anchor(mining):
    x, label = mining_batch()
    for seed in range(20):
        chosen = chosen_negatives(mining, x, label, seed)
        assert (label[chosen] != label[:, None]).all()


def frequencies(mining, x, label, draws=400):
    counts = np.zeros((len(label), len(label)))
    for seed in range(draws):
        chosen = chosen_negatives(mining, x, label, seed)
        for a in range(len(label)):
            counts[a] += np.bincount(chosen[a], minlength=len(label))
    return counts / counts.sum(axis=1, keepdims=True)


def test_random_negatives_are_drawn_evenly():
    x, label = mining_batch()
    negative = label[:, None] != label
    wanted = negative / negative.sum(axis=1, keepdims=True)
    # 4,000 draws: a standard deviation of at most 0.008.
    np.testing.assert_allclose(frequencies("random", x, label), wanted, atol=0.035)


def test_distance_weighted_negatives_follow_the_papers_weights():
    x, label = mining_batch()
    x[8] = x[0] + 0.05 * x[8]  # closer than the cut-off
    unit_x = np.array(unit(x.astype(np.float32).astype(np.float64)))
    n, dimension = x.shape
    weight = np.zeros((n, n))
    for a in range(n):
        for j in range(n):
            d = distance(unit_x[a], unit_x[j])
            if label[a] != label[j] and d < 1.4:
                d = max(d, 0.5)
                weight[a, j] = 1 / (d ** (dimension - 2) * (1 - d * d / 4) ** ((dimension - 3) / 2))
        if not weight[a].any():
            weight[a] = label != label[a]
    np.testing.assert_allclose(
        frequencies("distance", x, label), weight / weight.sum(axis=1, keepdims=True), atol=0.035
    )


def test_distance_weighting_in_many_dimensions_neither_overflows_nor_leaves_the_reach():
    rng = np.random.default_rng(8)
    label = np.repeat(np.arange(5), 4)
    x = np.abs(rng.normal(size=(20, 2048)))  # like pooled features: all in one corner, distances about 0.85
    x[0] = -x[0]  # farther than 1.4 from every other: no negative in reach
    chosen = chosen_negatives("distance", x, label)
    assert (label[chosen] != label[:, None]).all()
    value, gradient = value_and_gradient(build("tripletloss", "distance"), x, label)
    assert value > 0 and np.isfinite(gradient).all()


# ---------------------------------------------------------------- softmax and build_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_softmax_equals_its_formula(smoothing):
    rng = np.random.default_rng(9)
    logits, label = (rng.normal(size=(5, 7)) * 3).astype(np.float32), np.array([0, 6, 3, 3, 1])
    target = np.full((5, 7), smoothing / 7)
    target[np.arange(5), label] += 1 - smoothing
    wide = logits.astype(np.float64)
    p = np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True)
    x = paddle.to_tensor(logits, stop_gradient=False)
    value = SoftmaxLoss(smoothing)(x, paddle.to_tensor(label))
    value.backward()
    assert value.item() == pytest.approx(-(target * np.log(p)).sum(axis=1).mean(), rel=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), (p - target) / 5, rtol=1e-4, atol=1e-6)


def test_softmax_of_huge_logits_is_finite():
    x = paddle.to_tensor([[1e5, -1e5], [-1e5, 1e5]], stop_gradient=False)
    value = SoftmaxLoss(0.1)(x, paddle.to_tensor([0, 0]))
    value.backward()
    assert math.isfinite(value.item()) and np.isfinite(x.grad.numpy()).all()


def test_build_loss_knows_its_names():
    assert losses.build_loss(LossSettings("softmax")) is None
    with pytest.raises(
        UserError, match="unknown loss 'npairs'; known: softmax, normsoftmax, arcmarginloss, tripletloss,"
    ):
        losses.build_loss(LossSettings("npairs"))
    with pytest.raises(ValueError, match="unknown mining 'easy'"):
        build("tripletloss", "easy")
