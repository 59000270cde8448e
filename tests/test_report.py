"""The report page: what stands in it against plain loops and NumPy, its charts, its size, and what it refuses."""

import html.parser
import importlib.util
import os
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from conftest import run
from PIL import Image

import eval as eval_script
from retrieval import charts, features, figures, metrics, report

SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def draw(seed, count, classes, dimension=6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return (rng.normal(size=(classes, dimension))[labels] * 1.2 + rng.normal(size=(count, dimension))), labels


def contents_of(some, labels, paths, gallery=None, gallery_labels=None, log=None, classes=()):
    """report.Contents of arrays; `gallery`: features of the pictures `paths` again, or None."""
    measured = figures.measure(figures.Search(some, labels, gallery, gallery_labels), every_pair=True)
    queries = features.Gallery(some, np.array(paths, object), labels, np.array(classes, object), "", "list.txt")
    others = gallery if gallery is None else queries._replace(features=gallery, labels=gallery_labels)
    lines = figures.lines(measured)
    title = "ResNet8 on <list>.txt"
    return report.Contents(title, measured.figures, lines, measured, queries, others, None, log, 10**8)


def written(path, contents):
    report.write(str(path), contents)
    return path.read_text()


class Tags(html.parser.HTMLParser):
    """Checks that what is opened is closed, and collects the elements."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# ---------------------------------------------------------------- what is shown


@pytest.mark.parametrize("with_gallery", [False, True])
def test_histograms_are_those_of_all_pairs(with_gallery):
    some, labels = draw(0, 70, 6)
    other, other_labels = draw(1, 50, 6) if with_gallery else (None, None)
    pairs = metrics.Pairs(1)
    metrics.rank(some, labels, other, other_labels, pairs=pairs)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (some, some if other is None else other)]
    same, different = [], []
    for i, label in enumerate(labels):
        for j, other_label in enumerate(labels if other is None else other_labels):
            if with_gallery or j > i:
                (same if label == other_label else different).append(float(unit[0][i] @ unit[1][j]))
    for found, wanted in zip(pairs.histograms(40), (same, different)):
        # A cosine within rounding of an edge may be counted on either side.
        assert found.sum() == len(wanted)
        assert np.abs(np.cumsum(found) - np.cumsum(np.histogram(wanted, 40, (-1, 1))[0])).max() <= 1


def test_histogram_takes_equal_pictures_in():
    pairs = metrics.Pairs(1)
    metrics.rank(np.ones((4, 3)), np.array([0, 0, 1, 1]), pairs=pairs)
    same, different = pairs.histograms(10)
    assert same.tolist() == [0] * 9 + [2] and different.tolist() == [0] * 9 + [4]


def test_worst_are_those_with_the_most_wrong_neighbours_first():
    some, labels = draw(2, 60, 5)
    labels[0] = 99  # alone: there is nothing to show of it
    ranked = metrics.rank(some, labels)
    unit = some / np.linalg.norm(some, axis=1, keepdims=True)
    wrong = {}
    for i, label in enumerate(labels):
        order = [j for j in np.argsort(-(unit @ unit[i])) if j != i]
        first = next((rank for rank, j in enumerate(order) if labels[j] == label), None)
        if first:
            wrong[i] = first
    rows = report.worst(ranked)
    assert 0 not in rows and len(rows) == min(report.WORST, len(wrong))
    assert [wrong[row] for row in rows] == sorted(wrong.values(), reverse=True)[: report.WORST]


def test_drawn_are_drawn_alike_and_once():
    assert report.drawn(3).tolist() == [0, 1, 2]
    rows = report.drawn(1000)
    assert len(set(rows.tolist())) == report.RANDOM and np.array_equal(rows, report.drawn(1000))


def test_confusions_count_the_nearest_of_the_misses():
    some, labels = draw(3, 120, 8)
    labels = labels * 10 - 5
    measured = figures.measure(figures.Search(some, labels))
    unit = some / np.linalg.norm(some, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    nearest = labels[cosines.argmax(axis=1)]
    rows = report.confusions(measured, labels, labels)
    assert len(rows) > 3
    assert [row[2] for row in rows] == sorted(row[2] for row in rows)
    for label, queries, recall, _, taken_for in rows:
        own = nearest[labels == label]
        assert queries == len(own) and recall == pytest.approx(np.mean(own == label))
        counts = {other: int((own == other).sum()) for other in set(own.tolist()) - {label}}
        assert (
            sorted((n for _, n in taken_for), reverse=True) == sorted(counts.values(), reverse=True)[: report.CONFUSED]
        )
        assert all(counts[other] == n for other, n in taken_for)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (5, 1), (2, 3), (1, 4)])
def test_pca_is_that_of_a_singular_value_decomposition(shape):
    rows = np.random.default_rng(0).normal(size=shape)
    found = report.pca(rows)
    assert found.shape == (shape[0], 2)
    u, s, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    wanted = np.zeros((shape[0], 2))
    wanted[:, : min(2, len(s))] = (u * s)[:, :2]
    assert np.allclose(np.abs(found), np.abs(wanted), atol=1e-6)
    assert (found.max(axis=0) >= -found.min(axis=0) - 1e-9).all()


def test_curves_are_those_of_the_log():
    log = [
        {"args": {}},
        {"epoch": -1, "eval": {"recall@1": 0.1}},
        {"epoch": 0, "step": 0, "loss_metric": 0.0, "loss_cls": 4.0},
        {"epoch": 0, "step": 9, "loss_metric": 0.0, "loss_cls": 3.0},
        {"epoch": 0, "eval": {"recall@1": 0.2}},
        {"epoch": 1, "step": 4, "loss_metric": 0.0, "loss_cls": float("nan")},
        {"epoch": 1, "step": 9, "loss_metric": 0.0, "loss_cls": 2.0},
        {"epoch": 1, "eval": {"recall@1": True}},
        {"epoch": "x", "step": None, "eval": 3},
    ]
    assert report.loss_curves(log) == {"loss_cls": ([0.1, 1.0, 2.0], [4.0, 3.0, 2.0])}
    assert report.recall_curve(log) == ([0, 1], [0.1, 0.2])
    other = {"args": {"val_list": "other"}}
    assert report.recall_curve([*log[:4], other, {"epoch": 1, "eval": {"recall@1": 0.3}}]) == ([2], [0.3])
    assert report.loss_curves([]) == {} and report.recall_curve([]) is None


# ---------------------------------------------------------------- charts


def test_line_goes_through_its_points():
    x, y = [0, 1, 4], [10.0, 30.0, 20.0]
    chart = xml.etree.ElementTree.fromstring(charts.lines({"a < b": (x, y)}, "x", "y & z", 'a "chart"'))
    places = chart.find("polyline").get("points").split()
    places = np.array([[float(value) for value in place.split(",")] for place in places])
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    assert places[:, 0].tolist() == pytest.approx([left, left + (right - left) / 4, right], abs=0.1)
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    assert places[:, 1].tolist() == pytest.approx([bottom, top, (top + bottom) / 2], abs=0.1)
    texts = ["".join(text.itertext()) for text in chart.iter("text")]
    assert "a < b" in texts and "y & z" in texts and chart.get("aria-label") == 'a "chart"'


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 47, [0, 10, 20, 30, 40]), (0.13, 0.27, [0.15, 0.2, 0.25])],
)
def test_ticks_are_round(low, high, wanted):
    assert charts._ticks(low, high) == wanted


@pytest.mark.parametrize("span", [1e-7, 1e-3, 0.5, 1, 3, 7, 99, 12345, 1e9])
def test_ticks_are_few_and_inside(span):
    ticks = charts._ticks(-span / 3, span)
    assert 2 <= len(ticks) <= 7 and min(ticks) >= -span / 3 and max(ticks) <= span * (1 + 1e-9)


def test_a_long_line_is_thinned_to_means():
    y = np.arange(10_000.0)
    x, thin = charts._thinned(y, y)
    assert len(x) <= charts.MOST_POINTS and thin[0] == y[: 10_000 // len(x)].mean() and np.array_equal(x, thin)


def test_one_value_is_drawn():
    chart = charts.lines({"a": ([1], [2.0])}, "x", "y", "t")
    assert "nan" not in chart and "inf" not in chart
    xml.etree.ElementTree.fromstring(chart)


# ---------------------------------------------------------------- the page


def test_page_is_whole(tmp_path):
    some, labels = draw(4, 90, 5)
    paths = [f"/gone/{i} & <b>.jpg" for i in range(90)]
    log = [{"epoch": 0, "step": 0, "loss_cls": 1.0}, {"epoch": 0, "eval": {"recall@1": 0.5}}]
    contents = contents_of(some, labels, paths, log=log, classes=["0 <b>zero</b>", "1 one"])
    page = written(tmp_path / "r.html", contents)
    tags = Tags(page)
    assert tags.open == ["html"] or tags.open == []
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "link", "iframe", "b"})
    assert "http" not in page and "&lt;b&gt;zero&lt;/b&gt;" in page and "class 4" in page
    anchors = [attrs["href"][1:] for tag, attrs in tags.found if tag == "a"]
    ids = [attrs["id"] for _, attrs in tags.found if "id" in attrs]
    assert anchors == ids and len(ids) == 7
    for svg in SVG.findall(page):
        assert "nan" not in svg
        xml.etree.ElementTree.fromstring(svg)
    assert len(SVG.findall(page)) == 4 + bool(importlib.util.find_spec("sklearn"))
    assert ("With scikit-learn" in page) == (not importlib.util.find_spec("sklearn"))
    for name, value in contents.figures.items():
        assert f"<td>{name}</td>" in page
        assert (f"<td>{value:.4f}</td>" if isinstance(value, float) else f"<td>{value}</td>") in page


def test_rows_show_neighbours_in_their_order(tmp_path):
    some, labels = draw(5, 40, 4)
    paths = [f"/gone/{i}.jpg" for i in range(40)]
    page = written(tmp_path / "r.html", contents_of(some, labels, paths))
    unit = some / np.linalg.norm(some, axis=1, keepdims=True)
    sections = re.findall(r"<section>.*?</section>", page, re.DOTALL)
    assert len(sections) >= report.RANDOM
    for section in sections:
        rows = [int(row) for row in re.findall(r"(\d+)\.jpg</figcaption>", section)]
        kinds = re.findall(r'<figure class="(\w*)"', section)
        wanted = [j for j in np.argsort(-(unit @ unit[rows[0]])) if j != rows[0]][: report.NEIGHBOURS]
        assert rows[1:] == wanted
        assert kinds == ["query", *("same" if labels[j] == labels[rows[0]] else "other" for j in wanted)]


def test_gallery_of_its_own(tmp_path):
    some, labels = draw(6, 30, 4)
    page = written(tmp_path / "r.html", contents_of(some, labels, ["q.jpg"] * 30, some[::-1], labels[::-1]))
    assert "None: the nearest picture of every query is of its class." in page and "None.</p>" in page


@pytest.mark.parametrize("case", ["one picture", "one class", "all equal", "no labels twice"])
def test_odd_lists_have_a_page(tmp_path, case):
    some, labels = draw(7, 12, 3)
    if case == "one picture":
        some, labels = some[:1], labels[:1]
    elif case == "one class":
        labels[:] = 3
    elif case == "all equal":
        some[:] = 1
    else:
        labels = np.arange(12)
    page = written(tmp_path / "r.html", contents_of(some, labels, ["p.jpg"] * len(labels)))
    assert "nan" not in page and Tags(page).open in (["html"], [])


def test_page_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(40)]
    for path in paths:  # noise: no photograph takes more bytes
        Image.fromarray(rng.integers(0, 256, (200, 200, 3), np.uint8)).save(path)
    some, labels = draw(8, 5000, 100, 32)
    contents = contents_of(some, labels, [paths[i % 40] for i in range(5000)])
    report.write(str(tmp_path / "r.html"), contents)
    assert os.path.getsize(tmp_path / "r.html") < 5e6


def test_more_pictures_than_the_map_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_ON_MAP", 20)
    some, labels = draw(9, 50, 3)
    page = written(tmp_path / "r.html", contents_of(some, labels, ["p.jpg"] * 50))
    assert "20 of 50 queries, drawn" in page
    assert page.count("<circle") == 20 * (1 + bool(importlib.util.find_spec("sklearn")))


# ---------------------------------------------------------------- eval.py


def test_eval_writes_a_report(trained, birds, tmp_path):
    path = tmp_path / "report.html"
    best = trained / "ResNet8" / "best"
    for _ in range(2):  # an earlier page is replaced
        result = run("eval.py", f"--pretrained_model={best}", f"--report={path}", "--use_gpu=False")
    assert f"wrote the report to {path}" in result.stdout
    page = path.read_text()
    recall = re.search(r"^recall@1: (.*)$", result.stdout, re.MULTILINE)[1]
    assert f"<td>recall@1</td><td>{recall}</td>" in page
    assert "losses by epoch" in page and "Bird_" in page and page.count("data:image/jpeg") > 50
    assert f"--report={path}" in page


def test_classes_of_one_name_are_all_on_the_map(tmp_path):
    some, labels = draw(10, 30, 3)
    classes = ["0 bird", "1 bird", "2 bird"]
    page = written(tmp_path / "r.html", contents_of(some, labels, ["p.jpg"] * 30, classes=classes))
    assert page.count("<circle") == 30 * (1 + bool(importlib.util.find_spec("sklearn")))


def test_threshold_of_zero_is_marked():
    pairs = metrics.Pairs(1)
    metrics.rank(np.array([[1, 0], [1, 0.0], [0, 1], [0, 1]]), np.array([0, 0, 1, 1]), pairs=pairs)
    rows = [{"false_accepts": share, "cosine": cosine} for share, cosine in ((0.01, 0.0), (0.001, None))]
    found = "".join(report._cosines(figures.Measured({}, None, rows, {}, None, pairs)))
    assert "1.0% false accepts" in found and "0.1% false accepts" not in found


def test_log_is_that_of_the_checkpoint_alone(trained, tmp_path, monkeypatch):
    assert eval_script.log_of_run(str(trained / "ResNet8" / "best"))
    monkeypatch.chdir(trained / "ResNet8")  # where there is a log of some run
    assert eval_script.log_of_run("best")
    assert eval_script.log_of_run("") is None and eval_script.log_of_run("imagenet") is None


def test_report_replaces_nothing_else(trained, tmp_path):
    best = trained / "ResNet8" / "best"
    (tmp_path / "thesis.html").write_text("<!doctype html>\n")
    for name, message in (("thesis.html", "is there already and is not a report"), ("r.pdf", "must end in .html")):
        flags = [f"--pretrained_model={best}", f"--report={tmp_path / name}", "--use_gpu=False"]
        result = run("eval.py", *flags, status=2)
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["thesis.html"]
