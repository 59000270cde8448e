"""data/make_sample.py: run as a user does, and its species against what the README says of them."""

import json
import os
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

sys.path.insert(0, os.path.join(ROOT, "data"))

import make_sample

SMALL = ["--species=4", "--images=3", "--size=48"]


def make(folder, *flags, **options):
    return run("data/make_sample.py", f"--output_dir={folder}", *flags, **options)


def contents(folder):
    """-> dict path -> bytes of all files below a folder."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found


def read_list(folder, part):
    """-> paths, labels."""
    with open(os.path.join(folder, f"birds_{part}.txt")) as file:
        rows = [line.rsplit(None, 1) for line in file]
    return [path for path, _ in rows], np.array([int(label) for _, label in rows])


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The sample as `make quickstart` gets it."""
    folder = str(tmp_path_factory.mktemp("default") / "sample")
    result = make(folder)
    assert result.stderr == "" and len(result.stdout.splitlines()) == 1, result.stdout + result.stderr
    return folder


def test_layout(sample):
    with open(os.path.join(sample, "sample.json")) as file:
        species = json.load(file)["species"]
    assert len(species) >= 40
    folders = sorted(os.listdir(os.path.join(sample, "images")))
    assert folders == [f"{number:03d}.{bird['name']}" for number, bird in enumerate(species, 1)]
    for folder, bird in zip(folders, species):
        names = sorted(os.listdir(os.path.join(sample, "images", folder)))
        assert names == [f"{bird['name']}_{number:04d}.jpg" for number in range(1, len(names) + 1)]
        assert len(names) >= 20
        with Image.open(os.path.join(sample, "images", folder, names[-1])) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 96))
    lists = ["birds_train.txt", "birds_val.txt", "birds_classes.txt"]
    assert sorted(os.listdir(sample)) == sorted(["images", "sample.json", *lists])


def test_lists_split_the_species(sample):
    train_paths, train = read_list(sample, "train")
    val_paths, val = read_list(sample, "val")
    half = len(os.listdir(os.path.join(sample, "images"))) // 2
    assert set(train) == set(range(1, half + 1)) and set(val) == set(range(half + 1, 2 * half + 1))
    assert all(path.startswith(f"images/{label:03d}.") for path, label in zip(val_paths, val))
    assert all(os.path.isfile(os.path.join(sample, path)) for path in train_paths + val_paths)


@pytest.mark.parametrize("middle", [False, True])
def test_colours_alone_do_not_tell_the_species_apart(sample, middle):
    """Nearest neighbours by colour histogram, of the whole picture and of its middle, where the bird is."""
    paths, labels = read_list(sample, "val")
    features = []
    for path in paths:
        image = cv2.imread(os.path.join(sample, path))
        image = image[24:-24, 24:-24] if middle else image
        histogram = cv2.calcHist([image], [0, 1, 2], None, [4, 4, 4], [0, 256] * 3).ravel()
        features.append(np.sqrt(histogram / histogram.sum()))
    similarity = np.stack(features) @ np.stack(features).T
    np.fill_diagonal(similarity, -1)
    recall = (labels[similarity.argmax(axis=1)] == labels).mean()
    print(f"recall@1 of colour histograms, middle={middle}: {recall:.3f}")
    assert recall < 0.45


@pytest.mark.parametrize("count, seed", [(96, 0), (96, 1), (200, 0), (200, 2)])
def test_two_species_differ_in_two_traits(count, seed):
    species = make_sample.draw_species(count, seed)
    names = [bird.pop("name") for bird in species]
    assert len(set(names)) == count and all(name.replace("_", "").isalpha() for name in names)
    for i, a in enumerate(species):
        assert all(sum(a[trait] != b[trait] for trait in a) >= 2 for b in species[:i])
        assert len({a[part] for part in make_sample.COLOURED}) == 4


def test_many_species_share_their_colours():
    species = make_sample.draw_species(96, 0)
    dresses = [frozenset(bird[part] for part in make_sample.COLOURED) for bird in species]
    assert all(dresses.count(dress) >= 16 for dress in dresses)


def test_every_shape_is_seen():
    rng = np.random.default_rng(0)
    traits = make_sample.draw_species(2, 0)[0]
    for trait, values in make_sample.SHAPES.items():
        pictures = [
            make_sample.draw_picture({**traits, trait: value}, np.random.default_rng(5), 96) for value in values
        ]
        for i, a in enumerate(pictures):
            assert a.shape == (96, 96, 3) and a.dtype == np.uint8
            assert all((a != b).any(axis=2).mean() > 0.005 for b in pictures[:i]), trait
    assert (make_sample.draw_picture(traits, rng, 96) != make_sample.draw_picture(traits, rng, 96)).mean() > 0.5


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        make(tmp_path / name, *SMALL, f"--seed={seed}")
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert len(a) == len(c) == 4 * 3 + 4
    assert not set(a.values()) & {data for path, data in c.items() if path.endswith(".jpg")}
    # A larger sample has the smaller one's pictures in it.
    make(tmp_path / "d", "--species=6", "--images=4", "--size=48", "--seed=7")
    d = contents(tmp_path / "d")
    assert all(d[path] == data for path, data in a.items() if path.endswith(".jpg"))


def test_overwrite_replaces_a_sample(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    make(folder, *SMALL)  # an empty folder is as good as none
    (folder / ".DS_Store").write_text("what a file viewer leaves")
    make(folder, "--species=2", "--images=2", "--size=32", "--overwrite")
    assert len(contents(folder)) == 2 * 2 + 4
    assert os.listdir(tmp_path) == ["birds"]


def test_overwrite_replaces_a_sample_that_has_the_earlier_names(tmp_path):
    folder = tmp_path / "birds"
    make(folder, *SMALL)
    new = contents(folder)
    for name, earlier in zip(make_sample.LISTS, make_sample.EARLIER_LISTS):
        os.rename(folder / name, folder / earlier)
    make(folder, *SMALL, "--overwrite")
    assert contents(folder) == new
    # Beside lists of the new names they are somebody's own.
    (folder / "CUB200_val.txt").write_text("mine")
    assert "CUB200_val.txt" in refused(folder, *SMALL, "--overwrite")
    assert (folder / "CUB200_val.txt").read_text() == "mine"


def test_overwrite_follows_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        make(tmp_path / "link", *SMALL, "--overwrite")
    assert (tmp_path / "link").is_symlink() and len(contents(tmp_path / "real")) == 4 * 3 + 4


def refused(folder, *flags):
    """Runs the script into a mistake; -> its one line on stderr."""
    result = make(folder, *flags, status=2)
    assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_what_is_there_is_kept(tmp_path):
    folder = tmp_path / "birds"
    make(folder, *SMALL)
    before = contents(tmp_path)
    assert "not empty: --overwrite" in refused(folder, *SMALL)
    assert contents(tmp_path) == before

    for path in ("notes.txt", "images/001.txt", "extra/mine.jpg"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("mine")
        before = contents(tmp_path)
        assert path in refused(folder, *SMALL, "--overwrite")
        assert contents(tmp_path) == before
        (folder / path).unlink()


def test_what_is_no_file_of_ours_is_kept(tmp_path):
    """An empty folder, a link, a pipe, a picture with too high a number, and what is beside a file viewer's."""
    folder = tmp_path / "birds"
    make(folder, *SMALL)
    (species,) = (folder / "images").glob("001.*")
    picture = sorted(species.iterdir())[0]
    for path, put in (
        (folder / "mine", os.mkdir),
        (folder / "images" / "mine", os.mkdir),
        (species / ".DS_Store", os.mkdir),
        (species / "link", lambda path: os.symlink("/", path)),
        (folder / "Thumbs.db", lambda path: os.symlink("mine", path)),
        (species / "pipe", os.mkfifo),
        (str(picture).replace("_0001", "_0004"), lambda path: os.link(picture, path)),
        (str(picture).replace("_0001", "_0000"), lambda path: os.link(picture, path)),
    ):
        put(path)
        assert make_sample.foreign_file(str(folder)) == str(path)
        (os.rmdir if os.path.isdir(path) and not os.path.islink(path) else os.remove)(path)
    (folder / "mine").mkdir()
    (folder / "mine" / ".DS_Store").write_text("mine")
    assert make_sample.foreign_file(str(folder)) == f"{folder}/mine/.DS_Store"
    (folder / "mine" / ".DS_Store").unlink()
    assert f"not all of it comes from this script: {folder}/mine\n" in refused(folder, *SMALL, "--overwrite")


@pytest.mark.parametrize(
    "mark",
    [
        b'{"species": [{"name": "Mine"}, {"name": "b"}], "images": 10000000}',
        b'{"species": [{"name": "Mine"}, {"name": "b"}], "images": true}',
        b'{"species": [{"name": "Mine"}, {"name": "b"}], "images": 2.0}',
        b'{"species": [{"name": "Mine"}, {"name": "b"}], "images": NaN}',
        b'{"species": [' + b'{"name": "Mine"},' * 201 + b'{"name": "b"}], "images": 2}',
        b'{"species": [{"name": "Mine"}, {"name": "b"}], "images": 2' + b" " * (1 << 21) + b"}",
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"\xff\xfe",
        "pipe",
        "/dev/zero",
    ],
    ids=["many", "bool", "float", "nan", "species", "spaces", "open", "nested", "utf-16", "pipe", "zero"],
)
def test_a_mark_that_is_none_costs_nothing(tmp_path, mark):
    (tmp_path / "images" / "001.Mine").mkdir(parents=True)
    (tmp_path / "images" / "001.Mine" / "Mine_0001.jpg").write_text("mine")
    if isinstance(mark, bytes):
        (tmp_path / "sample.json").write_bytes(mark)
    elif mark == "pipe":
        os.mkfifo(tmp_path / "sample.json")
    else:
        (tmp_path / "sample.json").symlink_to(mark)
    assert make_sample.foreign_file(str(tmp_path)) == f"{tmp_path}/sample.json (missing or unreadable)"


def test_names_are_shown_in_one_line(tmp_path):
    folder = tmp_path / "a\nb\x1b[2J"
    assert make(folder, *SMALL).stdout.count("\n") == 1
    assert r"a\nb\x1b[2J: is not empty" in refused(folder, *SMALL)


@pytest.mark.parametrize(
    "mark", [None, "", "[]", "{}", '{"species": [1], "images": 2}', '{"species": [], "images": 2}']
)
def test_overwrite_refuses_other_folders(tmp_path, mark):
    (tmp_path / "images" / "001.Mine").mkdir(parents=True)
    (tmp_path / "images" / "001.Mine" / "Mine_0001.jpg").write_text("mine")
    if mark is not None:
        (tmp_path / "sample.json").write_text(mark)
    before = contents(tmp_path)
    assert "not deleted" in refused(tmp_path, *SMALL, "--overwrite")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--species=1"], "--species: 1 is out of range: must be at least 2 and at most 200"),
        (["--species=201"], "--species: 201"),
        (["--images=1"], "--images: 1"),
        (["--size=8"], "--size: 8"),
        (["--seed=-1"], "--seed: -1"),
        (["--species=many"], "expected int, not 'many'"),
        (["--specie=4"], "unrecognized arguments: --specie=4"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    assert message in refused(tmp_path / "birds", *flags)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in refused(file, *SMALL)
    assert "cannot write" in refused(file / "birds", *SMALL)
    if os.path.isdir("/proc"):  # a folder where even root cannot write
        assert "cannot write" in refused("/proc/birds", *SMALL)
    assert contents(tmp_path) == {"file": b"mine"}


def test_paddle_is_not_imported(tmp_path):
    (tmp_path / "paddle.py").write_text("raise SystemExit('imported paddle')")
    make(tmp_path / "birds", *SMALL, PYTHONPATH=str(tmp_path))


def test_help():
    text = run("data/make_sample.py", "--help").stdout
    assert "default: data/sample" in text and "default: 96" in text
