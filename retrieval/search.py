"""The nearest pictures of a gallery to each query, for infer.py: found, printed and written.

A query that is in the gallery itself, as the same file, is no neighbour of its own.
"""

import collections
import csv
import dataclasses
import json
import os

import numpy as np

import files
import lists
from retrieval import features, index, neighbours, sheet
from utility import UserError, number, plain

# A query with its neighbours, the nearest first. path: str; label: int or None; neighbours: list of Neighbour.
Found = collections.namedtuple("Found", "path label neighbours")
# label: int or None; name: of its class, "" where that is not known.
Neighbour = collections.namedtuple("Neighbour", "cosine path label name")

SUFFIXES = (".csv", ".jsonl", ".html")
HEAD = ("query", "rank", "cosine", "path", "label", "class")


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched for, in the flags' words."""

    gallery: str = ""
    top_k: int = 5
    threshold: float = None
    neighbours_file: str = ""
    index: str = ""
    index_file: str = ""


def add_search_arguments(parser):
    """Adds the flags of Search."""
    # fmt: off
    add = parser.add_argument_group("search").add_argument
    add("--gallery", default="",
        help="print the nearest of these pictures to each of --input: an .npz that --feature_file wrote, or a list, "
        "folder or picture, which is indexed on the spot")
    add("--top_k", type=number(int, low=1, high=10**6), default=5, help="neighbours of each picture, at most")
    add("--threshold", type=number(float, low=-1, high=1),
        help="the cosine from which on pictures count as of one class, such as one that eval.py prints: farther ones "
        "are no neighbours, and of two pictures it is said whether they are the same")
    add("--neighbours_file", default="",
        help="write the neighbours to this file, too: .csv, .jsonl, or .html, a page with the pictures in it")
    add("--index", default="",
        help="search by an index of faiss, by its factory string, such as HNSW32 or IVF1024,Flat (pip install "
        "faiss-cpu), rather than exactly; exact: never (default: exact, or for a gallery of more than 100000 pictures "
        "with --index_file or 5000 queries IVF<n>,Flat with the root of their number)")
    add("--index_file", default="",
        help="keep the index in this file, .faiss: loaded where it is there and fits, else built and saved")
    # fmt: on


def idle_flags(flags):
    """{flag: why} of those that have no effect beside the others, {name: value}."""
    if flags["gallery"]:
        return {}
    idle = dict.fromkeys(("threshold", "index", "index_file"), "no --gallery")
    return idle if flags["feature_file"].endswith(".parquet") else {**idle, "top_k": "no --gallery"}


def check_search(search):
    """Raises a UserError where flags contradict each other, or a file can't be written."""
    if search.neighbours_file:
        if not search.gallery:
            raise UserError("--neighbours_file: nothing is searched: it needs --gallery")
        if not search.neighbours_file.endswith(SUFFIXES):
            ends = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
            raise UserError(f"--neighbours_file={search.neighbours_file}: must end in {ends}")
        files.check_output(search.neighbours_file, is_neighbours_file, "a file of neighbours that infer.py wrote")
    if search.gallery:
        index.check_index(search)


# ---------------------------------------------------------------- a search


def find(search, queries, gallery):
    """neighbours.Neighbours of the queries in a gallery, both features.Gallery, as Search says."""
    own = None
    if len(gallery.features) > 1:  # else two pictures are compared
        own = own_rows(queries.paths, gallery.paths)
        count = sum(len(rows) > 0 for rows in own)
        if count:
            print(f"note: {count} of {len(own)} queries are in the gallery themselves: none is a neighbour of its own")
    use = index.open_index(search, gallery, len(queries.features))
    if use is None:
        return neighbours.nearest(queries.features, gallery.features, search.top_k, own, gallery.source)
    return index.search(use, queries.features, gallery, search.top_k, own)


def among_themselves(gallery, k):
    """neighbours.Neighbours of a gallery's pictures among each other; None where that would take hours."""
    count = len(gallery.features)
    if count > index.LARGE:
        print(f"note: neighbours of {count} pictures are left out of the file: it is done for {index.LARGE} at most")
        return None
    own = [[row] for row in range(count)]
    return neighbours.nearest(gallery.features, gallery.features, min(k, max(1, count - 1)), own, gallery.source)


def own_rows(paths, gallery_paths):
    """For each path, the rows of the gallery's paths that are the same file, links followed: list of int64 [0 or more].

    Args:
        gallery_paths: array of texts, or features.Stored.
    """
    own = lists.real_paths([_file_name(path) for path in paths])
    rows = {path: [] for path in own}
    for start, block in features.blocks(gallery_paths):
        for row, path in enumerate(lists.real_paths([_file_name(path) for path in block]), start):
            if path in rows:
                rows[path].append(row)
    return [np.array(rows[path], np.int64) for path in own]


def _file_name(path):
    """A path, or "" where no file can have it."""
    path = str(path)
    try:
        os.fsencode(path)
    except ValueError:
        return ""
    return "" if "\0" in path else path


def found_of(queries, gallery, result):
    """Yields Found for each query.

    Args:
        queries, gallery: features.Gallery; result: neighbours.Neighbours.
    """
    there = np.unique(result.index[result.index >= 0])
    labels = {} if gallery.labels is None else dict(zip(there.tolist(), gallery.labels[there].tolist()))
    names = features.class_names(gallery, set(labels.values()))
    for row, (found, cosine) in enumerate(zip(result.index, result.cosine)):
        found = found[found >= 0]
        rows = zip(found.tolist(), np.clip(cosine[: len(found)], -1, 1).round(6).tolist(), gallery.paths[found])
        yield Found(
            str(queries.paths[row]),
            None if queries.labels is None else int(queries.labels[row]),
            [Neighbour(c, str(path), labels.get(i), names.get(labels.get(i), "")) for i, c, path in rows],
        )


def near(found, threshold):
    """Those of a Found's neighbours that are near enough."""
    return [other for other in found.neighbours if threshold is None or other.cosine >= threshold]


# ---------------------------------------------------------------- what is printed and written


def report(search, queries, gallery, result):
    """Prints the neighbours of each query, a line each with tabs between its fields, and writes --neighbours_file.

    Args:
        queries, gallery: features.Gallery; result: neighbours.Neighbours.
    """
    labelled, single = gallery.labels is not None, len(gallery.features) == 1
    for found in found_of(queries, gallery, result):
        for row in _rows(found, search.threshold, single):
            print("\t".join(plain(field, 1000) for field in (row if labelled else row[:4])))
    path = search.neighbours_file
    if not path:
        return
    found = found_of(queries, gallery, result)
    with files.atomic_write(path, "wb") as file, features.text_file(file) as text:
        if path.endswith(".csv"):
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(HEAD if labelled else HEAD[:4])
            for query in found:
                rows.writerows(row if labelled else row[:4] for row in _rows(query, search.threshold, single))
        elif path.endswith(".jsonl"):
            text.writelines(_record(query, search.threshold) for query in found)
        else:
            sheet.write(text, found, search.threshold)
    print(f"wrote the neighbours of {len(queries.features)} pictures to {plain(path, 1000)}")


def _rows(found, threshold, single):
    """The fields of HEAD for each neighbour of a Found.

    With a threshold, the rank says "none" in the line of the nearest where that is not near enough; and where the
    gallery is a single picture, "same" or "not the same".
    """
    others = near(found, threshold)
    ranks = [str(rank) for rank, _ in enumerate(others, 1)]
    if not others:
        others, ranks = found.neighbours[:1] or [Neighbour("", "", None, "")], ["none"]
    if single and threshold is not None:
        ranks = ["not the same" if ranks == ["none"] else "same"]
    for rank, other in zip(ranks, others):
        cosine = f"{other.cosine:.6f}" if other.path else ""
        label = "" if other.label is None else str(other.label)
        yield found.path, rank, cosine, other.path, label, other.name


def _record(found, threshold):
    """A line of JSON for a Found."""
    record = {"query": found.path, **({} if found.label is None else {"label": found.label}), "neighbours": []}
    for other in near(found, threshold):
        fields = {"path": other.path, "cosine": round(other.cosine, 6), "label": other.label, "class": other.name}
        record["neighbours"].append({name: value for name, value in fields.items() if value not in (None, "")})
    return json.dumps(record) + "\n"


def is_neighbours_file(path):
    """Whether a file is one that --neighbours_file has written before."""
    starts = {".csv": ",".join(HEAD[:4]), ".jsonl": '{"query": ', ".html": sheet.START}
    start = starts[os.path.splitext(path)[1]].encode()
    try:
        with files.open_file(path) as file:
            return file.read(len(start)) == start
    except OSError:
        return False
