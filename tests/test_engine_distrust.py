"""What the inference engine makes of models that are damaged, foreign or wrong."""

import os
import shutil

import numpy as np
import pytest
from test_engine import SHAPE, assert_same, eager, kept, network, pictures  # noqa: F401

import models
from models.refined import Refined
from retrieval import engine
from retrieval.engine import EngineOptions
from utility import UserError


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
