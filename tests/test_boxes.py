"""data/boxes.py: the rule of the crops in plain NumPy, whole data sets that are cut, and what happens on the way."""

import io
import os
import signal
import subprocess
import sys
import time

import data_sets
import numpy as np
import pytest
from archives import tar
from conftest import ROOT, listing, read_rows
from data_sets import prepare
from PIL import Image

import boxes
import cub200
import published
from transforms import MEAN_COLOR, BadImage
from utility import UserError

ANY = "--any_counts"


# ---------------------------------------------------------------- the rule


def numbered(height, width):
    """A picture [H, W, 3] in which each pixel says where it was."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.full_like(x, 7)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    "box, margin, padding, rows, columns",
    [
        ((10, 5, 30, 15), 0, "none", range(5, 15), range(10, 30)),
        ((10.2, 5.9, 29.1, 14.1), 0, "none", range(5, 15), range(10, 30)),  # outwards to whole pixels
        ((10, 5, 30, 15), 0.1, "none", range(4, 16), range(8, 32)),
        ((-4, -3, 30, 15), 0.1, "none", range(0, 17), range(0, 33)),  # what is outside goes before the margin
        ((30, 35, 60, 60), 0, "none", range(35, 40), range(30, 50)),
        ((0, 0, 50, 40), 10, "none", range(40), range(50)),
        ((10, 5, 30, 15), 0, "context", range(0, 20), range(10, 30)),
        ((10, 2, 30, 8), 0, "context", range(0, 20), range(10, 30)),  # moved into the picture
        ((40, 10, 50, 30), 0, "context", range(10, 30), range(30, 50)),
        ((0, 5, 50, 15), 0, "context", [None] * 5 + list(range(40)) + [None] * 5, range(50)),  # too small for it
        ((10, 5, 30, 15), 0, "mean", [None] * 5 + list(range(5, 15)) + [None] * 5, range(10, 30)),
        ((10, 5, 13, 15), 0, "mean", range(5, 15), [None] * 3 + [10, 11, 12] + [None] * 4),
    ],
)
def test_the_rule(box, margin, padding, rows, columns):
    """A row or column that is None is of the mean colour."""
    image = numbered(40, 50)
    expected = np.empty((len(rows), len(columns), 3), np.uint8)
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            expected[i, j] = MEAN_COLOR if y is None or x is None else image[y, x]
    found = boxes.cut(image, box, boxes.Crop(margin, padding))
    assert found.shape == expected.shape and (found == expected).all()


@pytest.mark.parametrize(
    "box", [(5, 5, 5, 9), (9, 5, 5, 9), (60, 5, 70, 9), (-9, 5, 0, 9), (np.nan, 5, 9, 9), (0, 0, np.inf, 9)]
)
def test_boxes_that_are_none(box):
    for padding in ("none", "context", "mean"):
        with pytest.raises(BadImage, match="its box"):
            boxes.cut(numbered(40, 50), box, boxes.Crop(0.1, padding))


def test_a_square_has_limits_and_a_folder_says_its_rule(monkeypatch):
    monkeypatch.setattr(boxes.transforms, "MAX_PIXELS", 1000)
    with pytest.raises(BadImage, match="a square of 50 x 50 pixels"):
        boxes.cut(numbered(40, 50), (0, 0, 50, 2), boxes.Crop(0, "mean"))
    folders = [boxes.Crop(*rule).folder for rule in ((0.0, "none"), (0.1, "none"), (0.25, "context"), (0.0, "mean"))]
    assert folders == ["boxes", "boxes_margin_0.1", "boxes_margin_0.25_context", "boxes_mean"]


# ---------------------------------------------------------------- whole data sets


def check_crops(folder, prefix, sizes, *parts):
    """The lists name crops, all of one size and near in colour to the originals' upper left; -> the paths."""
    paths = [
        row.rpartition(" ")[0] for part in parts for row in read_rows(os.path.join(folder, f"{prefix}_{part}.txt"))
    ]
    for path in paths:
        with Image.open(os.path.join(folder, path)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", sizes), path
    return paths


def test_cub_of_2011(tmp_path):
    data_sets.write(tmp_path, data_sets.birds_2011())
    out = prepare("cub200.py", tmp_path, ANY, "--crop_boxes").stdout
    assert f"cutting 8 pictures to their boxes, into {tmp_path}/boxes" in out
    paths = check_crops(tmp_path, "CUB200_boxes", (18, 11), "train", "val")
    assert paths[0] == "boxes/CUB_200_2011/images/001.Bird/Bird_1_0.jpg" and len(paths) == 8
    # Nothing is cut twice, and another rule has another folder and other lists.
    before = listing(tmp_path)
    prepare("cub200.py", tmp_path, ANY, "--crop_boxes")
    assert listing(tmp_path) == before
    prepare("cub200.py", tmp_path, ANY, "--crop_boxes", "--box_padding=mean", "--box_margin=0.1")
    check_crops(tmp_path, "CUB200_boxes_margin_0.1_mean", (22, 22), "train", "val")
    prepare("cub200.py", tmp_path, ANY)
    assert read_rows(tmp_path / "CUB200_train.txt")[0] == "CUB_200_2011/images/001.Bird/Bird_1_0.jpg 1"
    os.remove(tmp_path / "CUB_200_2011" / "images.txt")
    error = prepare("cub200.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    assert "bounding_boxes.txt: --crop_boxes needs images.txt beside it, which is not there" in error


def test_cub_of_2010_with_boxes_of_matlab(tmp_path):
    pytest.importorskip("scipy")
    data_sets.write(tmp_path, data_sets.birds())
    for name in data_sets.birds():
        if "._" not in name:
            path = tmp_path / "annotations-mat" / f"{name[len('images/') : -len('.jpg')]}.mat"
            box = {"left": 3, "top": 5, "right": 20, "bottom": 15}
            data_sets.mat(str(path), bbox=box, seg=np.zeros((30, 40), np.uint8), wikipedia_url="http://x.org")
    data_sets.write(tmp_path, {"annotations-mat/001.Bird/._Bird_1_0.mat": b"mac"})
    prepare("cub200.py", tmp_path, ANY, "--crop_boxes")
    path = check_crops(tmp_path, "CUB200_boxes", (18, 11), "train", "val")[-1]  # pixels 3 to 20 of 1 to 40
    whole, part = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in (path[len("boxes/") :], path))
    assert abs(part - whole[4:15, 2:20]).max() <= 6
    os.remove(tmp_path / "annotations-mat" / "102.Bird" / "Bird_102_0.mat")
    error = prepare("cub200.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    assert "1 of 8 pictures have no box (first: images/102.Bird/Bird_102_0.jpg)" in error
    data_sets.write(tmp_path, {"annotations-mat/102.Bird/Bird_102_0.mat": b"MATLAB"})
    error = prepare("cub200.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    assert "Bird_102_0.mat: cannot read it: no MATLAB 5 file" in error


def test_the_download_goes_on_to_crops(tmp_path, monkeypatch):
    """The annotations are unpacked beside the pictures; another pack than the published one has counts of its own."""
    pytest.importorskip("scipy")
    content = {name: data for name, data in data_sets.birds().items() if "._" not in name}
    data_sets.write(tmp_path, content)
    box = {"left": 3, "top": 5, "right": 20, "bottom": 15}
    members = {}
    for name in content:
        data_sets.mat(str(tmp_path / "x.mat"), bbox=box)
        members[f"annotations-mat/{name[len('images/') : -len('.jpg')]}.mat"] = (tmp_path / "x.mat").read_bytes()
    packed = tar({**members, "annotations-mat/._001.Bird": b"mac", "annotations-mat/README.txt": b"x"})
    (tmp_path / "annotations.tgz").write_bytes(packed)
    with pytest.raises(UserError, match=r"is not the boxes of CUB-200 .2010.: it has .*download https://"):
        cub200.fetch_boxes(str(tmp_path))
    known = published.Archive("annotations-mat", f"sha256:{data_sets.sha256(packed)}", len(packed))
    monkeypatch.setitem(cub200.ANNOTATIONS, "annotations.tgz", known)
    monkeypatch.setattr(cub200.download, "script_folder", lambda file: str(tmp_path))
    monkeypatch.setenv("CUB200_IMAGES", "8")
    monkeypatch.setattr(sys, "argv", ["cub200.py", "2010", "--crop_boxes"])
    cub200.main()
    check_crops(tmp_path, "CUB200_boxes", (18, 11), "train", "val")
    assert len(read_rows(tmp_path / "CUB200_train.txt")) == 4


@pytest.mark.parametrize("layout", ["combined", "devkit", "by_folders"])
def test_cars(tmp_path, layout):
    pytest.importorskip("scipy")
    if layout == "by_folders":
        data_sets.write(tmp_path, data_sets.cars_by_folders())
    else:
        getattr(data_sets, f"cars_{layout}")(str(tmp_path))
    prepare("cars196.py", tmp_path, ANY, "--crop_boxes", "--box_padding=context")
    paths = check_crops(tmp_path, "cars196_boxes_context", (18, 18), "train", "val")
    assert len(paths) == 12 and paths[0].startswith("boxes_context/car")


def test_inshop_boxes_are_for_small_pictures(tmp_path):
    pictures, files = data_sets.inshop()
    data_sets.write(tmp_path, {**pictures, **files})
    prepare("inshop.py", tmp_path, ANY, "--crop_boxes", f"--output_dir={tmp_path}/out")
    paths = check_crops(tmp_path / "out", "inshop_boxes", (128, 128), "train", "query", "gallery")
    assert paths[0] == "boxes/img/WOMEN/Blouses_Shirts/id_00000001/01_1_front.jpg"
    large, _ = data_sets.inshop(size=300)
    os.rename(tmp_path / "img", tmp_path / "img_small")
    data_sets.write(tmp_path, {name.replace("img/", "img_highres/", 1): data for name, data in large.items()})
    out = prepare("inshop.py", tmp_path, ANY).stdout
    assert "In-shop Clothes Retrieval, pictures of high resolution: 20 images of 7 classes" in out
    error = prepare("inshop.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    assert "20 of 20 pictures can't be cut" in error
    assert "300 x 300 pixels, but the boxes are those of pictures of 256 x 256" in error


# ---------------------------------------------------------------- on the way


def test_only_crops_need_packages(tmp_path):
    data_sets.write(tmp_path, data_sets.birds_2011())
    command = [sys.executable, "-S", os.path.join(ROOT, "data", "cub200.py"), str(tmp_path), ANY]  # without packages
    subprocess.run(command, capture_output=True, check=True)
    before = listing(tmp_path)
    result = subprocess.run([*command, "--crop_boxes"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == "" and listing(tmp_path) == before
    assert result.stderr.startswith("error: not installed in this Python (") and result.stderr.count("\n") == 1


def test_pictures_that_cannot_be_cut_are_counted_and_nothing_is_listed(tmp_path):
    files = data_sets.birds_2011()
    boxes_file = files["CUB_200_2011/bounding_boxes.txt"].splitlines()
    boxes_file[1], boxes_file[2] = "2 50.0 4.0 18.0 11.0", "3 1.0 4.0 0.0 11.0"
    files["CUB_200_2011/bounding_boxes.txt"] = "\n".join(boxes_file)
    files["CUB_200_2011/images/101.Bird/Bird_101_0.jpg"] = data_sets.jpeg(0)[:200]
    data_sets.write(tmp_path, files)
    error = prepare("cub200.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    first = tmp_path / "CUB_200_2011/images/001.Bird/Bird_1_1.jpg"
    assert f"3 of 8 pictures can't be cut to their boxes (first: {first}: its box" in error
    assert not list(tmp_path.glob("CUB200_*"))
    assert len([name for name in listing(tmp_path / "boxes") if name.endswith(".jpg")]) == 5
    data_sets.write(tmp_path, {"CUB_200_2011/bounding_boxes.txt": "1 2.0 4.0 18.0\n"})
    error = prepare("cub200.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    assert "bounding_boxes.txt:1: not a row of this file" in error


def test_folders_of_others_and_crops_by_other_boxes(tmp_path):
    data_sets.write(tmp_path, {**data_sets.birds_2011(), "boxes/holiday.jpg": data_sets.jpeg(1)})
    before = listing(tmp_path)
    error = prepare("cub200.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    assert "boxes: is there already, and without boxes.json no folder of crops: rename it" in error
    assert listing(tmp_path) == before
    os.rename(tmp_path / "boxes", tmp_path / "mine")
    prepare("cub200.py", tmp_path, ANY, "--crop_boxes")
    path = tmp_path / "CUB_200_2011" / "bounding_boxes.txt"
    path.write_text(path.read_text().replace("18.0", "17.0"))
    error = prepare("cub200.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    assert "boxes: holds crops of other pictures or boxes: remove it or rename it" in error
    path.write_text(path.read_text().replace("17.0", "18.0"))
    target = tmp_path / "boxes" / "CUB_200_2011" / "images" / "001.Bird" / "Bird_1_0.jpg"
    target.unlink()
    target.symlink_to(tmp_path / "mine" / "absent.jpg")
    assert (
        "Bird_1_0.jpg: a link: what is written here"
        in prepare("cub200.py", tmp_path, ANY, "--crop_boxes", status=2).stderr
    )
    assert not (tmp_path / "mine" / "absent.jpg").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on(tmp_path, number):
    """What is complete is not cut again, and nothing half written stays."""
    files = data_sets.birds_2011()
    rng = np.random.default_rng(0)
    for name in files:
        if name.endswith(".jpg") and "._" not in name:
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (1500, 1500, 3), np.uint8)).save(out, "JPEG")
            files[name] = out.getvalue()
    files["CUB_200_2011/bounding_boxes.txt"] = "".join(f"{n} 1.0 1.0 1400.0 1400.0\n" for n in range(1, 9))
    data_sets.write(tmp_path, files)
    command = [sys.executable, os.path.join(ROOT, "data", "cub200.py"), str(tmp_path), ANY, "--crop_boxes"]
    run = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    crops = tmp_path / "boxes"
    while not list(crops.rglob("*.jpg")) and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    if run.returncode == 130:
        assert error.endswith(b"interrupted: run this again to go on\n")
    done = {path: path.stat().st_mtime_ns for path in crops.rglob("*.jpg")}
    (crops / "CUB_200_2011" / "images" / "001.Bird" / "Bird_1_1.jpg.tmpab_c1234").write_bytes(b"\xff\xd8\xff half")
    prepare("cub200.py", tmp_path, ANY, "--crop_boxes")
    assert len(check_crops(tmp_path, "CUB200_boxes", (1400, 1400), "train", "val")) == 8
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()) and not list(crops.rglob("*.tmp*"))
