"""The exported model: on its own, by its run.py, and measured; and networks opened from Python."""

import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL, run
from PIL import Image
from test_engine import SHAPE, eager, features, make_network, network, no_trace, pictures, weights_file  # noqa: F401

from models import Settings
from retrieval import export, exported_run, extraction
from utility import UserError

ALONE = """
import json, sys
import numpy as np
from paddle import inference

description = json.load(open("description.json"))
predictor = inference.create_predictor(inference.Config(*description["files"]))
image = predictor.get_input_handle(description["input"]["name"])
pictures = np.load(sys.argv[1])
image.reshape(pictures.shape)
image.copy_from_cpu(pictures)
predictor.run()
np.save(sys.argv[2], predictor.get_output_handle(description["output"]["name"]).copy_to_cpu())
assert not any(name in sys.modules for name in ("models", "utility", "reader", "engine"))
"""

SCRIPTS = ["run.py", "transforms.py", "jpeg.py", "files.py", "utility.py"]


def test_an_exported_model_runs_on_its_own(weights_file, features, birds, tmp_path):
    folder = tmp_path / "new" / "exported"
    result = run("infer.py", *SMALL, f"--pretrained_model={weights_file}", "--pooling=max", "--test_transform=resize",
                 f"--export_dir={folder}")  # fmt: skip
    assert result.stderr == "" and f"wrote the model to {folder}" in result.stdout and "Test-0" not in result.stdout
    description = json.loads((folder / "description.json").read_text())
    assert sorted(os.listdir(folder)) == sorted([*description["files"], "README.md", "description.json", *SCRIPTS])
    assert os.listdir(folder.parent) == ["exported"]
    requirements = "requirements-2.6.txt" if description["paddle"].startswith("2.6") else "requirements.txt"
    with open(os.path.join(ROOT, requirements)) as file:
        (opencv,) = re.findall(r"^opencv\S+", file.read(), re.MULTILINE)
    assert opencv in (folder / "README.md").read_text()
    assert description["input"]["shape"] == ["N", 32, 32, 3] and description["output"]["shape"] == ["N", 64]
    assert description["transform"]["name"] == "resize" and description["model"] == "ResNet8"

    np.save(tmp_path / "in.npy", pictures(5))
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(tmp_path / "alone.py"), str(tmp_path / "in.npy"), str(tmp_path / "out.npy")]
    subprocess.run(command, cwd=folder, check=True, env=environment, capture_output=True)
    found = np.load(tmp_path / "out.npy")
    wanted, _ = eager(make_network(pooling="max"), pictures(5))
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), rtol=1e-4, atol=1e-5)


def test_an_export_beside_features_and_over_an_older_one(weights_file, features, birds, tmp_path):
    for _ in range(2):
        run("infer.py", *SMALL, *birds.lists, f"--pretrained_model={weights_file}", "--pooling=max",
            f"--export_dir={tmp_path}/e/", f"--feature_file={tmp_path}/f.npz")  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "f.npz")["features"], features[0], rtol=1e-5, atol=1e-6)
    assert sorted(os.listdir(tmp_path)) == ["e", "f.npz"]


def test_an_export_is_whole_or_nothing(network, tmp_path, no_trace, capfd):
    settings = Settings(model="ResNet8", image_shape=SHAPE, pooling="avg", test_transform="resize")
    target = tmp_path / "e"
    target.mkdir()  # an empty folder is taken
    export.check_export_folder(str(target))
    export.export(network, settings, str(target), np.array([3, 5]), "whitened", "of a list")
    asked = dict.fromkeys(("model", "pooling", "image_shape", "test_transform"))
    opened = extraction.open_network(asked, str(target))
    assert opened.chosen_on == "of a list" and opened.refined == "whitened" and opened.settings.image_shape == SHAPE
    assert "exported model in" in capfd.readouterr().out
    assert json.loads((target / "description.json").read_text())["trained_labels"] == [3, 5]
    before = {name: (target / name).read_bytes() for name in os.listdir(target)}
    no_trace()
    with pytest.raises(UserError, match="nothing written: tracing failed"):
        export.export(network, settings, str(target))
    assert os.listdir(tmp_path) == ["e"] and before == {n: (target / n).read_bytes() for n in os.listdir(target)}
    assert capfd.readouterr() == ("", "")

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        export.check_export_folder(str(tmp_path / "own"))
    # A description alone does not make a folder ours, nor does an export with something beside it.
    (tmp_path / "own" / "description.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        export.check_export_folder(str(tmp_path / "own"))
    for content in ("[" * 100000, "[]", '{"transform": 0}', '{"transform": {"meaning": "x"}, "paddle": NaN}', "\xff"):
        (tmp_path / "own" / "thesis.tex").unlink(missing_ok=True)
        (tmp_path / "own" / "description.json").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match="holds other files"):
            export.check_export_folder(str(tmp_path / "own"))
    (tmp_path / "own" / "thesis.tex").write_text("")
    (target / "notes.txt").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        export.check_export_folder(str(target))
    (target / "notes.txt").unlink()
    # Nor one whose scripts are somebody's work; one of before has none, and no sums.
    with open(target / "run.py", "a") as file:
        file.write("print('mine')")
    with pytest.raises(UserError, match="holds other files"):
        export.check_export_folder(str(target))
    description = json.loads((target / "description.json").read_text())
    del description["sums"]
    (target / "description.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="holds other files"):
        export.check_export_folder(str(target))
    for name in SCRIPTS:
        (target / name).unlink()
    export.check_export_folder(str(target))
    with pytest.raises(UserError, match="a file, not a folder"):
        export.check_export_folder(str(tmp_path / "own" / "thesis.tex"))


def test_a_full_disk_is_called_that(network, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export.os, "fsync", full)
    with pytest.raises(UserError, match=r"nothing written: .*No space left on device"):
        export.export(network, Settings("ResNet8", image_shape=SHAPE), str(tmp_path / "e"))
    assert os.listdir(tmp_path) == []


def test_an_exported_model_in_onnx_runtime(tmp_path):
    pytest.importorskip("paddle2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    network = make_network(pooling="avg+max", embedding_size=16)
    settings = Settings(model="ResNet8", image_shape=SHAPE, pooling="avg+max", test_transform="resize")
    export.export(network, settings, str(tmp_path / "e"))
    program, parameters = json.loads((tmp_path / "e" / "description.json").read_text())["files"]
    command = [sys.executable, "-m", "paddle2onnx.command", f"--model_dir={tmp_path}/e", f"--model_filename={program}"]
    command += [f"--params_filename={parameters}", f"--save_file={tmp_path}/model.onnx"]
    subprocess.run(command, check=True, capture_output=True)
    session = onnxruntime.InferenceSession(f"{tmp_path}/model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: pictures(5)})
    wanted, _ = eager(network, pictures(5))
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- run.py


def odd_pictures(folder):
    """Writes pictures in modes and shapes that decoders treat in ways of their own; -> their paths."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    picture = Image.fromarray(noise).resize((140, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "plain.jpg": (picture, {}),
        "grey.jpg": (picture.convert("L"), {}),
        "palette.png": (picture.quantize(16), {}),
        "alpha.png": (Image.merge("RGBA", (*picture.split(), picture.getchannel(0))), {}),
        "turned.jpg": (picture, {"exif": exif}),
        "ink.jpg": (picture.convert("CMYK"), {}),
        "deep.png": (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {}),
        "dot.png": (picture.crop((0, 0, 1, 1)), {}),
        "wide.png": (picture.resize((5000, 3)), {}),
        "progressive.jpg": (picture, {"progressive": True}),
        "picture.webp": (picture, {}),
        "a name with\ttab.png": (picture, {}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    return [str(folder / name) for name in images]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A folder with the export of a checkpoint in e/, odd pictures, and what infer.py makes of them in features.npz."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "odd").mkdir()
    inputs = odd_pictures(folder / "odd")
    run("infer.py", f"--pretrained_model={trained}/ResNet8/best", *VIEW, f"--export_dir={folder}/e",
        f"--feature_file={folder}/features.npz", "--input", *inputs)  # fmt: skip
    return folder


# Not square: height and width must not be taken for each other.
VIEW = ["--image_shape=3,32,48", "--flip=True", "--use_gpu=False"]


@pytest.fixture
def copied(exported, tmp_path):
    """An export of its own, to be damaged."""
    shutil.copytree(exported / "e", tmp_path / "e")
    return tmp_path / "e"


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def run_alone(folder, *arguments, status=0):
    """Runs run.py where nothing of the project can be imported, and checks that nothing was; -> its outputs."""
    code = (
        "import atexit, runpy, sys\n"
        "files = lambda: [str(getattr(module, '__file__', '')) for module in list(sys.modules.values())]\n"
        "atexit.register(lambda: print(*files(), sep='\\n', file=open('imported.txt', 'w')))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-I", "-c", code, f"{folder}/run.py", *map(str, arguments)]
    elsewhere = folder.parent
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
    imported = (elsewhere / "imported.txt").read_text().splitlines()
    ours = [os.path.relpath(path, ROOT) for path in imported if path.startswith(f"{ROOT}{os.sep}")]
    assert not [path for path in ours if not path.startswith(".venv")]
    assert {f"{folder}/{name}" for name in SCRIPTS if name != "run.py"} <= set(imported)
    return result


def test_the_exported_script_is_infer(exported):
    wanted = np.load(exported / "features.npz")
    before = sorted(os.listdir(exported / "e"))
    output = exported / "embeddings.npz"
    result = run_alone(exported / "e", *wanted["paths"], f"--output={output}", "--batch_size=5")
    assert result.stderr == ""
    assert result.stdout == f"wrote {len(wanted['paths'])} features of size 64 to {output}\n"
    found = np.load(output)
    assert found["features"].dtype == np.float32 and found["paths"].tolist() == wanted["paths"].tolist()
    np.testing.assert_allclose(found["features"], unit(wanted["features"]), atol=1e-4)
    assert len(np.unique(found["features"].round(3), axis=0)) > 8  # pictures that look different are

    lines = run_alone(exported / "e", *wanted["paths"]).stdout.splitlines()
    paths, rows = zip(*(line.split("\t") for line in lines))
    assert paths[:-1] == tuple(wanted["paths"][:-1]) and paths[-1].endswith("a name with\\ttab.png")
    np.testing.assert_allclose(np.array([row.split(" ") for row in rows], float), found["features"], atol=1e-6)
    assert sorted(os.listdir(exported / "e")) == before  # it may be written again
    for name in SCRIPTS[1:]:
        with open(os.path.join(ROOT, name), "rb") as file:
            assert (exported / "e" / name).read_bytes() == file.read()


def test_bad_pictures_of_the_exported_script(exported, tmp_path):
    good, bad, absent = exported / "odd" / "plain.jpg", tmp_path / "bad.jpg", tmp_path / "absent.jpg"
    bad.write_bytes(good.read_bytes()[:500])
    output = tmp_path / "o.npz"
    for flags, message in (
        ([bad], f"{bad}: a truncated JPEG (--on_bad_image=skip goes on without)"),
        ([absent], f"{absent}: No such file or directory (--on_bad_image=skip goes on without)"),
        ([tmp_path, absent, "--on_bad_image=skip"], "not one image could be read"),
        ([good, "--max_pixels=13999"], f"{good}: 140 x 100 pixels, more than --max_pixels=13999 (--on_bad_image"),
    ):
        result = run_alone(exported / "e", *flags, f"--output={output}", status=2)
        lines = result.stderr.splitlines()
        assert lines[-1].startswith(f"error: {message}") and len(lines) == 1 + ("skip" in str(flags[-1]))
        assert result.stdout == "" and not output.exists()
    result = run_alone(exported / "e", good, bad, tmp_path, good, "--on_bad_image=skip", "--batch_size=1")
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.startswith(f"warning: skipped 2 bad images; the first: {bad}: a trunc")
    (tmp_path / "thesis.npz").write_text("words")
    err = run_alone(exported / "e", good, f"--output={tmp_path}/thesis.npz", status=2).stderr
    assert err.startswith(f"error: {tmp_path}/thesis.npz: is there already") and err.count("\n") == 1


# ---------------------------------------------------------------- eval.py, infer.py


def test_an_export_is_measured(exported, trained, birds, tmp_path):
    out = {}
    for name, flags in {"network": VIEW, "export": ["--image_shape=3,32,48", "--use_gpu=False"]}.items():
        weights = {"network": f"{trained}/ResNet8/best", "export": exported / "e"}[name]
        flags = [*flags, f"--pretrained_model={weights}", f"--val_list={birds.val_list}"]
        result = run("eval.py", *flags, f"--output_json={tmp_path}/{name}.json")
        assert result.stderr == ""
        out[name] = result.stdout
    network, export = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("network", "export"))
    for figure in ("recall@1", "recall@8", "MAP@R", "R-precision", "queries", "dimension", "refined"):
        assert network[figure] == export[figure], figure
    assert "recall@1: " in out["export"] and "(flip)" in out["export"] and "loss" not in export
    assert f"opened the exported model in {exported}/e: ResNet8 (flip)" in out["export"]

    flags = [f"--pretrained_model={exported}/e", "--use_gpu=False"]
    wanted = np.load(exported / "features.npz")
    run("infer.py", *flags, "--input", *wanted["paths"], f"--feature_file={tmp_path}/f.npz")
    np.testing.assert_allclose(np.load(tmp_path / "f.npz")["features"], unit(wanted["features"]), atol=1e-4)
    err = run("eval.py", *flags, f"--val_list={birds.val_list}", "--flip=True", status=2).stderr
    assert err.startswith("error: --flip: ") and err.count("\n") == 1


def test_flags_that_an_export_can_not_heed(exported):
    heeded = {"model", "pooling", "pretrained_model", "whiten_size", "whiten_power", "save_whiten"}
    for script in ("eval", "infer"):
        parser = importlib.import_module(script).build_parser()
        groups = {group.title: group._group_actions for group in parser._action_groups}
        names = [a for t in ("model", "weights", "speed", "refined features") for a in groups[t]]
        assert {action.dest for action in names} - heeded <= set(extraction.NOT_EXPORTED)
        asked = {action.dest: action.default for action in parser._actions}
        extraction.open_network(asked, str(exported / "e"))
        for name in set(extraction.NOT_EXPORTED) & set(asked):
            with pytest.raises(UserError, match=f"^--{name}: .*leave this out"):
                extraction.open_network({**asked, name: "other"}, str(exported / "e"))
        for name, value in (("model", "ResNet50"), ("pooling", "max"), ("test_transform", "resize")):
            with pytest.raises(UserError, match=f"^--{name}={value}, but "):
                extraction.open_network({**asked, name: value}, str(exported / "e"))
        extraction.open_network({**asked, "model": "ResNet8", "image_shape": [3, 32, 48]}, str(exported / "e"))


HOSTILE = (None, True, -1, 0, 10**400, 1.5, "", "../../x", [], {}, [[]], ["N", 9, 9, 4], ["N", 10**6, 9, 3], {"a": 1})


def test_a_hostile_description(copied, tmp_path):
    whole = exported_run.read_description(str(copied))
    path = copied / "description.json"
    for name in whole:
        for value in HOSTILE:
            path.write_text(json.dumps({**whole, name: value}))
            if not is_refused(exported_run.read_description, str(copied)):
                is_refused(exported_run.open_model, str(copied), exported_run.read_description(str(copied)))
    for changes in (
        {"files": ["/dev/zero", "model.pdiparams"]},
        {"input": {**whole["input"], "shape": ["N", 32, True, 3]}},
        {"transform": {"name": "x"}},
        {"output": {"shape": ["N", "64"]}},
        {"sums": {"run.py": 1}},
    ):
        path.write_text(json.dumps({**whole, **changes}))
        assert is_refused(exported_run.read_description, str(copied))
    for content in (b"", b"[" * 100_000, b"[]", b"\xff\xfe", b'{"model": NaN}'):
        path.write_bytes(content)
        assert is_refused(exported_run.read_description, str(copied))
    # One that promises other outputs than the model has.
    path.write_text(json.dumps({**whole, "output": {"shape": ["N", 65]}}))
    with pytest.raises(UserError, match=r"64.*comes out of the model in place of one float32 \[1, 65\]"):
        exported_run.open_model(str(copied), exported_run.read_description(str(copied)))


def is_refused(call, *arguments):
    """Whether a call raises a UserError, which must be a short one."""
    try:
        call(*arguments)
    except UserError as error:
        assert len(str(error)) < 1000
        return True
    return False


def test_a_damaged_model(copied):
    description = exported_run.read_description(str(copied))
    for name in description["files"]:
        data = (copied / name).read_bytes()
        (copied / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=f"{name}: damaged or replaced"):
            exported_run.open_model(str(copied), description)
        with pytest.raises(UserError, match="cannot run it"):  # one of before, without sums
            exported_run.open_model(str(copied), {**description, "sums": None})
        (copied / name).unlink()
        with pytest.raises(UserError, match=f"{name}: cannot read this part"):
            exported_run.open_model(str(copied), description)
        os.mkfifo(copied / name)
        with pytest.raises(UserError, match=f"{name}: cannot read .*a pipe, not a file"):
            exported_run.open_model(str(copied), description)
        (copied / name).unlink()
        (copied / name).write_bytes(data)
    exported_run.open_model(str(copied), description)


def test_a_model_of_paddle_3_on_2(copied, monkeypatch):
    """Paddle 2.6 would die of a segmentation fault."""
    from paddle import inference

    description = exported_run.read_description(str(copied))
    monkeypatch.setattr(inference, "Config", object)
    (copied / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot run it \(written by [23][.0-9]+\): it needs version 3"):
        exported_run.open_model(str(copied), {**description, "files": ["model.json", "model.pdiparams"], "sums": None})


# ---------------------------------------------------------------- from Python


def test_the_documented_lines(exported, trained, tmp_path):
    with open(os.path.join(ROOT, "docs", "evaluation.md")) as file:
        section = file.read().split("\n## From Python\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 5
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "ResNet50").symlink_to(f"{trained}/ResNet8")
    names = dict(zip(re.findall(r'"(\w+\.jpg)"', block), ("turned.jpg", "ink.jpg")))
    assert len(names) == 2
    for name, source in names.items():
        shutil.copy(exported / "odd" / source, tmp_path / name)
    block += "import numpy\nnumpy.save('embedding.npy', embedding)\n"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", block]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    found = np.load(tmp_path / "embedding.npy")
    flags = [f"--pretrained_model={trained}/ResNet8/best", "--use_gpu=False", f"--feature_file={tmp_path}/f.npz"]
    run("infer.py", *flags, "--input", *(f"{tmp_path}/{name}" for name in names))
    wanted = unit(np.load(tmp_path / "f.npz")["features"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    printed = re.search(r"\[\[(.*)\]\s*\[(.*)\]\]", result.stdout)
    similarity = np.array([row.split() for row in printed.groups()], float)
    np.testing.assert_allclose(similarity, wanted @ wanted.T, atol=1e-4)


def test_an_embedder(exported, tmp_path):
    wanted = np.load(exported / "features.npz")
    embed = extraction.open_embedder(str(exported / "e"), use_gpu=False)
    paths = wanted["paths"].tolist()
    np.testing.assert_allclose(embed(paths, batch_size=5), unit(wanted["features"]), atol=1e-4)
    one = exported / "odd" / "plain.jpg"
    assert np.array_equal(embed(one), embed([str(one)])) and embed(str(one)).shape == (1, 64)
    with pytest.raises(UserError, match="no pictures"):
        embed([])
    for bad in (tmp_path, tmp_path / "absent.jpg"):
        with pytest.raises(UserError, match=f"^{re.escape(str(bad))}: (Is a directory|No such file)"):
            embed([one, bad, one])
    with pytest.raises(UserError, match="no weights there"):
        extraction.open_embedder(str(tmp_path), use_gpu=False)
