"""Files of features: written and read back, those of others, damaged ones, and what they take of memory."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_search import a_gallery, sorted_cosines

from retrieval import features, neighbours
from utility import UserError


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("block", [1, 2**24])
def test_npz_there_and_back(tmp_path, monkeypatch, labelled, block):
    monkeypatch.setattr(features, "BLOCK_BYTES", block)
    gallery, path = a_gallery(labelled=labelled), str(tmp_path / "g.npz")
    features.write(path, gallery)
    names = ["features", "paths", *(["labels", "classes"] if labelled else []), "made_by", "folder"]
    with np.load(path) as file:  # as NumPy reads it
        assert sorted(file.files) == sorted(names)
        assert np.array_equal(file["features"], gallery.features) and file["features"].dtype == np.float32
        assert file["paths"].tolist() == gallery.paths.tolist()
    found = features.open_features(path)
    assert found.made_by == ["weights=1"] and features.is_feature_file(path)
    assert np.array_equal(found.features[2:5], gallery.features[2:5]) and len(found.features[9:]) == 0
    assert np.array_equal(found.features[np.array([5, 0])], gallery.features[[5, 0]])
    assert found.paths[np.array([6])].tolist() == [gallery.paths[6]]
    if labelled:
        assert found.labels[:].tolist() == list(range(7))
        assert features.class_names(found, {1, -2, 5}) == {1: "One", -2: "a b"}
        odd = gallery._replace(classes=np.array(["--1 x", "1.0 y", "\u0661 z", "-2 b"]))
        assert features.class_names(odd, {1, -1, -2}) == {-2: "b"}


def test_paths_are_reached_from_another_folder(tmp_path, monkeypatch):
    gallery, path = a_gallery(), str(tmp_path / "g.npz")
    gallery = gallery._replace(paths=np.array(["a/1.jpg", "/b/2.jpg", *gallery.paths[2:]], object))
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    features.write(path, gallery)
    assert features.open_features(path).paths[:2].tolist() == ["a/1.jpg", "/b/2.jpg"]
    monkeypatch.chdir(tmp_path)
    found = features.open_features(path)
    assert found.paths[np.array([1, 0])].tolist() == ["/b/2.jpg", "made/a/1.jpg"] and len(found.paths) == 7
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_text("")  # which has moved with the file
    assert found.paths[:1].tolist() == ["a/1.jpg"]
    os.rmdir(tmp_path / "made")  # on another machine: as they are
    assert features.open_features(path).paths[:1].tolist() == ["a/1.jpg"]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_csv_is_known_again(tmp_path, labelled):
    gallery, path = a_gallery(labelled=labelled), tmp_path / "g.csv"
    features.write(str(path), gallery._replace(features=gallery.features[:, :1]))
    assert features.is_feature_file(str(path))
    path.write_text("path,label,mine\n")
    assert not features.is_feature_file(str(path))


@pytest.mark.parametrize("kind", [np.float16, np.float64, ">f4"])
def test_other_types_and_older_files_are_read(tmp_path, capsys, kind):
    path, gallery = str(tmp_path / "g.npz"), a_gallery()
    np.savez(path, features=gallery.features.astype(kind), paths=np.array(["a.jpg"] * 7))
    found = features.open_features(path)
    order, _ = sorted_cosines(gallery.features, gallery.features)
    assert np.array_equal(neighbours.nearest(gallery.features, found.features, 3).index, order[:, :3])
    features.check_made_by(found.source, found.made_by, ["weights=1", "model=M"])
    assert capsys.readouterr().out == f"note: {path} does not say of which weights its features are: taken as these\n"


HOSTILE = {
    "no array": (dict(paths=np.array(["a"])), "no features in it"),
    "pickle": (dict(features=np.array([[{}]]), paths=np.array(["a"])), "which is not read"),
    "pickled paths": (dict(features=np.ones((1, 2)), paths=np.array(["a"], object)), "which is not read"),
    "complex": (dict(features=np.ones((1, 2), complex), paths=np.array(["a"])), "features is complex128"),
    "by columns": (dict(features=np.asfortranarray(np.ones((3, 2))), paths=np.array(["a"] * 3)), "which is not read"),
    "flat": (dict(features=np.ones(3), paths=np.array(["a"] * 3)), "features is float64 [3]"),
    "lengths": (dict(features=np.ones((3, 2)), paths=np.array(["a"])), "3 features and 1 others"),
    "labels": (dict(features=np.ones((1, 2)), paths=np.array(["a"]), labels=np.ones(1)), "labels is float64 [1]"),
    "nothing": (dict(features=np.ones((0, 2)), paths=np.zeros(0, "U1")), "0 features"),
    "no values": (dict(features=np.ones((4, 0)), paths=np.array(["a"] * 4)), "features is float64 [4, 0]"),
    "long paths": (dict(features=np.ones((1, 2)), paths=np.array(["a" * 70_000])), "paths is <U70000"),
    "long text": (dict(features=np.ones((1, 2)), paths=np.array(["a"]), made_by=np.array(["a" * 50_000])), "too long"),
    "many": ({f"{'x' * 1000}{i}": np.ones(1) for i in range(200)}, "too many arrays"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_galleries_that_are_none(tmp_path, case):
    arrays, message = HOSTILE[case]
    path = str(tmp_path / "g.npz")
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}: no features that can be used: .*{re.escape(message)}"):
        features.open_features(path)


def test_damaged_galleries(tmp_path):
    path, whole = tmp_path / "g.npz", tmp_path / "whole.npz"
    np.savez_compressed(path, features=np.zeros((10**6, 8)), paths=np.array(["a"] * 10**6))
    with pytest.raises(UserError, match=r"features.npy is compressed"):
        features.open_features(str(path))
    features.write(str(whole), a_gallery())
    data = whole.read_bytes()
    for count in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:count])
        with pytest.raises(UserError, match="no features that can be used"):
            features.open_features(str(path))
    for old, new in ((b"(7, 3)", b"(9, 3)"), (b"(7, 3)", b"(-7,3)"), (b"'<f4'", b"'|O'  "[:5]), (b"(7,)", b"(8,)")):
        assert old in data
        path.write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match="no features that can be used"):
            features.open_features(str(path))
    # Text that is none: characters beyond the last one.
    start = data.index("photos".encode("utf-32-le"))
    path.write_bytes(data[:start] + b"\xff\xff\xff\xff" + data[start + 4 :])
    with pytest.raises(UserError, match="text that is none"):
        features.open_features(str(path)).paths[:1]
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("pipe.npz", "absent.npz", "."):
        with pytest.raises(UserError, match="no features that can be used"):
            features.open_features(str(tmp_path / name))
    # One that becomes shorter while it is open.
    features.write(str(whole), a_gallery(20_000))
    found = features.open_features(str(whole))
    os.truncate(whole, 100_000)
    with pytest.raises(UserError, match="has become shorter"):
        found.features[:]


PEAK = """
import sys, tracemalloc
sys.path.insert(0, {root!r})
import numpy as np
from retrieval import features, neighbours
vectors = np.random.default_rng(0).standard_normal((200_000, 64), dtype=np.float32)
paths = np.array([str(i) for i in range(len(vectors))], object)
tracemalloc.start()
features.write({path!r}, features.Gallery(vectors, paths, None, None, None, ""))
written = tracemalloc.get_traced_memory()[1]
tracemalloc.reset_peak()
gallery = features.open_features({path!r})
found = neighbours.nearest(vectors[:300], gallery.features, 5)
print(written, tracemalloc.get_traced_memory()[1], (found.index[:, 0] == np.arange(300)).all())
"""


def test_no_second_copy_of_the_features(tmp_path):
    code = PEAK.format(root=ROOT, path=str(tmp_path / "g.npz"))
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    written, searched, right = lines.splitlines()[-1].split()
    whole = 200_000 * 64 * 4  # 51 MB; blocks are of 17 MB, and there are several of these in the search
    assert right == "True" and os.path.getsize(tmp_path / "g.npz") > whole
    assert int(written) < 0.5 * whole and int(searched) < 0.9 * whole
