"""Batches that are read ahead in threads, good pictures and bad ones."""

import itertools
import threading
import time

import cv2
import numpy as np
import pytest
from test_reader import (
    folder,  # noqa: F401
)

import reader
import sampler
import transforms
from utility import UserError


class Fake:
    """Takes the place of transforms.load: picture i is filled with i, `bad` ones are broken; counts and delays."""

    def __init__(self, monkeypatch, count, bad=(), delay=lambda i: 0):
        self.bad, self.delay, self.loaded, self.lock = set(bad), delay, [], threading.Lock()
        self.samples = reader.Samples([str(i) for i in range(count)], np.arange(count) // 4 + 50, "list", range(1, 999))
        monkeypatch.setattr(transforms, "load", self.load)

    def load(self, path, max_pixels=None):
        i = int(path)
        with self.lock:
            self.loaded.append(i)
        time.sleep(self.delay(i))
        if i in self.bad:
            raise transforms.BadImage(f"picture {i} is broken")
        return np.full((2, 3, 3), i, np.uint8)

    def read(self, batches, transform=lambda image, position: image, skipped=None, **options):
        """Yields the batches with a picture; a list in `skipped` gets what is said of bad ones, and goes on."""
        skip_bad = skipped is not None
        found = reader.read_batches(self.samples, batches, transform, (2, 3), skip_bad=skip_bad, **options)
        try:
            for batch in found:
                if skip_bad:
                    skipped += batch.bad
                if len(batch.index):
                    yield batch
        finally:
            found.close()


def assert_consistent(batches, samples):
    for batch in batches:
        assert batch.image.dtype == np.uint8 and batch.index.dtype == np.int64 and batch.label.dtype == np.int64
        assert batch.image.shape == (len(batch.index), 2, 3, 3)
        assert (batch.image == batch.index[:, None, None, None]).all()
        assert np.array_equal(batch.label, samples.labels[batch.index])


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_batches_do_not_depend_on_timing(folder, workers, monkeypatch):
    transform = transforms.training_transform((24, 24), 3, 4)
    order = [*sampler.shuffled_batches(23, 8, 0, 0, 4), np.arange(20, 23)]
    positions = np.split(np.arange(35), np.cumsum([8] * 4))
    wanted = [
        np.stack([transform(cv2.imread(folder.paths[i])[:, :, ::-1], p) for i, p in zip(rows, places)])
        for rows, places in zip(order, positions)
    ]
    load, rng = transforms.load, np.random.default_rng(workers)
    monkeypatch.setattr(
        transforms, "load", lambda path, limit: (time.sleep(rng.uniform(0, 0.006)), load(path, limit))[1]
    )
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
    fake.samples = fake.samples._replace(labels=np.arange(8) * 10)
    [batch] = fake.read([[3, 6]])
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
        for batch in itertools.cycle(sampler.sequential_batches(200, 10)):  # never ends
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
    batches = fake.read(sampler.sequential_batches(400, 100), num_workers=2)
    next(batches)
    wait_until(lambda: len(fake.loaded) > 100)
    started = len(fake.loaded)
    batches.close()
    assert len(fake.loaded) <= started + 2
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_first_bad_image_in_the_list_is_the_error(monkeypatch, workers):
    # The first one takes long: the others are found first.
    fake = Fake(monkeypatch, 60, bad=[13, 15, 16, 25, 40], delay=lambda i: 0.1 if i == 13 else 0)
    before = threading.active_count()
    batches = fake.read(sampler.sequential_batches(60, 10), num_workers=workers)
    assert next(batches).index.tolist() == list(range(10))
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(error.value) == "list:14: 13: picture 13 is broken (--on_bad_image=skip goes on without)"
    assert threading.active_count() == before


def test_a_workers_error_reaches_the_caller(monkeypatch):
    fake = Fake(monkeypatch, 20)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(fake.read(sampler.sequential_batches(20, 5), lambda image, position: image * (1 // (9 - position))))
    with pytest.raises(ValueError, match="shape"):
        list(fake.read(sampler.sequential_batches(20, 5), lambda image, position: image[:1, :1, :2]))
    with pytest.raises(IndexError):
        list(fake.read([[20]]))
    with pytest.raises(UserError, match="needs 7 classes"):
        list(fake.read(sampler.class_balanced_batches(fake.samples.labels, 14, 2, 0, 0, 3)))
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 3])
def test_skipping(monkeypatch, workers):
    fake = Fake(monkeypatch, 16, bad=[2, 3, 8, 9, 10, 11, 15], delay=lambda i: 0.005 * (i % 3))
    skipped = []
    order = [*sampler.sequential_batches(16, 4), [2, 5]]
    batches = list(fake.read(order, num_workers=workers, skipped=skipped))
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
    order = list(sampler.class_balanced_batches(fake.samples.labels, 12, 4, 0, 0, 24))
    batches = list(fake.read(order, num_workers=workers, skipped=skipped, replace=True))
    assert_consistent(batches, fake.samples)
    moved = 0
    for batch, rows in zip(batches, order):
        good = ~np.isin(rows, list(fake.bad))
        moved += (~good).sum()
        assert np.array_equal(batch.index[good], rows[good]) and np.array_equal(batch.label, fake.samples.labels[rows])
        assert len(np.unique(batch.index)) == 12 and not np.isin(batch.index, list(fake.bad)).any()
    assert moved > 10 and len(batches) == 24
    assert sorted(i for i, _ in skipped) == sorted(fake.bad)
    plain = list(fake.read(order, num_workers=1, skipped=[], replace=True))
    assert [b.index.tolist() for b in batches] == [b.index.tolist() for b in plain]


def test_replacements_are_spread_over_the_class(monkeypatch):
    fake = Fake(monkeypatch, 100, bad=[0])
    fake.samples = fake.samples._replace(labels=np.zeros(100, np.int64))
    batches = list(fake.read([[0, 1]] * 50, skipped=[], replace=True))
    assert len({int(batch.index[0]) for batch in batches}) > 25


def test_replacements_where_the_class_has_few_good_images(monkeypatch):
    # Two of four are good: each comes twice. One of four: four times. None: any picture, but no smaller batch.
    fake = Fake(monkeypatch, 12, bad=[1, 2, 4, 5, 7, 8, 9, 10, 11])
    skipped = []
    batches = list(fake.read([np.arange(12)] * 2, skipped=skipped, replace=True))
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
    for batch, rows in zip(fake.read(order, num_workers=workers, skipped=[], replace=True), order):
        assert len(batch.index) == len(rows) == len(set(batch.index.tolist()))
        classes, counts = np.unique(batch.label, return_counts=True)
        assert counts.tolist() == [4] * (len(rows) // 4) and 52 not in classes
        others |= set(classes) - set(fake.samples.labels[rows])
    assert len(others) > 2  # not always the same one


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_make_up_the_batch(monkeypatch, processes):
    """What the processes read together, pictures, labels and random draws, is what one process reads."""
    fake = Fake(monkeypatch, 40, bad=[5])
    order = list(sampler.class_balanced_batches(fake.samples.labels, 12, 4, 0, 0, 5))
    drawn = {}

    def transform(image, position):
        drawn.setdefault(position, int(image[0, 0, 0]))
        assert drawn[position] == image[0, 0, 0]  # the same picture at the same position in every process
        return image

    whole = list(fake.read(order, transform, skipped=[], replace=True, position=7))
    for part in range(processes):

        def share(count, part=part):
            return slice(count * part // processes, count * (part + 1) // processes)

        read = list(fake.read(order, transform, skipped=[], replace=True, position=7, share=share))
        for mine, all_of_it in zip(read, whole):
            assert len(mine.index) == 12 // processes
            assert np.array_equal(mine.index, all_of_it.index[share(12)])
            assert np.array_equal(mine.label, all_of_it.label[share(12)])
    assert any(5 in rows for rows in order)
    assert set(drawn) == set(range(7, 7 + 60))


def test_a_replacement_may_be_bad_too(monkeypatch):
    fake = Fake(monkeypatch, 4, bad=[0, 1, 2])
    skipped = []
    [batch] = fake.read([[0]], skipped=skipped, replace=True)
    assert batch.index.tolist() == [3] and skipped[0] == (0, "picture 0 is broken")
    assert {i for i, _ in skipped} <= fake.bad


def test_a_batch_without_a_good_picture_is_empty_and_says_why(monkeypatch):
    fake = Fake(monkeypatch, 8, bad=[0, 1, 4])
    batches = list(reader.read_batches(fake.samples, [[0, 1], [2, 4], [1, 3]], lambda i, p: i, (2, 3), skip_bad=True))
    assert [batch.index.tolist() for batch in batches] == [[], [2], [3]]
    assert [[index for index, _ in batch.bad] for batch in batches] == [[0, 1], [4], []]  # each once
    assert batches[0].image.shape == (0, 2, 3, 3) and batches[0].label.tolist() == []
