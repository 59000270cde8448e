"""The bytes of a picture -> upright RGB, uint8 [H, W, 3] -> crops and resizes of it.

Decoding and resizing release Python's interpreter lock in OpenCV and Pillow.
"""

import contextlib
import io
import itertools
import math
import re
import struct

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

import files
import jpeg
from utility import plain

# RGB mean and standard deviation of ImageNet, of values in 0..1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MEAN_COLOR = (124, 116, 104)  # in 0..255
# 8192 x 8192. Decoding takes, at its peak, 6 to 12 bytes for each pixel of a JPEG or PNG, and up to 23 of other formats
# (JPEG 2000, WebP): 0.4 to 1.6 GB a worker.
MAX_PIXELS = 2**26
MOST_TILES = 4096  # of a JPEG 2000, each of which takes some 12 KB
_SIZ = re.compile(rb"\xff\x4f\xff\x51.{4}(.{32})", re.DOTALL)
# Pillow's decoders of these are loops in Python: 3 seconds for so many pixels.
SLOW_PIXELS, _SLOW_PPM = 2**20, ("ppm", "ppm_plain")
MAX_SCANS = 32  # of a JPEG; encoders make 12 at most, and each is a pass over the whole picture

# Pillow knows 43 formats, of which some start other programs or believe what a file says of its size.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
_READ = "JPEG, PNG, BMP, GIF, WebP, TIFF, PPM, JPEG 2000, AVIF"
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class BadImage(Exception):
    """A picture that is missing, broken, or no picture; the message says which of these."""


def decode(data, max_pixels=None):
    """The bytes of a picture -> upright RGB, uint8 [H, W, 3].

    Its format is one of FORMATS (a JPEG may be an MPO), or HEIC where pillow-heif is installed. Grey, palette and CMYK
    are converted; samples of more than 8 bits are scaled by the largest value that their format has, floats by 1. An
    alpha channel is dropped, as torchvision, PaddleClas and OpenCV do: what is transparent shows the colour stored
    there. Of an animation, the first picture is taken. Upright is what Pillow takes for it: by EXIF data, else by XMP.

    Raises: BadImage where the data is empty, truncated, or no picture; where its header promises more than
        `max_pixels` (None: MAX_PIXELS): a few hundred bytes can ask for any amount of memory; and where samples are
        signed, or floats beyond 0..1, whose meaning only their author knows.
    """
    if not data:
        raise BadImage("an empty file")
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _decode_jpeg(data, max_pixels)
        return _decode_with_pillow(data, max_pixels)
    except UnidentifiedImageError:
        raise BadImage(_unknown(data)) from None
    except jpeg.BadJpeg as error:
        raise BadImage(str(error)) from None
    except BadImage:
        raise
    except Exception as error:  # a broken file makes Pillow's plugins raise nearly anything
        raise BadImage(f"not readable as an image ({plain(error)})") from None


def _decode_jpeg(data, max_pixels):
    header = jpeg.read_header(data)
    _check_size(header.width, header.height, max_pixels)
    if jpeg.count_scans(data, header, MAX_SCANS + 1) > MAX_SCANS:
        raise BadImage(f"a JPEG of more than {MAX_SCANS} scans")
    # OpenCV is the faster decoder, but takes a JPEG that ends early for a good one with a grey rest. One that ends with
    # its end marker is whole; any other goes to Pillow, which tells a truncated file from one with a trailer.
    if data[-2:] == b"\xff\xd9":
        if jpeg.lacks_restarts(data, header):
            raise BadImage("a truncated JPEG")
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        with contextlib.suppress(cv2.error):  # more pixels than OpenCV takes: Pillow finds the words for it
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
            if image is not None and image.shape[:2] == (header.height, header.width):
                if (header.components == 4 or _has_gray_corner(image)) and _stops_early(data):
                    raise BadImage("a truncated JPEG")
                return _upright(image, _jpeg_orientation(data) if header.exif else 1)
    return _decode_with_pillow(data, max_pixels, (header.width, header.height))


def _decode_with_pillow(data, max_pixels, size=None):
    """`decode` by Pillow.

    Args:
        size: (width, height) that Pillow must find, too; None: what it finds.
    """
    formats = FORMATS
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC and (heif := _heif()):
        formats += (heif,)
    if data[:2] in (b"P1", b"P2", b"P3") and len(data) > 2**22:
        raise BadImage("a large PPM in text")
    if data[:4] == b"RIFF":
        _check_size(*_webp_size(data), max_pixels)
    with Image.open(io.BytesIO(data), formats=formats) as image:
        if size and image.size != size:
            raise BadImage("an image whose header can be read in two ways")
        # What decoders allocate: the picture, and of what it is made of the largest piece.
        for width, height in (image.size, (_number(image, 322, 0), _number(image, 323, 0))):  # TIFF: a tile's
            _check_size(width, height, max_pixels)
        if image.format == "JPEG2000":
            _check_tiles(data)
        if image.format == "PPM" and image.tile[0][0] in _SLOW_PPM and image.width * image.height > SLOW_PIXELS:
            raise BadImage("a large PPM whose white is neither 255 nor 65535")
        image.load()
        orientation = 1
        with contextlib.suppress(Exception):  # a broken EXIF block does not make a broken picture
            orientation = image.getexif().get(0x0112, 1)
        return _upright(_rgb(image), orientation)


def _check_size(width, height, max_pixels):
    if width * height > (max_pixels or MAX_PIXELS):
        limit = f"--max_pixels={max_pixels}" if max_pixels else MAX_PIXELS
        raise BadImage(f"{width} x {height} pixels, more than {limit}")


def _webp_size(data):
    """(width, height) that Pillow's decoder allocates when it opens a WebP."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _rgb(image):
    """A loaded picture of Pillow's -> uint8 RGB [H, W, 3]; in bands, for Pillow's copies would be as large as it is."""
    if image.mode != "F" and _number(image, 339, 1) == 2:
        raise BadImage("signed samples, whose black and white are not known")
    if image.mode[0] in "IF":
        return cv2.cvtColor(_gray(image), cv2.COLOR_GRAY2RGB)
    rows = max(1, 2**22 // image.width)
    if rows >= image.height:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    whole = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole[top : top + rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return whole


def _gray(image):
    """A loaded picture of Pillow's in 16 or 32 bits or floats -> uint8 [H, W]."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # NaN included
            raise BadImage("float samples beyond 0..1, or NaN: which of them is white is not known")
        gray = np.rint(values * 255).astype(np.uint8)
    else:
        bits = _number(image, 258, 16)
        if bits == 32:
            values = values.view(np.uint32)
        gray = np.clip(values.astype(np.uint32) >> (bits - 8), 0, 255).astype(np.uint8)
    return 255 - gray if _number(image, 262, 1) == 0 else gray


def _number(image, tag, default):
    """The first number that a TIFF has under a tag; the default where it has none, or is none."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    value = value[0] if isinstance(value, tuple) and value else value
    if type(value) is not int:
        raise BadImage(f"a TIFF whose tag {tag} is no number")
    return value


def _check_tiles(data):
    """Raises a BadImage where a JPEG 2000 has so many tiles that they take more memory than its pixels.

    Of all that looks like the description of its size (SIZ), for only its decoder knows which one counts.
    """
    for found in itertools.islice(_SIZ.finditer(data), 100):
        right, bottom, _, _, width, height, left, top = struct.unpack(">8I", found[1])
        across, down = -((left - right) // max(1, width)), -((top - bottom) // max(1, height))
        if across * down > MOST_TILES:
            raise BadImage(f"a JPEG 2000 of more than {MOST_TILES} tiles")


def _upright(image, orientation):
    """Turns uint8 [H, W, 3] as an orientation of EXIF says."""
    turns = {
        2: lambda: cv2.flip(image, 1),
        3: lambda: cv2.rotate(image, cv2.ROTATE_180),
        4: lambda: cv2.flip(image, 0),
        5: lambda: cv2.transpose(image),
        6: lambda: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
        7: lambda: cv2.flip(cv2.transpose(image), -1),
        8: lambda: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
    }
    return turns[orientation]() if orientation in turns else image


def _jpeg_orientation(data):
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return image.getexif().get(0x0112, 1)
    return 1


def _has_gray_corner(image):
    """Whether a corner has the grey that libjpeg gives to what is missing."""
    return any(image[y, x].tolist() == [128, 128, 128] for y in (0, -1) for x in (0, -1))


def _stops_early(data):
    """Whether the coded data of a JPEG ends before its picture does, although an end marker follows.

    Bytes put before the end marker change the picture only where something is missing. They begin with 0, for the data
    may end with an FF that lacks it. Other damage can't be seen: a JPEG has no checksum, and a progressive one may end
    after any of its scans.
    """

    def preview(data):
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.draft("L", (1, 1))  # an eighth of the size: quick, and as telling
            return image.tobytes()

    try:
        return preview(data) != preview(data[:-2] + bytes(range(255)) + data[-2:])
    except Exception:  # Pillow refuses what OpenCV took: the doubt that brought us here was right
        return True


def _heif():
    """The name of the format HEIF in Pillow, or None without pillow-heif."""
    try:
        import pillow_heif
    except ImportError:
        return None
    pillow_heif.register_heif_opener()
    return "HEIF"


def _unknown(data):
    """What is wrong with a file that is in none of the formats."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC:
        return "HEIC, which is read where pillow-heif is installed: pip install pillow-heif"
    named = {b"%PDF": "PDF", b"<svg": "SVG", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL"}
    name = next((name for start, name in named.items() if data.startswith(start)), None)
    Image.init()
    for key, (_, accept) in Image.OPEN.items():
        with contextlib.suppress(Exception):  # of which most look at a few bytes and no further
            if not name and accept and accept(data[:32]):
                name = key
    if name in FORMATS:
        return f"a broken {name}, or one of a kind that is not read"
    if name:
        return f"in the format {name}, which is not read: save it as one of {_READ}"
    return "not an image, or in no format that is known here"


def load(path, max_pixels=None):
    """`decode` of a file. Raises: BadImage."""
    try:
        # What is longer than any picture of so many pixels is none; 8 bytes are two samples of 32 bits, or 4 of 16.
        with files.open_file(path, 8 * (max_pixels or MAX_PIXELS) + 2**24) as file:
            return decode(file.read(), max_pixels)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    except ValueError as error:  # a zero byte in the path
        raise BadImage(str(error)) from None


def _resize(image, height, width):
    """Averages along a side that shrinks (so do Pillow and torchvision), interpolates along one that grows."""
    small = (min(width, image.shape[1]), min(height, image.shape[0]))
    if small != (image.shape[1], image.shape[0]):
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    if small != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def _resize_quickly(image, height, width):
    """Halves a side until it is less than twice as long as wanted, then interpolates linearly: each pixel has a share.

    For training: `_resize` takes three to ten times as long where it shrinks, which is a fifth of all that a picture of
    500 x 375 costs. The results differ by one grey value in 255 on average.
    """
    while image.shape[0] >= 2 * height or image.shape[1] >= 2 * width:
        y, x = 1 + (image.shape[0] >= 2 * height), 1 + (image.shape[1] >= 2 * width)
        half = (image.shape[0] // y, image.shape[1] // x)
        # Without an odd last row or column: only whole factors are quick.
        image = cv2.resize(image[: half[0] * y, : half[1] * x], half[::-1], interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def random_resized_crop(image, shape, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random part of the picture, at `shape` (height, width), mirrored half of the time: the original's training.

    Args:
        scale: range of the part's share of the area, drawn uniformly.
        ratio: range of its width / height, drawn log-uniformly.
        rng: np.random.Generator.

    Where ten draws don't fit into the picture, the largest centred part within `ratio` is taken.
    """
    full_height, full_width = image.shape[:2]
    for _ in range(10):
        # All numbers of a try at once: a call for each takes five times as long.
        area, aspect, top, left, mirror = rng.random(5).tolist()
        area = full_height * full_width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            top, left = int(top * (full_height - height + 1)), int(left * (full_width - width + 1))
            break
    else:
        aspect = min(max(full_width / full_height, ratio[0]), ratio[1])
        width = min(full_width, max(1, round(full_height * aspect)))
        height = min(full_height, max(1, round(full_width / aspect)))
        top, left = (full_height - height) // 2, (full_width - width) // 2
    part = _resize_quickly(image[top : top + height, left : left + width], *shape)
    return cv2.flip(part, 1) if mirror < 0.5 else part


def center_crop(image, shape):
    """The original's test transform: the short side becomes 256/224 of the crop's, then the centre is cut out."""
    height, width = shape
    scale = max(height / image.shape[0], width / image.shape[1]) * 256 / 224
    # A picture far longer than the crop is cut first: all of a 10 x 10000 one would grow to hundreds of megabytes.
    y, x = (max(0, int(full - 4 * side / scale) // 2) for full, side in zip(image.shape, shape))
    image = image[y : image.shape[0] - y, x : image.shape[1] - x]
    image = _resize(image, max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale)))
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def resize(image, shape):
    """The whole picture at `shape` (height, width), its aspect ratio not kept."""
    return _resize(image, *shape)


TEST_TRANSFORMS = {"center_crop": center_crop, "resize": resize}


def color_jitter(image, rng, strength):
    """Brightness, contrast and saturation, in this order, each by a factor drawn from 1 - strength to 1 + strength.

    They are those of Pillow's ImageEnhance and torchvision's ColorJitter: blends of the picture with black, with its
    mean grey and with its own grey.

    Args:
        image: uint8 RGB [H, W, 3]; rng: np.random.Generator; strength: in 0..1.
    """
    brightness, contrast, saturation = (1 + strength * (2 * rng.random(3) - 1)).tolist()
    values = np.arange(256)
    image = cv2.LUT(image, np.clip(values * brightness + 0.5, 0, 255).astype(np.uint8))
    mean = round(float(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()))
    image = cv2.LUT(image, np.clip(values * contrast + mean * (1 - contrast) + 0.5, 0, 255).astype(np.uint8))
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, saturation, gray, 1 - saturation, 0)


def random_erasing(image, rng, probability):
    """Random erasing: a rectangle of the picture gets ImageNet's mean colour. Zhong et al., arXiv 1708.04896.

    The rectangle has 2 to 40 % of the area, and a height of 0.3 to 1/0.3 of its width, drawn log-uniformly. Where ten
    draws don't fit into the picture, it stays as it is.

    Args:
        image: uint8 RGB [H, W, 3]; rng: np.random.Generator; probability: in 0..1.
    """
    height, width = image.shape[:2]
    if rng.random() >= probability:
        return image
    for _ in range(10):
        area, aspect, top, left = rng.random(4).tolist()
        area = height * width * (0.02 + 0.38 * area)
        aspect = 0.3 ** (1 - 2 * aspect)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(top * (height - h + 1)), int(left * (width - w + 1))
            image = image.copy()
            image[top : top + h, left : left + w] = MEAN_COLOR
            break
    return image


def training_transform(shape, seed, epoch, min_area=0.08, jitter=0.0, erasing=0.0):
    """`random_resized_crop`, `color_jitter`, `random_erasing`; all draws depend on seed, epoch and position alone."""

    def transform(image, position):
        rng = np.random.default_rng([seed, epoch, position])
        image = random_resized_crop(image, shape, rng, (min_area, 1.0))
        if jitter:
            image = color_jitter(image, rng, jitter)
        return random_erasing(image, rng, erasing) if erasing else image

    return transform
