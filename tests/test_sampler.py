"""Which pictures make a batch."""

import numpy as np
import pytest

import sampler
from utility import UserError


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
    batches = list(sampler.class_balanced_batches(labels, batch_size, k, 5, 0, 60))
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
        batches = list(sampler.class_balanced_batches(labels, 8, 4, 0, epoch, 20))
        assert sorted(np.concatenate(batches[:10])) == list(range(80))
        assert sorted(np.concatenate(batches[10:])) == list(range(80))


def test_classes_come_as_often_as_they_have_images():
    sizes = np.random.default_rng(3).integers(4, 40, 60)
    labels = class_sizes(sizes)
    groups = sum(-(-size // 4) for size in sizes)
    seen = np.zeros(len(labels), int)
    for epoch in range(4):
        draws = np.concatenate(list(sampler.class_balanced_batches(labels, 32, 4, 0, epoch, groups // 8)))
        counts = np.bincount(draws, minlength=len(labels))
        assert (counts > 0).mean() > 0.97 and counts.max() <= 3
        seen += counts
    assert seen.min() >= 2 and seen.max() <= 8


def test_one_huge_class_does_not_shut_out_the_others():
    labels = class_sizes([1000] + [4] * 6)
    batches = np.array(list(sampler.class_balanced_batches(labels, 12, 4, 0, 0, 90)))
    names, counts = np.unique(labels, return_counts=True)
    share = np.array([(labels[batches] == name).any(axis=1).mean() for name in names])
    assert share[counts == 1000] > 0.9
    assert share[counts == 4].min() > 0.25 and share[counts == 4].max() < 0.45  # two places for six classes
    huge = batches[labels[batches] == names[counts == 1000]]
    assert len(np.unique(huge)) == len(huge)


def test_draws_depend_on_seed_and_epoch_alone():
    labels = class_sizes([9] * 12)
    for make in (
        lambda *key: sampler.class_balanced_batches(labels, 12, 4, *key),
        lambda *key: sampler.shuffled_batches(len(labels), 12, *key),
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
        sampler.check_balance(classes, batch_size, k)
    assert wanted in str(error.value)
    with pytest.raises(UserError):
        next(sampler.class_balanced_batches(np.repeat(np.arange(classes), 8), batch_size, k, 0, 0, 1))


def test_shuffled_batches():
    batches = list(sampler.shuffled_batches(17, 5, 0, 0, 34))
    assert all(len(np.unique(batch)) == 5 for batch in batches)
    draws = np.concatenate(batches)
    assert (np.bincount(draws) == 10).all()
    for end in range(0, 170, 17):
        assert sorted(draws[end : end + 17]) == list(range(17)) and list(draws[end : end + 17]) != list(range(17))
    small = list(sampler.shuffled_batches(3, 8, 0, 0, 4))
    assert [sorted(batch) for batch in small] == [[0, 1, 2]] * 4


def test_sequential_batches():
    assert [b.tolist() for b in sampler.sequential_batches(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [b.tolist() for b in sampler.sequential_batches(6, 3)] == [[0, 1, 2], [3, 4, 5]]
    assert list(sampler.sequential_batches(0, 3)) == []
