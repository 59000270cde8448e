"""Refined features: each view and the whitening against NumPy; eval.py, infer.py and the exported model agree."""

import json
import re

import numpy as np
import paddle
import pytest
from conftest import SMALL, run
from PIL import Image

from models import build_model
from models.refined import resize
from retrieval import engine, refine
from retrieval.refine import Refinement, Whitening
from utility import UserError


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pictures(count=3, size=32):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def network():
    paddle.seed(3)
    net = build_model("ResNet8", 4)
    net.eval()
    return net


def run_network(net, x):
    with paddle.no_grad():
        embedding, logits = net(paddle.to_tensor(x))
    return embedding.numpy(), logits.numpy()


# ---------------------------------------------------------------- views


def pillow(picture, height, width):
    """Bilinear, in floating point, channel by channel."""
    channels = [Image.fromarray(picture[:, :, c].astype(np.float32)) for c in range(3)]
    return np.stack([np.asarray(c.resize((width, height), Image.Resampling.BILINEAR)) for c in channels], axis=2)


@pytest.mark.parametrize("size", [(16, 16), (23, 41), (9, 32), (32, 32), (70, 20)])
def test_resize_is_pillows(size):
    found = resize(paddle.to_tensor(pictures().astype(np.float32)), *size).numpy()
    np.testing.assert_allclose(found, np.stack([pillow(picture, *size) for picture in pictures()]), atol=1e-2)


def test_flip_and_sizes_equal_the_sums():
    net = network()
    halves = np.stack([pillow(picture, 16, 16) for picture in pictures()])
    views = [(size, mirrored) for size in (pictures().astype(np.float32), halves) for mirrored in (False, True)]
    found = [run_network(net, x[:, :, ::-1].copy() if mirrored else x) for x, mirrored in views]
    whole, whole_flipped, half, half_flipped = (unit(embedding) for embedding, _ in found)
    logits = sum(scores for _, scores in found) / 4
    for join, wanted in (
        (False, unit(whole + whole_flipped + half + half_flipped)),
        (True, unit(np.concatenate([whole + whole_flipped, half + half_flipped], axis=1))),
    ):
        layer = refine.refined(net, Refinement(True, (1.0, 0.5), join))
        embedding, scores = run_network(layer, pictures())
        np.testing.assert_allclose(embedding, wanted, atol=2e-6)
        np.testing.assert_allclose(scores, logits, atol=1e-5)
        assert layer.dimension == embedding.shape[1]
    assert refine.refined(net, Refinement()) is net


def test_the_engine_gives_the_same():
    layer = refine.refined(network(), Refinement(True, (0.71, 1.0, 1.29), True))
    compiled = engine.compile_network(layer, [3, 32, 32])
    for here, there in zip(run_network(layer, pictures()), compiled(pictures())):
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- whitening


def by_hand(train, x, size, power):
    """From the singular values of the centred features."""
    train, x = unit(train), unit(x)
    mean = train.mean(axis=0)
    _, values, directions = np.linalg.svd(train - mean, full_matrices=False)
    variance = np.maximum(values**2 / len(train), 1e-5 * values[0] ** 2 / len(train))
    return unit((x - mean) @ directions[:size].T * variance[:size] ** -power)


@pytest.mark.parametrize(("count", "dimension"), [(60, 10), (12, 30)], ids=["tall", "wide"])
@pytest.mark.parametrize("power", [0.5, 0.25, 0.0])
def test_whitening_equals_the_singular_values(count, dimension, power):
    rng = np.random.default_rng(1)
    scales = np.geomspace(1, 0.05, dimension)
    train, x = (rng.normal(size=(n, dimension)) * scales + 0.3 for n in (count, 7))
    for size in (4, 100):
        whitening = Whitening(*refine.learn(train, size, power, "x"), "")
        found = refine.whiten(whitening, x.astype(np.float32))
        wanted = by_hand(train, x, min(size, count - 1, dimension), power)
        assert found.shape == wanted.shape and found.dtype == np.float32
        np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-4)  # whatever the signs


def test_whitening_of_two_axes(monkeypatch):
    """Of variances 2 and 1/2, divided by them to the power; signs are free."""
    monkeypatch.setattr(refine.extraction, "at_length_1", lambda x: x.copy())
    train = np.array([[2.0, 0], [-2, 0], [0, 1], [0, -1]])
    for power, wanted in ((0.5, [2**0.5, 2**0.5]), (0.25, [1.6817928305074292, 1.189207115002721])):
        whitening = Whitening(*refine.learn(train, 2, power, "x"), "")
        found = refine.whiten(whitening, np.array([[2, 1]], np.float32))
        np.testing.assert_allclose(np.abs(found), [wanted], rtol=1e-6)


def test_whitened_features_are_uncorrelated():
    train = unit(np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, 0.2], [-1.0, -0.2]]))
    _, matrix = refine.learn(train, 2, 0.5, "x")
    np.testing.assert_allclose(np.cov((train @ matrix).T, bias=True), np.eye(2), atol=1e-5)
    _, half = refine.learn(train, 2, 0.25, "x")
    values = np.linalg.eigvalsh(np.cov(train.T, bias=True))[::-1]
    np.testing.assert_allclose(np.cov((train @ half).T, bias=True), np.diag(values**0.5), atol=1e-5)


def test_whitening_that_cannot_be_learned():
    with pytest.raises(UserError, match="x: all features are equal"):
        refine.learn(np.ones((5, 3)), 2, 0.5, "x")
    with pytest.raises(UserError, match="x: 1 features, too few"):
        refine.learn(np.ones((1, 3)), 2, 0.5, "x")
    whitening = Whitening(np.zeros(4, np.float32), np.eye(4, dtype=np.float32), "")
    with pytest.raises(UserError, match="of features of size 4, these have 3"):
        refine.whiten(whitening, np.ones((2, 3), np.float32))


# ---------------------------------------------------------------- the scripts


def test_eval_infer_and_the_export_agree(birds, trained, tmp_path):
    weights = f"--pretrained_model={trained}/ResNet8/latest"
    views = ["--use_gpu=False", "--flip=True", "--scales=0.71,1,1.29", "--join_scales=True"]
    size = ["--whiten_size=20", "--whiten_power=0.5"]
    saved, exported = tmp_path / "whiten.npz", tmp_path / "exported"
    out = run("eval.py", *birds.lists, weights, *views, *size, f"--whiten={birds.train_list}", f"--save_whiten={saved}",
              f"--output_json={tmp_path}/a.json").stdout  # fmt: skip
    how = "flip, scales 0.71,1,1.29 joined, whitened to 20 by birds_train.txt"
    assert f" ({how})\n" in out and f"\ndimension: 20\nrefined: {how}\n" in out
    known = run("eval.py", weights, *views, f"--val_list={birds.train_list}", f"--whiten={saved}").stdout
    assert re.search(r"^acc1: \S+ \(flip, scales 0\.71,1,1\.29 joined\)$", known, re.MULTILINE)
    # The same from the saved whitening, and from features.
    run("infer.py", weights, *views, f"--input={birds.train_list}", f"--feature_file={tmp_path}/train.npz")
    for number, source in enumerate((saved, tmp_path / "train.npz")):
        run(
            "eval.py",
            *birds.lists,
            weights,
            *views,
            *size,
            f"--whiten={source}",
            f"--output_json={tmp_path}/{number}.json",
        )
        first, again = (json.loads((tmp_path / name).read_text()) for name in ("a.json", f"{number}.json"))
        assert {k: v for k, v in first.items() if "R" in k} == {k: v for k, v in again.items() if "R" in k}

    run("infer.py", weights, *views, f"--input={birds.val_list}", f"--whiten={saved}", f"--export_dir={exported}",
        f"--feature_file={tmp_path}/val.npz")  # fmt: skip
    from reader import Reading, read_in_order, read_list

    samples = read_list(birds.val_list, None)
    (batch,) = read_in_order(samples, Reading(image_shape=[3, 32, 32], test_transform="center_crop"), 48)
    with np.load(tmp_path / "val.npz") as file:
        assert file["features"].shape == (48, 20)
        embedding, _ = engine.load(str(exported), "float32")(batch.image)
        np.testing.assert_allclose(embedding, file["features"], atol=2e-4)
    assert "whitened to 20 by whiten.npz" in (exported / "README.md").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": np.zeros(3, np.float32)},
        {"matrix": np.array("x")},
        {"views": np.zeros(2)},
        {"mean": np.full(4, 1e300)},
        {"made_by": np.ones(2)},
    ],
)
def test_a_damaged_whitening(tmp_path, wrong):
    sound = {"mean": np.zeros(4), "matrix": np.eye(4), "views": np.array(""), "made_by": np.array(["a=b"])}
    for save, arrays in ((np.savez, {**sound, **wrong}), (np.savez_compressed, sound)):
        save(tmp_path / "w.npz", **arrays)
        assert refine.is_whitening(tmp_path / "w.npz")
        with pytest.raises(UserError, match=r"w\.npz: no whitening that can be used: "):
            refine._read_whitening(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", **sound)  # float64 becomes float32, in place of which features are whitened
    whitening, made_by = refine._read_whitening(tmp_path / "w.npz")
    assert whitening.mean.dtype == whitening.matrix.dtype == np.float32 and made_by == ["a=b"]


def test_features_that_are_not_finite_teach_nothing():
    with pytest.raises(UserError, match="x: features that are NaN or infinite"):
        refine.learn(np.array([[1.0, np.nan], [2.0, 1.0]]), 2, 0.5, "x")


def test_what_is_learned_from_is_told(birds, trained, tmp_path):
    """Pictures of the test among those, also where these are features; what was skipped; flags that do nothing."""
    weights = f"--pretrained_model={trained}/ResNet8/latest"
    flags = [*SMALL, *birds.lists, weights]
    run("infer.py", *SMALL, weights, f"--input={birds.val_list}", f"--feature_file={tmp_path}/f.npz")
    for source in (birds.val_list, tmp_path / "f.npz"):
        err = run("eval.py", *flags, f"--whiten={source}", f"--save_whiten={tmp_path}/w.npz").stderr
        assert "warning: 48 of 48 images are learned from by --whiten" in err
    out = run("eval.py", *flags, f"--whiten={tmp_path}/w.npz", "--whiten_size=2").stdout
    assert "without effect here: --whiten_size (--whiten names one that is learned)" in out
    with open(birds.val_list) as file:
        (tmp_path / "list.txt").write_text(f"{file.read()}missing.jpg 7\n")
    more = [f"--data_dir={birds.root}", f"--whiten={tmp_path}/list.txt"]
    err = run("eval.py", *flags, *more, status=2).stderr
    assert "list.txt:49: " in err and "missing.jpg: no such image" in err and err.count("\n") == 1
    err = run("eval.py", *flags, *more, "--on_bad_image=skip").stderr
    assert "warning: skipped 1 bad images; the first: " in err and "list.txt:49" in err


def test_mistakes(birds, trained, tmp_path):
    flags = [*SMALL, *birds.lists, f"--pretrained_model={trained}/ResNet8/latest"]
    text = tmp_path / "x.npz"
    np.savez(text, other=np.ones(3))
    odd = tmp_path / "odd.npz"
    np.savez(odd, features=np.ones((3, 4)), made_by=np.ones(2))
    for flag, wanted in (
        (["--save_whiten=w.npz"], "--save_whiten: nothing is whitened"),
        (["--join_scales=True"], "--join_scales=True: there is one size"),
        ([f"--whiten={tmp_path}/nothing.npz"], "nothing.npz: no such file"),
        ([f"--whiten={text}"], "x.npz: no features that can be used: no features in it"),
        ([f"--whiten={odd}"], "odd.npz: no features that can be used: made_by is float64 [2]"),
        (["--scales=0"], "--scales"),
    ):
        message = run("eval.py", *flags, *flag, status=2).stderr
        assert wanted in message and "Traceback" not in message
    run("eval.py", *flags, f"--whiten={birds.train_list}", f"--save_whiten={tmp_path}/w.npz")
    message = run("eval.py", *flags, f"--whiten={tmp_path}/w.npz", "--flip=True", status=2).stderr
    assert "w.npz: learned from plain pictures: give the same flags" in message
    message = run("eval.py", *flags, f"--whiten={tmp_path}/w.npz", "--test_transform=resize", status=2).stderr
    assert "w.npz: its features are of another test_transform: center_crop there, resize here: learn" in message
    other = [*SMALL, *birds.lists, f"--whiten={tmp_path}/w.npz"]  # random weights
    assert "w.npz: its features are of other weights" in run("eval.py", *other, status=2).stderr
    run("infer.py", *other[:-1], f"--feature_file={tmp_path}/f.npz")
    message = run("eval.py", *flags, f"--whiten={tmp_path}/f.npz", status=2).stderr
    assert "f.npz: its features are of other weights" in message
