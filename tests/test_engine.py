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
from models.refined import Refined
from retrieval import engine
from retrieval.engine import EngineOptions
from runtime import process
from utility import UserError

SHAPE = [3, 32, 32]
needs_bf16 = pytest.mark.skipif(bool(engine.no_bf16()), reason="this CPU has no bf16 instructions")


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


@pytest.fixture
def loaded(monkeypatch):
    """The folders that engine.load is called with."""
    load, folders = engine.load, []
    monkeypatch.setattr(engine, "load", lambda folder, precision: folders.append(folder) or load(folder, precision))
    return folders


def test_parameters_that_are_not_the_networks_are_not_parsed(network, tmp_path, loaded):
    """Also where the sums fit."""
    engine.compile_network(network, SHAPE, folders=[str(tmp_path)])
    folder = tmp_path / kept(tmp_path)[0]
    file = folder / "model.pdiparams"
    data = file.read_bytes()
    damaged = [data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in (0, 4, 12, 16, 20, 22, 40)]
    damaged += [data + bytes(20), data + b"x", data[:-1], data[24 + 16 * 4 :], b""]
    for content in [*damaged, damaged[1]]:
        file.write_bytes(content)
        with pytest.raises((ValueError, LookupError)):
            engine._check_parameters(str(folder), network)
    engine._write_sums(folder)
    loaded.clear()
    assert "compiled" in engine.compile_network(network, SHAPE, folders=[str(tmp_path)]).source
    assert str(folder) not in loaded and file.read_bytes() == data


def test_the_parameters_of_a_refined_network_are_its_own(tmp_path):
    network = models.build_model("ResNet8", 5, "gem", 8, head="cosine")
    network = Refined(network, True, (0.7, 1.0), True, (np.zeros(16), np.eye(16)))
    network.eval()
    with engine.silence():
        engine.trace(network, str(tmp_path), SHAPE)
    engine._check_parameters(str(tmp_path), network)


def test_a_program_that_came_from_elsewhere_is_not_parsed(network, tmp_path, loaded):
    """Also where it has a sum that fits."""
    engine.compile_network(network, SHAPE, folders=[str(tmp_path)])
    folder = tmp_path / kept(tmp_path)[0]
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    os.rename(tmp_path / "copy", folder)
    loaded.clear()
    assert "compiled" in engine.compile_network(network, SHAPE, folders=[str(tmp_path)]).source
    assert str(folder) not in loaded


@pytest.mark.parametrize(
    "content",
    [
        "",
        "0",
        "null",
        "NaN",
        '"a"',
        "{}",
        "[]",
        "[[], {}]",
        '{"model.json": {}}',
        "1" * 5000,
        "[" * 100000,
        b"\xff\xfe",
    ],
    ids=lambda content: repr(content[:9]),
)
def test_sums_of_any_content(tmp_path, content):
    for name in ("model.json", "model.pdiparams"):
        (tmp_path / name).write_text("x")
    engine._write_sums(tmp_path)
    engine._check_sums(tmp_path)
    (tmp_path / engine.SUMS).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, OSError)):
        engine._check_sums(tmp_path)


def test_a_model_that_has_ended_a_run_is_not_read_again(network, tmp_path, monkeypatch, loaded, capsys):
    compile_network = lambda: engine.compile_network(network, SHAPE, folders=[str(tmp_path)]).source  # noqa: E731
    compile_network()
    folder = tmp_path / kept(tmp_path)[0]
    with monkeypatch.context() as patch:

        def end(*args):
            raise KeyboardInterrupt

        patch.setattr(engine, "load", end)  # a crash leaves the same: nothing comes after it
        with pytest.raises(KeyboardInterrupt):
            compile_network()
    loaded.clear()
    assert "compiled" in compile_network() and str(folder) not in loaded
    note = "note: an earlier run ended while it read a kept model of the engine: made anew\n"
    assert capsys.readouterr() == ("", note)
    assert "as kept" in compile_network() and not (folder / engine.MARK).exists()


def test_a_model_that_another_process_is_reading_is_read(network, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    engine.compile_network(network, SHAPE, folders=[str(tmp_path)])
    mark = tmp_path / kept(tmp_path)[0] / engine.MARK
    with open(mark, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("x")
        file.flush()
        assert "as kept" in engine.compile_network(network, SHAPE, folders=[str(tmp_path)]).source
        assert mark.exists() and capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="folders there have no modes")
@pytest.mark.parametrize("what", ["folder", "around", "link", "link around", "another user"])
def test_only_this_users_own_folders_are_used(network, tmp_path, monkeypatch, loaded, what):
    folder = tmp_path / "cache" / "inference" / "0"
    compile_network = lambda: engine.compile_network(network, SHAPE, folders=[str(folder)]).source  # noqa: E731
    assert compile_network() == f"compiled and kept in {folder}"
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    if what == "another user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    elif "link" in what:
        link = folder if what == "link" else folder.parent
        os.rename(link, tmp_path / "elsewhere")
        link.symlink_to(tmp_path / "elsewhere")
    else:
        (folder if what == "folder" else folder.parent).chmod(0o770)
    before = kept(folder)
    assert compile_network() == "compiled" and kept(folder) == before
    assert not any(str(tmp_path) in path for path in loaded[1:])


def test_weights_that_nobody_may_write_beside_and_a_cache_that_cannot_be(network, tmp_path, monkeypatch, capsys):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "w.pdparams").write_bytes(b"")
    shared.chmod(0o555)
    prepare = lambda: engine.prepare(network, EngineOptions("inference"), SHAPE, 1, str(shared / "w.pdparams"))  # noqa: E731
    for cache, words in ("good", "compiled and kept in"), ("good", "as kept in"), ("file/cache", "compiled, "):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DEEP_METRIC_LEARNING_CACHE", str(tmp_path / cache))
        assert prepare() is not network
        out, err = capsys.readouterr()
        assert words in out and err == ""
    shared.chmod(0o755)
    assert kept(shared) == ["w.pdparams"]


def doctored(monkeypatch, change):
    """Has a loaded model's outputs for all but the trial of two pictures be what `change(pictures, outputs)` gives."""
    load = engine.load

    def load_doctored(*args):
        right = load(*args)
        wrong = lambda images: right(images) if len(images) == 2 else change(images, right(images))  # noqa: E731
        wrong.threads = 1
        return wrong

    monkeypatch.setattr(engine, "load", load_doctored)


def fail(*args):
    raise RuntimeError("no memory")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda images, outputs: [np.ones_like(output) for output in outputs], "its outputs are off by"),
        (lambda images, outputs: [output * np.nan for output in outputs], "its outputs are off by nan"),
        (lambda images, outputs: [outputs[0], None], "it has other outputs"),
        (lambda images, outputs: [np.concatenate([x, x]) for x in outputs], "it has other outputs"),
        (fail, "no memory"),
    ],
)
def test_a_model_that_is_right_on_trial_alone(network, tmp_path, monkeypatch, capsys, change, why):
    monkeypatch.setenv("DEEP_METRIC_LEARNING_CACHE", str(tmp_path))
    prepare = lambda: engine.prepare(network, EngineOptions("inference"), SHAPE, 1, "w")  # noqa: E731
    prepare()
    doctored(monkeypatch, change)
    run_engine = prepare()
    assert "as kept in" in capsys.readouterr().out
    for seed in (1, 2):
        images = pictures(5, seed=seed)
        assert all(np.array_equal(a, b) for a, b in zip(run_engine(images), eager(network, images)))
    err = capsys.readouterr().err
    assert err.startswith(f"warning: running without the inference engine, slower: {why}") and err.count("\n") == 1
    assert kept(tmp_path / "inference" / os.path.basename(engine.model_folders("w")[0])) == []


def test_a_model_that_fails_or_is_wrong_later(network, monkeypatch, capsys):
    prepare = lambda: engine.prepare(network, EngineOptions("inference"), SHAPE, 1)  # noqa: E731
    with monkeypatch.context() as patch:
        doctored(patch, lambda images, outputs: outputs if len(images) == 5 else fail())
        run_engine = prepare()
        for count in (5, 4, 5):  # what gave nothing leaves what came before right
            assert_same(run_engine(pictures(count)), eager(network, pictures(count)))
    assert capsys.readouterr().err == "warning: running without the inference engine, slower: no memory\n"

    monkeypatch.setattr(engine, "SHARE", 1)
    doctored(monkeypatch, lambda images, outputs: (outputs[0] * (1 + (len(images) == 4) / 100), outputs[1]))
    run_engine = prepare()
    for _ in range(3):
        run_engine(pictures(5))
    with pytest.raises(UserError, match=r"right at first, but now its outputs are off by 0\.01: give --engine=eager"):
        run_engine(pictures(4))


def test_one_wrong_picture_among_many_and_pictures_that_nobody_knows(network, monkeypatch):
    wanted = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32), None
    found = wanted[0].copy(), None
    assert engine.difference(wanted, found, "float32") == ""
    found[0][7] *= 1.0005
    assert engine.difference(wanted, found, "float32") == "its outputs are off by 0.0005"

    seen = []
    for _ in range(2):
        engine.check(lambda images: seen.append(images) or eager(network, images), network, [3, 37, 45], "float32")
    assert seen[0].shape == (2, 37, 45, 3) and not any(np.array_equal(a, b) for a, b in zip(*seen))


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
