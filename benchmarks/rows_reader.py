"""Training pictures: JPEG -> random resized crop of 224 x 224, mirrored half of the time -> uint8 batches of 20.

The other loaders do the same to uint8, with the libraries' own transforms: no float32, no normalisation, which would
cost them more. All read files that the system keeps in memory. Decoding alone has them in the process already.
"""

import glob
import io
import os
import tempfile

import numpy as np

from comparison import Comparison, Speed

BATCH = 20
# Real pictures where they are: full photographs of about 500 x 375, and box crops of 224 x 224; else drawn ones.
PHOTOS = os.environ.get("BENCH_PHOTOS", "")
CROPS = os.environ.get("BENCH_CROPS", "")


def comparisons(tiny):
    sets = [("about 500 x 375", PHOTOS, (375, 500), 120), ("224 x 224", CROPS, (224, 224), 200)]
    for size, folder, shape, count in sets[:1] if tiny else sets:
        count = 20 if tiny else count
        pictures = {"folder": folder, "shape": shape, "count": count, "passes": 1 if tiny else max(1, 600 // count)}
        what = f"reader, JPEG of {size} ({'photographs' if folder else 'drawn'})"
        rows = {
            "reader.py, per core": ("ours", {**pictures, "threads": 1}),
            "decoding alone (simplejpeg), per core": ("decode", pictures),
            "decoding, linear resize, mirroring alone, per core": ("bare", pictures),
        }
        one, decoding, bare = rows
        yield Comparison(
            what,
            rows,
            [Speed(one, decoding, 0.75, "cpu"), Speed(one, bare, None, "cpu")],
            7,
            count * pictures["passes"],
        )
        rows = {
            "reader.py, all cores": ("ours", {**pictures, "threads": None}),
            "PyTorch's DataLoader, torchvision on PIL, all cores": ("pytorch", pictures),
            "Paddle's DataLoader and transforms, all cores": ("paddle", pictures),
            "decoding alone (simplejpeg), all cores": ("decode_everywhere", pictures),
        }
        ours, pytorch, paddle, decoding = rows
        speeds = [Speed(ours, pytorch, 2.0), Speed(ours, paddle, 2.0), Speed(ours, decoding)]
        yield Comparison(what, rows, speeds, 7, count * pictures["passes"])


def find(folder, shape, count, passes):
    """-> paths of `count` JPEG pictures, `passes` times: from the folder, or drawn in a temporary one."""
    if folder:
        paths = sorted(glob.glob(os.path.join(folder, "**", "*.jpg"), recursive=True))
        step = max(1, len(paths) // count)
        paths = paths[::step][:count]
    else:
        import cv2

        folder = os.path.join(tempfile.gettempdir(), f"bench_pictures_{os.getuid()}")
        os.makedirs(folder, exist_ok=True)
        rng, paths = np.random.default_rng(0), []
        for i in range(count):
            # Coarse and fine noise: about as many bytes as a photograph of this size.
            coarse = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), shape[::-1], interpolation=cv2.INTER_CUBIC)
            fine = cv2.GaussianBlur(rng.normal(0, 40, (*shape, 3)), (0, 0), 0.8)
            paths.append(os.path.join(folder, f"{shape[0]}_{i}.jpg"))
            cv2.imwrite(paths[-1], np.clip(coarse + fine, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return (paths * (count // len(paths) + 1))[:count] * passes


def ours(threads, **pictures):
    from runtime import process

    process.start_paddle(seed=0)  # the process as train.py has it
    import reader
    import sampler
    import transforms

    paths = find(**pictures)
    samples = reader.Samples(paths, np.zeros(len(paths), np.int64), None, None)

    def run():
        transform = transforms.training_transform((224, 224), 0, 0)
        batches = sampler.sequential_batches(len(paths), BATCH)
        read = reader.read_batches(samples, batches, transform, (224, 224), num_workers=threads)
        assert sum(len(batch.image) for batch in read) == len(paths)

    return run


def contents(**pictures):
    paths, data = find(**pictures), {}
    for path in set(paths):
        with open(path, "rb") as file:
            data[path] = file.read()
    return [data[path] for path in paths]


def decode(**pictures):
    import simplejpeg

    data = contents(**pictures)

    def run():
        for picture in data:
            simplejpeg.decode_jpeg(picture)

    return run


def decode_everywhere(**pictures):
    import concurrent.futures

    import simplejpeg

    from runtime import process

    data = contents(**pictures)
    pool = concurrent.futures.ThreadPoolExecutor(process.cpu_count())

    def run():
        for _ in pool.map(simplejpeg.decode_jpeg, data):
            pass

    return run


def bare(**pictures):
    """The floor of any reader on these libraries: no random draws, no files, no batches, no checks."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    data = contents(**pictures)

    def run():
        for picture in data:
            image = simplejpeg.decode_jpeg(picture)
            height, width = (int(0.73 * side) for side in image.shape[:2])  # the mean of the random crops
            part = cv2.resize(image[:height, :width], (224, 224), interpolation=cv2.INTER_LINEAR)
            cv2.flip(part, 1)

    return run


class _Pictures:
    """What both DataLoaders take as a data set: a picture, opened by PIL, through `transform`."""

    def __init__(self, paths, transform):
        self.paths = paths
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from PIL import Image

        with open(self.paths[index], "rb") as file:
            return self.transform(Image.open(io.BytesIO(file.read())).convert("RGB"))


def pytorch(**pictures):
    import torch
    import torchvision_ops  # noqa: F401
    from torchvision import transforms

    from runtime import process

    transform = transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    torch.set_num_threads(1)
    paths = find(**pictures)
    loader = torch.utils.data.DataLoader(
        _Pictures(paths, transform), BATCH, num_workers=process.cpu_count(), persistent_workers=True
    )

    def run():
        assert sum(len(batch) for batch in loader) == len(paths)

    return run


def paddle(**pictures):
    from runtime import process

    paddle = process.start_paddle(seed=0)
    from paddle.vision import transforms

    crop = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()])
    paths = find(**pictures)
    data = type("Pictures", (_Pictures, paddle.io.Dataset), {})(paths, lambda image: np.asarray(crop(image)))
    loader = paddle.io.DataLoader(
        data, batch_size=BATCH, num_workers=process.cpu_count(), persistent_workers=True, timeout=120
    )

    def run():
        assert sum(len(batch[0] if isinstance(batch, (list, tuple)) else batch) for batch in loader) == len(paths)

    return run
