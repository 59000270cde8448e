"""The bytes of a picture -> upright RGB, uint8 [H, W, 3] -> crops and resizes of it. Imports nothing of ours.

Decoding and resizing release Python's interpreter lock in OpenCV and Pillow.
"""

import contextlib
import io
import math

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# RGB mean and standard deviation of ImageNet, of values in 0..1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MEAN_COLOR = (124, 116, 104)  # in 0..255
MAX_PIXELS = 200_000_000  # 600 MB decoded; the largest telephones take so many


class BadImage(Exception):
    """A picture that is missing, broken, or no picture; the message says which of these."""


def decode(data, max_pixels=MAX_PIXELS):
    """The bytes of a JPEG, PNG, BMP, WebP (or what else Pillow reads) -> upright RGB, uint8 [H, W, 3].

    Grey, palette, CMYK and 16-bit pictures are converted. An alpha channel is dropped, as torchvision, PaddleClas and
    OpenCV do: what is transparent shows the colour stored there. Of an animation, the first picture is taken.

    Raises: BadImage where the data is empty, truncated, or no picture, or where its header promises more than
        `max_pixels`: a few hundred bytes can ask for any amount of memory.
    """
    if not data:
        raise BadImage("an empty file")
    # OpenCV is the faster decoder, but takes a JPEG that ends early for a good one with a grey rest. One that ends with
    # its end marker is whole; any other goes to Pillow, which tells a truncated file from one with a trailer.
    if data[:3] == b"\xff\xd8\xff" and data[-2:] == b"\xff\xd9" and 0 < _jpeg_pixels(data) <= max_pixels:
        with contextlib.suppress(cv2.error):  # more pixels than OpenCV takes: Pillow finds the words for it
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if image is not None:
                if _has_gray_corner(image) and _stops_early(data):
                    raise BadImage("a truncated JPEG")
                return image
    try:
        return _decode_with_pillow(data, max_pixels)
    except UnidentifiedImageError:
        raise BadImage("not an image, or in no format that is known here") from None
    except BadImage:
        raise
    except Exception as error:  # a broken file makes Pillow's plugins raise nearly anything
        raise BadImage(f"not readable as an image ({' '.join(str(error).split())})") from None


def _decode_with_pillow(data, max_pixels):
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > max_pixels:
            raise BadImage(f"{image.width} x {image.height} pixels, more than --max_pixels={max_pixels}")
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block does not make a broken picture
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip rather than scale
            gray = (np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)
            return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _jpeg_pixels(data):
    """Pixels that a JPEG's header promises; 0 where the header is not one that is quickly read."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 9 <= len(data):
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame header, and not a table
            return int.from_bytes(data[at + 5 : at + 7], "big") * int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _has_gray_corner(image):
    """Whether a corner has the grey that libjpeg gives to what is missing (EXIF data decides which corner is last)."""
    return bool((image[[0, 0, -1, -1], [0, -1, 0, -1]] == 128).all(axis=1).any())


def _stops_early(data):
    """Whether the coded data of a JPEG ends before its picture does, although an end marker follows.

    Bytes put before the end marker change the picture only where something is missing. Other damage can't be seen: a
    JPEG has no checksum, and a progressive one may end after any of its scans.
    """

    def preview(data):
        with Image.open(io.BytesIO(data)) as image:
            image.draft("L", (1, 1))  # an eighth of the size: quick, and as telling
            return image.tobytes()

    try:
        return preview(data) != preview(data[:-2] + bytes(range(1, 255)) + data[-2:])
    except Exception:  # Pillow refuses what OpenCV took: the doubt that brought us here was right
        return True


def load(path, max_pixels=MAX_PIXELS):
    """`decode` of a file. Raises: BadImage."""
    try:
        with open(path, "rb") as file:
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


def random_erasing(image, rng, probability, scale=(0.02, 0.4), ratio=(0.3, 1 / 0.3)):
    """Random erasing: a rectangle of the picture gets ImageNet's mean colour. Zhong et al., arXiv 1708.04896.

    Args:
        image: uint8 RGB [H, W, 3]; rng: np.random.Generator; probability: in 0..1.
        scale: range of the rectangle's share of the area; ratio: range of its height / width, drawn log-uniformly.

    Where ten draws don't fit into the picture, it stays as it is.
    """
    height, width = image.shape[:2]
    if rng.random() >= probability:
        return image
    for _ in range(10):
        area, aspect, top, left = rng.random(4).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
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
