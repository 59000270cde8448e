"""Which classes, or which pictures of each, go into which list."""

import dataclasses
import hashlib
import math

from listing import encode
from utility import UserError

ALL = "--train_classes=all lists it whole"


@dataclasses.dataclass(frozen=True)
class Division:
    """What goes into which list, in the flags' words."""

    train_classes: str = None
    holdout: float = None
    within_classes: float = None
    seed: int = None

    def check(self, parts):
        """Raises a UserError where the flags, or those and the folders, say two things."""
        some = self.train_classes not in (None, "all")
        if parts and (some or self.within_classes is not None):
            flag = f"--train_classes={self.train_classes}" if some else "--within_classes"
            where = " and ".join(parts.values())
            raise UserError(f"{flag}: {where} say already what trains: name one of them to split its classes")
        if self.within_classes is not None:
            if some or self.holdout is not None:
                raise UserError("--within_classes splits all classes: no --train_classes or --holdout beside it")
            if not 0 < self.within_classes < 1:
                raise UserError(f"--within_classes={self.within_classes:g}: a share, such as 0.2, was expected")

    def divide(self, classes):
        """{list: its classes} of all classes. Raises: UserError."""
        if self.within_classes is not None:
            pairs = [self.halves(one) for one in classes]
            if not any(taken.images for _, taken in pairs):
                raise UserError("--within_classes: no class has two images: none would be left for val")
            return {"train": [kept for kept, _ in pairs], "val": [taken for _, taken in pairs if taken.images]}
        drawn = self.draw(classes, lambda one: one.name)
        count = count_of(self.train_classes, len(classes))
        return self.hold_out({"train": drawn[:count], "val": drawn[count:]})

    def hold_out(self, lists):
        """Adds fit and holdout, the training classes in two, where that is asked for; -> the lists, sorted."""
        if self.holdout is not None:
            drawn = self.draw(lists["train"], lambda one: one.name)
            fit = len(drawn) - holdout_count(self.holdout, len(drawn))
            lists = {**lists, "fit": drawn[:fit], "holdout": drawn[fit:]}
        return {part: sorted(classes, key=lambda one: one.label) for part, classes in lists.items() if classes}

    def halves(self, one):
        """-> the Class without the share of its images that is for val, and that share: at least one stays in each."""
        images = self.draw(one.images, lambda image: f"{one.name}/{image}")
        count = min(max(1, math.floor(self.within_classes * len(images) + 0.5)), len(images) - 1)
        taken = set(images[len(images) - count :])
        kept = [image for image in one.images if image not in taken]
        return one._replace(images=kept), one._replace(images=[image for image in one.images if image in taken])

    def draw(self, items, name):
        """The items in an order drawn from the seed and their names, alike everywhere; as they are without a seed."""
        if self.seed is None:
            return list(items)
        return sorted(items, key=lambda item: hashlib.sha256(encode(f"{self.seed}/{name(item)}")).digest())


def count_of(text, total):
    """How many of the classes train. `text`: a count, a fraction such as 0.5, "all", or None. Raises: UserError."""
    if text == "all":
        return total
    if total < 2:
        raise UserError(f"{total} class folder, at least 2 are needed: one to train, one to test on ({ALL})")
    if text is None:
        return max(total // 2, min(2, total - 1))  # two where there are three: of one class nothing is learned
    try:
        count = math.floor(float(text) * total + 0.5) if "." in text else int(text)
    except (ValueError, OverflowError):
        raise UserError(
            f"--train_classes={text}: expected a count of classes, a fraction such as 0.5, or all"
        ) from None
    if not 1 <= count < total:
        raise UserError(
            f"--train_classes={text}: {count} of the {total} classes would train: it must be 1 to {total - 1}, so that "
            "some train and some are left to test on, or all"
        )
    return count


def holdout_count(share, count):
    """How many of `count` training classes a share holds out. Raises: UserError where that leaves too few."""
    held = math.floor(share * count + 0.5) if 0 < share < 1 else 0
    if not 1 <= held < count:
        raise UserError(f"--holdout={share:g}: {held} of the {count} training classes: it must be 1 to {count - 1}")
    return held
