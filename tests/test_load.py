"""What is loaded, what is not, and what is said about it; and where weights are looked for."""

import os
import pickle
import re
import shutil
import time

import numpy as np
import paddle
import pytest
import safetensors.numpy
from test_formats import fluid_variable
from test_layouts import loaded, paddleclas_resnet, paddleclas_se_resnext_vd, pytorch, random_weights

import models
import weights
from retrieval import extraction
from utility import UserError
from weights import formats, sets
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


@pytest.mark.parametrize("prefix", ["module.", "_layers.", "backbone.", "model.backbone.", "0.", "net_"])
def test_names_behind_a_wrapper(tmp_path, prefix):
    """Data-parallel layers and PaddleClas' retrieval models put a word in front of the names."""
    network = paddle.vision.models.resnet18(num_classes=-1)
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    paddle.save({**state, "neck.weight": paddle.zeros([3])}, str(tmp_path / "w.pdparams"))
    network, line = loaded(tmp_path / "w", "ResNet18", 3)
    assert line.startswith("loaded 100 of 100") and line.endswith("none there; not used: neck.weight")


def test_half_a_head_is_skipped_whole(tmp_path):
    network = models.build_model("ResNet8", 3)
    state = {**network.state_dict(), "head.bias": paddle.zeros([])}
    paddle.save(state, str(tmp_path / "w.pdparams"))
    other, line = loaded(tmp_path / "w", "ResNet8", 3)
    assert line.endswith("; head skipped: 1 classes there, 3 here")
    assert not np.array_equal(other.head.weight.numpy(), network.head.weight.numpy())


def test_unknown_tensors_beside_known_ones_are_named(tmp_path):
    path = vision_file(tmp_path, 18, **{"aux.weight": np.zeros(3, np.float32)})
    assert loaded(path, "ResNet18", 1000)[1].endswith("head loaded: 1000 classes; not used: aux.weight")


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
    assert message("output").endswith(f"it holds the folders of runs; give one of them, such as {run_dir}/best")
    os.rename(run_dir, tmp_path / "elsewhere")
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


def checkpoint(folder, name="3"):
    """A folder that looks like a run's; -> that of its checkpoint."""
    path = folder / "ResNet8" / name
    os.makedirs(path)
    paddle.save(models.build_model("ResNet8", 3).state_dict(), str(path / WEIGHTS_FILE))
    paddle.save({"head.bias/velocity_0": paddle.zeros([3])}, str(path / "model.pdopt"))
    (path / "checkpoint.json").write_text("{}")
    return path


def said(path, **options):
    with pytest.raises(UserError) as caught:
        weights.read_weights(str(path), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_path_beside_the_weights_says_which_to_give(tmp_path):
    path = checkpoint(tmp_path / "output")
    run_dir = path.parent
    (run_dir / "best").write_text("3\n")  # where there are no links
    assert said(tmp_path / "output").endswith(f"the folders of runs; give one of them, such as {run_dir}/best")
    assert said(run_dir).endswith(f"the checkpoints of a run; give one of them, such as {run_dir}/best")
    os.remove(run_dir / "best")
    assert said(run_dir).endswith(f"give one of them, such as {path}")
    for name in ("model.pdopt", "checkpoint.json"):
        assert said(path / name).endswith(f"give {path}" if name == "model.pdopt" else f"give the directory, {path}")
    for name in ("model.pdparams/", "model.pdparams/x/y"):
        assert f"{path}/model.pdparams is a file, not a directory; give {path}" in said(f"{path}/{name}")
    assert said(path / "best").endswith(f"{path} is a checkpoint directory: give that")
    assert said(path, which="ima") == f"--weights=ima: {path} is a checkpoint directory, which has model"


def test_an_optimizers_file_names_the_weights_beside_it(tmp_path):
    paddle.save({"linear_0.w_0_moment1_0": paddle.zeros([3])}, str(tmp_path / "net.pdopt"))
    assert said(tmp_path / "net.pdopt").endswith("not weights: give the .pdparams beside it")
    (tmp_path / "net.pdparams").write_bytes(b"")
    assert said(tmp_path / "net.pdopt").endswith(f"not weights: give {tmp_path}/net.pdparams")


@pytest.mark.parametrize("names", [("model.json", "model.pdiparams"), ("inference.pdmodel", "inference.pdiparams")])
def test_an_exported_model_is_no_weights(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(bytes(12) + b"x")
    for path in (tmp_path, *(tmp_path / name for name in names)):
        assert "exported for Paddle Inference" in said(path) and said(path).endswith("that it was exported from")


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("https://paddle-hapi.bj.bcebos.com/models/resnet18.pdparams", "imagenet --model=ResNet18 fetches"),
        ("http://example.com/ResNet50_vd_pretrained.pdparams?x=1", "imagenet --model=ResNet50_vd fetches"),
        ("s3://bucket/net.pdparams", "--pretrained_model=imagenet fetches"),
        ("https:/example.com/", "--pretrained_model=imagenet fetches"),
    ],
)
def test_an_address_is_to_be_downloaded_first(path, wanted):
    message = said(path)
    assert message.startswith(f"--pretrained_model={path}: an address, not a file: download it first")
    assert wanted in message and "has no https" not in message


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("resnet50.pdparams", "ResNet50"),
        ("ResNet50_vd_ssld_pretrained", "ResNet50_vd"),
        ("SE_ResNext50_32x4d_pretrained.pdparams", "SE_ResNeXt50_32x4d"),
        ("resnet-101", "ResNet101"),
        ("seresnext50_32x4d.safetensors", "SE_ResNeXt50_32x4d"),
        ("my_net.pdparams", None),
    ],
)
def test_a_file_that_is_not_there_suggests_a_model_and_a_file(tmp_path, monkeypatch, name, model):
    monkeypatch.chdir(tmp_path)
    message = said(name)
    assert message.startswith(f"{name}: no weights there: the working directory has no {name}")
    assert ".pdparams takes" not in message
    wanted = f"; --pretrained_model=imagenet --model={model} takes the official ImageNet weights"
    assert message.endswith(wanted) if model else "imagenet" not in message
    (tmp_path / f"x{name}").write_bytes(b"")
    assert f"; did you mean x{name}?" in said(name)


# ---------------------------------------------------------------- what people's own code writes


def resnet8(seed=0):
    """A ResNet8 under the names of paddle.vision."""
    paddle.seed(seed)
    state = models.build_model("ResNet8", 0).state_dict()
    return {name[len("backbone.") :]: value.numpy() for name, value in state.items()}


def put(tensors, where, prefix=""):
    """{"a": {"b": {prefix + name: array}}} of "a b"."""
    content = {f"{prefix}{name}": value for name, value in tensors.items()}
    for key in reversed(where.split()):
        content = {key: content}
    return content


def adam(tensors):
    """An optimizer's state, as Paddle's dygraph names it."""
    state = {f"conv2d_{n}.w_0_moment{m}_0": v for n, v in enumerate(tensors.values()) for m in (1, 2)}
    masters = {f"conv2d_{n}.w_0": v for n, v in enumerate(tensors.values())}
    return {**state, "master_weights": masters, "LR_Scheduler": {"last_epoch": 3, "last_lr": 0.1}}


@pytest.mark.parametrize(
    ("where", "prefix"),
    [
        ("model", ""),
        ("net", "module."),
        ("state_dict module", "_layers."),
        ("a b c d", "student.backbone."),
        ("", "model.backbone."),
        ("", "module.encoder_q."),
        ("", "0."),
        ("state.dict", "x/y/"),
        ("state dict", "my net: "),
        ("model", "net_"),
        ("model", "backbone."),
    ],
)
def test_weights_are_found_in_any_dict_and_behind_any_prefix(tmp_path, where, prefix):
    tensors = resnet8()
    head = {f"{prefix.replace('backbone.', '')}classifier.{n}": np.zeros(3, np.float32) for n in ("w", "b", "c")}
    content = {**put({**tensors}, where, prefix), "extra": head, "opt": adam(tensors), "epoch": 3, "args": ["x", (1,)]}
    paddle.save(content, str(tmp_path / "w.pdparams"))
    network, line = loaded(tmp_path / "w.pdparams", "ResNet8", 3)
    own = prefix.endswith("backbone.")  # behind it such names are those of this project
    under = ".".join([*where.split(), prefix.removesuffix("backbone.")])
    source = "this project" if own else "paddle.vision"
    assert line.startswith(
        f"loaded 45 of 45 backbone tensors from {tmp_path}/w.pdparams ({source} ResNet8, under {under!r}); "
    )
    assert line.endswith("; not used: extra.* (3 tensors), an optimizer's state (135 tensors)")
    for name, value in tensors.items():
        assert np.array_equal(network.backbone.state_dict()[name].numpy(), value)


def test_lists_of_state_dicts_and_safetensors_behind_a_prefix(tmp_path):
    paddle.save([adam(resnet8()), {"net": resnet8()}], str(tmp_path / "w.pdparams"))
    assert "ResNet8, under '1.net.')" in loaded(tmp_path / "w.pdparams", "ResNet8", 3)[1]
    path = tmp_path / "w.safetensors"
    tensors = {name.replace("_mean", "running_mean").replace("_variance", "running_var"): value
               for name, value in resnet8().items()}  # fmt: skip
    safetensors.numpy.save_file(put(tensors, "", "backbone."), str(path))
    assert "(torchvision/timm ResNet8, under 'backbone.')" in loaded(path, "ResNet8", 3)[1]


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        (("model", ""), ("ema", "module."), ("model", "ema.module", "ema")),
        (("", "module.encoder_q."), ("", "module.encoder_k."), ("module.encoder_q", "module.encoder_k", "encoder_k")),
        (("", ""), ("ema", ""), (".", "ema", "ema")),
        (("student backbone", ""), ("teacher", "backbone."), ("student", "teacher", "teacher")),
    ],
)
def test_two_sets_take_a_choice(tmp_path, one, other, names):
    path = tmp_path / "w.pdparams"
    first, second = resnet8(1), resnet8(2)
    paddle.save({**put(first, *one), **put(second, *other), "opt": adam(first)}, str(path))
    message = said(path, model="ResNet8")
    assert message.startswith(f"{path}: holds 2 sets of weights, each of them complete: ResNet8 ")
    flags = [f"--weights={name}" for name in names[:2]]
    assert message.endswith((f"choose one: {' or '.join(flags)}", f"choose one: {' or '.join(flags[::-1])}"))
    for name, tensors in zip(names, (first, second, second)):
        found = weights.read_weights(str(path), "ResNet8", name)
        assert np.array_equal(found.tensors["backbone.conv1.weight"], tensors["conv1.weight"])
        assert found.unused[-1] == "an optimizer's state (135 tensors)" and len(found.unused) <= 6
    message = said(path, which="x\x1b" * 100)
    assert re.match(r"--weights=x\\x1b.* \.\.\. .*: .*w.pdparams has no weights of that name; it has ", message)
    assert all(repr(name) in message for name in names[:2] if name != ".") and len(message) < 600


def test_the_set_that_is_complete_or_of_the_model_is_taken(tmp_path):
    path = tmp_path / "w.pdparams"
    part = {name: value for name, value in resnet8(1).items() if "layer3.0.bn2" not in name}
    paddle.save({"ema": part, "model": resnet8()}, str(path))
    assert "(paddle.vision ResNet8, under 'model.')" in loaded(path, "ResNet8", 3)[1]
    deep = {name: value.numpy() for name, value in models.build_model("ResNet18", 0).state_dict().items()}
    paddle.save({"teacher": deep, "student": resnet8()}, str(path))
    for model, under in (("ResNet8", "student."), ("ResNet18", "teacher.")):
        assert weights.read_weights(str(path), model).source.endswith(f"{model}, under {under!r}")
    assert "ResNet18 under 'teacher' and ResNet8 under 'student'; choose one" in said(path, model="ResNet50")
    paddle.save({"model": part, "epoch": 3}, str(path))  # nothing complete: as for a file without a dict around it
    assert "backbone.layer3.0.bn2.weight (missing), " in refusal(path, "ResNet8")
    assert "loaded 41 of 45" in loaded(path, "ResNet8", 3, allow_partial=True)[1]


@pytest.mark.parametrize("model", ["ResNet8", "ResNet18", "ResNet50", "ResNet50_vd", "SE_ResNeXt50_32x4d"])
def test_completeness_is_that_of_the_network(model):
    state = {name: value.numpy() for name, value in models.build_model(model, 3).state_dict().items()}
    (found,) = sets.find_sets(state)
    assert (found.prefix, found.missing, found.network) == ("", 0, model.replace("_va", ""))
    for name in [*state][1:-2:13]:
        if name not in ("backbone.layer1.0.conv2.weight", "backbone.layer1.0.conv3.weight"):
            found = sets.find_sets({other: value for other, value in state.items() if other != name})[0]
            assert found.prefix == "" and found.missing, name


@pytest.mark.parametrize(
    "names",
    [
        [f"x{n}.layer1.0.bn1._mean" for n in range(100_000)],
        ["a." * n + "layer1.0.bn1._mean" for n in range(80)] + ["a." * 80 + f"bn1.x{n}" for n in range(100_000)],
        [f"{n}.conv2d_{n}.w_0" for n in range(50_000)] + ["moment" * 20 + str(n) for n in range(50_000)],
    ],
    ids=["sets", "nested", "numbers"],
)
def test_sets_are_found_in_time_as_there_are_names(names):
    array = np.zeros(1)
    start = time.process_time()
    found = sets.find_sets(dict.fromkeys(names, array))
    words = sets.not_used(dict.fromkeys(names, array), found[0])
    assert time.process_time() - start < 15  # ten times what it takes; for each with each other it is hours
    assert words


def test_one_array_under_the_names_of_many(tmp_path):
    """Keras' kernels are copied: a small file must not ask for their memory many times over."""
    kernel = np.zeros((3, 3, 64, 512), np.float32)
    names = ["conv2_block1_1_conv/kernel", *(f"conv{s}_block{b}_2_conv/kernel" for s in (2, 3, 4) for b in range(1, 7))]
    with open(tmp_path / "w.pdparams", "wb") as file:
        pickle.dump(dict.fromkeys(names, kernel), file, protocol=2)
    with pytest.raises(UserError, match=r"w\.pdparams: refused: one array has the names of many"):
        weights.read_weights(str(tmp_path / "w.pdparams"))


def test_the_file_of_a_part_is_that_part(trained):
    path = f"{trained}/ResNet8/latest/model.pdparams"
    assert weights.read_weights(path, which="model").tensors
    for which in ("ema", "nonsense"):
        with pytest.raises(UserError, match=f"--weights={which}: .*model.pdparams is the model of a checkpoint"):
            weights.read_weights(path, which=which)


def test_no_random_embedding_layer_is_evaluated(tmp_path):
    """Of a file without a description a head that does not fit may be skipped, and no other layer that is there."""
    values = models.build_model("ResNet8", 3, embedding_size=8).state_dict()
    del values["embedding.bias"]
    paddle.save(values, str(tmp_path / "x.pdparams"))
    asked = dict.fromkeys(("model", "pooling", "embedding_size", "head", "image_shape", "test_transform"))
    asked["model"] = "ResNet8"
    with pytest.raises(UserError, match=r"x\.pdparams: not the weights of ResNet8: embedding"):
        extraction.open_network(asked, str(tmp_path / "x.pdparams"))
    assert extraction.open_network(asked, str(tmp_path / "x.pdparams"), allow_partial=True).settings.embedding_size == 8
