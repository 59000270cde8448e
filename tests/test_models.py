"""Backbones against Paddle's own networks and restatements in plain functions; pooling against NumPy."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

import models
import weights
from models.blocks import Conv1x1
from models.embedding_net import MEAN, STD, EmbeddingNet, Pooling
from training import optimizers
from utility import UserError


def pictures(count=2, size=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def normalised(image):
    """uint8 NHWC -> float32 NCHW as ImageNet networks want it."""
    x = (image.astype(np.float64) / 255 - MEAN) / STD
    return paddle.to_tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.float32))


def scramble(network, seed=0):
    """Weights and statistics that leave no layer at its neutral start."""
    rng = np.random.default_rng(seed)
    for name, value in network.state_dict().items():
        low, high = (
            (0.5, 1.5) if name.endswith(("_variance", "bn1.weight", "bn2.weight", "bn3.weight")) else (-0.2, 0.2)
        )
        if "conv" in name and name.endswith("weight") and value.ndim == 4:
            high = (2 / np.prod(value.shape[1:])) ** 0.5
            low = -high
        value.set_value(rng.uniform(low, high, value.shape).astype(np.float32))
    network.eval()
    return network


def close(a, b, tolerance=1e-5):
    a, b = (v.numpy() if hasattr(v, "numpy") else v for v in (a, b))
    assert a.shape == b.shape and np.abs(b).max() > 0
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


# ---------------------------------------------------------------- backbones


@pytest.mark.parametrize("depth", [18, 50, 101, 152])
def test_resnet_gives_the_outputs_of_paddle_vision_with_its_weights(depth, tmp_path):
    theirs = scramble(getattr(paddle.vision.models, f"resnet{depth}")(num_classes=7))
    paddle.save(theirs.state_dict(), str(tmp_path / "theirs.pdparams"))
    ours = models.build_model(f"ResNet{depth}", 7)
    line = weights.load_weights(ours, weights.read_weights(str(tmp_path / "theirs")), f"ResNet{depth}", head="must")
    count = len(theirs.state_dict()) - 2
    source = f"{tmp_path}/theirs.pdparams (paddle.vision ResNet{depth})"
    assert line == f"loaded {count} of {count} backbone tensors from {source}; head loaded: 7 classes"
    ours.eval()
    image = pictures()
    with paddle.no_grad():
        close(ours(paddle.to_tensor(image))[1], theirs(normalised(image)))


def batch_norm(x, state, name):
    scale, shift, mean, variance = (state[f"{name}.{n}"] for n in ("weight", "bias", "_mean", "_variance"))
    return F.batch_norm(x, mean, variance, scale, shift)


def stem(x, state):
    x = F.relu(batch_norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), state, "bn1"))
    return F.max_pool2d(x, 3, 2, 1)


def blocks(state):
    """(name of the block, stride), in order."""
    names = sorted({tuple(int(p) for p in n[5:].split(".")[:2]) for n in state if n.startswith("layer")})
    return [(f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1) for stage, i in names]


def forward_va(x, state):
    """The original ResNet: the first 1x1 convolution of a stage halves the resolution."""
    x = stem(x, state)
    for name, stride in blocks(state):
        y = F.relu(batch_norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride), state, f"{name}.bn1"))
        y = F.relu(batch_norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), state, f"{name}.bn2"))
        y = batch_norm(F.conv2d(y, state[f"{name}.conv3.weight"]), state, f"{name}.bn3")
        x = F.relu(y + shortcut(x, state, name, stride))
    return x


def shortcut(x, state, name, stride):
    if f"{name}.downsample.0.weight" not in state:
        return x
    return batch_norm(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride), state, f"{name}.downsample.1")


def forward_se_resnext(x, state):
    x = stem(x, state)
    for name, stride in blocks(state):
        y = F.relu(batch_norm(F.conv2d(x, state[f"{name}.conv1.weight"]), state, f"{name}.bn1"))
        y = F.conv2d(y, state[f"{name}.conv2.weight"], stride=stride, padding=1, groups=32)
        y = F.relu(batch_norm(y, state, f"{name}.bn2"))
        y = batch_norm(F.conv2d(y, state[f"{name}.conv3.weight"]), state, f"{name}.bn3")
        s = y.mean([2, 3]) @ state[f"{name}.squeeze.weight"] + state[f"{name}.squeeze.bias"]
        s = F.relu(s) @ state[f"{name}.excitation.weight"] + state[f"{name}.excitation.bias"]
        x = F.relu(y * (1 / (1 + (-s).exp())).unsqueeze([2, 3]) + shortcut(x, state, name, stride))
    return x


@pytest.mark.parametrize(("name", "forward"), [("ResNet50_va", forward_va), ("SE_ResNeXt50_32x4d", forward_se_resnext)])
def test_backbone_equals_its_restatement(name, forward):
    network = scramble(models.build_model(name, 0))
    image = pictures()
    with paddle.no_grad():
        close(network.backbone(normalised(image)), forward(normalised(image), network.backbone.state_dict()))


@pytest.mark.parametrize(("size", "stride"), [((4, 4), 1), ((1, 3), 1), ((7, 5), 2), ((6, 6), 2)])
def test_conv1x1_of_a_whole_batch_has_the_values_and_gradients_of_paddles(size, stride, monkeypatch):
    layer = Conv1x1(5, 7, stride)
    x = paddle.randn([3, 5, *size])
    x.stop_gradient = False
    wanted = F.conv2d(x, layer.weight, stride=stride)
    towards = paddle.randn(wanted.shape)
    wanted_gradients = paddle.grad(wanted, [x, layer.weight], [towards])
    monkeypatch.setattr(paddle.nn.Conv2D, "forward", None)  # not used
    result = layer(x)
    close(result, wanted)
    for gradient, wanted in zip(paddle.grad(result, [x, layer.weight], [towards]), wanted_gradients):
        close(gradient, wanted)


def test_strides_matter():
    """va and vb have the same shapes and different outputs."""
    va, vb = (scramble(models.build_model(name, 0)) for name in ("ResNet50_va", "ResNet50"))
    x = normalised(pictures())
    with paddle.no_grad():
        a, b = va.backbone(x).numpy(), vb.backbone(x).numpy()
    assert a.shape == b.shape and np.abs(a - b).max() > 0.01 * np.abs(a).max()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # paddle.vision's own count for ResNet, FACTS.md's for SE-ResNeXt; statistics of batch norm included
        ("ResNet50", 25_610_152),
        ("ResNet50_va", 25_610_152),
        ("SE_ResNeXt50_32x4d", 27_628_120),
    ],
)
def test_sizes_with_1000_classes(name, values):
    network = models.build_model(name, 1000)
    assert sum(int(np.prod(p.shape)) for p in network.state_dict().values()) == values


def test_every_model_maps_pictures_to_features():
    for name in models.MODELS:
        network = models.build_model(name, 3)
        network.eval()
        with paddle.no_grad():
            embedding, logits = network(paddle.to_tensor(pictures(1, 64)))
        assert embedding.shape == [1, network.backbone.out_channels] and logits.shape == [1, 3]
        depth = int("".join(c for c in name.split("_32x4d")[0] if c.isdigit()))
        layers = [n for n, _ in network.backbone.named_sublayers() if n.split(".")[-1] in ("conv1", "conv2", "conv3")]
        assert len(layers) + 1 == depth  # and the head


# ---------------------------------------------------------------- the embedding network


class Fixed(paddle.nn.Layer):
    """A backbone that gives the picture itself."""

    out_channels = 3

    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", models.POOLINGS)
def test_pooling(kind):
    network = EmbeddingNet(Fixed(), 0, kind)
    image = pictures(3, 9)
    x = normalised(image).numpy().astype(np.float64)
    wanted = {
        "avg": x.mean((2, 3)),
        "max": x.max((2, 3)),
        "avg+max": x.mean((2, 3)) + x.max((2, 3)),
        "gem": (np.clip(x, 1e-6, None) ** 3).mean((2, 3)) ** (1 / 3),
    }[kind]
    embedding, logits = network(paddle.to_tensor(image))
    assert logits is None
    close(embedding, wanted.astype(np.float32))


@pytest.mark.parametrize("power", [-2.0, 0.0, 0.5, 6.5, 9.0])
def test_a_power_of_gem_that_has_gone_too_far_counts_as_the_nearest_that_has_not(power):
    x = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32)
    x[0, 1] = 0  # a channel that is dead in one picture
    pool = Pooling("gem")
    pool.power.set_value(np.array([power], np.float32))
    taken = min(max(power, 1), 6)
    wanted = (np.clip(x, 1e-6, None).astype(np.float64) ** taken).mean((2, 3)) ** (1 / taken)
    y = pool(paddle.to_tensor(x, stop_gradient=False))
    y.sum().backward()
    np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-4, atol=1e-7)
    assert np.isfinite(pool.power.grad.numpy()).all()


def test_gem_learns_its_power_and_stands_dead_channels():
    network = EmbeddingNet(Fixed(), 0, "gem")
    image = pictures(2, 5)
    image[..., 0] = 0
    network(paddle.to_tensor(image))[0].sum().backward()
    gradient = network.pool.power.grad.numpy()
    assert np.isfinite(gradient).all() and gradient != 0


def test_embedding_layer_and_head():
    network = EmbeddingNet(Fixed(), 5, embedding_size=4, dropout=0.5)
    network.eval()
    image = pictures(2, 6)
    embedding, logits = network(paddle.to_tensor(image))
    pooled = normalised(image).numpy().mean((2, 3))
    close(embedding, pooled @ network.embedding.weight.numpy() + network.embedding.bias.numpy())
    close(logits, embedding.numpy() @ network.head.weight.numpy() + network.head.bias.numpy())


def test_zero_init_residual_makes_the_blocks_identities():
    network = models.build_model("ResNet8", 0)
    network.backbone.zero_init_residual()
    block = network.backbone.layer1[0]
    x = paddle.rand([2, 16, 8, 8])  # at least 0: the final relu changes nothing
    assert np.array_equal(block(x).numpy(), x.numpy())


@pytest.mark.parametrize("stages", range(4))
def test_recomputation_changes_neither_gradients_nor_batch_norm_statistics(stages):
    image, results = pictures(6, 16), []
    for recompute in (False, True):
        paddle.seed(0)
        network = models.build_model("ResNet8", 4)
        if recompute:
            network.backbone.use_recompute()
        network.start_training(freeze_stages=stages)
        for _ in range(2):
            _, logits = network(paddle.to_tensor(image))
            F.cross_entropy(logits, paddle.to_tensor(np.arange(6) % 4)).backward()
        gradients = {n: p.grad.numpy() for n, p in network.named_parameters() if not p.stop_gradient}
        results.append((gradients, {n: v.numpy() for n, v in network.state_dict().items()}))
    (gradients, state), (gradients_again, state_again) = results
    assert len(gradients) == len(gradients_again) == len(optimizers.trained_parameters(network)) >= 2
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradients_again[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)
    for name, value in state.items():
        np.testing.assert_allclose(state_again[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    start = models.build_model("ResNet8", 4).state_dict()
    moved = [n for n in state if n.endswith("_mean") and not np.allclose(state[n], start[n].numpy(), atol=1e-4)]
    assert len(moved) == sum(n.endswith("_mean") for n in state) - [0, 3, 6, 9][stages]


def test_frozen_batch_norm_stays():
    network = models.build_model("ResNet8", 4)
    network.train()
    network.start_training(freeze_bn=True)
    before = {n: v.numpy().copy() for n, v in network.state_dict().items() if "bn" in n or "downsample.1" in n}
    parameters = [p for p in network.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.SGD(0.1, parameters)
    _, logits = network(paddle.to_tensor(pictures(4, 16)))
    F.cross_entropy(logits, paddle.to_tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    after = network.state_dict()
    assert len(before) == 4 * 9 and all(np.array_equal(value, after[n].numpy()) for n, value in before.items())


@pytest.mark.parametrize(("stages", "rest"), [(0, False), (1, False), (3, False), (0, True), (2, True)])
def test_what_rests_stays(stages, rest):
    """Weights and running statistics of frozen stages and of a resting backbone; all else moves."""
    network = models.build_model("ResNet8", 4, embedding_size=8)
    network.start_training(freeze_stages=stages, rest=rest)
    before = {name: value.numpy().copy() for name, value in network.state_dict().items()}
    optimizer = paddle.optimizer.SGD(0.1, [p for p in network.parameters() if not p.stop_gradient])
    _, logits = network(paddle.to_tensor(pictures(4, 16)))
    F.cross_entropy(logits, paddle.to_tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not np.array_equal(value.numpy(), before[name])}
    late = tuple(f"backbone.layer{stage}" for stage in range(stages + 1, 4))
    if stages == 0:
        late = ("backbone",)
    wanted = {name for name in before if name.startswith(("embedding", "head")) or (not rest and name.startswith(late))}
    assert moved == wanted
    statistics = {id(tensor) for tensor in network.batch_norm_statistics()}
    names = {name for name, value in network.named_parameters() if id(value) in statistics}
    assert all(name in moved for name in names) and bool(statistics) == (not rest and stages < 3)
    # The next epoch wakes a backbone that rested, but not what is frozen for good.
    network.start_training(freeze_stages=stages)
    assert bool(network.batch_norm_statistics()) == (stages < 3)


def test_more_stages_than_there_are():
    with pytest.raises(UserError, match="--freeze_stages=4: this backbone has 3 stages"):
        models.build_model("ResNet8", 4).start_training(freeze_stages=4)


def test_unknown_names():
    with pytest.raises(UserError, match="unknown model 'ResNet49'; known: ResNet50, "):
        models.build_model("ResNet49", 1)
    with pytest.raises(UserError, match="unknown pooling 'mean'; known: avg, max, gem, avg"):
        models.build_model("ResNet8", 1, pooling="mean")


def test_cosine_head_and_layer_norm():
    """Against their formulas, with an embedding of zeros among others, which must not give NaN."""
    net = models.build_model("ResNet8", 3, embedding_norm="layer", head="cosine", head_scale=7.0)
    net.eval()
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    embedding, logits = (tensor.numpy().astype(np.float64) for tensor in net(paddle.to_tensor(pictures)))
    np.testing.assert_allclose(embedding.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(embedding.std(axis=1), 1, rtol=1e-3)
    weight = net.head.weight.numpy().astype(np.float64)
    wanted = 7 * embedding @ weight
    wanted /= np.linalg.norm(embedding, axis=1, keepdims=True) * np.linalg.norm(weight, axis=0)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)

    zeros = paddle.zeros([2, 64])
    zeros.stop_gradient = False
    scores = net.head(zeros)
    scores.sum().backward()
    assert not scores.numpy().any() and not zeros.grad.numpy().any()
    assert np.isfinite(net.head.weight.grad.numpy()).all()


@pytest.mark.parametrize("name", ["ResNet8", "ResNet18", "ResNet50", "ResNet50_va", "SE_ResNeXt50_32x4d"])
def test_last_stride(name):
    """The same weights give twice the resolution."""
    backbones = [models.build_model(name, 0, last_stride=stride).backbone for stride in (2, 1)]
    backbones[1].set_state_dict(backbones[0].state_dict())
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32))
    for backbone in backbones:
        backbone.eval()
    small, large = (backbone(x) for backbone in backbones)
    assert [2 * side for side in small.shape[2:]] == large.shape[2:] and small.shape[1] == large.shape[1]
