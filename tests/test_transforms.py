"""Decoding: pictures of all kinds, and what is no picture."""

import contextlib
import io
import struct
import time
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

import jpeg
import reader
import transforms


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


def tiff(values, black_is_zero=1):
    """An uncompressed grey TIFF of the array [H, W]: the meaning of its samples is that of the array's type."""
    height, width = values.shape
    data = values.tobytes()
    numbers = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: black_is_zero, 273: 8, 277: 1}
    numbers.update({278: height, 279: len(data), 339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind]})
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(numbers)) + entries + bytes(4)


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
    "16-bit grey jpeg 2000": (encode(GRAY * WIDE, "JPEG2000"), GRAY_RGB, 0),
    "10-bit pgm": (b"P5 64 48 1023\n" + (GRAY * np.uint16(4)).astype(">u2").tobytes(), GRAY_RGB, 1),
    "float pfm": (b"Pf\n64 48\n-1.0\n" + (GRAY[::-1] / 255).astype("<f4").tobytes(), GRAY_RGB, 0),
    "16-bit tiff, white is zero": (tiff(65535 - GRAY * WIDE, 0), GRAY_RGB, 0),
    "float tiff": (tiff(GRAY.astype("<f4") / 255), GRAY_RGB, 0),
    "float tiff, white is zero": (tiff(1 - GRAY.astype("<f4") / 255, 0), GRAY_RGB, 0),
    "32-bit tiff": (tiff(GRAY.astype("<u4") * 16843009), GRAY_RGB, 0),
    "1x1 jpeg": (encode(RGB[:1, :1], "JPEG", quality=97), RGB[:1, :1], 5),
    "1x1 png": (encode(RGB[:1, :1], "PNG"), RGB[:1, :1], 0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Palette images")
@pytest.mark.parametrize("name", PICTURES)
def test_decode(name):
    data, wanted, limit = PICTURES[name]
    assert_near(transforms.decode(data), wanted, limit)


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
    plain = encode(RGB, "JPEG", quality=97, exif=exif)
    assert_near(transforms.decode(plain), wanted, 5)
    assert_near(transforms.decode(plain + b"trailer"), wanted, 5)
    assert_near(transforms.decode(encode(RGB, "PNG", exif=exif)), wanted, 0)
    assert_near(transforms.decode(encode(RGB, "WEBP", exif=exif, lossless=True)), wanted, 0)
    assert_near(transforms.decode(encode(GRAY * WIDE, "PNG", exif=exif)), UPRIGHT[orientation](GRAY_RGB), 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_broken_picture():
    exif = Image.Exif()
    exif[0x112] = 6
    for block in (b"Exif\0\0garbage", exif.tobytes()[:14], exif.tobytes()[:20], b"Exif\0\0"):
        plain = encode(RGB, "JPEG", quality=97, exif=block)
        for data in (plain, plain + b"trailer", encode(RGB, "PNG", exif=block), encode(RGB, "WEBP", exif=block)):
            assert sorted(transforms.decode(data).shape[:2]) == [48, 64]


def bad_reason(data):
    with pytest.raises(transforms.BadImage) as error:
        transforms.decode(data)
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
        assert transforms.decode(data).size == 60 * 80 * 3
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
    assert np.array_equal(transforms.decode(encode(image, "JPEG")), image)
    image[8:24, 16:40] = noise(16, 24)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}):
        data = encode(image, "JPEG", quality=95, **options)
        assert transforms._has_gray_corner(transforms.decode(data))
        assert np.array_equal(transforms.decode(data), np.asarray(Image.open(io.BytesIO(data))))


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
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89478485)  # Pillow's own, which reading batches takes away
    assert "65000 x 65000 pixels, more than 67108864" in bad_reason(jpeg_that_claims(65000, 65000))
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
    assert transforms.decode(data, height * width).shape == RGB.shape
    with pytest.raises(
        transforms.BadImage, match=f"{width} x {height} pixels, more than --max_pixels={height * width - 1}"
    ):
        transforms.decode(data, height * width - 1)


def test_header_of_a_jpeg():
    height, width = RGB.shape[:2]
    plain = encode(RGB, "JPEG")
    for data in (plain, encode(RGB, "JPEG", progressive=True, comment=b"long " * 99)):
        assert jpeg.read_header(data)[:3] == (width, height, 3)
    for end in range(plain.index(b"\xff\xda") + 10):
        with pytest.raises(jpeg.BadJpeg):
            jpeg.read_header(plain[:end])
    with pytest.raises(jpeg.BadJpeg):
        jpeg.read_header(b"\xff\xd8" + b"\xff" * 100)


@pytest.mark.parametrize(
    "before", [b"\xff\xff\xff", b"\xff\xd0\xff", b"\xff\x01\xff", b"\xff\0\xff", b"\xff\xfe\0\x06junk\xff"]
)
def test_a_frame_hidden_from_the_limit(before):
    """Where a reader of headers that knows less than libjpeg would take the segment's content for the frame."""
    data = jpeg_that_claims(20000, 20000)
    small = encode(RGB[:16, :16], "JPEG")
    frame = small[small.index(b"\xff\xc0") :][:19]
    segment = before + b"\xe1" + struct.pack(">H", 2 + len(frame)) + frame
    assert "20000 x 20000 pixels" in bad_reason(data[:2] + segment + data[2:])
    with pytest.raises(transforms.BadImage, match="two frames"):
        transforms.decode(data[:2] + frame + data[2:], 10**6)


def test_scans_without_end():
    data = encode(RGB, "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    assert transforms.decode(data[:-2] + 20 * data[at:-2] + data[-2:]).shape == RGB.shape
    assert "more than 32 scans" in bad_reason(data[:-2] + 40 * data[at:-2] + data[-2:])


@pytest.mark.parametrize("where", ["header", "progressive scan", "scan with restart markers"])
def test_many_fill_bytes_are_quick(where):
    options = {"progressive scan": {"progressive": True}, "scan with restart markers": {"restart_marker_blocks": 3}}
    data, fill = encode(RGB, "JPEG", quality=97, **options.get(where, {})), b"\xff" * 300_000 + b"\0"
    at = 2 if where == "header" else data.rindex(b"\xff\xda") + 30
    start = time.process_time()
    with contextlib.suppress(transforms.BadImage):
        transforms.decode(data[:at] + fill + data[at:])
    assert time.process_time() - start < 5  # minutes, where each byte is tried anew


def test_many_segments():
    data = encode(RGB, "JPEG")
    assert "without a picture" in bad_reason(data[:2] + b"\xff\xe2\0\2" * 20_000 + data[2:])


def test_tags_that_are_no_numbers():
    """A width that is a text, times a height, is that text over and over."""
    data = tiff(GRAY)
    for kind in (2, 7):  # ASCII, bytes
        entries = struct.pack("<HHI4s", 322, kind, 3, b"999\0") + struct.pack("<HHII", 323, 4, 1, 2**31)
        at = struct.unpack("<I", data[4:8])[0]
        changed = data[:at] + struct.pack("<H", data[at] + 2) + data[at + 2 : -4] + entries + data[-4:]
        assert "tag 322 is no number" in bad_reason(changed)


def test_many_tiles_of_a_jpeg_2000():
    whole = encode(RGB, "JPEG2000", tile_size=(32, 32), no_jp2=True)
    assert_near(transforms.decode(whole), RGB, 40)
    at = whole.index(b"\xff\x51") + 6
    many = whole[:at] + struct.pack(">8I", 1000, 1000, 0, 0, 4, 4, 0, 0) + whole[at + 32 :]
    assert "more than 4096 tiles" in bad_reason(many)


def test_ppms_that_are_slow_to_read():
    assert "PPM in text" in bad_reason(b"P1\n1000 1000\n" + b"# x\n" * 10**6 + b"1" * 10**6)
    assert "a large PPM" in bad_reason(b"P5 2000 2000 100\n" + bytes(4_000_000))
    assert transforms.decode(b"P2 2 1 255\n0 255\n").tolist() == [[[0] * 3, [255] * 3]]


def test_tiles_larger_than_the_picture():
    data = tiff(GRAY)
    entries = struct.pack("<HHII", 322, 4, 1, 40000) + struct.pack("<HHII", 323, 4, 1, 40000)
    at = struct.unpack("<I", data[4:8])[0]
    data = data[:at] + struct.pack("<H", data[at] + 2) + data[at + 2 : -4] + entries + data[-4:]
    assert "40000 x 40000 pixels, more than" in bad_reason(data)


def test_samples_whose_meaning_is_not_known():
    for values in (GRAY.astype("<i2"), GRAY.astype("<i4"), GRAY.astype("<i1")):
        assert "signed samples" in bad_reason(tiff(values))
    for value in (-0.1, 1.1, np.nan, np.inf):
        values = np.full((4, 4), 0.5, "<f4")
        values[2, 2] = value
        assert "float samples" in bad_reason(tiff(values))


@pytest.mark.parametrize("name", ["PCX", "ICO", "EPS", "SGI", "PDF", "QOI"])
def test_formats_that_are_not_read_are_named(name):
    assert f"in the format {name}, which is not read" in bad_reason(encode(RGB, name))


def test_heic_says_what_to_install():
    assert "pip install pillow-heif" in bad_reason(b"\0\0\0\x18ftypheic" + bytes(40))


@pytest.mark.parametrize("trailer", [b"", b"\0"])
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_decoders_turn_a_jpeg_alike(order, kind, trailer):
    """OpenCV, left to itself, passes over an orientation in XMP, and over one of 4 bytes where they begin with 0."""
    data = encode(RGB, "JPEG", quality=97)
    for orientation, turn in UPRIGHT.items():
        value = struct.pack(f"{order}HH", orientation, 0) if kind == 3 else struct.pack(f"{order}I", orientation)
        exif = struct.pack(f"{order}HIHHHI", 42, 8, 1, 0x112, kind, 1) + value + bytes(4)
        exif = b"Exif\0\0" + (b"II" if order == "<" else b"MM") + exif
        xmp = f'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="{orientation}"/>'.encode()
        for content in (exif, xmp):
            segment = b"\xff\xe1" + struct.pack(">H", 2 + len(content)) + content
            turned = transforms.decode(data[:2] + segment + data[2:] + trailer)
            assert_near(turned, turn(RGB), 5)


@pytest.mark.parametrize("options", [{"restart_marker_rows": 1}, {"restart_marker_blocks": 3}, {"mode": "CMYK"}])
def test_truncated_jpegs_of_rarer_kinds(options):
    image = Image.fromarray(noise(96, 96)).convert(options.pop("mode", "RGB"))
    data = encode(image, "JPEG", quality=90, **options)
    for share in np.linspace(0.4, 0.97, 20):
        assert "truncated" in bad_reason(data[: int(share * len(data))] + b"\xff\xd9")


def test_large_pictures_are_converted_in_bands():
    image = np.random.default_rng(0).integers(0, 256, (2100, 2100, 4), np.uint8)
    assert np.array_equal(transforms.decode(encode(image, "PNG", compress_level=0)), image[:, :, :3])


def test_load_says_what_is_wrong_with_the_file(tmp_path):
    for path, reason in (
        (tmp_path / "none.jpg", "No such file"),
        (tmp_path, "Is a directory"),
        ("a\0b.jpg", "null byte"),
    ):
        with pytest.raises(transforms.BadImage, match=reason):
            transforms.load(str(path))
