"""Neighbours against a sort of all cosines in NumPy; infer.py's search and its files; indices."""

import contextlib
import csv
import html.parser
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import read_rows, run

import infer
from retrieval import features, index, neighbours, search
from utility import UserError

# ---------------------------------------------------------------- exact search


def sorted_cosines(queries, gallery, own=None):
    """All rows of the gallery in the order of their cosines and then of their numbers: index, cosine [Q, M]."""
    queries, gallery = (np.asarray(x, np.float64) for x in (queries, gallery))
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (queries, gallery)]
    cosine = np.array([[float(np.dot(q, g)) for g in unit[1]] for q in unit[0]]).reshape(len(queries), len(gallery))
    for row, hidden in enumerate(own or []):
        cosine[row, hidden] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(len(gallery)), cosine.shape), -cosine.round(9)), axis=1)
    cosine = np.take_along_axis(cosine, order, axis=1)
    return np.where(np.isinf(cosine), -1, order), cosine


def a_gallery(count=7, size=3, labelled=True):
    draw = np.random.default_rng(0)
    paths = np.array([f"photos/{'ä' * (i % 7)}.jpg" for i in range(count)], object)
    labels = np.arange(count) if labelled else None
    vectors = draw.standard_normal((count, size)).astype(np.float32)
    return features.Gallery(vectors, paths, labels, np.array(["1 One", "-2 a b"], object), ["weights=1"], "g")


def check(found, queries, gallery, k, own=None):
    order, cosine = sorted_cosines(queries, gallery, own)
    assert found.index.dtype == np.int64 and np.array_equal(found.index, order[:, :k])
    np.testing.assert_allclose(found.cosine, cosine[:, :k], atol=2e-6)


@pytest.mark.parametrize("k", [1, 5, 60, 1000])
@pytest.mark.parametrize("block_values", [1, 40, 2**22])  # a row, some rows, all at once
def test_nearest_is_a_sort(monkeypatch, k, block_values):
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", block_values)
    draw = np.random.default_rng(0)
    gallery = draw.standard_normal((60, 7)).astype(np.float32)
    gallery[20:30] = gallery[:10] * 2  # of another length: equal cosines
    gallery[40:45] = gallery[3]
    gallery[50] = 0
    queries = np.concatenate([draw.standard_normal((9, 7)), gallery[[3, 50]]]).astype(np.float32)
    check(neighbours.nearest(queries, gallery, k), queries, gallery, k)
    own = [[]] * 9 + [[3, 40], np.array([50])]
    check(neighbours.nearest(queries, gallery, k, own), queries, gallery, k, own)


def test_all_equal_come_in_their_order():
    gallery = np.tile(np.random.default_rng(0).standard_normal(33), (5000, 1)).astype(np.float32)
    found = neighbours.nearest(gallery[:3], gallery, 4)
    assert found.index.tolist() == [[0, 1, 2, 3]] * 3 and np.allclose(found.cosine, 1)


def test_one_picture_no_query_and_extremes():
    one = np.array([[3, 4]], np.float32)
    assert neighbours.nearest(one, one, 5).index.tolist() == [[0]]
    assert neighbours.nearest(one, one, 5, own=[[0]]).index.tolist() == [[-1]]
    assert neighbours.nearest(one[:0], one, 5).index.shape == (0, 1)
    large = np.array([[3e38, 3e38], [1e-38, 0], [-2e-38, 1e-45]], np.float32)
    found = neighbours.nearest(one, large, 3)
    np.testing.assert_allclose(found.cosine, [[7 / np.sqrt(50), 0.6, -0.6]], atol=1e-6)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(UserError, match=r"g\.npz: the features of picture 2 are NaN or infinite"):
            neighbours.nearest(one, np.array([[1, 0], [bad, 1]], np.float32), 1, source="g.npz")


def test_own_pictures_by_file(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    a, b, link = (str(tmp_path / name) for name in ("a.jpg", "b.jpg", "link.jpg"))
    gallery = np.array([b, link, "zero\0byte", "\ud800", str(tmp_path / "." / "a.jpg"), "", a])
    found = np.array([[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, -1, 2, 1, 0]])
    own = search.own_pictures([a, b], gallery, found)
    assert own.tolist() == [[i in (1, 4, 6) for i in found[0]], [i == 0 for i in found[1]]]
    # So often in the gallery that the first search brings nothing else.
    vectors = np.ones((30, 2), np.float32)
    vectors[25:, 1] = 0
    paths = np.array([a] * 25 + [b] * 5, object)
    asked = search.Search(gallery="g", top_k=3)
    query = features.Gallery(vectors[:1], paths[:1], None, None, None, "q")
    found = search.find(asked, query, features.Gallery(vectors, paths, None, None, None, "g"))
    assert found.index.tolist() == [[25, 26, 27]]


# ---------------------------------------------------------------- infer.py


@pytest.fixture(scope="module")
def found(birds, trained, tmp_path_factory):
    """A folder with g.npz, the features of the pictures of the validation list, and the flags of its checkpoint."""
    folder = tmp_path_factory.mktemp("found")
    flags = [f"--pretrained_model={trained}/ResNet8/best", "--use_gpu=False", "--quiet"]
    run("infer.py", *flags, "--input", birds.val_list, f"--feature_file={folder}/g.npz")
    return folder, flags


def run_here(*flags):
    """What infer.py prints, run in this process, which has Paddle loaded already."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["infer.py", *(str(flag) for flag in flags)])
        infer.main()
    return out.getvalue()


def lines_of(text):
    """The lines with tabs: what `cut -s` sees."""
    return [line.split("\t") for line in text.splitlines() if "\t" in line]


def test_the_nearest_pictures_are_printed_and_written(found, birds, tmp_path):
    folder, flags = found
    arrays = np.load(folder / "g.npz")
    order, cosine = sorted_cosines(arrays["features"], arrays["features"], [[row] for row in range(48)])
    queries = [arrays["paths"][row] for row in (5, 30)]
    wanted = [
        [queries[q], str(rank + 1), cosine[row, rank], arrays["paths"][order[row, rank]],
         str(arrays["labels"][order[row, rank]]), f"{arrays['labels'][order[row, rank]]:03d}.Bird_"]
        for q, row in enumerate((5, 30)) for rank in range(3)
    ]  # fmt: skip
    flags = [*flags, "--top_k=3", "--input", *queries]
    for name in ("csv", "jsonl", "html", "csv"):  # an earlier file is replaced
        out = run_here(*flags, f"--gallery={folder}/g.npz", f"--neighbours_file={tmp_path}/n.{name}")
        lines = lines_of(out)
        assert "note: 2 of 2 queries are in the gallery themselves" in out and "Test-0" not in out
        for line, (query, rank, value, path, label, start) in zip(lines, wanted):
            assert [line[i] for i in (0, 1, 3, 4)] == [query, rank, path, label] and line[5].startswith(start)
            assert abs(float(line[2]) - value) < 2e-6
        assert len(lines) == len(wanted)
    with open(tmp_path / "n.csv", newline="") as file:
        assert list(csv.reader(file)) == [list(search.HEAD), *lines]
    records = [json.loads(row) for row in read_rows(tmp_path / "n.jsonl")]
    assert [record["query"] for record in records] == queries
    assert [[n["path"], n["cosine"], n["label"], n["class"]] for n in records[0]["neighbours"]] == [
        [path, float(value), int(label), name] for _, _, value, path, label, name in lines[:3]
    ]
    page = (tmp_path / "n.html").read_text()
    assert page.count("<img") == 8 and page.count("<section>") == 2 and "<script" not in page
    assert "http" not in page and f"{float(lines[0][2]):.3f}<br>{lines[0][5]}" in page
    html.parser.HTMLParser().feed(page)
    # On the spot: a list has labels and names, a folder those of its class folders.
    on_the_spot = lines_of(run_here(*flags, f"--gallery={birds.val_list}"))
    assert [line[:2] + line[3:] for line in on_the_spot] == [line[:2] + line[3:] for line in lines]
    in_a_folder = lines_of(run("infer.py", *flags, f"--gallery={birds.root}/images").stdout)
    assert len(in_a_folder) == 6 and {len(line) for line in in_a_folder} == {6}


def test_classes_of_two_folders_are_compared_by_name(found, birds, tmp_path):
    """Each folder numbers its classes on its own: bee is 1 among the queries and 2 in the gallery."""
    _, flags = found
    rows = [row.rsplit(" ", 1)[0] for row in read_rows(birds.val_list)[::12]]
    for folder, names in (("q", "bee cat"), ("g", "ant bee cat")):
        for number, name in enumerate(names.split()[::-1]):
            (tmp_path / folder / name).mkdir(parents=True)
            shutil.copy(f"{birds.root}/{rows[number]}", tmp_path / folder / name / "0.png")
    flags = [*flags, "--input", tmp_path / "q", "--top_k=2"]
    run_here(*flags[:-3], "--input", tmp_path / "g", f"--feature_file={tmp_path}/g.npz")
    for gallery in (tmp_path / "g", tmp_path / "g.npz"):
        for name in ("html", "jsonl"):
            run_here(*flags, f"--gallery={gallery}", f"--neighbours_file={tmp_path}/n.{name}")
        page = (tmp_path / "n.html").read_text()
        assert page.count('class="same"') == 2 and page.count('class="other"') == 2
        records = [json.loads(row) for row in read_rows(tmp_path / "n.jsonl")]
        assert [(record["class"], record["neighbours"][0]["class"]) for record in records] == [
            ("bee",) * 2,
            ("cat",) * 2,
        ]
    # Labels without names on one side: nobody knows.
    (tmp_path / "list.txt").write_text("g/bee/0.png 1\ng/cat/0.png 2\n")
    run_here(*flags, f"--gallery={tmp_path}/list.txt", f"--neighbours_file={tmp_path}/n.html")
    page = (tmp_path / "n.html").read_text()
    assert 'class="same"' not in page and 'class="other"' not in page


def test_labels_and_names_of_lists(found, birds, tmp_path, capsys):
    _, flags = found
    rows = [f"{birds.root}/{row.rsplit(' ', 1)[0]}" for row in read_rows(birds.val_list)[::12]]
    for name, third in (("one", "bee"), ("two", "wasp")):
        (tmp_path / f"{name}_train.txt").write_text("".join(f"{row} {label}\n" for label, row in enumerate(rows)))
        (tmp_path / f"{name}_classes.txt").write_text(f"0 ant\n1 cat\n2 {third}\n")
    one, two = tmp_path / "one_train.txt", tmp_path / "two_train.txt"
    assert infer.class_names(infer.find_samples([str(one)], None)) == {0: "ant", 1: "cat", 2: "bee"}
    capsys.readouterr()
    assert infer.find_samples([str(one), str(two)], None).labels is None
    assert capsys.readouterr().out == f"note: label 2 is bee in {one} and wasp in {two}: their labels are left out\n"
    (tmp_path / "two_classes.txt").write_text("0 ant\n1 cat\n")
    assert infer.class_names(infer.find_samples([str(one), str(two)], None)) == {0: "ant", 1: "cat"}
    # The labels are those of the gallery, also where its pictures are those of --input.
    lines = lines_of(run_here(*flags, "--top_k=1", "--input", *rows, f"--gallery={one}"))
    assert len(lines) == 4 and all(len(line) == 6 for line in lines)
    assert {line[4]: line[5] for line in lines}.items() <= {"0": "ant", "1": "cat", "2": "bee", "3": ""}.items()


def test_the_same_or_not(found, birds):
    folder, flags = found
    one, other = (row.rsplit(" ", 1)[0] for row in read_rows(birds.val_list)[:2])
    one, other = f"{birds.root}/{one}", f"{birds.root}/{other}"
    ask = lambda *more: lines_of(run_here(*flags, "--input", one, *more))  # noqa: E731
    ((_, verdict, cosine, path),) = ask(f"--gallery={other}", "--threshold=-1")
    assert (verdict, path) == ("same", other) and -1 < float(cosine) < 1
    assert ask(f"--gallery={other}", f"--threshold={float(cosine) + 1e-6}") == [[one, "not the same", cosine, other]]
    assert ask(f"--gallery={other}", f"--threshold={cosine}") == [[one, "same", cosine, other]]
    assert ask(f"--gallery={one}", "--threshold=1") == [[one, "same", "1.000000", one]]
    # Of more pictures: those that are near enough, or one line that nothing is.
    lines = ask(f"--gallery={folder}/g.npz")
    middle = (float(lines[1][2]) + float(lines[2][2])) / 2
    assert ask(f"--gallery={folder}/g.npz", f"--threshold={middle}") == lines[:2]
    assert ask(f"--gallery={folder}/g.npz", "--threshold=1") == [[one, "none", *lines[0][2:]]]


def test_a_gallery_of_other_weights_or_size(found, birds, tmp_path):
    folder, flags = found
    picture = f"{birds.root}/{read_rows(birds.val_list)[0].rsplit(' ', 1)[0]}"
    flags = [*flags, "--input", picture]
    small = ["--model=ResNet8", "--image_shape=3,32,32", "--use_gpu=False", "--input", picture, "--seed=9"]
    for command, message in (
        ([*flags, "--image_shape=3,40,40"], "another image_shape: 3,32,32 there, 3,40,40 here"),
        ([*flags, "--flip=True"], "another view: the picture there, flip here"),
        ([*flags, "--test_transform=resize"], "another test_transform"),
        ([*flags, f"--whiten={folder}/g.npz"], "another whitening"),
        (small, "of other weights than those in use"),
    ):
        with pytest.raises(UserError, match=f"^{folder}/g.npz: .*{message}"):
            run_here(*command, f"--gallery={folder}/g.npz")
    np.savez(tmp_path / "old.npz", features=np.ones((2, 9), np.float32), paths=np.array(["a", "b"]))
    err = run("infer.py", *flags, f"--gallery={tmp_path}/old.npz", status=2).stderr
    assert "another size: 9 there, 64 here" in err and err.count("\n") == 1
    # Another precision is told from other weights, and noted.
    features.check_made_by("g.npz", ["weights=1", "precision=bf16"], ["weights=1", "precision=float32"])


def test_the_exported_model_searches_too(found, birds, tmp_path):
    folder, flags = found
    run_here(*flags, f"--export_dir={tmp_path}/e")
    picture = f"{birds.root}/{read_rows(birds.val_list)[9].rsplit(' ', 1)[0]}"
    ask = ["--use_gpu=False", "--quiet", "--input", picture, f"--gallery={folder}/g.npz", "--top_k=4"]
    wanted = lines_of(run_here(*ask, *flags[:1]))
    exported = lines_of(run_here(*ask, f"--pretrained_model={tmp_path}/e"))
    assert [line[3:] for line in exported] == [line[3:] for line in wanted] and len(wanted) == 4
    # Of an older version, that does not say what it was made of: only its own features are known to fit.
    description = json.loads((tmp_path / "e" / "description.json").read_text())
    del description["made_by"]
    (tmp_path / "e" / "description.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="of other weights than those in use"):
        run_here(*ask, f"--pretrained_model={tmp_path}/e")
    own = ["--use_gpu=False", f"--pretrained_model={tmp_path}/e", "--input", birds.val_list]
    run_here(*own, f"--feature_file={tmp_path}/e.npz")
    again = lines_of(run_here(*ask, f"--pretrained_model={tmp_path}/e", f"--gallery={tmp_path}/e.npz"))
    assert [line[3:] for line in again] == [line[3:] for line in wanted]


def test_mistakes(found, birds, tmp_path):
    folder, flags = found
    (tmp_path / "thesis.csv").write_text("query,rank\n")
    (tmp_path / "thesis.html").write_text("<!doctype html>\n")
    (tmp_path / "g.csv").write_text("path,f0\n")
    gallery = f"--gallery={folder}/g.npz"
    for more, message in (
        ([f"--neighbours_file={tmp_path}/n.csv"], "nothing is searched: it needs --gallery"),
        ([gallery, f"--neighbours_file={tmp_path}/n.txt"], "must end in .csv, .jsonl or .html"),
        ([gallery, f"--neighbours_file={tmp_path}/thesis.csv"], "is there already and is not a file of neighbours"),
        ([gallery, f"--neighbours_file={tmp_path}/thesis.html"], "is there already and is not a file of neighbours"),
        ([f"--gallery={tmp_path}/absent"], "absent: no such file or folder"),
        ([f"--gallery={tmp_path}/g.csv"], "an .npz is searched"),
        ([gallery, f"--index_file={tmp_path}/x.bin"], "must end in .faiss"),
        ([gallery, "--index=exact", f"--index_file={tmp_path}/x.faiss"], "leave one of them out"),
        ([gallery, "--threshold=2"], "out of range"),
        ([gallery, "--top_k=0"], "out of range"),
        ([f"--feature_file={tmp_path}/f.txt"], "must end in .npz, .csv or .parquet"),
    ):
        with pytest.raises(UserError, match=message):
            run_here(*flags, "--input", birds.val_list, *more)
    assert sorted(os.listdir(tmp_path)) == ["g.csv", "thesis.csv", "thesis.html"]
    idle = infer.idle_flags({**vars(infer.build_parser().parse_args([])), "input": ["x"]})
    assert {"threshold", "top_k", "index", "index_file"} <= set(idle)


def test_a_sheet_escapes_names_and_shows_what_is_missing(tmp_path, birds):
    name = "<script>alert('x')</script>&\x1b[2J.jpg"
    shutil.copy(f"{birds.root}/{read_rows(birds.val_list)[0].rsplit(' ', 1)[0]}", tmp_path / "q.jpg")
    query = features.Gallery(np.ones((1, 2), np.float32), np.array([str(tmp_path / "q.jpg")]), None, None, None, "")
    gallery = a_gallery(2, 2)._replace(paths=np.array([name, "absent.jpg"], object))
    asked = search.Search(gallery="g", neighbours_file=str(tmp_path / "n.html"))
    search.report(asked, query, gallery, search.find(asked, query, gallery), 10**8)
    page = (tmp_path / "n.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert page.count("<img") == 1 and page.count('class="none"') == 2 and "No such file" in page
    assert search.is_neighbours_file(str(tmp_path / "n.html"))


# ---------------------------------------------------------------- with faiss, with pyarrow


def test_what_is_missing_is_one_line(found, birds, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        features.check_feature_file(str(tmp_path / "f.parquet"))
    monkeypatch.setattr(index, "_has_faiss", lambda: False)
    for asked in (search.Search("g", index="Flat"), search.Search("g", index_file="x.faiss")):
        with pytest.raises(UserError, match="pip install faiss-cpu"):
            search.check_search(asked)
    # Large galleries are searched exactly, and a line says what may be faster.
    monkeypatch.setattr(index, "LARGE", 6)
    assert index.open_index(search.Search("g"), a_gallery(), 1) is None
    assert "faiss may be faster: pip install faiss-cpu" in capsys.readouterr().out
    monkeypatch.setattr(index, "_has_faiss", lambda: True)
    assert index.open_index(search.Search("g"), a_gallery(), 1) is None
    assert "--index_file=gallery.faiss keeps" in capsys.readouterr().out


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", "PQ4x4"])
def test_an_index_is_built_saved_and_loaded(tmp_path, capsys, factory):
    pytest.importorskip("faiss", reason="pip install faiss-cpu")
    centres = np.random.default_rng(0).standard_normal((20, 16))
    vectors = (centres[np.arange(1000) % 20] * 3 + np.random.default_rng(1).standard_normal((1000, 16))).astype("f4")
    gallery = a_gallery()._replace(features=vectors, paths=np.array([str(i) for i in range(1000)], object))
    asked = search.Search("g", index=factory, index_file=str(tmp_path / "i.faiss"))
    exact = neighbours.nearest(vectors[:50], vectors, 5)
    for what in ("built in", "loaded from"):
        made = index.open_index(asked, gallery, 50)
        out = capsys.readouterr().out
        recall = float(re.fullmatch(rf"index {factory}: {what} .*; ([\d.]+)% of the 5 nearest .*\n", out)[1]) / 100
        found = index.search(made, vectors[:50], gallery, 5)
        same = np.mean([len(np.intersect1d(*rows)) / 5 for rows in zip(found.index, exact.index)])
        assert abs(same - recall) < 0.15 and (recall == 1 or factory != "Flat") and recall > 0.5
        order = np.take_along_axis(neighbours.unit(vectors[:50]) @ neighbours.unit(vectors).T, found.index, axis=1)
        np.testing.assert_allclose(found.cosine, order, atol=1e-6)  # those of the features, not of the index
        assert (np.diff(found.cosine, axis=1) <= 0).all()
    index.open_index(search.Search("g", index_file=asked.index_file), gallery, 50)  # whatever kind it is
    assert f"index {factory}: loaded from" in capsys.readouterr().out
    own = [[row] for row in range(50)]
    assert not (index.search(made, vectors[:50], gallery, 5, own).index == np.arange(50)[:, None]).any()
    # Another gallery, or another kind: built anew. Damage: an error that says what to do.
    other = gallery._replace(features=vectors + 1)
    index.open_index(asked, other, 50)
    assert "of another gallery or kind: built anew" in capsys.readouterr().out
    data = bytearray((tmp_path / "i.faiss").read_bytes())
    data[200] ^= 1
    (tmp_path / "i.faiss").write_bytes(data)
    with pytest.raises(UserError, match="not the file that was written: delete it"):
        index.open_index(asked, other, 50)
    (tmp_path / "i.faiss").write_bytes(b"IxFI and something else")
    with pytest.raises(UserError, match="is there already and is not an index"):
        search.check_search(asked)


def test_indices_that_cannot_be(tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss", reason="pip install faiss-cpu")
    for factory in ("Nonsense", "IVF100,Flat", "PQ7"):
        with pytest.raises(UserError, match=rf"--index={factory}: faiss can't build it of 7 x 3"):
            index.open_index(search.Search("g", index=factory), a_gallery(), 1)
    monkeypatch.setattr(index, "LARGE", 6)
    monkeypatch.setattr(index, "MANY", 2)
    assert index.open_index(search.Search("g", index="exact"), a_gallery(), 2) is None
    assert index.open_index(search.Search("g"), a_gallery(), 2).about["factory"] == "IVF2,Flat"


def test_an_index_that_has_nothing_to_find_or_cannot_search(tmp_path, capsys):
    pytest.importorskip("faiss")
    one = a_gallery(1)
    index.open_index(search.Search("g", index="Flat"), one, 1)
    assert "100.0% of the 5 nearest pictures are found" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--index=IVF0,Flat: faiss can't build it of 7 x "):
        index.open_index(search.Search("g", index="IVF0,Flat"), a_gallery(), 1)


def test_the_picture_that_an_index_cannot_learn_from_is_named(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(index, "MOST_TRAINING", 10)
    rows = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    rows[80:] = np.nan
    gallery = features.Gallery(rows, np.array([str(n) for n in range(100)], object), None, None, None, "g.npz")
    with pytest.raises(UserError, match=r"g\.npz: the features of picture 81 are NaN"):
        index.open_index(search.Search("g", index="IVF2,Flat"), gallery, 1)


def test_parquet_as_viewers_read_it(found, birds, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    pq = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    folder, flags = found
    path = f"{tmp_path}/f.parquet"
    for _ in range(2):  # an earlier one is replaced
        run_here(*flags, "--input", birds.val_list, f"--feature_file={path}", "--top_k=4")
    table, arrays = pq.read_table(path), np.load(folder / "g.npz")
    assert table.column_names == ["path", "label", "vector", "neighbours"]
    assert table["path"].to_pylist() == arrays["paths"].tolist()
    assert table["label"].to_pylist() == arrays["labels"].tolist()
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), arrays["features"])
    order, cosine = sorted_cosines(arrays["features"], arrays["features"], [[row] for row in range(48)])
    ranks = table["neighbours"].to_pylist()
    assert [row["ids"] for row in ranks] == order[:, :4].tolist()
    np.testing.assert_allclose([row["distances"] for row in ranks], 1 - cosine[:, :4], atol=2e-6)
    pq.write_table(pa.table({"path": ["a"]}), f"{tmp_path}/mine.parquet")
    assert not features.is_feature_file(f"{tmp_path}/mine.parquet")
    monkeypatch.setattr(features, "BLOCK_BYTES", 1)
    features.write(path, a_gallery(3)._replace(paths=np.array(["a", "\udcff", "c"], object)))
    assert pq.read_table(path)["path"].to_pylist() == ["a", "\\udcff", "c"]
