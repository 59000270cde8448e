"""The lists of a training run, checked and counted, and the batches of an epoch."""

import collections
import dataclasses
import itertools

import numpy as np

import lists
import losses
import reader
import sampler
import transforms
from runtime import parallel
from utility import UserError, number, number_of

# train: Samples with class indices for labels; val: Samples or None; classes: int64, the label of each class index;
# batch_size: images a step of all processes; steps: of an epoch.
Data = collections.namedtuple("Data", "train val classes batch_size steps")


@dataclasses.dataclass(frozen=True)
class Lists:
    """Where the pictures are, in the flags' words."""

    train_list: str
    val_list: str
    data_dir: str = None


@dataclasses.dataclass(frozen=True)
class Batching:
    """What batches are made of, in the flags' words."""

    loss_name: str
    train_batch_size: int
    samples_each_class: int = 4
    small_classes: str = "fill"
    total_images: int = None
    min_area: float = 0.08
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    seed: int = 0
    typed: bool = True  # whether train_batch_size was: then it is that or an error, else as near as the list allows

    @property
    def balanced(self):
        """Whether a batch has samples_each_class pictures of each of its classes."""
        return losses.row(self.loss_name).balanced

    def fills(self, sizes):
        """Whether more classes fill a batch, of classes with so many images, int [C], where some have fewer than K."""
        return self.balanced and self.small_classes == "fill" and bool((sizes < self.samples_each_class).any())


def add_batch_arguments(parser):
    """Adds the flags of Batching."""
    # fmt: off
    add = parser.add_argument_group("batches").add_argument
    add("--batch_size", type=number(int, low=1), default=256,
        help="images a step, for training; where it is not typed, no more than the list has classes for")
    add("--train_batch_size", type=number(int, low=1),
        help="images a step, of all processes together; overrides --batch_size")
    add("--test_batch_size", type=number(int, low=1),
        help="images at once in evaluation (default: 32; on a GPU 128)")
    add("--small_classes", choices=("fill", "repeat"), default="fill",
        help="what becomes of classes with fewer than --samples_each_class images, as SOP has them: fill: they give "
        "those that they have, two or more, and further classes fill the batch; larger ones are cut into parts of much "
        "the same size. repeat: their images come several times in a batch, cut in other ways")
    add("--total_images", type=number(int, low=1), help="images an epoch (default: the length of --train_list)")
    add("--min_area", type=number(float, above=0, high=1), default=0.08,
        help="smallest share of a picture that a random crop may keep; 0.08 is the original, 0.16 to 0.5 suits "
        "pictures that are cut to the object already")
    add("--color_jitter", type=number(float, low=0, high=1), default=0.0,
        help="largest change of brightness, contrast and saturation, as a share; 0.25 is common, 0: none")
    add("--random_erasing", type=number(float, low=0, high=1), default=0.0,
        help="probability that a rectangle of a training picture is hidden; 0.5 is common, 0: none")
    # fmt: on


def load_data(named, batching, reading, class_dim, before=None, checkpoint="", evaluates=True):
    """Reads and checks the lists; -> Data.

    The training labels become class indices: themselves where all fit below a given `class_dim` (so that a head of
    ImageNet keeps its meaning), else their rank.

    Args:
        named: Lists; batching: Batching; reading: reader.Reading.
        class_dim: --class_dim, or None.
        before: the labels in the order of the class indices of the run that goes on from `checkpoint`; else None.
        evaluates: whether --val_list is needed.

    Raises: UserError
    """
    train = reader.read_list(named.train_list, named.data_dir)
    found = np.unique(train.labels)
    if before is not None:
        classes = np.array(before, np.int64)
        if not np.isin(found, classes).all():
            raise UserError(f"{named.train_list}: has classes that the run of {checkpoint} did not have")
    elif class_dim and found[0] >= 0 and found[-1] < class_dim:
        classes = np.arange(class_dim)
    else:
        classes = found
    if len(found) < 2 and not batching.balanced:
        raise UserError(f"{named.train_list}: one class, and nothing to tell it from: training needs at least two")
    if class_dim and class_dim < len(found):
        raise UserError(f"--class_dim={class_dim} is less than the {len(found)} classes of {named.train_list}")
    idle = len(classes) - len(found)
    if idle and "embedding_size" in losses.row(batching.loss_name).needs and parallel.is_first():
        count = number_of(idle, "class", "classes")
        print(f"note: {count} that the list does not have: their proxies only push the others' pictures away")
    batch_size = check_batch(train, batching)
    val = reader.read_list(named.val_list, named.data_dir) if evaluates else None
    if reading.on_bad_image == "fail":
        for samples in [train, val] if val else [train]:
            lists.check_files(samples)
    if parallel.is_first():
        report_sharing(train, val)
    steps = max(1, (batching.total_images or len(train.paths)) // batch_size)
    return Data(train._replace(labels=np.searchsorted(classes, train.labels)), val, classes, batch_size, steps)


def list_digests(data):
    """{"train_list": digest, "val_list": digest or None} of the lists of Data."""
    return {"train_list": reader.fingerprint(data.train), "val_list": data.val and reader.fingerprint(data.val)}


def report_sharing(train, val):
    """Says which pictures are twice in a list, and which pictures and classes of the one are in the other.

    Args:
        val: Samples, or None.
    """
    if not val:
        lists.report_repeated(train, *lists.identify(train))
        return
    train_identity, val_identity = lists.identify(train, val)
    lists.report_repeated(train, train_identity)
    lists.report_repeated(val, val_identity)
    lists.report_shared(val, val_identity, train_identity, "training images, too")
    classes = np.unique(val.labels)
    trained = int(np.isin(classes, train.labels).sum())
    if trained:
        of = f"{trained} of the {len(classes)} classes of {val.source}"
        print(f"note: {of} are trained on: their recall is not that of unseen classes")


def check_batch(train, batching):
    """The images of a step. Raises: UserError where the list can't make such batches."""
    wanted, count = batching.train_batch_size, len(train.paths)
    sizes = np.unique(train.labels, return_counts=True)[1]
    keeps = batching.typed and (batching.balanced or wanted <= count)
    batch_size = wanted if keeps else largest_batch(sizes, batching)
    if batching.balanced and batch_size < wanted and parallel.is_first():
        print(f"note: --train_batch_size={batch_size} instead of {wanted}: the list and the flags allow no more")
    if batch_size % parallel.world_size():
        raise UserError(
            f"a batch of {batch_size} can't be shared evenly by {parallel.world_size()} processes: take a multiple of "
            "that as --train_batch_size, which counts the images of all"
        )
    if batching.balanced:
        check_classes(sizes, batch_size, batching)
    elif batch_size < wanted and parallel.is_first():
        why = f"the list has {count} images" if count < wanted else f"{parallel.world_size()} processes share them"
        print(f"note: batches of {batch_size}: {why}")
    return batch_size


def check_classes(sizes, batch_size, batching):
    """Says what becomes of classes of few images. Raises: UserError where such batches can't be made.

    Args:
        sizes: images of each class, int [C].
    """
    k, fills = batching.samples_each_class, batching.fills(sizes)
    if fills:
        sampler.check_filling(sizes, batch_size, k)
        what = "more classes fill their place in a batch"
    else:
        sampler.check_balance(len(sizes), batch_size, k)
        what = "drawn with replacement"
    small, lone = int((sizes < k).sum()), int((sizes == 1).sum())
    if small and parallel.is_first():
        have = "1 class has" if small == 1 else f"{small} classes have"
        print(f"note: {have} fewer than {k} images: {what}")
    if lone and fills and parallel.is_first():
        print(
            f"note: {number_of(lone, 'class', 'classes')} of one image: in no batch (--small_classes=repeat takes them)"
        )


def largest_batch(sizes, batching):
    """The most images of a step, up to train_batch_size, that the list allows and the processes can share.

    Where it allows none, train_batch_size, of which an error says why.

    Args:
        sizes: images of each class, int [C].
    """
    wanted, processes = batching.train_batch_size, parallel.world_size()
    if not batching.balanced:
        most = min(wanted, int(sizes.sum()))
        return most - most % processes or most
    k = batching.samples_each_class
    classes = sampler.images_to_fill(sizes, k) // k if batching.fills(sizes) else len(sizes)
    fitting = (n * k for n in range(min(wanted // k, classes), 1, -1) if n * k % processes == 0)
    return next(fitting, wanted)


def training_batches(data, batching, reading, progress):
    """The rest of the epoch's batches of augmented pictures, of each this process's share, read ahead in threads.

    Args:
        progress: training.run.Progress, which says where the epoch is.
    """
    labels, seed, epoch = data.train.labels, batching.seed, progress.epoch
    if batching.balanced:
        sizes = np.unique(labels, return_counts=True)[1]
        draw = sampler.filled_batches if batching.fills(sizes) else sampler.class_balanced_batches
        order = draw(labels, data.batch_size, batching.samples_each_class, seed, epoch, progress.steps)
    else:
        order = sampler.shuffled_batches(len(labels), data.batch_size, seed, epoch, progress.steps)
    return reader.read_batches(
        data.train,
        itertools.islice(order, progress.step, None),
        transforms.training_transform(
            reading.shape, seed, epoch, batching.min_area, batching.color_jitter, batching.random_erasing
        ),
        reading.shape,
        num_workers=reading.num_workers,
        skip_bad=reading.on_bad_image == "skip",
        replace=True,
        position=progress.step * data.batch_size,
        share=parallel.share,
        max_pixels=reading.max_pixels,
    )
