"""The losses that the original page does not name, against plain NumPy loops written from their formulas, published
values, and each other: alone, beside other images (a memory), and on degenerate batches."""

import math

import numpy as np
import paddle
import pytest
from test_losses import degenerate_batches, numeric_gradient, unit, value_and_gradient

import losses
from losses import LossSettings
from losses.distances import distances, pair_masks
from losses.memory import MemoryLoss
from losses.multisimilarityloss import MultiSimilarityLoss
from losses.tripletloss import draw_by_distance

# Unit vectors with exact cosines: .8 0 -.6 / .6 0 / .8.
T4 = np.array([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
Y4 = [0, 0, 1, 1]
# Class weights and embeddings; the second has cosine 1 to its class, the third -1.
W3 = np.array([[1, 0], [0, 1], [-1, 0]])
E3, Y3 = np.array([[0.6, 0.8], [0, 1], [-1, 0]]), [0, 1, 0]
PAIRS = ["contrastiveloss", "multisimilarityloss", "supconloss", "circleloss", "marginloss"]


def build(name, num_classes=3, dimension=2, **options):
    given = {"num_classes": num_classes, "embedding_size": dimension}
    return losses.build_loss(LossSettings(name, options=options), **given)


def with_proxies(proxies, **options):
    loss = build("proxyanchorloss", *np.shape(proxies), **options)
    loss.proxies.set_value(np.asarray(proxies, np.float32))
    return loss


# ---------------------------------------------------------------- the formulas again, as loops


def groups(label, other_label):
    """For each anchor, its positives and its negatives."""
    for a, mine in enumerate(label):
        yield (
            a,
            [j for j, theirs in enumerate(other_label) if theirs == mine and j != a],
            [j for j, theirs in enumerate(other_label) if theirs != mine],
        )


def mean(terms):
    return sum(terms) / len(terms) if terms else 0.0


def distance(a, b):
    return math.sqrt(max(((a - b) ** 2).sum(), 1e-12))


def loop_contrastive(x, y, label, labels, margin=1.0):
    pull, push = [], []
    for a, positives, negatives in groups(label, labels):
        pull += [distance(x[a], y[p]) for p in positives if distance(x[a], y[p]) > 2e-6]
        push += [margin - distance(x[a], y[n]) for n in negatives if distance(x[a], y[n]) < margin]
    return mean(pull) + mean(push)


def loop_multisimilarity(x, y, label, labels, margin=0.1, scale=50.0):
    terms = []
    for a, positives, negatives in groups(label, labels):
        s = [float(x[a] @ other) for other in y]
        least = min((s[p] for p in positives), default=math.inf)
        most = max((s[n] for n in negatives), default=-math.inf)
        positives = [p for p in positives if s[p] - margin < most]
        negatives = [n for n in negatives if s[n] + margin > least]
        pull = math.log(1 + sum(math.exp(-2 * (s[p] - 0.5)) for p in positives)) / 2
        push = math.log(1 + sum(math.exp(scale * (s[n] - 0.5)) for n in negatives)) / scale
        terms.append(pull + push)
    return mean(terms)


def loop_supcon(x, y, label, labels, scale=10.0):
    terms = []
    for a, positives, negatives in groups(label, labels):
        if positives and negatives:
            s = [scale * float(x[a] @ other) for other in y]
            total = math.log(sum(math.exp(s[j]) for j in positives + negatives))
            terms.append(-mean([s[p] - total for p in positives]))
    return mean(terms)


def loop_circle(x, y, label, labels, margin=0.4, scale=80.0, weights=None):
    """`weights`: the cosines that the weights, which get no gradient, are computed from."""
    terms = []
    for a, positives, negatives in groups(label, labels):
        if positives and negatives:
            s = [float(x[a] @ other) for other in y]
            w = s if weights is None else weights[a]
            pull = [-scale * max(0, 1 + margin - w[p]) * (s[p] - 1 + margin) for p in positives]
            push = [scale * max(0, w[n] + margin) * (s[n] - margin) for n in negatives]
            exponent = np.logaddexp.reduce(pull) + np.logaddexp.reduce(push)
            terms.append(np.logaddexp(0, exponent))
    return mean(terms)


def loop_margin(x, y, label, labels, chosen, margin=0.2, beta=1.2):
    terms = []
    for a, positives, negatives in groups(label, labels):
        for p in positives if negatives else []:
            terms += [distance(x[a], y[p]) - beta + margin, beta - distance(x[a], y[chosen[a, p]]) + margin]
    return mean([term for term in terms if term > 1e-8])


def loop_npairs(x, label):
    pairs = []
    for c in dict.fromkeys(label):
        members = [i for i, other in enumerate(label) if other == c]
        pairs += list(zip(members[::2], members[1::2]))
    terms = []
    for a, _ in pairs:
        logits = [float(x[a] @ x[p]) for _, p in pairs]
        same = [k for k, (other, _) in enumerate(pairs) if label[other] == label[a]]
        terms.append(np.logaddexp.reduce(logits) - mean([logits[k] for k in same]))
    used = [i for pair in pairs for i in pair]
    return mean(terms) + 0.5 * 0.01 * mean([float(x[i] @ x[i]) for i in used])


def loop_proxy_anchor(x, proxies, label, margin=0.1, scale=32.0):
    x, proxies = unit(x), unit(proxies)
    pull, push = [], []
    for c, p in enumerate(proxies):
        own = [float(v @ p) for v, mine in zip(x, label) if mine == c]
        others = [float(v @ p) for v, mine in zip(x, label) if mine != c]
        if own:
            pull.append(math.log(1 + sum(math.exp(-scale * (s - margin)) for s in own)))
        push.append(math.log(1 + sum(math.exp(scale * (s + margin)) for s in others)))
    return mean(pull) + mean(push)


LOOPS = {
    "contrastiveloss": loop_contrastive,
    "multisimilarityloss": loop_multisimilarity,
    "supconloss": loop_supcon,
    "circleloss": loop_circle,
    "marginloss": loop_margin,
}


def drawn(x, label, other=None, other_label=None, seed=5):
    """The negatives that marginloss draws with this seed."""
    x, label = paddle.to_tensor(np.asarray(x, np.float32)), paddle.to_tensor(np.asarray(label, np.int64))
    if other is not None:
        other = paddle.to_tensor(np.asarray(other, np.float32))
        other_label = paddle.to_tensor(np.asarray(other_label, np.int64))
    paddle.seed(seed)
    return draw_by_distance(distances(x, other), pair_masks(label, other_label)[1], x.shape[1]).numpy()


def loop(name, x, label, other=None, other_label=None, **options):
    """The loss of raw embeddings x beside `other`, the first of which are x."""
    y = unit(x if other is None else other)
    return LOOPS[name](unit(x), y, label, label if other is None else other_label, **options)


# ---------------------------------------------------------------- values


def value(loss, x, label):
    return value_and_gradient(loss, x, label)[0]


def test_values_that_other_libraries_give():
    near = pytest.approx
    assert value(build("contrastiveloss"), T4, Y4) == near(0.7380283410337599, rel=1e-6)
    assert value(build("supconloss"), T4, Y4) == near(0.06377983976191093, rel=1e-6)
    assert value(build("supconloss", scale=1.0), T4, Y4) == near(0.6735767888870938, rel=1e-6)
    assert value(build("circleloss"), T4, Y4) == near(3.2008639525221625, rel=1e-6)
    assert value(build("circleloss", margin=0.25, scale=256.0), T4, Y4) == near(35.201573078802426, rel=1e-6)
    assert value(MultiSimilarityLoss(None, 50.0), T4, Y4) == near(0.2688111287279738, rel=1e-6)
    assert value(MultiSimilarityLoss(None, 40.0), T4, Y4) == near(0.26897084936814325, rel=1e-6)
    assert value(build("multisimilarityloss"), T4, Y4) == 0  # nothing is mined
    assert value(build("multisimilarityloss", margin=0.25), T4, Y4) == near(0.1594391411063626, rel=1e-6)
    f = [[1, 0], [2, 0], [0, 1], [0, 3]]
    assert value(build("npairsloss"), f, Y4) == near(0.10650768130835737, rel=1e-6)
    assert value(with_proxies(W3), E3[:2], [0, 1]) == near(11.75996894651197, rel=1e-6)
    assert value(with_proxies(W3, scale=1.0), E3[:2], [0, 1]) == near(1.401991049836274, rel=1e-6)
    assert value(build("supconloss", scale=1 / 0.07), T4, Y4) == near(0.027932542098582758, rel=1e-6)
    assert value(build("supconloss"), T4, [0, 0, 1, 2]) == near(0.06377983976191093, rel=1e-6)
    assert value(build("circleloss", scale=1.0), T4, Y4) == near(1.0076397607896483, rel=1e-6)
    assert value(build("multisimilarityloss", margin=0.25, scale=40.0), T4, Y4) == near(0.15959886172044402, rel=1e-6)
    assert value(build("npairsloss"), T4, Y4) == near(0.40927813965002147 + 0.005, rel=1e-6)  # with its penalty
    assert value(build("contrastiveloss"), T4, [0, 1, 2, 3]) == near(0.28022058164424407, rel=1e-6)
    assert value(build("contrastiveloss"), T4, [0] * 4) == near(1.1294366, rel=1e-6)
    assert value(MultiSimilarityLoss(None, 50.0), T4, [0, 1, 2, 3]) == near(0.3000004601, rel=1e-6)
    assert value(MultiSimilarityLoss(None, 50.0), T4, [0] * 4) == near(1.0534069, rel=1e-6)


def test_pytorch_metric_learning_gives_the_same():
    """Where it is installed: a second opinion on random embeddings."""
    others = pytest.importorskip("pytorch_metric_learning.losses")
    torch = pytest.importorskip("torch")
    label = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    x = embeddings(label)
    for ours, theirs in (
        (build("contrastiveloss"), others.ContrastiveLoss()),
        (MultiSimilarityLoss(None, 50.0), others.MultiSimilarityLoss()),
        (build("supconloss"), others.SupConLoss()),
        (build("circleloss"), others.CircleLoss()),
    ):
        y = torch.tensor(x, requires_grad=True)
        wanted = theirs(y, torch.tensor(label))
        wanted.backward()
        found, gradient = value_and_gradient(ours, x, label)
        assert found == pytest.approx(wanted.item(), rel=1e-5), theirs
        np.testing.assert_allclose(gradient, y.grad.numpy(), rtol=1e-3, atol=1e-5, err_msg=str(theirs))


def test_marginloss_and_the_gradient_of_its_boundary():
    """Of all triplets of T4 two terms are above 0, both of this value; the draw takes at least one of them."""
    loss = build("marginloss")
    assert value(loss, T4, Y4) == pytest.approx(0.5055728090000842, rel=1e-6)
    assert loss.beta.grad.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "scale", "wanted"),
    [
        ("arcmarginloss", 80.0, 62.63209793299061),
        ("arcmarginloss", 1.0, 1.3292373869947383),
        ("normsoftmax", 20.0, 14.672716644700651),
        ("normsoftmax", 1.0, 1.2947798643112254),
    ],
)
def test_losses_of_a_cosine_head(name, scale, wanted):
    """At cosines of 1 and -1, too, where the slope of the angle is infinite."""
    loss = losses.build_head_loss(LossSettings(name, head_scale=scale))
    found, gradient = value_and_gradient(loss, scale * (E3 @ W3.T), Y3)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.01


def test_arcmargin_gradient():
    """Published for the form with the angle itself; the 1e-6 under the root moves the fifth digit."""
    loss = losses.build_head_loss(LossSettings("arcmarginloss", head_scale=1.0))
    _, gradient = value_and_gradient(loss, (E3 @ W3.T)[:1], Y3[:1])
    np.testing.assert_allclose(gradient[0], [-0.6972460969180053, 0.5080798921468052, 0.125290958843181], rtol=1e-4)


def test_softmax_beyond_64():
    """A picture's cross-entropy has no ceiling."""
    loss = losses.build_head_loss(LossSettings("softmax"))
    found, gradient = value_and_gradient(loss, [[0.0, 300.0], [1.0, 0.0]], [0, 0])
    assert found == pytest.approx((300 + math.log(1 + math.exp(-1))) / 2, rel=1e-6)
    np.testing.assert_allclose(gradient[0], [-0.5, 0.5], rtol=1e-6)


# ---------------------------------------------------------------- values and gradients against the loops

LABELS = {
    "balanced": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "unequal": [2, 0, 2, 1, 2, 0, 2, 2, 0],
}


def embeddings(label, seed=0, dimension=5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(label), dimension)) + 0.7 * rng.normal(size=(9, dimension))[label]
    return x.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_loops(name, labels, beside):
    label = LABELS[labels]
    x, other, other_label = embeddings(label), None, None
    if beside:
        other_label = [*label, 2, 2, 5, 0, 1]
        other = np.concatenate([x, embeddings(other_label[len(label) :], seed=1)])
    options = {"chosen": drawn(x, label, other, other_label)} if name == "marginloss" else {}
    loss = build(name)

    def with_others(z, label):
        if other is None:
            return loss(z, label)
        return loss(z, label, paddle.to_tensor(other.astype(np.float32)), paddle.to_tensor(other_label))

    found, gradient = value_and_gradient(with_others, x, label)
    assert found == pytest.approx(loop(name, x, label, other, other_label, **options), rel=1e-5) and found > 0
    fixed = x if other is None else other
    if name == "circleloss":
        options["weights"] = np.array(unit(x)) @ np.array(unit(fixed)).T
    # Alone, both sides of a pair move; beside others only the anchor.
    wanted = numeric_gradient(lambda z: loop(name, z, label, other, other_label, **options), x)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("labels", [*LABELS.values(), [1, 0, 1, 1, 0, 2, 5, 1, 0], [4, 4, 4, 4]])
def test_npairs_equals_the_loop(labels):
    x = embeddings(labels)
    found, gradient = value_and_gradient(build("npairsloss"), x, labels)
    assert found == pytest.approx(loop_npairs(x, labels), rel=1e-5)
    np.testing.assert_allclose(gradient, numeric_gradient(lambda z: loop_npairs(z, labels), x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labels", LABELS.values())
def test_proxy_anchor_equals_the_loop(labels):
    x, proxies = embeddings(labels), embeddings([0, 1, 2, 3], seed=2)  # the last of a class that the batch lacks
    loss = with_proxies(proxies)
    found, gradient = value_and_gradient(loss, x, labels)
    assert found == pytest.approx(loop_proxy_anchor(x, proxies, labels), rel=1e-5)
    wanted = numeric_gradient(lambda z: loop_proxy_anchor(z, proxies, labels), x)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=2e-5)
    wanted = numeric_gradient(lambda p: loop_proxy_anchor(x, p, labels), proxies)
    np.testing.assert_allclose(loss.proxies.grad.numpy(), wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("what", "x", "label"), list(degenerate_batches()), ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("name", [*PAIRS, "npairsloss", "proxyanchorloss"])
def test_finite_and_right_on_degenerate_batches(name, what, x, label):
    loss = build(name, 10, x.shape[1])
    found, gradient = value_and_gradient(loss, x, label)
    assert math.isfinite(found) and np.isfinite(gradient).all()
    x = np.asarray(x, np.float32).astype(np.float64)
    if name == "npairsloss":
        assert found == pytest.approx(loop_npairs(x, label), rel=1e-4, abs=2e-6)
    elif name == "proxyanchorloss":
        assert found == pytest.approx(loop_proxy_anchor(x, loss.proxies.numpy(), label), rel=1e-4)
        assert np.isfinite(loss.proxies.grad.numpy()).all()
    else:
        options = {"chosen": drawn(x, label)} if name == "marginloss" else {}
        # Where cosines or distances are equal, rounding decides what the miner keeps.
        if not (name == "multisimilarityloss" and what in ("duplicates in other classes", "one dimension", "opposite")):
            assert found == pytest.approx(loop(name, x, label, **options), rel=1e-4, abs=2e-6)


# ---------------------------------------------------------------- the memory


class CosineContrastive(paddle.nn.Layer):
    """The contrastive loss of the paper: by anchor, 1 - s of positives and s of negatives above .5."""

    def forward(self, embedding, label, other=None, other_label=None):
        x, y = (paddle.nn.functional.normalize(v) for v in (embedding, embedding if other is None else other))
        s = paddle.matmul(x, y, transpose_y=True)
        positive, negative = (mask.astype(s.dtype) for mask in pair_masks(label, other_label))
        return ((1 - s) * positive + s * (s > 0.5).astype(s.dtype) * negative).sum() / len(label)


def remember(memory, x, label):
    return memory(paddle.to_tensor(np.asarray(x, np.float32)), paddle.to_tensor(np.asarray(label, np.int64)))


def test_loss_with_a_memory():
    memory = MemoryLoss(CosineContrastive(), 10, 2)
    remember(memory, T4[2:], [1, 1])
    assert remember(memory, T4[:2], [0, 0]).item() == pytest.approx(0.7)  # .2 of the batch, .5 against the memory


def test_the_ring_wraps_over_the_oldest():
    memory = MemoryLoss(CosineContrastive(), 5, 1)
    for batch in ([1, 2], [3, 4], [5, 6]):
        remember(memory, [[v] for v in batch], batch)
    assert memory.past.numpy()[:, 0].tolist() == [6, 2, 3, 4, 5] == memory.past_label.numpy().tolist()
    remember(memory, [[v] for v in range(10, 17)], range(10, 17))  # more than it can hold
    assert sorted(memory.past_label.numpy().tolist()) == [12, 13, 14, 15, 16]


def test_what_the_memory_holds_is_compared_whatever_its_labels():
    """Label 0 is no empty place; a duplicate of an image is one of its positives, and only its own copy is not."""
    seen = []

    class Spy(CosineContrastive):
        def forward(self, embedding, label, other=None, other_label=None):
            if other is not None:
                seen.append((other.numpy()[:, 0].tolist(), other_label.numpy().tolist()))
            return super().forward(embedding, label, other, other_label)

    memory = MemoryLoss(Spy(), 4, 1)
    for batch in ([[1.0], [2.0]], [[3.0], [3.0]], [[4.0], [5.0]]):
        remember(memory, batch, [0, 0])
    assert seen == [
        ([1, 2], [0, 0]),
        ([3, 3, 1, 2], [0] * 4),
        ([4, 5, 3, 3], [0] * 4),
    ]


def test_a_memory_begins_with_its_epoch_and_gives_it_no_gradient():
    memory = MemoryLoss(build("contrastiveloss"), 8, 2, start_epoch=1)
    assert remember(memory, T4, Y4).item() == pytest.approx(0.7380283410337599) and memory.seen.item() == 0
    memory.epoch = 1
    x = paddle.to_tensor(T4.astype(np.float32), stop_gradient=False)
    memory(x, paddle.to_tensor(Y4))
    memory(x, paddle.to_tensor(Y4)).backward()
    assert memory.seen.item() == 8 and memory.past.stop_gradient and np.isfinite(x.grad.numpy()).all()


@pytest.mark.parametrize("mining", losses.MINING)
def test_triplets_beside_others(mining):
    """A negative of each anchor, from anywhere in the memory; what is of no anchor's class, too."""
    label, more = [3, 3, 1, 1], [7, 7, 3, 1, 9]
    x, other = embeddings([0, 0, 1, 1]), embeddings([2, 2, 0, 1, 3], seed=1)
    loss = build("tripletloss", margin=0.5, triplet_mining=mining)
    arguments = [
        paddle.to_tensor(np.asarray(v, t))
        for v, t in (
            (x, np.float32),
            (label, np.int64),
            (np.concatenate([x, other]), np.float32),
            (label + more, np.int64),
        )
    ]
    assert 0 < loss(*arguments).item() < 2.5
    if mining in ("random", "distance"):
        choose = {"random": "draw_evenly", "distance": "draw_by_distance"}[mining]
        from losses import tripletloss

        _, negative = pair_masks(arguments[1], arguments[3])
        seen = set()
        for _ in range(60):
            chosen = getattr(tripletloss, choose)(distances(arguments[0], arguments[2]), negative, 5).numpy()
            assert np.take_along_axis(negative.numpy(), chosen, 1).all()
            seen |= set(chosen[0].tolist())
        assert mining == "distance" or seen == {2, 3, 4, 5, 7, 8}


@pytest.mark.parametrize("mining", ["hard", "semihard"])
def test_triplets_beside_others_equal_the_loop(mining):
    label, labels = [0, 0, 1, 1], [0, 0, 1, 1, 2, 2, 0, 1, 3]
    x = embeddings(label)
    other = np.concatenate([x, embeddings(labels[4:], seed=1)])
    y, terms = unit(other), []
    for a in range(4):
        to = np.linalg.norm(y - y[a], axis=1)
        positives = [j for j, of in enumerate(labels) if of == label[a] and j != a]
        negatives = [to[j] for j, of in enumerate(labels) if of != label[a]]
        for p in [max(to[j] for j in positives)] if mining == "hard" else [to[j] for j in positives]:
            beyond = [n for n in negatives if mining == "semihard" and n > p]
            n = min(beyond) if beyond else min(negatives) if mining == "hard" else max(negatives)
            terms.append(max(0, p + 0.5 - n))
    given = ((x, "float32"), (label, "int64"), (other, "float32"), (labels, "int64"))
    loss = build("tripletloss", margin=0.5, triplet_mining=mining)
    found = loss(*(paddle.to_tensor(np.asarray(v, kind)) for v, kind in given)).item()
    assert found == pytest.approx(np.mean(terms), rel=1e-5) and found > 0
