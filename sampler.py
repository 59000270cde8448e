"""Which pictures make a batch: index arrays, drawn from seed and epoch alone."""

import numpy as np

from utility import UserError


def class_balanced_batches(labels, batch_size, samples_each_class, seed, epoch, num_batches):
    """Yields `num_batches` index arrays [batch_size]: K images of each of batch_size/K classes.

    The classes of a batch are distinct, and so are a class's K images where it has K; smaller classes are drawn with
    replacement. Over an epoch every image comes about once, so that large classes come more often than small ones.

    Args:
        labels: int64 [N].
        samples_each_class: K; must divide batch_size.
        seed, epoch: all that the draw depends on.

    Raises: UserError for an impossible combination.
    """
    k = samples_each_class
    check_balance(len(np.unique(labels)), batch_size, k)
    rng = np.random.default_rng([seed, epoch])
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.unique(labels[order], return_index=True)[1][1:])
    queues = [[] for _ in members]

    def refill(c):
        images = rng.permutation(members[c])
        if len(images) < k:
            queues[c].append(np.concatenate([images, rng.choice(images, k - len(images))]))
            return
        groups = [images[i : i + k] for i in range(0, len(images) - k + 1, k)]
        rest = images[len(groups) * k :]
        if len(rest):
            groups.append(np.concatenate([rest, rng.choice(images[: len(groups) * k], k - len(rest), replace=False)]))
        queues[c].extend(groups)

    num_classes = batch_size // k
    left = np.zeros(len(members), np.int64)  # groups that wait in each class's queue
    for _ in range(num_batches):
        first, others = np.zeros(0, np.int64), np.flatnonzero(left)
        if len(others) < num_classes:  # a new round; what is left of the old one comes first
            first, others = others, np.flatnonzero(left == 0)
            for c in others:
                refill(c)
                left[c] = len(queues[c])
        weight = left[others] / left[others].sum()
        chosen = np.concatenate([first, rng.choice(others, num_classes - len(first), replace=False, p=weight)])
        left[chosen] -= 1
        yield np.concatenate([queues[c].pop() for c in chosen])


def check_balance(num_classes, batch_size, samples_each_class):
    """Raises a UserError where batches of K images of batch_size/K classes can't be made."""
    k = samples_each_class
    if batch_size % k:
        nearest = max(k, round(batch_size / k) * k)
        raise UserError(
            f"a batch of {batch_size} is not divisible by --samples_each_class={k}; the nearest that is: {nearest}"
        )
    if num_classes < 2:
        raise UserError("the list has one class: a metric loss needs images of at least two")
    if batch_size == k:
        raise UserError(f"a batch of {batch_size} with --samples_each_class={k} has one class: it takes at least two")
    if num_classes < batch_size // k:
        raise UserError(
            f"a batch of {batch_size} with --samples_each_class={k} needs {batch_size // k} classes, the list has "
            f"{num_classes}: take --train_batch_size={num_classes * k} or less, or a larger --samples_each_class"
        )


def shuffled_batches(count, batch_size, seed, epoch, num_batches):
    """Yields `num_batches` index arrays [min(batch_size, count)] from one shuffling of 0..count-1 after the other."""
    rng = np.random.default_rng([seed, epoch])
    batch_size = min(batch_size, count)
    waiting = np.zeros(0, np.int64)
    for _ in range(num_batches):
        if len(waiting) < batch_size:
            fresh = rng.permutation(count)
            # No image twice in a batch that spans two shufflings.
            fresh = np.concatenate([fresh[~np.isin(fresh, waiting)], fresh[np.isin(fresh, waiting)]])
            waiting = np.concatenate([waiting, fresh])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def sequential_batches(count, batch_size):
    """Yields index arrays that cover 0..count-1 in order; the last one may be smaller."""
    for start in range(0, count, batch_size):
        yield np.arange(start, min(start + batch_size, count))


def substitutes(labels, batch, start, row):
    """Yields the pictures that may take the place of the bad one in `row` of a batch, the best first.

    First others of its class, those that are not in the batch before those that are; then pictures of a class that is
    not in the batch, the same one for all of a class's bad pictures; then any.

    The rows of a class have their turns at its pictures, so that no two take the same one, although nothing is known
    here of the other rows: in another process, they may be bad or not.

    Args:
        labels: int64 [N], of the list.
        batch: int64 [B], as it was drawn; start: its position. They and `row` are all that the draw depends on.
    """
    label = labels[batch[row]]
    rows = np.flatnonzero(labels[batch] == label)
    turn = np.searchsorted(rows, row)
    rng = np.random.default_rng([start, np.searchsorted(np.unique(labels), label)])

    def in_turns(pictures):
        pictures = rng.permutation(pictures)
        return np.concatenate([pictures[turn :: len(rows)], pictures])

    own = np.flatnonzero(labels == label)
    own = own[own != batch[row]]
    used = np.isin(own, batch)
    yield from in_turns(own[~used])
    yield from in_turns(own[used])
    for other in rng.permutation(np.setdiff1d(labels, labels[batch])):
        yield from in_turns(np.flatnonzero(labels == other))
    yield from in_turns(np.arange(len(labels)))
