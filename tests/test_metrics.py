"""recall, rank and summarise against plain loops in float64, on random, tied and degenerate inputs."""

import json
import tracemalloc

import numpy as np
import pytest

from retrieval import metrics
from utility import UserError


def retrieval_metrics(features, labels, recall_at=(1, 2, 4, 8), *gallery, **options):
    """All of it, where the ranks of all positives are found."""
    ranked = metrics.rank(features, labels, *gallery, **options)
    return metrics.summarise(ranked, recall_at, ("MAP@R", "R-precision"))


def loop_metrics(features, labels, recall_at, gallery=None, gallery_labels=None):
    """Each definition as it stands in the docstring; a tied negative goes before the positive."""
    own = gallery is None
    gallery, gallery_labels = (features, labels) if own else (gallery, gallery_labels)
    hits, average_precision, r_precision = {k: 0 for k in recall_at}, 0, 0

    def cosine(a, b):
        return float(a @ b / max(np.sqrt(a @ a), 1e-300) / max(np.sqrt(b @ b), 1e-300))

    for i, (q, label) in enumerate(zip(features.astype(np.float64), labels)):
        others = [j for j in range(len(gallery)) if not (own and j == i)]
        neighbours = [(cosine(q, gallery[j].astype(np.float64)), gallery_labels[j] == label) for j in others]
        neighbours.sort(key=lambda pair: (-round(pair[0], 9), pair[1]))
        relevant = [same for _, same in neighbours]
        count = sum(relevant)
        for k in recall_at:
            hits[k] += any(relevant[:k])
        if count:
            precision = [sum(relevant[: r + 1]) / (r + 1) for r in range(count)]
            average_precision += sum(p for p, same in zip(precision, relevant) if same) / count
            r_precision += sum(relevant[:count]) / count
    result = {f"recall@{k}": hits[k] / len(features) for k in recall_at}
    return {**result, "MAP@R": average_precision / len(features), "R-precision": r_precision / len(features)}


def check(features, labels, gallery=None, gallery_labels=None, recall_at=(1, 2, 4, 8)):
    """Both agree, and so does the recall without ranking; -> what retrieval_metrics returned."""
    result = retrieval_metrics(features, labels, recall_at, gallery, gallery_labels)
    wanted = loop_metrics(features, labels, recall_at, gallery, gallery_labels)
    assert {name: result[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    if gallery is None:
        without = {name: value for name, value in result.items() if name not in ("MAP@R", "R-precision")}
        assert metrics.recall(features, labels, recall_at) == without
    assert set(result) - set(wanted) <= {"queries", "queries_without_positive"}
    json.dumps(result)  # plain numbers
    return result


def clustered(rng, classes, images, dimension=6, spread=1.0):
    labels = rng.permutation(np.repeat(rng.choice(1000, classes, replace=False) - 500, images))
    centres = rng.normal(size=(1000, dimension))
    return (centres[labels] + spread * rng.normal(size=(len(labels), dimension))).astype(np.float32), labels


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_random_features(spread):
    features, labels = clustered(np.random.default_rng(0), 7, 9, spread=spread)
    result = check(features, labels)
    assert 0 < result["recall@1"] <= result["recall@8"] and 0 < result["MAP@R"] <= result["R-precision"]


def test_classes_of_unequal_sizes_and_lone_images():
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(9), [1, 2, 3, 1, 20, 5, 2, 1, 9]))
    result = check(rng.normal(size=(len(labels), 4)).astype(np.float32), labels)
    assert result["queries"] == 44 and result["queries_without_positive"] == 3


@pytest.mark.parametrize("block", [1, 5, 60, 10**6])
def test_any_block_size(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK_VALUES", block * 63)
    features, labels = clustered(np.random.default_rng(2), 7, 9)
    check(features, labels)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 29, 30, 31, 58, 59, 60, 300])
def test_classes_across_the_borders_of_blocks(monkeypatch, side):
    """59 queries: classes that end with a block, span several, or are alone in one; and many ties."""
    monkeypatch.setattr(metrics, "BLOCK_VALUES", 16 * side * side)
    rng = np.random.default_rng(14)
    labels = rng.permutation(np.repeat(np.arange(9), [1, 7, 3, 1, 29, 2, 7, 1, 8]))
    check(rng.normal(size=(len(labels), 4)).astype(np.float32), labels)
    check(rng.integers(1, 4, (len(labels), 3)).astype(np.float32), labels)


def test_more_than_a_byte_can_count():
    """A block of 700 rows in which every negative ties."""
    features = np.zeros((700, 2), np.float32)
    features[:, 0] = 1
    labels = np.repeat(np.arange(350), 2)
    assert check(features[:40], labels[:40])["recall@8"] == 0
    assert metrics.recall(features, labels, (698, 699)) == {
        "recall@698": 0, "recall@699": 1, "queries": 700,
    }  # fmt: skip


def test_ties_count_against_the_network():
    """Vectors of few small integers: very many equal similarities."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        features = rng.integers(-1, 2, (40, 4)).astype(np.float32)
        features[(features == 0).all(axis=1)] = 1
        check(features, rng.integers(0, 5, 40))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1234, -7e3])
def test_equal_features_find_nothing(value):
    result = check(np.full((50, 37), value, np.float32), np.repeat(np.arange(10), 5))
    assert result["recall@8"] == result["MAP@R"] == 0


def test_duplicates_of_the_query_are_fair_neighbours():
    features = np.random.default_rng(4).normal(size=(6, 3)).astype(np.float32)
    result = check(np.repeat(features, 2, axis=0), np.repeat(np.arange(6), 2))
    assert result["recall@1"] == result["MAP@R"] == 1


def test_one_class_and_one_image():
    features = np.random.default_rng(5).normal(size=(5, 3)).astype(np.float32)
    assert check(features, np.zeros(5, int))["recall@1"] == 1
    assert check(features[:1], np.zeros(1, int)) == {
        "recall@1": 0, "recall@2": 0, "recall@4": 0, "recall@8": 0, "MAP@R": 0, "R-precision": 0, "queries": 1,
        "queries_without_positive": 1,
    }  # fmt: skip


def test_k_beyond_the_list():
    features, labels = clustered(np.random.default_rng(6), 3, 3)
    assert check(features, labels, recall_at=(1, 100))["recall@100"] == 1


def test_separate_gallery():
    rng = np.random.default_rng(7)
    features, labels = clustered(rng, 6, 8)
    queries, query_labels = features[:20], labels[:20].copy()
    query_labels[3] = 12345  # not in the gallery
    assert check(queries, query_labels, features[20:], labels[20:])["queries_without_positive"] == 1


def test_a_query_that_is_in_the_gallery_finds_itself():
    features, labels = clustered(np.random.default_rng(8), 5, 4, spread=5)
    assert retrieval_metrics(features, labels, (1,), features, labels)["recall@1"] == 1


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-8, 1e4, 1e18, 1e37])
def test_the_length_of_features_does_not_matter(scale):
    features, labels = clustered(np.random.default_rng(9), 6, 6)
    wanted = retrieval_metrics(features, labels)
    assert retrieval_metrics(features * np.float32(scale), labels) == pytest.approx(wanted)


@pytest.mark.parametrize("scale", [1e-300, 1e-44, 1e39, 1e300])
def test_lengths_that_float32_lacks(scale):
    features, labels = clustered(np.random.default_rng(9), 6, 6)
    wanted = retrieval_metrics(features, labels)
    assert retrieval_metrics(features.astype(np.float64) * scale, labels) == pytest.approx(wanted)
    high = np.sign(features).astype(np.float32)  # 512 values of 2e37 are longer than float32 can say
    wide, longest = np.tile(high, (1, 64)), np.tile(high, (1, 64)) * np.float32(2e37)
    assert retrieval_metrics(longest, labels) == pytest.approx(retrieval_metrics(wide, labels))


def test_counts_that_do_not_fit():
    features, labels = clustered(np.random.default_rng(9), 6, 6)
    for arguments in ((features[:0], labels[:0]), (features, labels[1:]), (features, labels, (1,), features[:0], [])):
        with pytest.raises(ValueError, match="features and"):
            retrieval_metrics(*arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_an_error(value):
    features, labels = clustered(np.random.default_rng(10), 3, 4)
    features[5, 2] = value
    with pytest.raises(UserError, match=r"1 of 12 embeddings are NaN or infinite \(the first: number 6\)"):
        retrieval_metrics(features, labels)


def test_without_ranking_the_recall_is_the_same():
    features, labels = clustered(np.random.default_rng(11), 6, 6)
    every, some = retrieval_metrics(features, labels), metrics.recall(features, labels)
    assert some == {name: value for name, value in every.items() if name not in ("MAP@R", "R-precision")}


def test_inputs_are_left_alone_and_float64_and_float16_are_taken():
    features, labels = clustered(np.random.default_rng(12), 6, 6)
    before = features.copy()
    wanted = retrieval_metrics(features, labels)
    assert np.array_equal(features, before)
    assert retrieval_metrics(features.astype(np.float64), labels.tolist()) == wanted
    retrieval_metrics(features.astype(np.float16), labels)


def test_memory_stays_bounded():
    """20,000 x 64: a full similarity matrix would take 1.6 GB."""
    rng = np.random.default_rng(13)
    features, labels = rng.normal(size=(20000, 64)).astype(np.float32), rng.integers(0, 4000, 20000)
    for measure in (metrics.rank, metrics.recall):
        tracemalloc.start()
        measure(features, labels)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200e6


def test_memory_stays_bounded_with_one_large_class():
    features = np.random.default_rng(15).normal(size=(20000, 8)).astype(np.float32)
    tracemalloc.start()
    assert metrics.recall(features, np.arange(20000) // 19000)["queries"] == 20000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_a_query_does_not_find_itself_in_the_gallery():
    """Queries that are the whole gallery, in another order, give what the list against itself gives."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 8)).astype(np.float32), rng.integers(0, 6, 40)
    order = rng.permutation(40)
    place = np.argsort(order)
    own = [np.array([place[i]]) for i in range(40)]
    wanted = retrieval_metrics(features, labels)
    found = retrieval_metrics(features, labels, gallery_features=features[order], gallery_labels=labels[order], own=own)
    assert found == wanted and wanted["recall@1"] < 0.5
    kept = retrieval_metrics(features, labels, gallery_features=features[order], gallery_labels=labels[order])
    assert kept["recall@1"] == 1
