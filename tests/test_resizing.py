"""Crops and resizes."""

import itertools

import cv2
import numpy as np
import pytest
from PIL import Image
from test_transforms import assert_near, noise

import transforms


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
    assert_near(transforms.resize(image, size), np.round(area_average(image, *size)).astype(np.uint8), 1)


@pytest.mark.parametrize("size", [(30, 40), (97, 131), (30, 160), (120, 33), (60, 80), (60, 40), (90, 80)])
def test_resize_is_near_pillows(size):
    image = cv2.GaussianBlur(noise(60, 80), (0, 0), 2)  # what is sharp depends on the filter
    wanted = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    result = transforms.resize(image, size)
    assert_near(result, wanted, 12)
    assert np.abs(result.astype(int) - wanted).mean() < 2


def test_a_side_that_shrinks_is_averaged_while_the_other_grows():
    stripes = np.tile(np.array([0, 0, 0, 200], np.uint8), 20)[None, :, None].repeat(10, 0).repeat(3, 2)
    assert (transforms.resize(stripes, (30, 20)) == 50).all()
    assert (transforms.resize(stripes.swapaxes(0, 1), (20, 30)) == 50).all()


def ramp(height, width):
    """A picture that tells where its pixels come from: x and y of the pixel's centre, in 255 parts of the sides."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(x + 0.5) / width * 255, (y + 0.5) / height * 255, 0 * x], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("shape", [(224, 224), (96, 96), (64, 160), (160, 64), (300, 300)])
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (224, 224), (40, 60), (256, 256)])
def test_center_crop(size, shape):
    result = transforms.center_crop(ramp(*size), shape)
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
    result = transforms.center_crop(image, (224, 224))
    assert np.abs(result.astype(int) - wanted).mean() < 1


@pytest.mark.parametrize("size", [(2, 9000), (9000, 3), (1, 1), (1, 7), (100, 9000)])
def test_center_crop_of_odd_pictures(size, monkeypatch):
    resize, largest = cv2.resize, [0]

    def measured(image, size, **options):
        largest[0] = max(largest[0], size[0] * size[1])
        return resize(image, size, **options)

    monkeypatch.setattr(cv2, "resize", measured)
    result = transforms.center_crop(ramp(*size), (224, 224))
    assert result.shape == (224, 224, 3)
    assert largest[0] < 2_000_000
    assert np.abs(result[112, 112, :2].astype(int) - 127).max() <= 255 / min(s for s in size if s > 1 or size == (1, 1))


def test_resize_takes_the_whole_picture():
    result = transforms.TEST_TRANSFORMS["resize"](ramp(100, 300), (50, 60))
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
        part = transforms.random_resized_crop(image, (250, 250), rng, **options)
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
        result = transforms.random_resized_crop(image, (30, 40), np.random.default_rng(seed))
        assert np.abs(result.astype(int) - (wanted[:, ::-1] if mirrored else wanted)).mean() < 2


def test_random_crop_of_a_large_picture_uses_every_pixel():
    """Stripes of one pixel, which a resize that skips pixels turns into coarse patterns."""
    stripes = np.zeros((901, 1203, 3), np.uint8)
    stripes[::2] = stripes[:, ::2] = 200
    for seed in range(5):
        part = transforms.random_resized_crop(stripes, (60, 90), np.random.default_rng(seed), scale=(0.5, 1.0))
        assert (part == 150).all()


def test_random_crop_of_odd_pictures():
    for size, wanted in (((12, 200), (92, 0, 16, 12)), ((200, 12), (0, 92, 12, 16)), ((10, 13), (0, 0, 13, 10))):
        # Nothing of the whole area fits within the ratios, or only just: the largest centred part that does.
        boxes = draw_boxes(size, 20, np.random.default_rng(0), scale=(0.9999, 1.0), ratio=(3 / 4, 4 / 3))
        assert wanted in {tuple(box[:4]) for box in boxes}
        if size != (10, 13):
            assert len({tuple(box[:4]) for box in boxes}) == 1
    for size in ((1, 1), (1, 300), (300, 1), (2, 3)):
        result = transforms.random_resized_crop(coordinates(*size), (8, 9), np.random.default_rng(0))
        assert result.shape == (8, 9, 3)


def test_training_transform_depends_on_seed_epoch_and_position_alone():
    image = noise(60, 80)

    def draw(seed, epoch, position, **options):
        return transforms.training_transform((32, 32), seed, epoch, **options)(image, position).tobytes()

    transform = transforms.training_transform((32, 32), 1, 2)
    transform(image, 7)
    assert transform(image, 3).tobytes() == draw(1, 2, 3)
    keys = list(itertools.product(range(3), repeat=3))
    assert len({draw(*key) for key in keys}) == len(keys)
    areas = []
    for position in range(50):
        part = transforms.training_transform((250, 250), 0, 0, 0.6)(coordinates(240, 240), position)
        areas.append(np.prod(np.ptp(part[:, :, :2], axis=(0, 1)).astype(int) + 1) / 240**2)
    assert 0.59 < min(areas) < 0.7 and max(areas) > 0.85
