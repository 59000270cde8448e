"""What eval.py says of a list: figures over all queries, how sure they are, of each class, and the queries that failed.

    measured = measure(search, recall_at, options)

Importing this does not import paddle.
"""

import collections
import dataclasses
import importlib.util
import warnings

import numpy as np

from retrieval import metrics, rerank
from runtime import parallel
from utility import boolean, number

FALSE_ACCEPTS = (0.01, 0.001)  # shares of the pairs of different classes for which `thresholds` gives a cosine
DRAWS, SEED = 1000, 0  # of a bootstrap
MOST_FAILED = 2000  # queries that are listed

# What is searched for what: features float [N, D], labels int [N], the gallery's [M, D] and [M] (None: the queries
# themselves), own: as of metrics.rank.
Search = collections.namedtuple("Search", "features labels gallery_features gallery_labels own", defaults=[None] * 3)
# figures: {name: number}, for a line each; interval: of recall@1, see `interval`; thresholds, classes: of the functions
# of these names; ranked: metrics.Ranked; pairs: metrics.Pairs.
Measured = collections.namedtuple("Measured", "figures interval thresholds classes ranked pairs")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which figures beyond the usual ones, in the flags' words."""

    rerank: str = None
    query_expansion: int = 0
    nmi: bool = False


def add_figure_arguments(parser):
    """Adds the flags of Options."""
    # fmt: off
    add = parser.add_argument_group("more figures", "beside the first ones, never in their place").add_argument
    add("--rerank", choices=("k-reciprocal",), default=None,
        help="also rank by which pictures of the test have each other as neighbours (Zhong et al., 2017)")
    add("--query_expansion", type=number(int, low=0), default=0,
        help="also search with each query plus this many of its nearest neighbours, such as 5; 0: don't")
    add("--nmi", type=boolean, default=False,
        help="also cluster the features by k-means, as many clusters as classes, and print the normalised mutual "
        "information; minutes; needs scikit-learn")
    # fmt: on


def check_options(options, count):
    """Options that can be heeded; says what is left out. Raises: UserError where memory may not suffice for them.

    Args:
        count: pictures of the queries and the gallery.
    """
    if options.rerank:
        rerank.check_memory(count)
    if options.nmi and importlib.util.find_spec("sklearn") is None:
        if parallel.is_first():
            print("note: --nmi: NMI is left out: it needs scikit-learn: pip install scikit-learn")
        return dataclasses.replace(options, nmi=False)
    return options


def measure(search, recall_at=(1, 2, 4, 8), options=None, in_place=False, every_pair=False):
    """Measured, of a Search.

    Args:
        recall_at: the k of recall@k; options: Options, or None.
        in_place: the features are changed, as of metrics.rank.
        every_pair: whether `pairs` count all that are of different classes, as a histogram needs.
    """
    options = options or Options()
    pairs = metrics.Pairs(1 if every_pair else max(FALSE_ACCEPTS))
    ranked = metrics.rank(*search, pairs=pairs, in_place=in_place)
    figures = metrics.summarise(ranked, recall_at)
    figures.update(second_figures(search, recall_at, options))
    if options.nmi:
        figures["NMI"] = clustering_nmi(search.features, search.labels)
    table = classes(ranked, search.labels)
    hits = np.rint(np.array(table["recall@1"]) * table["queries"])
    return Measured(figures, interval(hits, table["queries"]), thresholds(pairs), table, ranked, pairs)


def second_figures(search, recall_at, options):
    """{"recall@k (k-reciprocal)": ...}: recall@k, MAP@R and mAP by neighbours that rerank.py finds."""
    if not (options.rerank or options.query_expansion):
        return {}
    every = np.arange(len(search.features))
    unit, gallery = metrics.unit(search.features, every), None
    if search.gallery_features is not None:
        gallery = metrics.unit(search.gallery_features, np.arange(len(search.gallery_features)))
    found = {}
    if options.rerank:
        similar = rerank.k_reciprocal(unit, gallery, search.own)
        found[options.rerank] = metrics.rank(*search, similar=similar)
    if options.query_expansion:
        expanded = rerank.expand_queries(unit, gallery, search.own, options.query_expansion)
        if gallery is None:
            search = search._replace(gallery_features=unit, gallery_labels=search.labels, own=every[:, None])
        found[f"query expansion {options.query_expansion}"] = metrics.rank(expanded, *search[1:])
    means = ("MAP@R", "mAP")
    names = [f"recall@{k}" for k in recall_at] + list(means)
    summaries = {how: metrics.summarise(ranked, recall_at, means) for how, ranked in found.items()}
    return {f"{name} ({how})": summary[name] for how, summary in summaries.items() for name in names}


def classes(ranked, labels):
    """Of each class of the queries, {"label": [C], "queries": [C], "recall@1": [C], "MAP@R": [C]}, means of a class."""
    known, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    hit = (ranked.closer == 0) & (ranked.positives > 0)
    means = [np.bincount(place, values) / counts for values in (hit, ranked.map_at_r)]
    return {"label": known.tolist(), "queries": counts.tolist()} | {
        name: values.tolist() for name, values in zip(("recall@1", "MAP@R"), means)
    }


def interval(sums, counts):
    """Where 95 % of the means lie when the classes are drawn again, as often as there are classes: [low, high].

    Pictures of one class are alike, so that a class comes with all its queries or not at all: Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, percentile interval. DRAWS draws, always the same.

    Args:
        sums, counts: of each class, of what the mean is over the queries, and its queries, [C].

    Returns: None for less than two classes.
    """
    sums, counts, rng = np.asarray(sums, np.float64), np.asarray(counts), np.random.default_rng(SEED)
    if len(counts) < 2:
        return None
    draws = (rng.integers(0, len(counts), len(counts)) for _ in range(DRAWS))
    return np.percentile([sums[draw].sum() / counts[draw].sum() for draw in draws], [2.5, 97.5]).tolist()


def thresholds(pairs):
    """For each of FALSE_ACCEPTS a dict: "false_accepts", that share; "cosine", the lowest that no more pairs of
    different classes reach, to metrics.STEPS; "accepted", the share that does; "true_accepts", that of the pairs of one
    class. The last three are None where metrics.Pairs.accepted has none."""
    rows = []
    for share in FALSE_ACCEPTS:
        cosine, accepted, true = pairs.accepted(share) or [None] * 3
        cosine = cosine and round(cosine, 5)
        rows.append({"false_accepts": share, "cosine": cosine, "accepted": accepted, "true_accepts": true})
    return rows


def lines(measured, how=""):
    """What is printed of the interval and the thresholds, a list of lines. `how`: refine.in_words."""
    what = f" ({how})" if how else ""
    found = []
    if measured.interval:
        found.append("recall@1 interval: [{:.4f}, {:.4f}]".format(*measured.interval) + what)
    for row in measured.thresholds:
        name = f"threshold for {row['false_accepts']:.1%} false accepts: "
        if row["cosine"] is None:
            found.append(f"{name}none")
        else:
            found.append(f"{name}cosine {row['cosine']:.5f}, true accepts {row['true_accepts']:.4f}{what}")
    return found


def failures(ranked):
    """The queries whose nearest neighbour is of another class, int64 [F]: of most wrong neighbours first, those whose
    class has no other picture last."""
    lone = ranked.positives == 0
    index = np.flatnonzero((ranked.closer > 0) | lone)
    return index[np.lexsort((-ranked.similarity[index], -ranked.closer[index], lone[index]))]


def failed(ranked, paths, labels, other_paths, other_labels):
    """The first MOST_FAILED of `failures`.

    Args:
        paths, labels: of the queries; other_paths, other_labels: of the gallery.

    Returns: list of dicts: "path", "label"; "neighbour", "neighbour_label", "cosine": of the nearest neighbour, None
        where there is none; "rank": of the first neighbour of its class, from 1, None where there is none.
    """
    rows = []
    for i in failures(ranked)[:MOST_FAILED].tolist():
        wrong = int(ranked.wrong[i])
        there = wrong >= 0
        rows.append({
            "path": paths[i],
            "label": int(labels[i]),
            "neighbour": other_paths[wrong] if there else None,
            "neighbour_label": int(other_labels[wrong]) if there else None,
            "cosine": round(float(ranked.similarity[i]), 6) if there else None,
            "rank": None if not ranked.positives[i] else int(ranked.closer[i]) + 1,
        })  # fmt: skip
    return rows


def clustering_nmi(features, labels):
    """`nmi` of the labels with clusters of k-means, as many as there are classes, of features of length 1."""
    from sklearn.cluster import KMeans

    unit = metrics.unit(features, np.arange(len(features)))
    count = len(np.unique(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fewer clusters were found: the figure says so
        clusters = KMeans(count, n_init=1, max_iter=100, random_state=0).fit_predict(unit)
    return nmi(labels, clusters)


def nmi(labels, clusters):
    """Normalised mutual information of two partitions, int [N] each: I / mean(H, H), the mean arithmetic; 1 where both
    are one set."""
    _, pairs = np.unique(np.stack([labels, clusters]), axis=1, return_counts=True)
    parts = [np.unique(part, return_counts=True)[1] for part in (labels, clusters)]
    joint, *single = (-(p * np.log(p)).sum() for p in (counts / len(labels) for counts in (pairs, *parts)))
    return float(2 * (sum(single) - joint) / sum(single)) if sum(single) else 1.0
