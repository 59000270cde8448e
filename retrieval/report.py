"""eval.py --report: one page of HTML, without scripts and with all pictures in it, that shows where a network fails.

Importing this does not import paddle.
"""

import collections
import html
import importlib.util
import os
import shlex
import sys
import warnings

import numpy as np

import files
from retrieval import charts, features, figures, metrics, neighbours, search, sheet
from utility import UserError, number_of, plain

WORST, RANDOM, NEIGHBOURS = 20, 10, 6  # rows of pictures of each kind, and neighbours in a row
CLASSES, CONFUSED = 25, 3  # classes in the table, and classes that each is taken for
MOST_ON_MAP = 5000  # pictures
BINS = 100  # of the histograms
SEED = 0

STYLE = """
body { max-width: 1100px; margin: 0 auto; padding: 8px; }
h1 { font-size: 22px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 28px 0 8px; }
nav a { display: inline-block; padding: 4px 10px 4px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px; }
text { paint-order: stroke; stroke: #fff; stroke-width: 3px; fill: #222; }
svg { width: 100%; height: auto; max-width: 700px; background: #fff; border: 1px solid #ddd; font-size: 13px; }
.grid { stroke: #ddd; }
.mark { stroke: #222; stroke-dasharray: 4 3; }
.ring { stroke: #111; stroke-width: 1.4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 3px 14px 3px 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""

# What a page is made of. title: what was measured on what; figures: {name: value} that eval.py prints; lines: of
# figures.lines; measured: figures.Measured, with all pairs counted; queries, gallery: features.Gallery (gallery: None
# where the list is its own); own: as of figures.Search; log: records of the run's log, or None; max_pixels: of a
# picture.
Contents = collections.namedtuple("Contents", "title figures lines measured queries gallery own log max_pixels")


def check_report(path):
    """Raises a UserError where --report can't be written, or would replace what is no such page."""
    if not path.endswith(".html"):
        raise UserError(f"--report={path}: must end in .html")
    files.check_output(path, is_report, "a report that eval.py wrote")


def is_report(path):
    """Whether a file is one that --report has written before."""
    return files.starts_with(path, sheet.start("eval.py").encode())


def write(path, contents):
    """Writes the page of Contents."""
    sections = {
        "Figures": lambda: [_figures(contents)],
        "Training": lambda: _curves(contents.log or []),
        "Worst queries": lambda: _queries(contents, worst(contents.measured.ranked)),
        "Random queries": lambda: _queries(contents, drawn(len(contents.queries.features))),
        "Classes that fail": lambda: [_classes(contents)],
        "Cosines": lambda: _cosines(contents.measured),
        "Map": lambda: _maps(contents),
    }
    # What has nothing to show is left out; pictures are read when their row is written.
    if not contents.log:
        del sections["Training"]
    title = html.escape(plain(contents.title, 1000))
    command = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    with files.atomic_write(path, "wb") as file, features.text_file(file) as text:
        text.write(sheet.start("eval.py") + sheet.HEAD.format(title=f"Report: {title}", style=sheet.STYLE + STYLE))
        text.write(f"<h1>{title}</h1>\n<pre>python {html.escape(plain(shlex.join(command), 2000))}</pre>\n<nav>\n")
        text.writelines(f'<a href="#{_anchor(name)}">{name}</a>\n' for name in sections)
        text.write("</nav>\n")
        for name, parts in sections.items():
            text.write(f'<h2 id="{_anchor(name)}">{name}</h2>\n')
            text.writelines(parts())
        text.write("</html>\n")
    print(f"wrote the report to {plain(path, 1000)}")


def _anchor(name):
    return name.lower().replace(" ", "-")


# ---------------------------------------------------------------- figures and curves


def _figures(contents):
    rows = [
        (name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in contents.figures.items()
    ]
    rows += [line.split(": ", 1) for line in contents.lines]
    return _table(("figure", "value"), rows)


def _table(head, rows):
    """Rows of texts and numbers as a table that scrolls by itself where it is wide, by keyboard as well."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    table = f"<table>\n<tr>{cells}</tr>\n{body}</table>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table of {html.escape(head[0])}">{table}</div>\n'
    )


def _cell(value):
    kind = "" if isinstance(value, str) else ' class="number"'
    return f"<td{kind}>{html.escape(plain(value, 1000))}</td>"


def _curves(log):
    """Charts of the losses and of recall@1 over the epochs."""
    yield '<div class="charts">\n'
    losses = loss_curves(log)
    if losses:
        yield charts.lines(losses, "epoch", "loss", "losses by epoch")
    recall = recall_curve(log)
    if recall:
        yield charts.lines({"recall@1": recall}, "epoch", "recall@1", "recall@1 on the validation list by epoch")
    yield "</div>\n"
    if not losses and not recall:
        yield "<p>The log of the run has no figures.</p>\n"


def loss_curves(log):
    """{name: (epochs done, losses)} of the records of a run's log; a loss that is 0 throughout is left out."""
    steps = [row for row in log if all(_is_number(row.get(name)) for name in ("epoch", "step"))]
    length = 1 + max((row["step"] for row in steps), default=0)
    curves = {}
    for name in ("loss_metric", "loss_cls"):
        rows = [row for row in steps if _is_number(row.get(name))]
        if any(row[name] for row in rows):
            curves[name] = [row["epoch"] + (row["step"] + 1) / length for row in rows], [row[name] for row in rows]
    return curves


def recall_curve(log):
    """(epochs done, recall@1) of the records of a run's log, on the last of its --val_list; or None."""
    rows, val_list = [], None
    for row in log:
        if isinstance(row.get("args"), dict) and row["args"].get("val_list") != val_list:
            rows, val_list = [], row["args"].get("val_list")
        if isinstance(row.get("eval"), dict):
            rows.append((row.get("epoch"), row["eval"].get("recall@1")))
    rows = [row for row in rows if all(map(_is_number, row))]
    return ([epoch + 1 for epoch, _ in rows], [recall for _, recall in rows]) if rows else None


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


# ---------------------------------------------------------------- pictures


def worst(ranked):
    """Rows of the queries with the most wrong neighbours before the first of their class; lone ones are left out."""
    order = figures.failures(ranked)
    return order[ranked.positives[order] > 0][:WORST]


def drawn(count):
    """Rows of some of `count` queries, drawn, not chosen."""
    return np.sort(np.random.default_rng(SEED).choice(count, min(RANDOM, count), replace=False))


def _queries(contents, rows):
    """A row of pictures for each query of these rows: itself and its neighbours."""
    if not len(rows):
        yield "<p>None.</p>\n"
        return
    yield (
        "<p>Each row: a picture, then the nearest ones, with their cosines. A green frame, whole: of the picture's own "
        "class; a red one, dashed: of another.</p>\n"
    )
    queries, gallery, ranked = contents.queries, contents.gallery or contents.queries, contents.measured.ranked
    chosen = queries._replace(features=queries.features[rows], paths=queries.paths[rows], labels=queries.labels[rows])
    own = [[row] for row in rows] if contents.gallery is None else contents.own and [contents.own[row] for row in rows]
    near = neighbours.nearest(chosen.features, gallery.features, NEIGHBOURS, own)
    for row, found in zip(rows, search.found_of(chosen, gallery, near)):
        name = found.name or f"class {found.label}"
        first = f"the first of its class is neighbour {ranked.closer[row] + 1}"
        first = first if ranked.positives[row] else "no other picture of its class"
        lines = [name, first, os.path.basename(found.path)]
        yield sheet.section(found, found.neighbours, lines, contents.max_pixels, os.path.basename)


# ---------------------------------------------------------------- classes


def confusions(measured, labels, gallery_labels):
    """Of the classes with the lowest recall@1, at most CLASSES: [(label, queries, recall@1, MAP@R, taken for)], the
    last [(label, how many of its queries have a picture of it as their nearest)] of at most CONFUSED classes."""
    table, ranked = measured.classes, measured.ranked
    order = np.lexsort((table["MAP@R"], table["recall@1"]))
    rows = []
    for place in order[:CLASSES].tolist():
        label = table["label"][place]
        wrong = ranked.wrong[(labels == label) & (ranked.wrong >= 0)]
        taken, counts = np.unique(gallery_labels[wrong], return_counts=True)
        most = np.argsort(-counts, kind="stable")[:CONFUSED]
        taken_for = list(zip(taken[most].tolist(), counts[most].tolist()))
        rows.append((label, table["queries"][place], table["recall@1"][place], table["MAP@R"][place], taken_for))
    return [row for row in rows if row[2] < 1]


def _classes(contents):
    queries, gallery = contents.queries, contents.gallery or contents.queries
    labels, gallery_labels = queries.labels, gallery.labels
    rows = confusions(contents.measured, labels, gallery_labels)
    if not rows:
        return "<p>None: the nearest picture of every query is of its class.</p>\n"
    names = features.class_names(queries, set(labels.tolist()))
    names = {**features.class_names(gallery, set(gallery_labels.tolist())), **names}
    name = {label: names.get(label, f"class {label}") for row in rows for label in (row[0], *(o for o, _ in row[4]))}
    head = ("class", "queries", "recall@1", "MAP@R", "its pictures are taken for")
    return _table(head, [
        (name[label], count, f"{recall:.2f}", f"{map_at_r:.2f}", ", ".join(f"{name[o]} ({n})" for o, n in taken_for))
        for label, count, recall, map_at_r, taken_for in rows
    ])  # fmt: skip


# ---------------------------------------------------------------- cosines and the map


def _cosines(measured):
    """The histograms of the cosines of pairs of one class and of different classes, with the thresholds."""
    counts = zip(("pairs of one class", "of different classes"), measured.pairs.histograms(BINS))
    known = {name: some / some.sum() for name, some in counts if some.any()}
    if not known:
        yield "<p>There are no pairs.</p>\n"
        return
    edges = np.linspace(-1, 1, BINS + 1)
    used = np.flatnonzero(sum(known.values()))
    first, last = used[0], used[-1] + 1
    thresholds = [row for row in measured.thresholds if row["cosine"] is not None]
    marks = {f"{row['false_accepts']:.1%} false accepts": row["cosine"] for row in thresholds}
    parts = {name: shares[first:last] for name, shares in known.items()}
    title = "histograms of the cosines of pairs of one class and of different classes"
    yield charts.histogram(parts, edges[first : last + 1], marks, "cosine", "share of the pairs", title)


def _maps(contents):
    """Maps of the queries' features in two dimensions."""
    queries, ranked = contents.queries, contents.measured.ranked
    count = len(queries.features)
    rows = np.arange(count)
    if count > MOST_ON_MAP:
        rows = np.sort(np.random.default_rng(SEED).choice(count, MOST_ON_MAP, replace=False))
    unit, labels = metrics.unit(queries.features, rows), queries.labels[rows]
    failed = (ranked.closer > 0)[rows] | (ranked.positives == 0)[rows]
    names = features.class_names(queries, set(labels.tolist()))
    known = np.unique(labels).tolist()
    groups = [(names.get(label, f"class {label}"), np.flatnonzero(labels == label)) for label in known]
    many = number_of(count, "query", "queries")
    many = many if len(rows) == count else f"{len(rows)} of {many}, drawn"
    yield f"<p>{many}; a colour for each class, a dark ring for a miss.</p>\n"
    yield '<div class="charts">\n'
    places = pca(unit)
    maps = {"the two principal components of the features (PCA)": places}
    spread = places[:, 0].std()
    if len(rows) > 3 and spread > metrics.TIE and importlib.util.find_spec("sklearn"):
        maps["t-SNE of the features"] = tsne(unit, places / spread)
    for title, places in maps.items():
        caption = f"<figcaption>{title[0].upper()}{title[1:]}</figcaption>"
        yield f"<div>{charts.points(*places.T, groups, failed, title)}{caption}</div>\n"
    yield "</div>\n"
    if not importlib.util.find_spec("sklearn"):
        yield "<p>With scikit-learn (pip install scikit-learn) there is a map by t-SNE, too.</p>\n"


def pca(rows):
    """The first two principal components of rows float [N, D]: float64 [N, 2], the largest value of each positive."""
    centred = rows - rows.mean(axis=0)
    # Of rows.T @ rows or rows @ rows.T, the smaller: their eigenvectors give the same components.
    wide = centred.shape[0] < centred.shape[1]
    product = centred @ centred.T if wide else centred.T @ centred
    values, vectors = np.linalg.eigh(product.astype(np.float64))
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    places = vectors * np.sqrt(np.maximum(values, 0)) if wide else centred @ vectors
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    return places * np.where(np.abs(places).max(axis=0) > places.max(axis=0), -1, 1)


def tsne(unit, places):
    """A map by t-SNE (van der Maaten and Hinton, 2008) of rows of length 1, float [N, D]: float [N, 2].

    Args:
        places: where the map begins, [N, 2], the first column's deviation 1. Equal ones would crash scikit-learn.
    """
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(unit) - 1) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = (places * 1e-4).astype(np.float32)  # small, as van der Maaten and Hinton have it
        return TSNE(perplexity=perplexity, init=start, random_state=SEED).fit_transform(unit)
