"""Lists, decoding, transforms, samplers and the threads of reader.py, each against a plain restatement."""

import io
import itertools
import os
import struct
import threading
import time
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

import reader
import utility
from utility import UserError

# ---------------------------------------------------------------- list files


def write_list(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_list_with_all_that_people_write(tmp_path):
    path = write_list(
        tmp_path / "list.txt",
        b"\xef\xbb\xbfa.jpg 1\r\nmy birds/b 2.jpg\t-3\r\n\r\n  c.jpg   +4  \r\n/abs/d.jpg 5\r\na.jpg 1\r\n../e.jpg 0\n",
    )
    samples = reader.read_list(path)
    root = str(tmp_path)
    names = ["a.jpg", "my birds/b 2.jpg", "c.jpg", "/abs/d.jpg", "a.jpg", "../e.jpg"]
    assert samples.paths == [os.path.join(root, name) for name in names]
    assert samples.labels.tolist() == [1, -3, 4, 5, 1, 0] and samples.labels.dtype == np.int64
    assert samples.lines == [1, 2, 4, 5, 6, 7]  # the blank line counts
    assert reader.where(samples, 2) == f"{path}:4: {root}/c.jpg"
    assert reader.read_list(path, "/data").paths[:4] == [
        "/data/a.jpg",
        "/data/my birds/b 2.jpg",
        "/data/c.jpg",
        names[3],
    ]
    assert reader.read_list(path, "").paths[0] == "a.jpg"


def test_labels_take_all_of_int64(tmp_path):
    path = write_list(tmp_path / "list.txt", f"a {2**63 - 1}\nb {-(2**63)}\nc 007")
    assert reader.read_list(path).labels.tolist() == [2**63 - 1, -(2**63), 7]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ("b.jpg", "no label on this line: expected '<path> <label>', found 'b.jpg'"),
        ("7", "no label on this line"),
        ("b.jpg cat", "the label 'cat' is no integer"),
        ("b.jpg 1.0", "the label '1.0' is no integer"),
        ("b.jpg 1_0", "the label '1_0' is no integer"),
        ("b.jpg \N{FULLWIDTH DIGIT ONE}", "is no integer"),
        ("b.jpg --1", "the label '--1' is no integer"),
        (f"b.jpg {2**63}", f"the label {2**63} does not fit into 64 bits"),
        (f"b.jpg {-(2**63) - 1}", "does not fit into 64 bits"),
        ("b.jpg " + "9" * 5000, "is no integer"),
    ],
)
def test_bad_rows(tmp_path, row, wanted):
    path = write_list(tmp_path / "list.txt", f"a.jpg 1\n\n{row}\n")
    with pytest.raises(UserError) as error:
        reader.read_list(path)
    assert str(error.value).startswith(f"{path}:3: ") and wanted in str(error.value)


def test_missing_empty_and_foreign_lists(tmp_path):
    for content in ("", "\n \t\r\n", b"\xef\xbb\xbf"):
        with pytest.raises(UserError, match=r"list\.txt: the list is empty"):
            reader.read_list(write_list(tmp_path / "list.txt", content))
    with pytest.raises(UserError, match=r"none\.txt: cannot read this list file: No such file"):
        reader.read_list(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="a folder, not a list file"):
        reader.read_list(str(tmp_path))
    with pytest.raises(UserError, match=r"list\.txt: is in UTF-16"):
        reader.read_list(write_list(tmp_path / "list.txt", "a.jpg 1\n".encode("utf-16")))


def test_list_without_labels(tmp_path):
    path = write_list(tmp_path / "list.txt", "a.jpg\nmy birds/b 2.jpg\n")
    samples = reader.read_list(path, need_labels=False)
    assert samples.labels is None and samples.paths == [f"{tmp_path}/a.jpg", f"{tmp_path}/my birds/b 2.jpg"]
    path = write_list(tmp_path / "list.txt", "a.jpg 1\nb.jpg 2\n")
    assert reader.read_list(path, need_labels=False).labels.tolist() == [1, 2]
    with pytest.raises(UserError, match=r"list\.txt:2: no label"):
        reader.read_list(write_list(tmp_path / "list.txt", "a.jpg 1\nb.jpg\n"), need_labels=False)


def test_file_name_that_is_not_utf8(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"\xe9.png"), "wb") as file:
        file.write(encode(Image.new("RGB", (2, 3)), "PNG"))
    samples = reader.read_list(write_list(tmp_path / "list.txt", b"\xe9.png 1\n"))
    reader.check_files(samples)
    assert reader.load(samples.paths[0]).shape == (3, 2, 3)


def test_repeated_pictures_are_reported(tmp_path, capsys):
    path = tmp_path / "list.txt"
    path.write_text("a.jpg 1\nb.jpg 2\nx/../b.jpg 2\na.jpg 3\n./b.jpg 2\n")
    reader.report_repeated(reader.read_list(str(path)))
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path}:3: {tmp_path}/x/../b.jpg: is on line 2, too (2 such lines)",
        f"warning: {path}:4: {tmp_path}/a.jpg: is on line 1 with another label, too",
    ]
    path.write_text("a.jpg 1\nb.jpg 2\n")
    reader.report_repeated(reader.read_list(str(path)))
    assert capsys.readouterr().err == ""


def test_find_images(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.webp", "c/d/x.bmp", "c/.hidden.jpg", "c/notes.txt", "c/y.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    root = str(tmp_path)
    found = reader.find_images([root])
    names = ["a.webp", "b/1.png", "b/2.JPG", "c/d/x.bmp", "c/y.jpeg"]
    assert found.paths == [f"{root}/{name}" for name in names] and found.labels is None
    assert reader.where(found, 1) == f"{root}/b/1.png"
    inputs = [f"{root}/c/notes.txt", f"{root}/b", f"{root}/a.webp"]  # a file that is named is taken, whatever its name
    assert reader.find_images(inputs).paths == [inputs[0], f"{root}/b/1.png", f"{root}/b/2.JPG", inputs[2]]
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        reader.find_images([f"{root}/nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images in this folder"):
        reader.find_images([f"{root}/empty"])


def test_check_files(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"")

    def check(*names):
        rows = "".join(f"{name} 1\n" for name in names)
        reader.check_files(reader.read_list(write_list(tmp_path / "list.txt", rows)))

    check("a/1.jpg", "a/../a/1.jpg", f"{tmp_path}/a/1.jpg", "a/1.jpg")
    for name in ("a/2.jpg", "a/1.JPG", "b/1.jpg", "folder.jpg", "a/1.jpg/", "a/..", "a\0.jpg"):
        if name == "a/1.JPG" and os.path.exists(tmp_path / name):
            continue  # a file system that takes one for the other
        with pytest.raises(UserError) as error:
            check("a/1.jpg", name)
        assert str(error.value) == f"{tmp_path}/list.txt:2: {tmp_path}/{name}: no such image"
    with pytest.raises(UserError, match=r"list\.txt:2: .*; 2 of 3 are missing: is --data_dir right\?"):
        check("a/1.jpg", "b.jpg", "c.jpg")

    def denied(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(os, "scandir", denied)
    check("a/1.jpg")  # a folder may be entered but not listed


# ---------------------------------------------------------------- pictures


def encode(image, kind, **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def smooth(height=48, width=64):
    """A picture that JPEG keeps within a few steps, unlike itself under every rotation and channel order."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return np.stack([250 * x, 40 + 200 * y, 240 - 130 * x - 60 * y], axis=-1).astype(np.uint8)


def noise(height, width, seed=0):
    """Structure at every scale, so that a JPEG of it has much to lose."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_near(image, wanted, limit):
    assert image.dtype == np.uint8 and image.shape == wanted.shape
    difference = np.abs(image.astype(int) - wanted.astype(int)).max()
    assert difference <= limit, difference


RGB = smooth()
GRAY = (RGB @ np.array([0.3, 0.5, 0.2])).astype(np.uint8)
GRAY_RGB = np.repeat(GRAY[:, :, None], 3, axis=2)
ALPHA = np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (48, 64))


def palette_image():
    """-> an image of 256 colours, and its colours."""
    image = Image.fromarray(RGB).quantize(256)
    palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    return image, palette[np.asarray(image)]


def cmyk():
    """-> ink [H, W, 4], and its colours: paper, less what each ink takes, less what black takes."""
    ink = np.dstack([RGB, GRAY // 2])
    left = 255.0 - ink
    return ink, np.round(left[:, :, :3] * left[:, :, 3:] / 255).astype(np.uint8)


def cv2_png(image):
    return cv2.imencode(".png", image[:, :, ::-1] if image.shape[2] == 3 else image[:, :, [2, 1, 0, 3]])[1].tobytes()


WIDE = np.uint16(257)  # 8 bits of brightness in 16
PICTURES = {
    "jpeg": (encode(RGB, "JPEG", quality=97), RGB, 5),
    "progressive jpeg": (encode(RGB, "JPEG", quality=97, progressive=True), RGB, 5),
    "jpeg with a trailer": (encode(RGB, "JPEG", quality=97) + b"\0" * 999, RGB, 5),
    "jpeg after jpeg": (encode(RGB, "JPEG", quality=97) + encode(255 - RGB, "JPEG"), RGB, 5),
    "grey jpeg": (encode(GRAY, "JPEG", quality=97), GRAY_RGB, 4),
    "cmyk jpeg": (encode(Image.fromarray(cmyk()[0], "CMYK"), "JPEG", quality=97), cmyk()[1], 6),
    "cmyk jpeg, a trailer": (encode(Image.fromarray(cmyk()[0], "CMYK"), "JPEG", quality=97) + b"0", cmyk()[1], 6),
    "png": (encode(RGB, "PNG"), RGB, 0),
    "grey png": (encode(GRAY, "PNG"), GRAY_RGB, 0),
    "bilevel png": (encode(Image.fromarray(GRAY > 100), "PNG"), np.where(GRAY_RGB > 100, 255, 0).astype(np.uint8), 0),
    "palette png": (encode(palette_image()[0], "PNG"), palette_image()[1], 0),
    "palette png, one clear": (encode(palette_image()[0], "PNG", transparency=3), palette_image()[1], 0),
    "palette png, alphas": (encode(palette_image()[0], "PNG", transparency=bytes(range(256))), palette_image()[1], 0),
    "grey and alpha png": (encode(np.dstack([GRAY, ALPHA]), "PNG"), GRAY_RGB, 0),
    "alpha png": (encode(np.dstack([RGB, ALPHA]), "PNG"), RGB, 0),
    "16-bit grey png": (encode(GRAY * WIDE, "PNG"), GRAY_RGB, 0),
    "16-bit png": (cv2_png(RGB * WIDE), RGB, 0),
    "16-bit alpha png": (cv2_png(np.dstack([RGB, ALPHA]) * WIDE), RGB, 0),
    "bmp": (encode(RGB, "BMP"), RGB, 0),
    "palette bmp": (encode(palette_image()[0], "BMP"), palette_image()[1], 0),
    "webp": (encode(RGB, "WEBP", lossless=True), RGB, 0),
    "alpha webp": (encode(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), RGB, 0),
    "animated webp": (
        encode(RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB, 0
    ),
    "animated png": (encode(RGB, "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB, 0),
    "animated gif": (
        encode(GRAY, "GIF", save_all=True, append_images=[Image.fromarray(255 - GRAY)]), GRAY_RGB, 0
    ),
    "16-bit grey tiff": (encode(GRAY * WIDE, "TIFF"), GRAY_RGB, 0),
    "32-bit tiff": (encode(GRAY.astype(np.int32) * 257, "TIFF"), GRAY_RGB, 0),
    "1x1 jpeg": (encode(RGB[:1, :1], "JPEG", quality=97), RGB[:1, :1], 5),
    "1x1 png": (encode(RGB[:1, :1], "PNG"), RGB[:1, :1], 0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Palette images")
@pytest.mark.parametrize("name", PICTURES)
def test_decode(name):
    data, wanted, limit = PICTURES[name]
    assert_near(reader.decode(data), wanted, limit)


# What a viewer does to the stored picture, by orientation.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    wanted = UPRIGHT[orientation](RGB)
    jpeg = encode(RGB, "JPEG", quality=97, exif=exif)
    assert_near(reader.decode(jpeg), wanted, 5)
    assert_near(reader.decode(jpeg + b"trailer"), wanted, 5)
    assert_near(reader.decode(encode(RGB, "PNG", exif=exif)), wanted, 0)
    assert_near(reader.decode(encode(RGB, "WEBP", exif=exif, lossless=True)), wanted, 0)
    assert_near(reader.decode(encode(GRAY * WIDE, "PNG", exif=exif)), UPRIGHT[orientation](GRAY_RGB), 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_broken_picture():
    exif = Image.Exif()
    exif[0x112] = 6
    for block in (b"Exif\0\0garbage", exif.tobytes()[:14], exif.tobytes()[:20], b"Exif\0\0"):
        jpeg = encode(RGB, "JPEG", quality=97, exif=block)
        for data in (jpeg, jpeg + b"trailer", encode(RGB, "PNG", exif=block), encode(RGB, "WEBP", exif=block)):
            assert sorted(reader.decode(data).shape[:2]) == [48, 64]


def bad_reason(data):
    with pytest.raises(reader.BadImage) as error:
        reader.decode(data)
    reason = str(error.value)
    assert reason and "\n" not in reason and " object at 0x" not in reason
    return reason


JPEG = encode(noise(60, 80), "JPEG", quality=90)
PROGRESSIVE = encode(noise(60, 80), "JPEG", quality=90, progressive=True)
GRAY_JPEG = encode(noise(60, 80)[:, :, 0], "JPEG", quality=90)
RESTARTS = encode(noise(60, 80), "JPEG", quality=90, restart_marker_rows=1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.95])
def test_truncated(share):
    for data in (JPEG, PROGRESSIVE, GRAY_JPEG, RESTARTS):
        assert "truncated" in bad_reason(data[: int(len(data) * share)])
    for kind in ("PNG", "BMP", "WEBP"):
        data = encode(noise(60, 80), kind)
        bad_reason(data[: int(len(data) * share)])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.95])
def test_truncated_jpeg_with_an_end_marker(share):
    exif = Image.Exif()
    exif[0x112] = 6
    turned = encode(noise(60, 80), "JPEG", quality=90, exif=exif)
    for data in (JPEG, GRAY_JPEG, RESTARTS, turned):
        assert reader.decode(data).size == 60 * 80 * 3
        part = data[: int(len(data) * share)]
        if part[-1:] == b"\xff":
            part = part[:-1]
        assert bad_reason(part + b"\xff\xd9") == "a truncated JPEG"
    # The first scan of a progressive one holds all of the picture, coarsely; within it, an end is seen.
    scan = PROGRESSIVE.index(b"\xff\xda")
    next_scan = PROGRESSIVE.index(b"\xff\xc4", scan)
    assert bad_reason(PROGRESSIVE[: scan + (next_scan - scan) // 2] + b"\xff\xd9") == "a truncated JPEG"


def test_jpeg_with_corners_of_libjpegs_gray_is_whole():
    image = np.full((40, 56, 3), 128, np.uint8)
    assert np.array_equal(reader.decode(encode(image, "JPEG")), image)
    image[8:24, 16:40] = noise(16, 24)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}):
        data = encode(image, "JPEG", quality=95, **options)
        assert reader._has_gray_corner(reader.decode(data))
        assert np.array_equal(reader.decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_what_is_no_picture():
    assert bad_reason(b"") == "an empty file"
    for data in (
        b"hello",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff" + b"junk" * 20 + b"\xff\xd9",
        b"\x89PNG\r\n\x1a\n",
        b"\0" * 99,
    ):
        bad_reason(data)
    assert bad_reason(b"GIF") == "not an image, or in no format that is known here"


def jpeg_that_claims(height, width):
    data = encode(RGB, "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def test_decompression_bombs(monkeypatch, tmp_path):
    assert "exceeds limit" in bad_reason(jpeg_that_claims(65000, 65000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "exceeds limit" in bad_reason(encode(RGB, "PNG"))  # more than twice the limit
    (tmp_path / "a.png").write_bytes(encode(RGB[:40, :40], "PNG"))  # less: Pillow warns, and goes on
    samples = reader.Samples([str(tmp_path / "a.png")], None, None, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with Image.open(tmp_path / "a.png"):
            assert len(said) == 1  # so the case is the right one
        [batch] = reader.read_batches(samples, [[0]], lambda image, position: image, (40, 40))
        assert len(said) == 1 and np.array_equal(batch.image[0], RGB[:40, :40])


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "BMP", "WEBP", "GIF"])
def test_max_pixels(kind):
    options = {"progressive": True} if kind == "progressive" else {}
    data = encode(RGB, "JPEG" if kind == "progressive" else kind, **options)
    height, width = RGB.shape[:2]
    assert reader.decode(data, height * width).shape == RGB.shape
    with pytest.raises(
        reader.BadImage, match=f"{width} x {height} pixels, more than --max_pixels={height * width - 1}"
    ):
        reader.decode(data, height * width - 1)


def test_pixels_of_a_jpeg_header():
    height, width = RGB.shape[:2]
    plain = encode(RGB, "JPEG")
    assert reader._jpeg_pixels(plain) == height * width
    assert reader._jpeg_pixels(encode(RGB, "JPEG", progressive=True, comment=b"long " * 99)) == height * width
    assert reader._jpeg_pixels(jpeg_that_claims(65000, 65000)) == 65000**2
    for end in range(plain.index(b"\xff\xc0") + 9):
        assert reader._jpeg_pixels(plain[:end]) == 0
    assert reader._jpeg_pixels(b"\xff\xd8" + b"\xff" * 100) == 0


def test_a_bomb_is_one_bad_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg_that_claims(65000, 65000))
    (tmp_path / "b.jpg").write_bytes(encode(RGB, "JPEG"))
    samples = reader.Samples([str(tmp_path / n) for n in ("a.jpg", "b.jpg")], None, "list", [1, 2])
    bad = []
    [batch] = reader.read_batches(samples, [[0, 1]], lambda image, position: image, RGB.shape[:2], bad_images=bad)
    assert batch.index.tolist() == [1] and bad == [(0, "65000 x 65000 pixels, more than --max_pixels=200000000")]


def test_load_says_what_is_wrong_with_the_file(tmp_path):
    for path, reason in (
        (tmp_path / "none.jpg", "No such file"),
        (tmp_path, "Is a directory"),
        ("a\0b.jpg", "null byte"),
    ):
        with pytest.raises(reader.BadImage, match=reason):
            reader.load(str(path))


# ---------------------------------------------------------------- resizing


def area_average(image, height, width):
    """Each new pixel the mean over the part of the picture that it covers."""

    def weights(old, new):
        edges = np.arange(new + 1) * old / new
        covered = np.minimum(edges[1:, None], np.arange(1, old + 1)) - np.maximum(edges[:-1, None], np.arange(old))
        covered = np.clip(covered, 0, None)
        return covered / covered.sum(axis=1, keepdims=True)

    return np.einsum("yh,xw,hwc->yxc", weights(image.shape[0], height), weights(image.shape[1], width), image)


@pytest.mark.parametrize("size", [(30, 40), (20, 20), (59, 79), (1, 1), (60, 33)])
def test_shrinking_averages(size):
    image = noise(60, 80)
    assert_near(reader.resize(image, size), np.round(area_average(image, *size)).astype(np.uint8), 1)


@pytest.mark.parametrize("size", [(30, 40), (97, 131), (30, 160), (120, 33), (60, 80), (60, 40), (90, 80)])
def test_resize_is_near_pillows(size):
    image = cv2.GaussianBlur(noise(60, 80), (0, 0), 2)  # what is sharp depends on the filter
    wanted = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    result = reader.resize(image, size)
    assert_near(result, wanted, 12)
    assert np.abs(result.astype(int) - wanted).mean() < 2


def test_a_side_that_shrinks_is_averaged_while_the_other_grows():
    stripes = np.tile(np.array([0, 0, 0, 200], np.uint8), 20)[None, :, None].repeat(10, 0).repeat(3, 2)
    assert (reader.resize(stripes, (30, 20)) == 50).all()
    assert (reader.resize(stripes.swapaxes(0, 1), (20, 30)) == 50).all()


def ramp(height, width):
    """A picture that tells where its pixels come from: x and y of the pixel's centre, in 255 parts of the sides."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(x + 0.5) / width * 255, (y + 0.5) / height * 255, 0 * x], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("shape", [(224, 224), (96, 96), (64, 160), (160, 64), (300, 300)])
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (224, 224), (40, 60), (256, 256)])
def test_center_crop(size, shape):
    result = reader.center_crop(ramp(*size), shape)
    assert result.shape == (*shape, 3)
    # The picture at the scale at which the crop is 224/256 of the side that is tightest; the crop in its middle.
    scale = max(side * 256 / 224 / full for side, full in zip(shape, size))
    for axis in (0, 1):
        full = round(size[axis] * scale)
        wanted = ((full - shape[axis]) // 2 + np.arange(shape[axis]) + 0.5) / full * 255
        middle = result[shape[0] // 2, :, 0] if axis == 1 else result[:, shape[1] // 2, 1]
        # Near its border, what is enlarged repeats the last pixel; the crop stays inside of that.
        assert np.abs(middle - wanted).max() < 2, axis


def test_center_crop_is_near_the_same_with_pillow():
    image = cv2.GaussianBlur(noise(375, 500), (0, 0), 3)
    wanted = Image.fromarray(image).resize((round(500 * 256 / 375), 256), Image.Resampling.BILINEAR)
    left = (wanted.width - 224) // 2
    wanted = np.asarray(wanted.crop((left, 16, left + 224, 16 + 224)))
    result = reader.center_crop(image, (224, 224))
    assert np.abs(result.astype(int) - wanted).mean() < 1


@pytest.mark.parametrize("size", [(2, 9000), (9000, 3), (1, 1), (1, 7), (100, 9000)])
def test_center_crop_of_odd_pictures(size, monkeypatch):
    resize, largest = cv2.resize, [0]

    def measured(image, size, **options):
        largest[0] = max(largest[0], size[0] * size[1])
        return resize(image, size, **options)

    monkeypatch.setattr(cv2, "resize", measured)
    result = reader.center_crop(ramp(*size), (224, 224))
    assert result.shape == (224, 224, 3)
    assert largest[0] < 2_000_000
    assert np.abs(result[112, 112, :2].astype(int) - 127).max() <= 255 / min(s for s in size if s > 1 or size == (1, 1))


def test_resize_takes_the_whole_picture():
    result = reader.TEST_TRANSFORMS["resize"](ramp(100, 300), (50, 60))
    assert result.shape == (50, 60, 3)
    assert np.abs(result[25, :, 0] - (np.arange(60) + 0.5) / 60 * 255).max() <= 1.5
    assert np.abs(result[:, 30, 1] - (np.arange(50) + 0.5) / 50 * 255).max() <= 1.5


def coordinates(height, width):
    """A picture whose red is x and whose green is y."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)


def draw_boxes(size, count, rng, **options):
    """-> (left, top, width, height, mirrored) of `count` random crops, read off the enlarged crop."""
    image, boxes = coordinates(*size), []
    for _ in range(count):
        part = reader.random_resized_crop(image, (250, 250), rng, **options)
        mirrored = part[0, 0, 0] > part[0, -1, 0]
        part = (part[:, ::-1] if mirrored else part).astype(int)
        (left, top, _), (right, bottom, _) = part[0, 0], part[-1, -1]
        boxes.append((left, top, right - left + 1, bottom - top + 1, mirrored))
    return np.array(boxes)


def distance(a, b):
    """Kolmogorov and Smirnov's: the largest gap between two empirical distributions."""
    at = np.sort(np.concatenate([a, b]))
    return np.abs(
        np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)
    ).max()


def test_random_crops_where_all_fit():
    rng = np.random.default_rng(0)
    left, top, width, height, mirrored = draw_boxes((240, 240), 2500, rng, scale=(0.1, 0.5)).T
    area, ratio = width * height / 240**2, np.log(width / height)
    assert 0.095 < area.min() < 0.105 and 0.49 < area.max() < 0.505
    assert distance(area, np.linspace(0.1, 0.5, 10000)) < 0.03
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.02
    assert distance(ratio, np.linspace(-np.log(4 / 3), np.log(4 / 3), 10000)) < 0.03
    assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.05
    for start, side in ((left, width), (top, height)):
        assert (start >= 0).all() and (start + side <= 240).all()
        assert distance((start + 0.5) / (240 - side + 1), np.linspace(0, 1, 10000)) < 0.035
    assert abs(mirrored.mean() - 0.5) < 0.03


def test_random_crops_reach_all_four_corners():
    boxes = draw_boxes((4, 5), 200, np.random.default_rng(0), scale=(0.45, 0.45), ratio=(1, 1))  # 3 x 3 of 4 x 5
    assert {tuple(box[:4]) for box in boxes} == {(left, top, 3, 3) for left in range(3) for top in range(2)}


@pytest.mark.parametrize("size", [(150, 200), (200, 120)])
def test_random_crops_are_the_originals(size):
    """Against a restatement: draw area and ratio, and draw again where that does not fit."""
    rng = np.random.default_rng(1)
    _, _, width, height, _ = draw_boxes(size, 2500, np.random.default_rng(2)).T
    wanted = []
    while len(wanted) < 10000:
        area, ratio = size[0] * size[1] * rng.uniform(0.08, 1), (4 / 3) ** rng.uniform(-1, 1)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= size[1] and h <= size[0]:
            wanted.append((w, h))
    wanted_width, wanted_height = np.array(wanted).T
    assert distance(width * height, wanted_width * wanted_height) < 0.035
    assert distance(width / height, wanted_width / wanted_height) < 0.035


def test_random_crop_is_that_part_resized():
    for seed in range(5):
        image = cv2.GaussianBlur(noise(90, 120), (0, 0), 2)
        [[left, top, width, height, mirrored]] = draw_boxes((90, 120), 1, np.random.default_rng(seed))
        part = Image.fromarray(image[top : top + height, left : left + width])
        wanted = np.asarray(part.resize((40, 30), Image.Resampling.BILINEAR))
        result = reader.random_resized_crop(image, (30, 40), np.random.default_rng(seed))
        assert np.abs(result.astype(int) - (wanted[:, ::-1] if mirrored else wanted)).mean() < 2


def test_random_crop_of_a_large_picture_uses_every_pixel():
    """Stripes of one pixel, which a resize that skips pixels turns into coarse patterns."""
    stripes = np.zeros((901, 1203, 3), np.uint8)
    stripes[::2] = stripes[:, ::2] = 200
    for seed in range(5):
        part = reader.random_resized_crop(stripes, (60, 90), np.random.default_rng(seed), scale=(0.5, 1.0))
        assert (part == 150).all()


def test_random_crop_of_odd_pictures():
    for size, wanted in (((12, 200), (92, 0, 16, 12)), ((200, 12), (0, 92, 12, 16)), ((10, 13), (0, 0, 13, 10))):
        # Nothing of the whole area fits within the ratios, or only just: the largest centred part that does.
        boxes = draw_boxes(size, 20, np.random.default_rng(0), scale=(0.9999, 1.0), ratio=(3 / 4, 4 / 3))
        assert wanted in {tuple(box[:4]) for box in boxes}
        if size != (10, 13):
            assert len({tuple(box[:4]) for box in boxes}) == 1
    for size in ((1, 1), (1, 300), (300, 1), (2, 3)):
        result = reader.random_resized_crop(coordinates(*size), (8, 9), np.random.default_rng(0))
        assert result.shape == (8, 9, 3)


def test_training_transform_depends_on_seed_epoch_and_position_alone():
    image = noise(60, 80)

    def draw(seed, epoch, position, **options):
        return reader.training_transform((32, 32), seed, epoch, **options)(image, position).tobytes()

    transform = reader.training_transform((32, 32), 1, 2)
    transform(image, 7)
    assert transform(image, 3).tobytes() == draw(1, 2, 3)
    keys = list(itertools.product(range(3), repeat=3))
    assert len({draw(*key) for key in keys}) == len(keys)
    areas = []
    for position in range(50):
        part = reader.training_transform((250, 250), 0, 0, 0.6)(coordinates(240, 240), position)
        areas.append(np.prod(np.ptp(part[:, :, :2], axis=(0, 1)).astype(int) + 1) / 240**2)
    assert 0.59 < min(areas) < 0.7 and max(areas) > 0.85


# ---------------------------------------------------------------- batches


def class_sizes(sizes, seed=0):
    """Labels with `sizes[i]` images of the i-th class, in random order; the labels are sparse and partly negative."""
    names = np.random.default_rng(seed).choice(np.arange(-1000, 1000), len(sizes), replace=False)
    return np.random.default_rng(seed + 1).permutation(np.repeat(names, sizes))


@pytest.mark.parametrize(
    ("sizes", "batch_size", "k"),
    [
        ([8] * 10, 8, 4),
        ([8] * 10, 40, 4),
        ([5, 9, 30, 4, 17, 6, 8], 12, 4),
        ([1, 2, 3, 4, 5, 6, 7, 8], 12, 4),
        ([2] * 9, 6, 2),
        ([1] * 5, 10, 2),
        ([1000, 4, 4, 4, 4, 4], 12, 4),
        ([7, 11, 13], 6, 2),
        ([30, 30], 60, 30),
        ([9, 9, 9], 3, 1),
    ],
)
def test_batches_are_balanced(sizes, batch_size, k):
    labels = class_sizes(sizes)
    count = dict(zip(*np.unique(labels, return_counts=True)))
    batches = list(reader.class_balanced_batches(labels, batch_size, k, 5, 0, 60))
    assert len(batches) == 60
    for batch in batches:
        classes, members = np.unique(labels[batch], return_counts=True)
        assert len(classes) == batch_size // k and (members == k).all()
        for c in classes:
            # Distinct images where the class has K, and all of a smaller class before one comes again.
            assert len(np.unique(batch[labels[batch] == c])) == min(k, count[c])


def test_every_image_comes_once_where_classes_divide():
    labels = class_sizes([8] * 10)
    for epoch in range(3):
        batches = list(reader.class_balanced_batches(labels, 8, 4, 0, epoch, 20))
        assert sorted(np.concatenate(batches[:10])) == list(range(80))
        assert sorted(np.concatenate(batches[10:])) == list(range(80))


def test_classes_come_as_often_as_they_have_images():
    sizes = np.random.default_rng(3).integers(4, 40, 60)
    labels = class_sizes(sizes)
    groups = sum(-(-size // 4) for size in sizes)
    seen = np.zeros(len(labels), int)
    for epoch in range(4):
        draws = np.concatenate(list(reader.class_balanced_batches(labels, 32, 4, 0, epoch, groups // 8)))
        counts = np.bincount(draws, minlength=len(labels))
        assert (counts > 0).mean() > 0.97 and counts.max() <= 3
        seen += counts
    assert seen.min() >= 2 and seen.max() <= 8


def test_one_huge_class_does_not_shut_out_the_others():
    labels = class_sizes([1000] + [4] * 6)
    batches = np.array(list(reader.class_balanced_batches(labels, 12, 4, 0, 0, 90)))
    names, counts = np.unique(labels, return_counts=True)
    share = np.array([(labels[batches] == name).any(axis=1).mean() for name in names])
    assert share[counts == 1000] > 0.9
    assert share[counts == 4].min() > 0.25 and share[counts == 4].max() < 0.45  # two places for six classes
    huge = batches[labels[batches] == names[counts == 1000]]
    assert len(np.unique(huge)) == len(huge)


def test_draws_depend_on_seed_and_epoch_alone():
    labels = class_sizes([9] * 12)
    for make in (
        lambda *key: reader.class_balanced_batches(labels, 12, 4, *key),
        lambda *key: reader.shuffled_batches(len(labels), 12, *key),
    ):

        def draw(*key, make=make):
            return np.array(list(make(*key)))

        assert np.array_equal(draw(0, 0, 20), draw(0, 0, 20))
        assert np.array_equal(draw(0, 0, 20)[:5], draw(0, 0, 5))
        assert len({draw(seed, epoch, 20).tobytes() for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize(
    ("classes", "batch_size", "k", "wanted"),
    [
        (9, 9, 4, "a batch of 9 is not divisible by --samples_each_class=4; the nearest that is: 8"),
        (9, 11, 4, "the nearest that is: 12"),
        (9, 2, 4, "the nearest that is: 4"),
        (5, 24, 4, "needs 6 classes, the list has 5: take --train_batch_size=20 or less"),
    ],
)
def test_batches_that_cannot_be(classes, batch_size, k, wanted):
    with pytest.raises(UserError) as error:
        reader.check_balance(classes, batch_size, k)
    assert wanted in str(error.value)
    with pytest.raises(UserError):
        next(reader.class_balanced_batches(np.repeat(np.arange(classes), 8), batch_size, k, 0, 0, 1))


def test_shuffled_batches():
    batches = list(reader.shuffled_batches(17, 5, 0, 0, 34))
    assert all(len(np.unique(batch)) == 5 for batch in batches)
    draws = np.concatenate(batches)
    assert (np.bincount(draws) == 10).all()
    for end in range(0, 170, 17):
        assert sorted(draws[end : end + 17]) == list(range(17)) and list(draws[end : end + 17]) != list(range(17))
    small = list(reader.shuffled_batches(3, 8, 0, 0, 4))
    assert [sorted(batch) for batch in small] == [[0, 1, 2]] * 4


def test_sequential_batches():
    assert [b.tolist() for b in reader.sequential_batches(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [b.tolist() for b in reader.sequential_batches(6, 3)] == [[0, 1, 2], [3, 4, 5]]
    assert list(reader.sequential_batches(0, 3)) == []


# ---------------------------------------------------------------- reading


@pytest.fixture()
def folder(tmp_path):
    """23 JPEGs of different sizes; -> Samples."""
    rows = []
    for i in range(23):
        (tmp_path / f"{i}.jpg").write_bytes(encode(noise(20 + i, 40 - i, seed=i), "JPEG"))
        rows.append(f"{i}.jpg {100 + i // 4}\n")
    return reader.read_list(write_list(tmp_path / "list.txt", "".join(rows)))


class Fake:
    """Takes the place of reader.load: picture i is filled with i, `bad` ones are broken; counts and delays."""

    def __init__(self, monkeypatch, count, bad=(), delay=lambda i: 0):
        self.bad, self.delay, self.loaded, self.lock = set(bad), delay, [], threading.Lock()
        self.samples = reader.Samples([str(i) for i in range(count)], np.arange(count) // 4 + 50, "list", range(1, 999))
        monkeypatch.setattr(reader, "load", self.load)

    def load(self, path, max_pixels=None):
        i = int(path)
        with self.lock:
            self.loaded.append(i)
        time.sleep(self.delay(i))
        if i in self.bad:
            raise reader.BadImage(f"picture {i} is broken")
        return np.full((2, 3, 3), i, np.uint8)

    def read(self, batches, transform=lambda image, position: image, **options):
        return reader.read_batches(self.samples, batches, transform, (2, 3), **options)


def assert_consistent(batches, samples):
    for batch in batches:
        assert batch.image.dtype == np.uint8 and batch.index.dtype == np.int64 and batch.label.dtype == np.int64
        assert batch.image.shape == (len(batch.index), 2, 3, 3)
        assert (batch.image == batch.index[:, None, None, None]).all()
        assert np.array_equal(batch.label, samples.labels[batch.index])


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_batches_do_not_depend_on_timing(folder, workers, monkeypatch):
    transform = reader.training_transform((24, 24), 3, 4)
    order = [*reader.shuffled_batches(23, 8, 0, 0, 4), np.arange(20, 23)]
    positions = np.split(np.arange(35), np.cumsum([8] * 4))
    wanted = [
        np.stack([transform(cv2.imread(folder.paths[i])[:, :, ::-1], p) for i, p in zip(rows, places)])
        for rows, places in zip(order, positions)
    ]
    load, rng = reader.load, np.random.default_rng(workers)
    monkeypatch.setattr(reader, "load", lambda path, limit: (time.sleep(rng.uniform(0, 0.006)), load(path, limit))[1])
    batches = list(reader.read_batches(folder, order, transform, (24, 24), num_workers=workers))
    assert [batch.index.tolist() for batch in batches] == [rows.tolist() for rows in order]
    for batch, images in zip(batches, wanted):
        assert batch.image.tobytes() == images.tobytes() and batch.image.shape == images.shape
        assert np.array_equal(batch.label, folder.labels[batch.index])


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_batches_of_different_sizes_with_slow_pictures(workers, monkeypatch):
    fake = Fake(monkeypatch, 40, delay=lambda i: 0.001)
    order = [np.arange(8), np.arange(8, 10), [], [10], np.arange(11, 30), [39, 39]]
    batches = list(fake.read(order, num_workers=workers))
    assert [b.index.tolist() for b in batches] == [list(rows) for rows in order if len(rows)]
    assert_consistent(batches, fake.samples)
    assert list(fake.read([], num_workers=workers)) == []


def test_positions_count_the_pictures(monkeypatch):
    fake = Fake(monkeypatch, 30)
    seen = []
    list(
        fake.read(
            [[4, 5, 6], [7], [1, 2]], lambda image, position: (seen.append((int(image[0, 0, 0]), position)), image)[1]
        )
    )
    assert sorted(seen, key=lambda pair: pair[1]) == [(4, 0), (5, 1), (6, 2), (7, 3), (1, 4), (2, 5)]
    assert all(type(position) is int for _, position in seen)


def test_labels(monkeypatch):
    fake = Fake(monkeypatch, 8)
    [batch] = fake.read([[3, 6]], labels=np.arange(8) * 10)
    assert batch.label.tolist() == [30, 60]
    fake.samples = fake.samples._replace(labels=None)
    [batch] = fake.read([[3, 6]])
    assert batch.label is None and batch.index.tolist() == [3, 6]


def wait_until(condition, seconds=5):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.005)
    assert condition()


def test_the_queue_is_bounded(monkeypatch):
    fake = Fake(monkeypatch, 200)
    taken = []

    def order():
        for batch in itertools.cycle(reader.sequential_batches(200, 10)):  # never ends
            taken.append(batch)
            yield batch

    before = threading.active_count()
    batches = fake.read(order(), num_workers=3)
    assert not taken and not fake.loaded  # nothing happens before it is asked for
    for number in range(1, 5):
        next(batches)
        wait_until(lambda number=number: len(fake.loaded) == (number + 2) * 10)  # it does read ahead
        time.sleep(0.02)
        assert len(fake.loaded) == (number + 2) * 10 and len(taken) == number + 2  # but by two batches only
    assert threading.active_count() <= before + 3
    batches.close()
    assert threading.active_count() == before


def test_close_ends_the_threads_at_once(monkeypatch):
    fake = Fake(monkeypatch, 400, delay=lambda i: 0.02 if i >= 100 else 0)
    before = threading.active_count()
    batches = fake.read(reader.sequential_batches(400, 100), num_workers=2)
    next(batches)
    wait_until(lambda: len(fake.loaded) > 100)
    started, start = len(fake.loaded), time.time()
    batches.close()
    assert time.time() - start < 1  # 100 pictures a worker would take 2 s
    assert len(fake.loaded) <= started + 2
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_first_bad_image_in_the_list_is_the_error(monkeypatch, workers):
    # The first one takes long: the others are found first.
    fake = Fake(monkeypatch, 60, bad=[13, 15, 16, 25, 40], delay=lambda i: 0.1 if i == 13 else 0)
    before = threading.active_count()
    batches = fake.read(reader.sequential_batches(60, 10), num_workers=workers)
    assert next(batches).index.tolist() == list(range(10))
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(error.value) == "list:14: 13: picture 13 is broken (--on_bad_image=skip goes on without)"
    assert threading.active_count() == before


def test_a_workers_error_reaches_the_caller(monkeypatch):
    fake = Fake(monkeypatch, 20)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(fake.read(reader.sequential_batches(20, 5), lambda image, position: image * (1 // (9 - position))))
    with pytest.raises(ValueError, match="shape"):
        list(fake.read(reader.sequential_batches(20, 5), lambda image, position: image[:1, :1, :2]))
    with pytest.raises(IndexError):
        list(fake.read([[20]]))
    with pytest.raises(UserError, match="needs 7 classes"):
        list(fake.read(reader.class_balanced_batches(fake.samples.labels, 14, 2, 0, 0, 3)))
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 3])
def test_skipping(monkeypatch, workers):
    fake = Fake(monkeypatch, 16, bad=[2, 3, 8, 9, 10, 11, 15], delay=lambda i: 0.005 * (i % 3))
    skipped = []
    order = [*reader.sequential_batches(16, 4), [2, 5]]
    batches = list(fake.read(order, num_workers=workers, bad_images=skipped))
    assert [b.index.tolist() for b in batches] == [[0, 1], [4, 5, 6, 7], [12, 13, 14], [5]]
    assert_consistent(batches, fake.samples)
    assert skipped == [(i, f"picture {i} is broken") for i in (2, 3, 8, 9, 10, 11, 15)]  # each once


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_replacements_keep_batches_balanced(monkeypatch, workers):
    rng = np.random.default_rng(workers)
    count = 4 * 30
    fake = Fake(monkeypatch, count, bad=[0, 1, 40, 41, 80, 81, 119], delay=lambda i: rng.uniform(0, 0.001))
    fake.samples = fake.samples._replace(labels=np.arange(count) % 4)
    skipped = []
    order = list(reader.class_balanced_batches(fake.samples.labels, 12, 4, 0, 0, 24))
    batches = list(fake.read(order, num_workers=workers, bad_images=skipped, replace=True))
    assert_consistent(batches, fake.samples)
    moved = 0
    for batch, rows in zip(batches, order):
        good = ~np.isin(rows, list(fake.bad))
        moved += (~good).sum()
        assert np.array_equal(batch.index[good], rows[good]) and np.array_equal(batch.label, fake.samples.labels[rows])
        assert len(np.unique(batch.index)) == 12 and not np.isin(batch.index, list(fake.bad)).any()
    assert moved > 10 and len(batches) == 24
    assert sorted(i for i, _ in skipped) == sorted(fake.bad)
    plain = list(fake.read(order, num_workers=1, bad_images=[], replace=True))
    assert [b.index.tolist() for b in batches] == [b.index.tolist() for b in plain]


def test_replacements_are_spread_over_the_class(monkeypatch):
    fake = Fake(monkeypatch, 100, bad=[0])
    fake.samples = fake.samples._replace(labels=np.zeros(100, np.int64))
    batches = list(fake.read([[0, 1]] * 50, bad_images=[], replace=True))
    assert len({int(batch.index[0]) for batch in batches}) > 25


def test_replacements_where_the_class_has_few_good_images(monkeypatch):
    # Two of four are good: each comes twice. One of four: four times. None: any picture, but no smaller batch.
    fake = Fake(monkeypatch, 12, bad=[1, 2, 4, 5, 7, 8, 9, 10, 11])
    skipped = []
    batches = list(fake.read([np.arange(12)] * 2, bad_images=skipped, replace=True))
    assert_consistent(batches, fake.samples)
    for batch in batches:
        assert sorted(set(batch.index.tolist())) == [0, 3, 6]
        assert batch.label.tolist()[:8] == [50] * 4 + [51] * 4 and batch.index.tolist()[4:8] == [6] * 4
    assert sorted(i for i, _ in skipped) == sorted(fake.bad)
    assert all(fake.loaded.count(i) == 2 for i in fake.bad)  # what is known to be bad is not tried again in its place


@pytest.mark.parametrize("workers", [1, 3])
def test_a_class_without_a_good_picture_makes_room_for_another(monkeypatch, workers):
    """The batch stays complete and balanced: K pictures of one class that was not in it."""
    fake = Fake(monkeypatch, 40, bad=[8, 9, 10, 11])  # all of class 52 of 10 classes
    order = [[0, 1, 2, 3, 8, 9, 10, 11, 36, 37, 38, 39], [8, 9, 10, 11, 4, 5, 6, 7]] * 5
    others = set()
    for batch, rows in zip(fake.read(order, num_workers=workers, bad_images=[], replace=True), order):
        assert len(batch.index) == len(rows) == len(set(batch.index.tolist()))
        classes, counts = np.unique(batch.label, return_counts=True)
        assert counts.tolist() == [4] * (len(rows) // 4) and 52 not in classes
        others |= set(classes) - set(fake.samples.labels[rows])
    assert len(others) > 2  # not always the same one


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_make_up_the_batch(monkeypatch, processes):
    """What the processes read together, pictures, labels and random draws, is what one process reads."""
    fake = Fake(monkeypatch, 40, bad=[5])
    order = list(reader.class_balanced_batches(fake.samples.labels, 12, 4, 0, 0, 5))
    drawn = {}

    def transform(image, position):
        drawn.setdefault(position, int(image[0, 0, 0]))
        assert drawn[position] == image[0, 0, 0]  # the same picture at the same position in every process
        return image

    whole = list(fake.read(order, transform, bad_images=[], replace=True, position=7))
    for part in range(processes):

        def share(count, part=part):
            return slice(count * part // processes, count * (part + 1) // processes)

        read = list(fake.read(order, transform, bad_images=[], replace=True, position=7, share=share))
        for mine, all_of_it in zip(read, whole):
            assert len(mine.index) == 12 // processes
            assert np.array_equal(mine.index, all_of_it.index[share(12)])
            assert np.array_equal(mine.label, all_of_it.label[share(12)])
    assert any(5 in rows for rows in order)
    assert set(drawn) == set(range(7, 7 + 60))


def test_a_replacement_may_be_bad_too(monkeypatch):
    fake = Fake(monkeypatch, 4, bad=[0, 1, 2])
    skipped = []
    [batch] = fake.read([[0]], bad_images=skipped, replace=True)
    assert batch.index.tolist() == [3] and skipped[0] == (0, "picture 0 is broken")
    assert {i for i, _ in skipped} <= fake.bad


# ---------------------------------------------------------------- for the scripts


def data_arguments(*flags):
    parser = utility.make_parser("test")
    reader.add_data_arguments(parser)
    return parser.parse_args(flags)


def test_flags():
    args = data_arguments()
    assert (args.train_list, args.val_list) == ("data/CUB200_train.txt", "data/CUB200_val.txt")
    assert (args.data_dir, args.num_workers, args.seed, args.on_bad_image) == (None, None, None, "fail")
    args = data_arguments("--image_shape=3,32,48", "--test_transform=resize", "--num_workers=3", "--seed=0")
    assert args.image_shape == [3, 32, 48] and args.test_transform == "resize"
    for flag in ("--image_shape=3,32", "--image_shape=1,32,32", "--image_shape=3,4,32", "--num_workers=0", "--seed=-1"):
        with pytest.raises(UserError, match=flag.split("=")[0]):
            data_arguments(flag)


@pytest.mark.parametrize("transform", ["center_crop", "resize"])
def test_read_in_order(folder, transform, capsys):
    args = data_arguments("--num_workers=2", "--on_bad_image=skip", f"--test_transform={transform}")
    args.image_shape = [3, 16, 20]
    with open(folder.paths[9], "wb") as file:
        file.write(b"hello")
    os.remove(folder.paths[11])
    bad = []
    batches = list(reader.read_in_order(folder, args, 8, bad))
    left = [i for i in range(23) if i not in (9, 11)]
    assert np.concatenate([batch.index for batch in batches]).tolist() == left
    assert [len(batch.index) for batch in batches] == [8, 6, 7]
    wanted = [reader.TEST_TRANSFORMS[transform](reader.load(folder.paths[i]), (16, 20)) for i in left]
    assert np.array_equal(np.concatenate([batch.image for batch in batches]), wanted)
    reader.report_bad_images(folder, bad)
    message = capsys.readouterr().err
    assert message == (
        f"warning: skipped 2 bad images; the first: {folder.source}:10: {folder.paths[9]}: "
        "not an image, or in no format that is known here\n"
    )
    reader.report_bad_images(folder, [])
    assert capsys.readouterr().err == ""
    args.on_bad_image = "fail"
    with pytest.raises(UserError, match=r"list\.txt:10: .*9\.jpg: not an image"):
        list(reader.read_in_order(folder, args, 8, bad))


def test_fingerprint():
    """Names that repeat in every class folder are told apart; the folders above may move."""
    labels = np.array([0, 1])
    first, other, moved = (
        reader.Samples([f"{a}/0.jpg", f"{b}/0.jpg"], labels, None, None)
        for a, b in (("x/cat", "x/dog"), ("x/cow", "x/dog"), ("y/z/cat", "y/./dog"))
    )
    assert reader.fingerprint(first) == reader.fingerprint(moved) != reader.fingerprint(other)
    assert reader.fingerprint(first, components=1) == reader.fingerprint(other, components=1)
