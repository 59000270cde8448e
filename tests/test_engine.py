"""The inference engine against the network itself, and what it keeps."""

import json
import os
import re
import shutil
import types

import numpy as np
import paddle
import pytest
from conftest import SMALL, run

import models
from retrieval import engine
from retrieval.engine import EngineOptions
from runtime import process
from utility import UserError

SHAPE = [3, 32, 32]
needs_bf16 = pytest.mark.skipif(bool(engine.lacks("bf16")), reason="this CPU has no bf16 instructions")


def make_network(seed=0, class_dim=7, pooling="avg", embedding_size=0, side=32):
    """A ResNet8 whose batch norms have seen something."""
    paddle.seed(seed)
    network = models.build_model("ResNet8", class_dim, pooling, embedding_size)
    network.train()
    for _ in range(3):
        network(paddle.randint(0, 256, [16, side, side, 3]).astype("uint8"))
    network.eval()
    return network


def pictures(count, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def eager(network, images):
    with paddle.no_grad():
        return [None if output is None else output.numpy() for output in network(paddle.to_tensor(images))]


def assert_same(found, wanted):
    for here, there in zip(found, wanted):
        assert (here is None) == (there is None)
        if here is not None:
            assert here.shape == there.shape and here.dtype == np.float32
            assert np.linalg.norm(here - there) <= 1e-4 * np.linalg.norm(there)


@pytest.fixture
def network():
    return make_network()


@pytest.fixture
def no_trace(monkeypatch):
    """Has every attempt to trace a network fail."""

    def fail(*args, **kwargs):
        raise RuntimeError("tracing failed\nand a long story")

    return lambda: monkeypatch.setattr(engine, "trace", fail)


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "avg"},
        {"pooling": "max", "embedding_size": 16},
        {"pooling": "gem"},
        {"pooling": "avg+max", "class_dim": 0},
        {"pooling": "max", "side": 40, "class_dim": 0, "embedding_size": 8},
    ],
    ids=str,
)
def test_outputs_are_the_networks_for_every_batch_size(settings):
    side = settings.get("side", 32)
    network = make_network(**settings)
    run_engine = engine.compile_network(network, [3, side, side])
    for count in (8, 3, 1, 8):  # the last batch of a list is a partial one
        images = pictures(count, side, seed=count)
        assert_same(run_engine(images), eager(network, images))


def test_the_network_is_left_as_it_was(network):
    before = eager(network, pictures(4))
    engine.compile_network(network, SHAPE)
    assert not any("forward" in vars(layer) for layer in network.sublayers(include_self=True))
    assert all(np.array_equal(a, b) for a, b in zip(before, eager(network, pictures(4))))
    network.train()
    network(paddle.to_tensor(pictures(4)))[0].sum().backward()


def test_pictures_that_are_not_contiguous_and_results_that_stay(network):
    run_engine = engine.compile_network(network, SHAPE)
    first, _ = run_engine(pictures(4))
    kept = first.copy()
    flipped = pictures(4, seed=1)[:, :, ::-1]
    assert_same(run_engine(flipped), eager(network, np.ascontiguousarray(flipped)))
    assert np.array_equal(first, kept)


@needs_bf16
def test_bf16_is_near(network):
    found, _ = engine.compile_network(network, SHAPE, "bf16")(pictures(8))
    wanted, _ = eager(network, pictures(8))
    assert 1e-5 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05


def test_outputs_that_are_off_are_refused(network, monkeypatch):
    load = engine.load

    def load_wrong(*args):
        right = load(*args)
        wrong = lambda images: (right(images)[0] * 1.01, right(images)[1])  # noqa: E731
        wrong.threads = 1
        return wrong

    monkeypatch.setattr(engine, "load", load_wrong)
    with pytest.raises(RuntimeError, match=r"its outputs are off by 0\.01"):
        engine.compile_network(network, SHAPE)


def kept(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_a_kept_model_is_used_again_for_the_same_weights_only(network, tmp_path, no_trace):
    folder = tmp_path / "w.inference"
    assert "compiled and kept in" in engine.compile_network(network, SHAPE, folders=[str(folder)]).source
    (first,) = kept(folder)
    assert first == engine.model_key(network, SHAPE)
    engine.compile_network(network, [3, 40, 40], folders=[str(folder)])
    assert len(kept(folder)) == 2 and first in kept(folder)  # another size, the same weights

    no_trace()
    run_engine = engine.compile_network(make_network(), SHAPE, folders=[str(folder)])
    assert run_engine.source == f"as kept in {folder}"
    assert_same(run_engine(pictures(5)), eager(network, pictures(5)))
    with pytest.raises(RuntimeError, match="tracing failed"):
        engine.compile_network(make_network(seed=1), SHAPE, folders=[str(folder)])


def test_models_of_other_weights_are_deleted_and_of_these_a_few_kept(network, tmp_path):
    engine.compile_network(make_network(seed=1), SHAPE, folders=[str(tmp_path)])
    for side in range(32, 32 + engine.KEPT + 2):
        engine.compile_network(network, [3, side, side], folders=[str(tmp_path)])
    newest = [engine.model_key(network, [3, side, side]) for side in range(34, 32 + engine.KEPT + 2)]
    assert kept(tmp_path) == sorted(newest)


def test_the_key_changes_with_all_that_the_model_depends_on(network, monkeypatch):
    key = engine.model_key(network, SHAPE)
    assert key == engine.model_key(make_network(), SHAPE)
    others = [engine.model_key(network, [3, 32, 40]), engine.model_key(make_network(pooling="max"), SHAPE)]
    with paddle.no_grad():
        network.shift.set_value(network.shift + 0.1)
    others.append(engine.model_key(network, SHAPE))
    others.append(engine.model_key(make_network(seed=1), SHAPE))
    network = make_network()
    monkeypatch.setattr(paddle, "__version__", "0")
    others.append(engine.model_key(network, SHAPE))
    assert len({key, *others}) == 6


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "no sums", "other weights"])
def test_a_damaged_model_is_made_again(network, tmp_path, damage):
    engine.compile_network(network, SHAPE, folders=[str(tmp_path)])
    (key,) = kept(tmp_path)
    file = tmp_path / key / "model.pdiparams"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:1000])
    elif damage == "changed":
        data[len(data) // 2] ^= 64
        file.write_bytes(data)
    elif damage == "gone":
        file.unlink()
    elif damage == "no sums":
        (tmp_path / key / engine.SUMS).write_text("[")
    else:  # whole, but not this network's: what only trying it out shows
        engine.compile_network(make_network(seed=1), SHAPE, folders=[str(tmp_path / "x")])
        shutil.rmtree(tmp_path / key)
        os.rename(tmp_path / "x" / kept(tmp_path / "x")[0], tmp_path / key)
        shutil.rmtree(tmp_path / "x")
    run_engine = engine.compile_network(network, SHAPE, folders=[str(tmp_path)])
    assert "compiled" in run_engine.source
    assert_same(run_engine(pictures(3)), eager(network, pictures(3)))
    assert kept(tmp_path) == [key]
    assert engine.compile_network(network, SHAPE, folders=[str(tmp_path)]).source == f"as kept in {tmp_path}"


def test_folders_that_cannot_be_written(network, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    bad, good = str(tmp_path / "file" / "w.inference"), str(tmp_path / "good")
    assert engine.compile_network(network, SHAPE, folders=[bad, good]).source == f"compiled and kept in {good}"
    assert engine.compile_network(network, SHAPE, folders=[bad]).source == "compiled"
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    full = tmp_path / "full"
    assert engine.compile_network(network, SHAPE, folders=[str(full)]).source == "compiled" and kept(full) == []


def test_two_processes_that_write_at_once(network, tmp_path, monkeypatch):
    write = engine._write_sums

    def write_and_be_second(folder):
        write(folder)
        shutil.copytree(folder, tmp_path / engine.model_key(network, SHAPE))

    monkeypatch.setattr(engine, "_write_sums", write_and_be_second)
    engine.compile_network(network, SHAPE, folders=[str(tmp_path)])
    assert kept(tmp_path) == [engine.model_key(network, SHAPE)]


def test_short_lists_and_eager_run_the_network_itself(network):
    enough = engine.MIN_PIXELS // 32**2
    assert engine.prepare(network, EngineOptions(), SHAPE, enough - 1) is network
    assert engine.prepare(network, EngineOptions(engine="eager"), SHAPE, enough) is network
    assert engine.prepare(network, EngineOptions(), SHAPE, enough) is not network
    assert engine.prepare(network, EngineOptions(engine="inference"), SHAPE, 1) is not network
    with pytest.raises(UserError, match="leave out --engine=eager"):
        engine.prepare(network, EngineOptions(engine="eager", precision="bf16"), SHAPE, 1)


def test_one_warning_where_the_engine_cannot_be_used(network, no_trace, capsys):
    no_trace()
    assert engine.prepare(network, EngineOptions(engine="inference"), SHAPE, 1) is network
    assert capsys.readouterr() == ("", "warning: running without the inference engine, slower: tracing failed\n")


def test_bf16_on_a_cpu_without_it(network, monkeypatch, capsys):
    monkeypatch.setattr(process, "cpu_flags", lambda: {"avx2"})
    assert engine.prepare(network, EngineOptions(precision="bf16"), SHAPE, 1) is network
    note = "note: --precision=bf16, but this CPU has no instructions for it: running in float32\n"
    assert capsys.readouterr().err == note


def test_models_are_kept_in_the_cache_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEP_METRIC_LEARNING_CACHE", str(tmp_path / "cache"))
    checkpoint = tmp_path / "run" / "7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.pdparams").write_bytes(b"")
    (tmp_path / "run" / "best").symlink_to("7")
    (folder,) = engine.model_folders(str(tmp_path / "run" / "best" / "model.pdparams"))
    assert os.path.dirname(folder) == str(tmp_path / "cache" / "inference")
    assert engine.model_folders("") == []


def test_what_is_not_ours_in_the_cache_stays(network, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    engine.compile_network(network, SHAPE, folders=[str(tmp_path)])
    assert kept(tmp_path) == sorted(["thesis", engine.model_key(network, SHAPE)])


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("weights") / "small.pdparams")
    network = make_network(pooling="max")
    paddle.save({name: value.numpy() for name, value in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def features(birds, weights_file, tmp_path_factory):
    """What infer.py writes without the engine, and its lines."""
    path = str(tmp_path_factory.mktemp("features") / "f.npz")
    result = run("infer.py", *SMALL, *birds.lists, f"--pretrained_model={weights_file}", "--pooling=max",
                 f"--feature_file={path}", "--engine=eager")  # fmt: skip
    assert not os.path.exists(f"{weights_file}.inference")
    return np.load(path)["features"], re.findall("^Test-.*", result.stdout, re.MULTILINE)


def test_scripts_give_the_same_through_the_engine(birds, weights_file, features, tmp_path):
    common = [*SMALL, *birds.lists, f"--pretrained_model={weights_file}", "--pooling=max", "--engine=inference"]
    result = run("infer.py", *common, f"--feature_file={tmp_path}/f.npz", "--batch_size=7")
    found = np.load(tmp_path / "f.npz")["features"]
    assert np.linalg.norm(found - features[0]) < 1e-4 * np.linalg.norm(features[0])
    classes = [re.findall(r"class \[.*", line) for line in features[1]]
    assert [re.findall(r"class \[.*", line) for line in re.findall("^Test-.*", result.stdout, re.MULTILINE)] == classes
    assert result.stderr == ""  # nothing of what Paddle says of passes and executors
    line = r"^inference engine: float32, \d+ threads, compiled and kept in .*inference.[0-9a-f]+, [\d.]+ sec$"
    assert re.search(line, result.stdout, re.MULTILINE)
    outputs = [tmp_path / name for name in ("inference.json", "eager.json")]
    result = run("eval.py", *common, f"--output_json={outputs[0]}")
    assert "as kept in" in result.stdout and result.stderr == "" and "---" not in result.stdout.split("------\n")[-1]
    run("eval.py", *common, "--engine=eager", f"--output_json={outputs[1]}")
    figures = [json.loads(path.read_text()) for path in outputs]
    assert figures[0]["recall@1"] == figures[1]["recall@1"] and figures[0]["MAP@R"] == figures[1]["MAP@R"]
