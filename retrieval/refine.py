"""Better features from the same weights: mirrored pictures, several sizes, whitening.

    found = refined(network, refinement) in the place of the network, then whiten(whitening, features)

Each uses the picture itself and, for whitening, the training pictures; none looks at the other pictures of the test.
Whitening is a principal component analysis of the training features v at length 1, whose components are divided by a
power of their variance:

    w = unit((v - mean) U diag(eigenvalue^-power)),  eigenvalues of the covariance (divided by N)

Power 1/2 makes all components alike; 1/4 goes half the way, which suits features that trained on other classes. Jegou
and Chum, Negative evidences and co-occurrences in image retrieval, ECCV 2012. Importing this does not import paddle.
"""

import collections
import dataclasses
import functools
import os
import zipfile

import numpy as np

import files
import lists
import reader
from retrieval import extraction, features
from runtime import parallel
from utility import UserError, boolean, comma_separated, number

# mean: float32 [D]; matrix: float32 [D, K]; views: a text, of which views of a picture it was learned. A file of it has
# made_by, too, texts as of features.made_by.
Whitening = collections.namedtuple("Whitening", "mean matrix views")


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What is made of the features, in the flags' words."""

    flip: bool = False
    scales: tuple = (1.0,)
    join_scales: bool = False
    whiten: str = ""
    whiten_size: int = 1024
    whiten_power: float = 0.25
    save_whiten: str = ""

    @property
    def views(self):
        """In words, what of a picture its features come from; "" for the picture as it is."""
        words = ["flip"] if self.flip else []
        if self.sizes != (1.0,):
            scales = ",".join(f"{scale:g}" for scale in self.sizes)
            words.append(f"scales {scales} {'joined' if self.join_scales else 'summed'}")
        return ", ".join(words)

    @property
    def sizes(self):
        return tuple(self.scales)


def add_refine_arguments(parser):
    """Adds the flags of Refinement, alike for eval.py and infer.py."""
    # fmt: off
    add = parser.add_argument_group("refined features").add_argument
    add("--flip", type=boolean, default=False, help="look at each picture's mirror image, too; twice the time")
    add("--scales", type=comma_separated(number(float, above=0, high=4)), default=[1.0],
        help="look at each picture in several sizes, as multiples of --image_shape, such as 0.71,1,1.29")
    add("--join_scales", type=boolean, default=False,
        help="put the embeddings of the sizes side by side, a longer one, rather than add them up")
    add("--whiten", default="",
        help="whiten the features: a list of training pictures to learn from, a file of their features that infer.py "
        "wrote with the same flags, or what --save_whiten wrote")
    add("--whiten_size", type=number(int, low=1), default=1024, help="size of whitened features, at most")
    add("--whiten_power", type=number(float, low=0, high=1), default=0.25,
        help="of the variance that each component is divided by: 0.5 makes all alike, 0.25 goes half the way")
    add("--save_whiten", default="", help="write the whitening to this .npz file, for --whiten and another run")
    # fmt: on


def idle_flags(flags):
    """{flag: why} of those that have no effect beside the others, {name: value}."""
    how = ("whiten_size", "whiten_power")
    if not flags["whiten"]:
        return dict.fromkeys(how, "no --whiten")
    return dict.fromkeys(how, "--whiten names one that is learned") if is_whitening(flags["whiten"]) else {}


def refined(network, refinement, whitening=None):
    """The network that looks at pictures as Refinement says: an EmbeddingNet itself where nothing is asked of it."""
    if not (refinement.views or refinement.whiten):
        return network
    from models.refined import Refined

    matrices = whitening and whitening[:2]
    layer = Refined(network, refinement.flip, refinement.sizes, refinement.join_scales, matrices)
    layer.eval()
    return layer


def check_refinement(refinement, data_dir, on_bad_image):
    """Raises a UserError where flags contradict each other or a file can't be read or written.

    Args:
        data_dir: of relative paths in a list, or None.
        on_bad_image: "fail": the pictures of a list must be there.

    Returns: reader.Samples of the pictures that --whiten learns from, in a list or a file of their features; None where
        it is learned, or they are not known.
    """
    if refinement.save_whiten:
        if not refinement.whiten:
            raise UserError("--save_whiten: nothing is whitened: it needs --whiten")
        if not refinement.save_whiten.endswith(".npz"):
            raise UserError(f"--save_whiten={refinement.save_whiten}: must end in .npz")
        files.check_output(refinement.save_whiten, is_whitening, "a whitening that was saved before")
    if refinement.join_scales and len(refinement.sizes) < 2:
        raise UserError("--join_scales=True: there is one size: --scales names several")
    if refinement.whiten and not os.path.isfile(refinement.whiten):
        raise UserError(f"--whiten={refinement.whiten}: no such file")
    if not refinement.whiten or is_whitening(refinement.whiten):
        return None
    if zipfile.is_zipfile(refinement.whiten):
        paths = features.open_features(refinement.whiten, ("features",)).paths
        return paths and reader.Samples(paths[:].tolist(), None, None, None)
    samples = reader.read_list(refinement.whiten, data_dir, need_labels=False)
    if on_bad_image == "fail":
        lists.check_files(samples)
    return samples


def count_seen(refinement, samples):
    """How many pictures the network looks at to learn --whiten. `samples`: what `check_refinement` returned."""
    return 0 if samples is None or zipfile.is_zipfile(refinement.whiten) else len(samples.paths)


# ---------------------------------------------------------------- whitening


def find_whitening(refinement, opened, network, reading, batch_size, samples, precision):
    """The Whitening that --whiten means, saved where asked; None without it. One that is learned here is that of rank
    0 alone, which alone whitens: the others have None.

    Args:
        opened: extraction.Opened; network: what is to be whitened, made of it by `refined` or engine.prepare.
        reading: reader.Reading.
        samples: what `check_refinement` returned.
        precision: float32, bf16 or float16.

    Raises: UserError for a file of another network's features, or of a whitening that was learned from such.
    """
    path, whitening, known = refinement.whiten, None, None
    if not path:
        return None
    made_by = features.made_by(opened, refinement, None, precision)
    if is_whitening(path):
        whitening, there = _read_whitening(path)
        if whitening.views != refinement.views:
            raise UserError(f"{path}: learned from {whitening.views or 'plain pictures'}: give the same flags")
    elif zipfile.is_zipfile(path):
        known = features.open_features(path, ("features",))
        there = known.made_by
    if (whitening or known) and parallel.is_first():
        features.check_made_by(path, there, made_by, "learn from features of these weights and flags")
    if not whitening:
        found = known or extraction.extract(network, samples, reading, batch_size)
        if not parallel.is_first():
            return None
        mean, matrix = learn(found.features[:], refinement.whiten_size, refinement.whiten_power, path)
        whitening = Whitening(mean, matrix, refinement.views)
    if refinement.save_whiten and parallel.is_first():
        with files.atomic_write(refinement.save_whiten, "wb") as file:
            np.savez(file, **whitening._asdict(), made_by=np.array(made_by))
    return whitening


def is_whitening(path):
    """Whether a file is one that --save_whiten has written."""
    try:
        with zipfile.ZipFile(path) as file:
            return {f"{name}.npy" for name in Whitening._fields} <= set(file.namelist())
    except features.BROKEN:
        return False


# What an .npz of a whitening may hold: kinds of type and dimensions.
_ARRAYS = {"mean": ("f", 1), "matrix": ("f", 2), "views": ("U", 0), "made_by": ("U", 1)}


def _read_whitening(path):
    """(Whitening, texts as of features.made_by or None) of an .npz file. Raises: UserError where it is damaged."""
    try:
        with np.load(path) as file:
            if any(info.compress_type != zipfile.ZIP_STORED for info in file.zip.infolist()):
                raise ValueError("compressed")
            arrays = {name: file[name] for name in _ARRAYS if name in file.files}
            wrong = [name for name, array in arrays.items() if (array.dtype.kind, array.ndim) != _ARRAYS[name]]
            if wrong or arrays["mean"].shape != arrays["matrix"].shape[:1]:
                raise ValueError("arrays that do not fit together")
            with np.errstate(over="ignore"):
                mean, matrix = (arrays[name].astype(np.float32, copy=False) for name in ("mean", "matrix"))
            if not (np.isfinite(mean).all() and np.isfinite(matrix).all()):
                raise ValueError("numbers that are NaN or infinite")
    except features.BROKEN as error:
        raise UserError(f"{path}: no whitening that can be used: {error}") from None
    made_by = arrays["made_by"].tolist() if "made_by" in arrays else None
    return Whitening(mean, matrix, str(arrays["views"])), made_by


def learn(features, size, power, source):
    """Learns a whitening; -> mean float32 [D], matrix float32 [D, K], K at most `size`.

    Args:
        features: float [N, D], of training pictures; they are brought to length 1 first.
        power: of the eigenvalues, 0 to 1; those under 1e-5 of the largest count as that.
        source: where they are from, for messages.

    Raises: UserError where there are fewer than two, all are equal, or some are NaN or infinite.
    """
    x = extraction.at_length_1(np.asarray(features, np.float64))
    count, dimension = x.shape
    if count < 2:
        raise UserError(f"{source}: {count} features, too few to learn a whitening from")
    mean = x.mean(axis=0)
    if not np.isfinite(mean).all():
        raise UserError(f"{source}: features that are NaN or infinite")
    x -= mean
    # The eigenvectors of the smaller of covariance and Gram matrix.
    if dimension <= count:
        values, vectors = np.linalg.eigh(x.T @ x / count)
    else:
        values, left = np.linalg.eigh(x @ x.T / count)
        keep = values > 1e-12 * max(values[-1], 0)
        values, vectors = values[keep], x.T @ (left[:, keep] / np.sqrt(count * values[keep]))
    if not len(values) or values[-1] <= 1e-12:
        raise UserError(f"{source}: all features are equal: nothing to learn a whitening from")
    values, vectors = values[::-1][:size], vectors[:, ::-1][:, :size]
    matrix = vectors * np.maximum(values, 1e-5 * values[0]) ** -power
    return mean.astype(np.float32), matrix.astype(np.float32)


def finish(whitening):
    """What extraction.extract makes of each batch's features; None without a Whitening."""
    return whitening and functools.partial(whiten, whitening)


def whiten(whitening, features):
    """features float [N, D] -> float32 [N, K] of length 1. Raises: UserError where D is not the Whitening's."""
    if features.shape[1] != len(whitening.mean):
        raise UserError(f"--whiten: of features of size {len(whitening.mean)}, these have {features.shape[1]}")
    x = extraction.at_length_1(np.asarray(features, np.float32)) - whitening.mean
    return extraction.at_length_1(x @ whitening.matrix)


def in_words(refinement, whitening):
    """What was made of the features, for figures: "flip, whitened to 1024 by whiten.npz"; "" for nothing."""
    words = [refinement.views] if refinement.views else []
    if whitening:
        words.append(f"whitened to {whitening.matrix.shape[1]} by {os.path.basename(refinement.whiten)}")
    return ", ".join(words)
