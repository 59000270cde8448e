"""Which pictures make a batch: index arrays, drawn from seed and epoch alone."""

import heapq

import numpy as np

from utility import UserError

MOST_TRIED = 100  # classes that are looked at for one that suits what is left of a batch


def class_balanced_batches(labels, batch_size, samples_each_class, seed, epoch, num_batches):
    """Yields `num_batches` index arrays [batch_size]: K images of each of batch_size/K classes.

    The classes of a batch are distinct, and so are a class's K images where it has K; smaller classes are drawn with
    replacement. Over an epoch every image comes about once, so that large classes come more often than small ones (a
    class of n images gives K x ceil(n / K), some of them twice).

    Args:
        labels: int64 [N].
        samples_each_class: K; must divide batch_size.
        seed, epoch: all that the draw depends on.

    Raises: UserError for an impossible combination.
    """
    k = samples_each_class
    check_balance(len(np.unique(labels)), batch_size, k)
    rng = np.random.default_rng([seed, epoch])
    members = images_of_classes(labels)
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
    _check_batch(num_classes, batch_size, k)
    if num_classes < batch_size // k:
        raise UserError(
            f"a batch of {batch_size} with --samples_each_class={k} needs {batch_size // k} classes, the list has "
            f"{num_classes}: take --train_batch_size={num_classes * k} or less, or a larger --samples_each_class"
        )


def _check_batch(num_classes, batch_size, k):
    if batch_size % k:
        nearest = max(k, round(batch_size / k) * k)
        raise UserError(
            f"a batch of {batch_size} is not divisible by --samples_each_class={k}; the nearest that is: {nearest}"
        )
    if num_classes < 2:
        raise UserError("the list has one class: a metric loss needs images of at least two")
    if batch_size == k:
        raise UserError(f"a batch of {batch_size} with --samples_each_class={k} has one class: it takes at least two")


def images_of_classes(labels):
    """[int64 array of the positions of a class's images], in the order of the labels."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.unique(labels[order], return_index=True)[1][1:])


# ---------------------------------------------------------------- classes of few images


def filled_batches(labels, batch_size, samples_each_class, seed, epoch, num_batches):
    """Yields `num_batches` index arrays [batch_size] without an image twice: 2 to K images of each class that is in it.

    A class of fewer than K images gives all of them; one of more is cut into parts as alike as can be, of 5 images by
    K = 4 into 3 and 2. As many classes come as fill the batch. Where that can't be done in twos or more, the last class
    gives one image. Classes of one image are left out: there is nothing that it could be drawn to.

    Every class's images come in its own shuffling, one shuffling after the other, and at any time all classes are as
    far in theirs, but for a batch or two: over an epoch every image comes about once.

    Args:
        labels: int64 [N].
        samples_each_class: K; must divide batch_size.
        seed, epoch: all that the draw depends on.

    Raises: UserError for an impossible combination.
    """
    members = images_of_classes(labels)
    check_filling(np.array([len(images) for images in members]), batch_size, samples_each_class)
    rng = np.random.default_rng([seed, epoch])
    decks = [_Deck(images, samples_each_class, rng) for images in members if len(images) > 1]
    queue = [(deck.due(), number) for number, deck in enumerate(decks)]
    heapq.heapify(queue)
    most = sum(deck.most for deck in decks)
    for _ in range(num_batches):
        batch, used = [], []
        left, there = batch_size, most  # images that the batch still needs, and that the decks in the queue can give
        while left:
            number, size = _next_deck(queue, decks, left, there)
            batch.append(decks[number].take(size))
            used.append(number)
            left, there = left - size, there - decks[number].most
        for number in used:
            heapq.heappush(queue, (decks[number].due(), number))
        yield np.concatenate(batch)


def _next_deck(queue, decks, left, there):
    """Takes the number of a deck off the queue; -> that, and how many images it gives, so that not one is left.

    Args:
        left: images that the batch still needs; there: that the decks in the queue can give.
    """
    tried = []
    while queue and len(tried) < MOST_TRIED:
        tried.append(heapq.heappop(queue))
        if left - decks[tried[-1][1]].size(left, there) != 1:
            chosen = tried.pop()
            break
    else:
        chosen = tried.pop(0)
    for item in tried:
        heapq.heappush(queue, item)
    return chosen[1], decks[chosen[1]].size(left, there)


class _Deck:
    """The images of a class, shuffled again whenever they have all come.

    Args:
        images: int64 [n], two or more; most: images that it gives to a batch.
    """

    def __init__(self, images, most, rng):
        self.images, self.most, self.rng = images, min(most, len(images)), rng
        self.waiting = rng.permutation(images)
        self.taken = 0

    def part(self):
        """How many images it would give: what waits, in parts as alike as can be; with the next shuffling for one."""
        waiting = len(self.waiting)
        waiting += len(self.images) if waiting < 2 else 0
        parts = -(-waiting // self.most)
        return -(-waiting // parts)

    def size(self, left, there):
        """How many it gives where a batch still needs `left`, and it and the other decks can give `there`.

        More than its part where the others would not suffice; one fewer, or more, if that keeps one from being left.
        """
        size = max(min(self.part(), left), left - (there - self.most))
        if left - size != 1:
            return size
        return size - 1 if size > 2 else min(left, self.most)

    def due(self):
        """When it is to come next, 1 for each shuffling: drawn at random from the time in which it has to."""
        return (self.taken + self.rng.random() * self.part()) / len(self.images)

    def take(self, count):
        """The next images, int64 [count], no two the same."""
        if count > len(self.waiting):
            self.waiting = _followed_by(self.waiting, self.rng.permutation(self.images))
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        self.taken += count
        return taken


def check_filling(sizes, batch_size, samples_each_class):
    """Raises a UserError where `filled_batches` can't be made of classes of these sizes, int [C]."""
    k, most = samples_each_class, images_to_fill(sizes, samples_each_class)
    _check_batch(len(sizes), batch_size, k)
    if (sizes > 1).sum() < 2:
        raise UserError(
            "fewer than two classes have two images or more: --small_classes=repeat draws an image of a class again, "
            "cut in another way"
        )
    if most < batch_size:
        fits = most // k * k
        way = f"take --train_batch_size={fits} or less" if fits > k else "take a smaller --samples_each_class"
        raise UserError(
            f"a batch of {batch_size} with --samples_each_class={k}: the classes have {most} images for it: {way}, or "
            "--small_classes=repeat, which draws images again"
        )


def images_to_fill(sizes, samples_each_class):
    """The most images that a batch of `filled_batches` can have."""
    return int(np.minimum(sizes[sizes > 1], samples_each_class).sum())


# ---------------------------------------------------------------- whatever their classes


def shuffled_batches(count, batch_size, seed, epoch, num_batches):
    """Yields `num_batches` index arrays [min(batch_size, count)] from one shuffling of 0..count-1 after the other."""
    rng = np.random.default_rng([seed, epoch])
    batch_size = min(batch_size, count)
    waiting = np.zeros(0, np.int64)
    for _ in range(num_batches):
        if len(waiting) < batch_size:
            waiting = _followed_by(waiting, rng.permutation(count))
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _followed_by(waiting, fresh):
    """The images that wait and a new shuffling, such that no image is twice in a batch that spans both."""
    again = np.isin(fresh, waiting)
    return np.concatenate([waiting, fresh[~again], fresh[again]])


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
