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
from runtime import process
from utility import UserError, number, plain

# A query with its neighbours, the nearest first. path: str; label: int or None; name: of its class, or ""; neighbours:
# list of Neighbour.
Found = collections.namedtuple("Found", "path label name neighbours")
# label, name: as of Found; same: whether it is of the query's class, None where that is not known.
Neighbour = collections.namedtuple("Neighbour", "cosine path label name same")

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
        "faiss-cpu), rather than exactly; exact: never (default: exact; with --index_file, or for 5000 queries in more "
        "than 100000 pictures, IVF<n>,Flat with the root of their number)")
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
    count, more = len(gallery.features), 1
    use = index.open_index(search, gallery, len(queries.features))
    while True:
        k = min(count, search.top_k + more)
        if use is None:
            found = neighbours.nearest(queries.features, gallery.features, k, source=gallery.source)
        else:
            found = index.search(use, queries.features, gallery, k)
        if count == 1:  # two pictures are compared
            return found
        own = own_pictures(queries.paths, gallery.paths, found.index)
        most = own.sum(axis=1).max(initial=0)
        if most <= more or k == count:
            break
        more = int(most) * 2  # a query's own file is there as often: ask for more
    if own.any():
        several = f"{own.any(axis=1).sum()} of {len(own)} queries are"
        print(f"note: {several} in the gallery themselves: none is a neighbour of its own")
    return without(found, own, search.top_k)


def without(found, hidden, k):
    """The first k of the Neighbours that are not hidden, bool [Q, K]."""
    order = np.argsort(hidden, axis=1, kind="stable")
    hidden = np.take_along_axis(hidden, order, axis=1)[:, :k]
    index, cosine = (np.take_along_axis(values, order, axis=1)[:, :k] for values in found)
    return neighbours.Neighbours(np.where(hidden, -1, index), np.where(hidden, -np.inf, cosine))


def among_themselves(gallery, k):
    """neighbours.Neighbours of a gallery's pictures among each other; None where that would take hours."""
    count = len(gallery.features)
    if count > index.LARGE:
        print(f"note: neighbours of {count} pictures are left out of the file: it is done for {index.LARGE} at most")
        return None
    own = [[row] for row in range(count)]
    return neighbours.nearest(gallery.features, gallery.features, min(k, max(1, count - 1)), own, gallery.source)


def own_pictures(paths, gallery_paths, index):
    """Which of the gallery's pictures that were found for a query are the query's own file, links followed.

    Not all paths of the gallery are looked at: a million take longer than the search.

    Args:
        paths: [Q], of the queries; gallery_paths: array of texts, or features.Stored; index: as of Neighbours.

    Returns: bool [Q, K].
    """
    there, place = np.unique(index, return_inverse=True)
    rows = there[there >= 0]
    names = [""] * (len(there) - len(rows)) + [_file_name(path) for path in gallery_paths[rows]]
    files_found = np.array(lists.real_paths(names), object)[place.reshape(index.shape)]
    own = np.array(lists.real_paths([_file_name(path) for path in paths]), object)
    return (files_found == own[:, None]).astype(bool) & (index >= 0)


def _file_name(path):
    """A path, or "" where no file can have it."""
    path = str(path)
    try:
        os.fsencode(path)
    except ValueError:
        return ""
    return "" if "\0" in path else path


def found_of(queries, gallery, result, by_name=False):
    """Yields Found for each query.

    Args:
        queries, gallery: features.Gallery; result: neighbours.Neighbours.
        by_name: of one class are those whose classes have one name, where names are known: the same label may stand for
            another class in each of two folders.
    """
    there = np.unique(result.index[result.index >= 0])
    labels = {} if gallery.labels is None else dict(zip(there.tolist(), gallery.labels[there].tolist()))
    names = features.class_names(gallery, set(labels.values()))
    own_labels = [None] * len(result.index) if queries.labels is None else queries.labels.tolist()
    own_names = features.class_names(queries, set(own_labels))
    for row, (found, cosine) in enumerate(zip(result.index, result.cosine)):
        found = found[found >= 0]
        label, name = own_labels[row], own_names.get(own_labels[row], "")
        others = []
        cosines = np.clip(cosine[: len(found)], -1, 1).round(6).tolist()
        for row_there, value, path in zip(found.tolist(), cosines, gallery.paths[found]):
            other = labels.get(row_there)
            its_name = names.get(other, "")
            same = None if label is None or other is None else label == other
            if by_name and (own_names or names):
                same = name == its_name if name and its_name else None
            others.append(Neighbour(value, str(path), other, its_name, same))
        yield Found(str(queries.paths[row]), label, name, others)


def near(found, threshold):
    """Those of a Found's neighbours that are near enough."""
    return [other for other in found.neighbours if threshold is None or other.cosine >= threshold]


# ---------------------------------------------------------------- what is printed and written


def report(search, queries, gallery, result, max_pixels):
    """Prints the neighbours of each query, a line each with tabs between its fields, and writes --neighbours_file.

    Args:
        queries, gallery: features.Gallery; result: neighbours.Neighbours; max_pixels: of the pictures of a page.
    """
    labelled, single = gallery.labels is not None, len(gallery.features) == 1
    with process.even_unread():
        for found in found_of(queries, gallery, result, by_name=True):
            for row in _rows(found, search.threshold, single):
                print("\t".join(plain(field, 1000) for field in (row if labelled else row[:4])))
    path = search.neighbours_file
    if not path:
        return
    found = found_of(queries, gallery, result, by_name=True)
    with files.atomic_write(path, "wb") as file, features.text_file(file) as text:
        if path.endswith(".csv"):
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(HEAD if labelled else HEAD[:4])
            for query in found:
                rows.writerows(row if labelled else row[:4] for row in _rows(query, search.threshold, single))
        elif path.endswith(".jsonl"):
            text.writelines(_record(query, search.threshold) for query in found)
        else:
            shown = ((query, near(query, search.threshold)) for query in found)
            sheet.write(text, shown, search.threshold, max_pixels)
    print(f"wrote the neighbours of {len(queries.features)} pictures to {plain(path, 1000)}")


def _rows(found, threshold, single):
    """The fields of HEAD for each neighbour of a Found.

    With a threshold, the rank says "none" in the line of the nearest where that is not near enough; and where the
    gallery is a single picture, "same" or "not the same".
    """
    others = near(found, threshold)
    ranks = [str(rank) for rank, _ in enumerate(others, 1)]
    if not others:
        others, ranks = found.neighbours[:1] or [Neighbour("", "", None, "", None)], ["none"]
    if single and threshold is not None:
        ranks = ["not the same" if ranks == ["none"] else "same"]
    for rank, other in zip(ranks, others):
        cosine = f"{other.cosine:.6f}" if other.path else ""
        label = "" if other.label is None else str(other.label)
        yield found.path, rank, cosine, other.path, label, other.name


def _record(found, threshold):
    """A line of JSON for a Found."""
    record = _known({"query": found.path}, found)
    record["neighbours"] = [
        _known({"path": other.path, "cosine": round(other.cosine, 6)}, other) for other in near(found, threshold)
    ]
    return json.dumps(record) + "\n"


def _known(fields, one):
    """The fields, and those of the class of a Found or a Neighbour that are known."""
    fields = {**fields, "label": one.label, "class": one.name}
    return {name: value for name, value in fields.items() if value not in (None, "")}


def is_neighbours_file(path):
    """Whether a file is one that --neighbours_file has written before."""
    starts = {".csv": ",".join(HEAD[:4]), ".jsonl": '{"query": ', ".html": sheet.start("infer.py")}
    return files.starts_with(path, starts[os.path.splitext(path)[1]].encode())
