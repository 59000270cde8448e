"""What is loaded, what is not, and what is said about it; and where weights are looked for."""

import os
import re
import shutil

import numpy as np
import paddle
import pytest
import safetensors.numpy
from test_formats import fluid_variable
from test_layouts import loaded, paddleclas_resnet, paddleclas_se_resnext_vd, pytorch, random_weights

import models
import weights
from utility import UserError
from weights import formats
from weights.checkpoint import WEIGHTS_FILE


def vision_file(tmp_path, depth, **changed):
    """A file with the names and shapes of paddle.vision's network."""
    network = getattr(paddle.vision.models, f"resnet{depth}")()
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    paddle.save({**state, **changed}, str(tmp_path / f"resnet{depth}.pdparams"))
    return tmp_path / f"resnet{depth}.pdparams"


def refusal(path, model, **options):
    """The message that refuses the file; nothing of the network has changed then."""
    network = models.build_model(model, 3)
    before = {n: v.numpy().copy() for n, v in network.state_dict().items()}
    with pytest.raises(UserError) as caught:
        weights.load_weights(network, weights.read_weights(str(path)), model, **options)
    assert all(np.array_equal(v.numpy(), before[n]) for n, v in network.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_of_another_depth(tmp_path):
    path = vision_file(tmp_path, 101)
    message = refusal(path, "ResNet50")
    # Every tensor of ResNet50 is there with its shape: what is left over tells.
    assert f"{path}: not the weights of ResNet50: backbone.layer3.6.conv1.weight (not in ResNet50), " in message
    assert message.count(" (not in ResNet50)") == 5 and " and 250 more; " in message
    assert message.endswith("the file is a ResNet101: take --model=ResNet101")
    message = refusal(path, "ResNet152")
    assert "backbone.layer2.4.conv1.weight (missing)" in message and message.endswith("take --model=ResNet101")
    assert refusal(path, "ResNet50_va").endswith("take --model=ResNet101")


@pytest.mark.parametrize(
    ("file", "model", "wanted"),
    [
        ("resnet34", "ResNet18", "the file is a ResNet34: no model here is one"),
        ("resnet18", "ResNet50", "the file is a ResNet18: take --model=ResNet18"),
        ("resnext50_32x4d", "SE_ResNeXt50_32x4d", "the file is a ResNeXt50_32x4d: no model here is one"),
    ],
)
def test_another_network_of_paddle_vision(tmp_path, file, model, wanted):
    paddle.save(getattr(paddle.vision.models, file)().state_dict(), str(tmp_path / "w.pdparams"))
    message = refusal(tmp_path / "w.pdparams", model)
    assert "w.pdparams: not the weights of " in message and message.endswith(wanted)
    assert len(re.findall(r"backbone\.", message)) == 5 and " more; " in message


@pytest.mark.parametrize(
    ("model", "names", "other"),
    [
        ("ResNet50_vd", paddleclas_resnet, "ResNet50"),
        ("SE_ResNeXt50_vd_32x4d", paddleclas_se_resnext_vd, "SE_ResNeXt50_32x4d"),
        ("ResNet50", paddleclas_resnet, "ResNet50_vd"),
    ],
)
def test_vd_variants_are_told_apart(tmp_path, model, names, other):
    safetensors.numpy.save_file(random_weights(model, names), str(tmp_path / "w.safetensors"))
    assert refusal(tmp_path / "w.safetensors", other).endswith(f"the file is a {model}: take --model={model}")


def test_a_deep_stem_of_unknown_names(tmp_path):
    tensors = random_weights("ResNet50", pytorch)
    tensors.pop(pytorch(None, None, None, 1)["kernel"])
    tensors.update({f"conv1.{i}.weight": np.zeros((32, 3, 3, 3), np.float32) for i in range(3)})
    safetensors.numpy.save_file(tensors, str(tmp_path / "vd.safetensors"))
    message = refusal(tmp_path / "vd.safetensors", "ResNet50")
    assert message.endswith("a variant with three convolutions in its stem under names that are not known here")
    network = models.build_model("ResNet50", 7)
    line = weights.load_weights(
        network, weights.read_weights(str(tmp_path / "vd.safetensors")), "ResNet50", allow_partial=True
    )
    assert line.startswith("loaded 26") and "--allow_partial passed over backbone.conv1.weight (" in line


def test_fluid_networks_of_other_sizes_are_no_resnet(tmp_path):
    for number in range(20):
        (tmp_path / f"conv2d_{number}.w_0").write_bytes(fluid_variable(np.ones((1, 1, 1, 1), np.float32)))
    wanted = "20 convolutions and 0 batch norms are no ResNet of 50, 101 or 152 layers"
    assert refusal(tmp_path, "ResNet50").endswith(wanted)
    assert refusal(tmp_path, "ResNet50", allow_partial=True).endswith(wanted)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"bn1.bias": np.zeros(65, np.float32)}, "[65] there, [64] here"),
        ({"bn1.bias": np.zeros(64, np.int8)}, "int8 values"),
        ({"bn1.bias": np.full(64, np.inf, np.float16)}, "NaN or infinite"),
    ],
)
def test_allow_partial_loads_the_rest_and_names_what_it_left(tmp_path, changed, why):
    path = vision_file(tmp_path, 18, **changed)
    message = refusal(path, "ResNet18")
    assert (
        f"backbone.bn1.bias ({why}); the file has the layers of ResNet18, but some tensors are missing or changed"
        in message
    )
    network, line = loaded(path, "ResNet18", 3, allow_partial=True)
    assert line.startswith(f"loaded 99 of 100 backbone tensors from {path} (paddle.vision ResNet18); ")
    assert f"; --allow_partial passed over backbone.bn1.bias ({why}); head skipped: 1000 classes there, 3 here" in line
    tensors = formats.read_pickle(str(path))
    for name, value in network.state_dict().items():
        if name.startswith("backbone.") and name != "backbone.bn1.bias":
            assert np.array_equal(value.numpy(), tensors[name[9:]])
    assert (network.backbone.bn1.bias.numpy() == 0).all()
    # What continues a run or is measured must fit whole.
    assert "backbone.bn1.bias" in refusal(path, "ResNet18", head="must", allow_partial=True)


def test_nothing_loaded_is_never_a_success(tmp_path):
    paddle.save({"layer1.0.bn1._mean": paddle.zeros([5])}, str(tmp_path / "w.pdparams"))
    for allow_partial in (False, True):
        message = refusal(tmp_path / "w.pdparams", "ResNet18", allow_partial=allow_partial)
        assert message.endswith("the file's network is none that is known here")
    assert "nothing in it fits ResNet18" in message
    path = tmp_path / "head.pdparams"
    paddle.save({"head.weight": paddle.zeros([64, 3]), "backbone.conv1.weight": paddle.zeros([1])}, str(path))
    assert "nothing in it fits" in refusal(path, "ResNet8", allow_partial=True)


@pytest.mark.parametrize(
    ("there", "here", "wanted"),
    [
        ((3, "avg", 0), (4, "avg", 0), "head skipped: 3 classes there, 4 here"),
        ((3, "avg", 0), (3, "avg", 0), "head loaded: 3 classes"),
        ((0, "avg", 0), (3, "avg", 0), "head starts anew: none there"),
        ((3, "avg", 0), (0, "avg", 0), "head unused: none here"),
        ((0, "avg", 0), (0, "avg", 0), ""),
        ((3, "gem", 0), (3, "avg", 0), "pool unused: none here; head loaded: 3 classes"),
        ((3, "avg", 0), (3, "gem", 0), "pool starts anew: none there; head loaded: 3 classes"),
        ((3, "gem", 8), (5, "gem", 8), "pool loaded; embedding loaded: 8 values; head skipped: 3 classes there, 5 "
                                       "here"),
        ((3, "avg", 8), (3, "avg", 9), "embedding skipped: 8 values there, 9 here; head skipped: head.weight ([8, 3] "
                                       "there, [9, 3] here), head.bias (not with the rest)"),
        ((3, "avg", 0), (3, "avg", 64), "embedding starts anew: none there; head skipped: head.weight (not with "
                                        "the rest), head.bias (not with the rest)"),
    ],
)  # fmt: skip
def test_the_account_of_pooling_embedding_and_head(tmp_path, there, here, wanted):
    theirs, ours = (models.build_model("ResNet8", *settings) for settings in (there, here))
    path = str(tmp_path / "w.pdparams")
    paddle.save(theirs.state_dict(), path)
    before = {n: v.numpy().copy() for n, v in ours.state_dict().items()}
    line = weights.load_weights(ours, weights.read_weights(path), "ResNet8")
    start = f"loaded 45 of 45 backbone tensors from {path} (this project ResNet8)"
    assert line == (f"{start}; {wanted}" if wanted else start)
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        part = name.split(".")[0]
        source = state if part == "backbone" or f"{part} loaded" in wanted else before
        assert np.array_equal(value.numpy(), np.asarray(source[name]))
    if "skipped" in wanted or "unused" in wanted or "anew" in wanted:
        with pytest.raises(UserError, match=r"w\.pdparams: not the weights of ResNet8"):
            weights.load_weights(ours, weights.read_weights(path), "ResNet8", head="must")


@pytest.mark.parametrize("prefix", ["module.", "_layers.", "backbone."])
def test_names_behind_a_wrapper(tmp_path, prefix):
    """Data-parallel layers and PaddleClas' retrieval models put a word in front of the names."""
    network = paddle.vision.models.resnet18(num_classes=-1)
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    paddle.save({**state, "neck.weight": paddle.zeros([3])}, str(tmp_path / "w.pdparams"))
    network, line = loaded(tmp_path / "w", "ResNet18", 3)
    assert line.startswith("loaded 100 of 100") and line.endswith("none there; unknown and not used: neck.weight")


def test_half_a_head_is_skipped_whole(tmp_path):
    network = models.build_model("ResNet8", 3)
    state = {**network.state_dict(), "head.bias": paddle.zeros([])}
    paddle.save(state, str(tmp_path / "w.pdparams"))
    other, line = loaded(tmp_path / "w", "ResNet8", 3)
    assert line.endswith("; head skipped: 1 classes there, 3 here")
    assert not np.array_equal(other.head.weight.numpy(), network.head.weight.numpy())


def test_unknown_tensors_beside_known_ones_are_named(tmp_path):
    path = vision_file(tmp_path, 18, **{"aux.weight": np.zeros(3, np.float32)})
    assert loaded(path, "ResNet18", 1000)[1].endswith("head loaded: 1000 classes; unknown and not used: aux.weight")


def test_paths(tmp_path):
    run_dir = tmp_path / "output" / "ResNet8"
    os.makedirs(run_dir / "3")
    os.symlink("3", run_dir / "best")
    paddle.save(models.build_model("ResNet8", 3).state_dict(), str(run_dir / "3" / WEIGHTS_FILE))
    for path in (run_dir / "3", run_dir / "best", run_dir / "best" / "model", run_dir / "3" / "model.pdparams"):
        assert weights.read_weights(str(path)).tensors["head.bias"].shape == (3,)
    shutil.copy(run_dir / "3" / "model.pdparams", tmp_path / "mine.pdparams")

    def message(*parts):
        with pytest.raises(UserError) as caught:
            weights.read_weights(os.path.join(tmp_path, *parts))
        return str(caught.value)

    assert message("mime") == (
        f"{tmp_path}/mime: no weights there: {tmp_path} has no mime and no mime.pdparams; did you mean "
        f"{tmp_path}/mine.pdparams?"
    )
    assert message("outptu", "ResNet8", "best").endswith(f"; did you mean {tmp_path}/output?")
    assert message("output", "ResNet8", "bets").endswith(f"; did you mean {run_dir}/best?")
    assert message("output", "ResNet8").endswith(f"the checkpoints of a run; give one of them, such as {run_dir}/best")
    assert message("").endswith("give one of the files in it: mine.pdparams")
    assert "neither a checkpoint directory" in message("output")
    (tmp_path / "output" / "__model__").write_bytes(b"")
    assert "variables are joined in one file" in message("output")
    with pytest.raises(UserError, match="--pretrained_model=imagenet --model=ResNet50 takes the official"):
        weights.read_weights("ResNet50")


def test_a_foreign_file_beside_a_checkpoint_has_not_its_description(tmp_path):
    (tmp_path / "checkpoint.json").write_text("{}")
    path = tmp_path / "other.pdparams"
    paddle.save(models.build_model("ResNet8", 3).state_dict(), str(path))
    assert weights.read_weights(str(path)).state is None
