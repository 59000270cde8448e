"""data/cars196.py on small copies of the layouts that people have, and matlab.py against files that scipy writes."""

import os
import shutil

import data_sets
import numpy as np
import pytest
from conftest import listing, read_rows
from data_sets import CAR_LABELS, CAR_NAMES, prepare, zipped

import cars196
import matlab
import published
from utility import UserError

scipy = pytest.importorskip("scipy")

ANY = "--any_counts"


def check_lists(folder, expected):
    """Train has the classes to 98, val the others, whatever the released flags say. -> the paths of train"""
    rows = [read_rows(os.path.join(folder, f"cars196_{part}.txt")) for part in ("train", "val", "classes")]
    labels = [[int(row.rpartition(" ")[2]) for row in part] for part in rows[:2]]
    assert labels == [[label for label in CAR_LABELS if label < 99], [label for label in CAR_LABELS if label > 98]]
    assert rows[2][:3] == [f"{n} {CAR_NAMES[n - 1]}" for n in (1, 2, 3)] and len(rows[2]) == 6
    paths = [row.rpartition(" ")[0] for part in rows[:2] for row in part]
    assert all(os.path.isfile(os.path.join(folder, path)) for path in paths)
    assert paths[:2] == expected


@pytest.mark.parametrize("compressed", [True, False])
def test_car_ims(tmp_path, compressed):
    home = tmp_path / "cars196"
    data_sets.cars_combined(str(home), compressed)
    result = prepare("cars196.py", home, ANY)
    check_lists(home, ["car_ims/000001.jpg", "car_ims/000002.jpg"])
    assert f"found Cars196, car_ims and cars_annos.mat: 12 images of 6 classes in {home}" in result.stdout
    assert "cars_annos.mat is not the published file: its md5 is " in result.stderr
    assert (
        "train: 6 images of 3 classes instead of 8054 of 98; val: 6 images of 3 classes instead of 8131"
        in result.stderr
    )
    before = listing(home)
    prepare("cars196.py", tmp_path, ANY)
    assert listing(home) == before
    assert "complete it, or list what is there: --any_counts" in prepare("cars196.py", home, status=2).stderr


def test_the_archives_of_the_challenge(tmp_path):
    data_sets.cars_devkit(str(tmp_path))
    for name, folder in (("cars_train", "cars_train"), ("cars_test", "cars_test"), ("car_devkit", "devkit")):
        archive = shutil.make_archive(str(tmp_path / name), "gztar", tmp_path, folder)
        os.rename(archive, tmp_path / f"{name}.tgz")
        shutil.rmtree(tmp_path / folder)
    result = prepare("cars196.py", tmp_path, ANY)
    check_lists(tmp_path, ["cars_test/00001.jpg", "cars_train/00001.jpg"])
    assert result.stderr.count("is not the published file: it has ") == 4
    # Nested, as copies on Kaggle are; then without the labels of the test pictures.
    for name in ("cars_train", "cars_test"):
        os.rename(tmp_path / name, tmp_path / "x")
        os.makedirs(tmp_path / name)
        os.rename(tmp_path / "x", tmp_path / name / name)
    prepare("cars196.py", tmp_path, ANY)
    check_lists(tmp_path, ["cars_test/cars_test/00001.jpg", "cars_train/cars_train/00001.jpg"])
    os.rename(tmp_path / "cars_test_annos_withlabels.mat", tmp_path / "devkit" / "cars_test_annos.mat")
    error = prepare("cars196.py", tmp_path, ANY, status=2).stderr
    assert "but not cars_test_annos_withlabels.mat, as those of the devkit have no classes" in error


def test_the_copy_by_class_folders(tmp_path):
    (tmp_path / "archive.zip").write_bytes(zipped(data_sets.cars_by_folders()))
    result = prepare("cars196.py", tmp_path / "archive.zip", ANY)
    home = tmp_path / "archive"
    check_lists(home, [f"car_data/car_data/{part}/Zeta C-V Van 2012/00001.jpg" for part in ("test", "train")])
    assert "is not the published" not in result.stderr
    os.remove(home / "names.csv")
    error = prepare("cars196.py", home, ANY, status=2).stderr
    assert "car_data of Cars196, but not anno_train.csv and names.csv" in error
    data_sets.write(home, {"names.csv": "\n".join(CAR_NAMES[:-1])})
    assert "names.csv: it does not name 196 classes" in prepare("cars196.py", home, ANY, status=2).stderr
    data_sets.write(home, {"names.csv": "\n".join(CAR_NAMES), "anno_test.csv": "00001.jpg,1,2,3,4,197\n"})
    assert "anno_test.csv:1: not a row" in prepare("cars196.py", home, ANY, status=2).stderr


def test_the_published_counts_are_taken_without_a_word(capsys):
    labels = [1 + n % 98 for n in range(8054)] + [99 + n % 98 for n in range(8131)]
    rows = [(f"{n}.jpg", label, (1, 1, 2, 2)) for n, label in enumerate(labels)]
    found = cars196.as_found("x", [], rows, CAR_NAMES, "x")
    published.check_counts("x", cars196.CARS, found.listed, False)
    assert capsys.readouterr() == ("", "") and found.names[3] == "AM General 2000"
    assert found.boxes()["0.jpg"] == (0, 0, 2, 2)  # from 0, the end exclusive


def test_half_a_layout(tmp_path):
    data_sets.cars_combined(str(tmp_path))
    os.rename(tmp_path / "cars_annos.mat", tmp_path / "x.mat")
    assert "car_ims of Cars196, but not cars_annos.mat" in prepare("cars196.py", tmp_path, ANY, status=2).stderr
    os.rename(tmp_path / "x.mat", tmp_path / "cars_annos.mat")
    shutil.rmtree(tmp_path / "car_ims")
    assert "cars_annos.mat of Cars196, but not car_ims" in prepare("cars196.py", tmp_path, ANY, status=2).stderr


def broken(path, kind):
    rows = data_sets.car_rows("relative_im_path", ["car_ims/000001.jpg"], [1])
    arrays = {"annotations": rows, "class_names": CAR_NAMES}
    if kind == "no class_names":
        del arrays["class_names"]
    elif kind == "few names":
        arrays["class_names"] = CAR_NAMES[:3]
    elif kind == "names that are numbers":
        arrays["class_names"] = list(range(196))
    elif kind == "no column":
        arrays["annotations"] = [{name: value for name, value in rows[0].items() if name != "bbox_x2"}]
    elif kind == "class of a half":
        rows[0]["class"] = 1.5
    elif kind == "class 0":
        rows[0]["class"] = 0
    elif kind == "NaN":
        rows[0]["bbox_x1"] = np.nan
    elif kind == "text for a number":
        rows[0]["bbox_x1"] = "three"
    elif kind == "number for a text":
        rows[0]["relative_im_path"] = 3
    elif kind == "no table":
        arrays["annotations"] = np.eye(3)
    elif kind == "an empty cell":
        rows[0]["class"] = np.zeros((0, 0))
    elif kind == "long text":
        rows[0]["relative_im_path"] = "a" * 20_000
    data_sets.mat(path, **arrays)


@pytest.mark.parametrize(
    "kind",
    [
        "no class_names", "few names", "names that are numbers", "no column", "class of a half", "class 0", "NaN",
        "text for a number", "number for a text", "no table", "an empty cell", "long text", "cut", "7.3", "text",
        "empty", "holes",
    ],
)  # fmt: skip
def test_annotations_that_are_none(tmp_path, kind):
    data_sets.write(tmp_path, {"car_ims/000001.jpg": data_sets.jpeg(0)})
    path = tmp_path / "cars_annos.mat"
    broken(str(path), kind)
    content = {
        "cut": path.read_bytes()[:300],
        "7.3": b"MATLAB 7.3 MAT-file".ljust(600),
        "text": b"MATLAB",
        "empty": b"",
    }
    path.write_bytes(content.get(kind, path.read_bytes()))
    if kind == "holes":
        os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match=r"cars_annos\.mat: ") as error:
        cars196.find(str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_path_outside_is_never_taken(tmp_path):
    data_sets.write(tmp_path, {"secret.jpg": data_sets.jpeg(0), "cars/car_ims/1.jpg": data_sets.jpeg(1)})
    rows = data_sets.car_rows(
        "relative_im_path", ["car_ims/1.jpg", "../secret.jpg", f"{tmp_path}/secret.jpg"], [1, 1, 99]
    )
    data_sets.mat(str(tmp_path / "cars" / "cars_annos.mat"), annotations=rows, class_names=CAR_NAMES)
    error = prepare("cars196.py", tmp_path / "cars", status=2).stderr
    assert "2 of 3 pictures are missing" in error
    assert "no pictures for the list 'val'" in prepare("cars196.py", tmp_path / "cars", ANY, status=2).stderr


def test_numbers_and_texts_of_matlab_are_what_scipy_wrote(tmp_path):
    rng = np.random.default_rng(0)
    kinds = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64, np.float32, np.float64)
    rows = [
        {"n": kind(rng.integers(0, 100) + (0.5 if kind in (np.float32, np.float64) else 0)), "text": "x" * number + "é"}
        for number, kind in enumerate(kinds, 1)
    ]
    for compressed in (True, False):
        path = str(tmp_path / "a.mat")
        data_sets.mat(path, before=np.eye(100), table=rows, cells=["a", "Citroën"], compressed=compressed)
        with matlab.reading(path) as mat:
            assert list(matlab.rows(matlab.find(mat, "table"), "n", "text")) == [tuple(row.values()) for row in rows]
            assert [matlab.value(cell) for cell in matlab.cells(matlab.find(mat, "cells"))] == ["a", "Citroën"]
            with pytest.raises(ValueError, match="no array 'absent' in it"):
                matlab.find(mat, "absent")
