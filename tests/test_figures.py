"""mAP, mINP, thresholds, intervals and re-ranking, against the definitions in plain loops and worked values."""

import itertools
import tracemalloc

import numpy as np
import pytest

from retrieval import figures, metrics, rerank
from utility import UserError


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)


def draw(seed, count, classes, dimension=5, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count) * 7 - 3
    if ties:
        return rng.integers(-1, 2, (count, dimension)).astype(np.float32), labels
    centres = rng.normal(size=(classes, dimension))
    return (centres[(labels + 3) // 7] + rng.normal(size=(count, dimension))).astype(np.float32), labels


def loop_rank(cosines, labels, gallery_labels, left_out):
    """[average precision, R / last rank, wrong, cosine, rank of the first] of each; a tied negative goes first."""
    rows = []
    for i, label in enumerate(labels):
        found = [
            (-round(float(cosines[i, j]), 9), bool(gallery_labels[j] == label), j)
            for j in range(len(gallery_labels))
            if j not in left_out[i]
        ]
        found.sort()
        ranks = [rank for rank, (_, same, _) in enumerate(found, 1) if same]
        precision = [n / rank for n, rank in enumerate(ranks, 1)]
        ap = sum(precision) / len(ranks) if ranks else 0
        inp = len(ranks) / ranks[-1] if ranks else 0
        failed = bool(found) and not found[0][1]
        rows.append([ap, inp, failed, -found[0][0] if failed else None, ranks[0] if ranks else None])
    return rows


def check(features, labels, gallery=None, gallery_labels=None, own=None):
    search = figures.Search(features, labels, gallery, gallery_labels, own)
    others, other_labels = (features, labels) if gallery is None else (gallery, gallery_labels)
    left_out = [[i] for i in range(len(labels))] if gallery is None else (own or [[]] * len(labels))
    cosines = unit(features) @ unit(others).T
    rows = loop_rank(cosines, labels, other_labels, left_out)
    ranked = metrics.rank(*search)
    assert np.allclose(ranked.average_precision, [row[0] for row in rows], atol=1e-12)
    assert np.allclose(ranked.inverse_penalty, [row[1] for row in rows], atol=1e-12)
    measured = figures.measure(search)
    plain = metrics.summarise(ranked, means=("MAP@R", "R-precision"))
    assert {name: measured.figures[name] for name in plain} == pytest.approx(plain, abs=1e-12)
    assert measured.figures["mAP"] == pytest.approx(np.mean([row[0] for row in rows]))
    assert measured.figures["mINP"] == pytest.approx(np.mean([row[1] for row in rows]))
    failed = figures.failed(ranked, list(range(len(labels))), labels, list(range(len(others))), other_labels)
    wanted = {i for i, row in enumerate(rows) if row[2] or row[4] is None}
    assert {row["path"] for row in failed} == wanted
    for row in failed:
        i, j = row["path"], row["neighbour"]
        assert row["rank"] == rows[i][4]
        assert (j is None) == (rows[i][3] is None)
        if j is not None:
            assert row["cosine"] == pytest.approx(rows[i][3], abs=2e-6) and j not in left_out[i]
            assert cosines[i, j] == pytest.approx(row["cosine"], abs=2e-6)
            assert row["neighbour_label"] == other_labels[j] != row["label"] == labels[i]
    check_thresholds(measured.thresholds, cosines, labels, other_labels, left_out, gallery is None)
    return measured


def check_thresholds(thresholds, cosines, labels, other_labels, left_out, once):
    pairs = [
        (cosines[i, j], labels[i] == other_labels[j])
        for i, j in itertools.product(*map(range, cosines.shape))
        if j not in left_out[i] and not (once and j < i)
    ]
    same = np.array([cosine for cosine, is_same in pairs if is_same])
    different = np.array([cosine for cosine, is_same in pairs if not is_same])
    for row in thresholds:
        cosine = row["cosine"]
        if cosine is None:
            few = not len(same) or not len(different)
            assert few or (different >= 1 - 2e-6).mean() > row["false_accepts"]
            continue
        # Cosines of float32 may be on either side of the threshold, and what is TIE below it counts as reaching it.
        for name, values in (("accepted", different), ("true_accepts", same)):
            assert (values >= cosine + 2e-6).mean() <= row[name] + 1e-12
            assert row[name] <= (values >= cosine - 2e-6).mean() + 1e-12
        step = 1 / metrics.STEPS
        assert row["accepted"] <= row["false_accepts"] < (different >= cosine - step - 2e-6).mean()


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("block", (1, 7 * 61, 2**24))
def test_a_list_alone(block, ties, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_VALUES", block)
    measured = check(*draw(1, 61, 9, ties=ties))
    assert 0 < measured.figures["mINP"] < measured.figures["mAP"] < 1


@pytest.mark.parametrize("ties", (False, True))
def test_a_gallery_with_own_pictures_left_out(ties):
    features, labels = draw(2, 60, 8, ties=ties)
    queries = np.random.default_rng(0).permutation(60)[:25]
    own = [np.array([i]) if n % 3 else np.zeros(0, np.int64) for n, i in enumerate(queries)]
    query_labels = labels[queries].copy()
    query_labels[4], query_labels[0] = 999, labels[queries[0]] + 7  # not in the gallery; own picture of another class
    check(features[queries], query_labels, features, labels)
    own[4] = np.append(own[4], queries[5])
    check(features[queries], query_labels, features, labels, [rows.tolist() for rows in own])


def test_counting_and_sorting_give_the_same_ranks(monkeypatch):
    """1,200 negatives and two positives are counted, 1,200 and 40 are sorted."""
    rng = np.random.default_rng(3)
    row = rng.integers(0, 50, 1200).astype(np.float32) / 50
    for count in (2, 40):
        positive = np.sort(rng.integers(0, 50, count).astype(np.float32) / 50)[::-1]
        wanted = [n + (row >= value - np.float32(1e-6)).sum() for n, value in enumerate(positive, 1)]
        assert metrics._ranks(positive, row).tolist() == wanted


def test_edges():
    features, _ = draw(4, 6, 2)
    one = check(features, np.zeros(6, int))
    assert one.figures["mAP"] == one.figures["mINP"] == 1 and one.interval is None
    assert [row["cosine"] for row in one.thresholds] == [None, None]
    lone = check(features, np.arange(6))
    assert lone.figures["mAP"] == 0 and [row["cosine"] for row in lone.thresholds] == [None, None]
    twice = check(np.repeat(features, 2, axis=0), np.repeat(np.arange(6), 2))
    assert twice.figures["mAP"] == twice.figures["mINP"] == 1 and twice.thresholds[0]["true_accepts"] == 1
    equal = check(np.ones((12, 3), np.float32), np.repeat(np.arange(4), 3))
    assert equal.figures["mAP"] < 0.3 and equal.figures["recall@8"] == 0
    assert figures.lines(equal)[1:] == [f"threshold for {share} false accepts: none" for share in ("1.0%", "0.1%")]


def test_a_worked_ranking():
    """Right, wrong, right, wrong, wrong, right: P@1 1, R-precision 2/3, MAP@R 5/9, AP 13/18, INP 1/2."""
    angles = np.arange(7) / 10
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    gallery_labels = np.array([1, 0, 1, 0, 0, 1])
    found = metrics.summarise(metrics.rank(features[:1], np.array([1]), features[1:], gallery_labels))
    wanted = {"recall@1": 1, "R-precision": 2 / 3, "MAP@R": 5 / 9, "mAP": 13 / 18, "mINP": 0.5}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    features = np.array([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    found = metrics.summarise(metrics.rank(features, np.array([0, 1, 0, 1])))
    assert (found["recall@1"], found["recall@2"], found["mAP"]) == pytest.approx((0, 0.5, 5 / 12))


def test_thresholds_of_many_pairs_in_small_blocks(monkeypatch):
    """The cosines below which nothing is counted rise from block to block, and change nothing."""
    features, labels = draw(5, 900, 30)
    cosines = (unit(features) @ unit(features).T)[np.triu_indices(900, 1)]
    different = cosines[(labels[:, None] != labels)[np.triu_indices(900, 1)]]
    monkeypatch.setattr(metrics, "BLOCK_VALUES", 900 * 20)
    pairs = metrics.Pairs(0.01)
    metrics.rank(features, labels, pairs=pairs)
    assert pairs.floor > 0.5 and pairs.total == len(different) > pairs.different.sum()
    for share in (0.01, 0.001):
        cosine, accepted, _ = pairs.accepted(share)
        assert cosine == pytest.approx(np.sort(different)[::-1][int(share * len(different))], abs=2e-5)
        assert accepted == pytest.approx((different >= cosine - 1e-6).mean(), abs=1e-5) and accepted <= share


def test_intervals():
    assert figures.interval([3], [5]) is None
    assert figures.interval([2.0, 4.0, 6.0], [4, 8, 12]) == [0.5, 0.5]
    rng = np.random.default_rng(0)
    hits, counts = rng.integers(0, 20, 100), np.full(100, 20)
    low, high = figures.interval(hits, counts)
    error = (hits / 20).std() / 10  # of the mean of 100 classes
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert low < hits.sum() / 2000 < high and figures.interval(hits, counts) == [low, high]


def test_nmi():
    """Arithmetic mean, as scikit-learn's default."""
    assert figures.nmi(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])) == pytest.approx(0.3437110184854508)
    assert figures.nmi(np.array([5, 5, -1]), np.array([0, 0, 1])) == pytest.approx(1)
    assert figures.nmi(np.zeros(3, int), np.zeros(3, int)) == 1


def test_nmi_of_features():
    pytest.importorskip("sklearn")
    features = np.repeat(np.eye(5, dtype=np.float32), 6, axis=0)
    assert figures.clustering_nmi(features, np.repeat(np.arange(5), 6)) == pytest.approx(1)
    features, labels = draw(0, 60, 5)
    found = figures.clustering_nmi(features, labels)
    search = figures.Search(features, labels)
    assert 0 < found < 1 and figures.measure(search, options=figures.Options(nmi=True)).figures["NMI"] == found


def test_without_scikit_learn_nmi_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert figures.check_options(figures.Options(nmi=True), 9) == figures.Options()
    assert "needs scikit-learn: pip install scikit-learn" in capsys.readouterr().out


# ---------------------------------------------------------------- re-ranking


def dense_k_reciprocal(items, k1, k2, kept):
    """The paper's formulas over whole matrices."""
    squared = ((items[:, None] - items) ** 2).sum(axis=2)
    d = squared / squared.max(axis=1, keepdims=True)
    ranks = np.argsort(np.where(np.eye(len(d), dtype=bool), -1, squared), axis=1, kind="stable")

    def reciprocal(i, k):
        return {j for j in ranks[i, : k + 1] if i in ranks[j, : k + 1]}

    v = np.zeros_like(d)
    for i in range(len(d)):
        near = reciprocal(i, k1)
        members = set(near)
        for j in near:
            other = reciprocal(j, round(k1 / 2))
            if len(other & near) > 2 / 3 * len(other):
                members |= other
        members = list(members)
        v[i, members] = np.exp(-d[i, members]) / np.exp(-d[i, members]).sum()
    v = np.stack([v[ranks[i, :k2]].mean(axis=0) for i in range(len(d))]) if k2 > 1 else v
    common = np.minimum(v[:, None], v).sum(axis=2)
    return (1 - kept) * (1 - common / np.maximum(v[:, None], v).sum(axis=2)) + kept * d


def test_k_reciprocal_as_published():
    query, gallery = np.zeros((1, 2)), np.array([[1.0, 0], [0, 2], [3, 0], [3, 1]])
    for k2, wanted in (
        (1, [0.34274416548631, 0.48401558857557, 0.85781515212367, 1]),
        (2, [0.03, 0.45899892116187, 0.87581658071692, 0.90581658071692]),
    ):
        found = rerank.k_reciprocal(query, gallery, k1=2, k2=k2)(np.array([0]))
        assert -found[0] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("k1", "k2"), ((20, 6), (5, 1), (3, 2), (100, 200)))
def test_k_reciprocal_is_that_of_whole_matrices(k1, k2, monkeypatch):
    monkeypatch.setattr(rerank, "BLOCK_VALUES", 2 * 7 * 50)
    items = unit(draw(6, 50, 5)[0])
    wanted = dense_k_reciprocal(items, k1, k2, 0.3)
    order = np.random.default_rng(0).permutation(50)
    assert -rerank.k_reciprocal(items, k1=k1, k2=k2)(order) == pytest.approx(wanted[order])
    rows = rerank.k_reciprocal(items[30:], items[:30], k1=k1, k2=k2)(np.arange(20))
    assert -rows == pytest.approx(wanted[30:, :30])
    # Queries that are the gallery's own pictures are these.
    own = [np.array([i]) for i in range(10)] + [np.zeros(0, np.int64)] * 20
    mixed = np.concatenate([items[:10], items[30:]])
    rows = rerank.k_reciprocal(mixed, items[:30], own, k1=k1, k2=k2)(np.arange(30))
    assert -rows == pytest.approx(np.concatenate([wanted[:10, :30], wanted[30:, :30]]))


def test_expanded_queries():
    query, gallery = np.array([[1.0, 0]]), np.array([[0.8, 0.6], [0, 1]])
    found = unit(rerank.expand_queries(query, gallery, count=1))
    assert found[0] == pytest.approx([0.9770661292061645, 0.2129360917225694])
    assert (found @ gallery.T)[0] == pytest.approx([0.9094145583984733, 0.2129360917225694])
    items = unit(draw(7, 30, 4)[0])
    for count in (1, 5, 100):
        for i, row in enumerate(rerank.expand_queries(items, count=count)):
            cosines = items @ items[i]
            near = [j for j in np.argsort(-cosines) if j != i][:count]
            wanted = items[i] + sum(max(cosines[j], 0) ** 3 * items[j] for j in near)
            assert row == pytest.approx(wanted)
    own = [np.array([i]) for i in range(30)]
    assert rerank.expand_queries(items, items, own, 5) == pytest.approx(rerank.expand_queries(items, None, None, 5))


@pytest.mark.parametrize("expansion", (1, 5))
def test_second_figures_stand_beside_the_first(expansion):
    features, labels = draw(8, 80, 8)
    options = figures.Options("k-reciprocal", expansion)
    found = figures.measure(figures.Search(features, labels), (1, 2), options).figures
    plain = figures.measure(figures.Search(features, labels), (1, 2)).figures
    assert {name: found[name] for name in plain} == plain
    items = unit(features)
    for how, scores in (
        ("k-reciprocal", -dense_k_reciprocal(items, 20, 6, 0.3)),
        (f"query expansion {expansion}", unit(rerank.expand_queries(items, count=expansion)) @ items.T),
    ):
        rows = loop_rank(scores, labels, labels, [[i] for i in range(80)])
        assert found[f"recall@1 ({how})"] == np.mean([row[4] == 1 for row in rows])
        assert found[f"mAP ({how})"] == pytest.approx(np.mean([row[0] for row in rows]))
        assert {f"recall@2 ({how})", f"MAP@R ({how})"} < set(found)
    # The list as a gallery of its own gives the same.
    own = [np.array([i]) for i in range(80)]
    again = figures.measure(figures.Search(features, labels, features, labels, own), (1, 2), options).figures
    assert again == pytest.approx(found, abs=1e-6)


def test_a_collapsed_network_gains_nothing():
    features, labels = np.ones((400, 7), np.float32) / 3, np.repeat(np.arange(40), 10)
    found = figures.measure(figures.Search(features, labels), (1,), figures.Options("k-reciprocal", 5)).figures
    assert found["recall@1 (k-reciprocal)"] == found["recall@1 (query expansion 5)"] == 0


def test_memory_stays_bounded():
    """Whole matrices of 6,000 x 6,000 would take 144 MB each, and there are four."""
    features = np.random.default_rng(9).normal(size=(6000, 8)).astype(np.float32)
    tracemalloc.start()
    similar = rerank.k_reciprocal(unit(features).astype(np.float32))
    similar(np.arange(10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6 + 6000 * rerank.MOST_BYTES


def test_too_little_memory_is_an_error():
    with pytest.raises(UserError, match=r"--rerank=k-reciprocal: 1000000000 pictures may need \d+ GB of memory, of"):
        figures.check_options(figures.Options("k-reciprocal"), 10**9)


@pytest.mark.parametrize("ties", [False, True])
def test_measured_in_place_nothing_changes_but_lengths(ties):
    for seed in range(20):
        features, labels = draw(seed, 60, 9, ties=ties)
        gallery, gallery_labels = draw(seed + 100, 45, 9, ties=ties)
        own = [np.arange(i % 3) for i in range(60)]
        for search in (
            figures.Search(features, labels),
            figures.Search(features, labels, gallery, gallery_labels),
            figures.Search(features, labels, gallery, gallery_labels, own),
        ):
            mine = figures.Search(*(None if a is None else list(a) if a is own else a.copy() for a in search))
            copied, placed = figures.measure(search), figures.measure(mine, in_place=True)
            assert copied[:4] == placed[:4]
            assert all(np.array_equal(a, b) for a, b in zip(copied.ranked, placed.ranked))
            for before, after in ((search.features, mine.features), (search.gallery_features, mine.gallery_features)):
                assert before is None or np.array_equal(after, metrics.unit(before, np.arange(len(before))))


def test_in_place_there_is_no_second_copy():
    features, labels = draw(0, 1000, 100, dimension=2**14)
    for measure in (
        lambda: figures.measure(figures.Search(features, labels), in_place=True),
        lambda: metrics.recall(features, labels, in_place=True),
    ):
        tracemalloc.start()
        measure()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < features.nbytes / 2
    with pytest.raises(ValueError, match="float64"):
        figures.measure(figures.Search(features.astype(np.float64), labels), in_place=True)


@pytest.mark.parametrize("processes", [2, 3])
def test_figures_of_several_processes_are_those_of_one(monkeypatch, processes):
    search = figures.Search(*draw(1, 2500, 300, dimension=40))
    ties = figures.Search(*draw(1, 500, 30, ties=True))
    once = [(figures.measure(one)[:4], metrics.recall(*one[:2])) for one in (search, ties)]
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", str(processes))
    again = [(figures.measure(one)[:4], metrics.recall(*one[:2])) for one in (search, ties)]
    for (measured, recall), (measured_again, recall_again) in zip(once, again):
        assert recall == recall_again and measured[1:] == measured_again[1:]
        assert measured_again[0] == pytest.approx(measured[0], abs=1e-9)
