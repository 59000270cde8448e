"""The exported model, on its own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import SMALL, run
from test_engine import SHAPE, eager, features, make_network, network, no_trace, pictures, weights_file  # noqa: F401

from models import Settings
from retrieval import export
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


def test_an_exported_model_runs_on_its_own(weights_file, features, birds, tmp_path):
    folder = tmp_path / "new" / "exported"
    result = run("infer.py", *SMALL, f"--pretrained_model={weights_file}", "--pooling=max", "--test_transform=resize",
                 f"--export_dir={folder}")  # fmt: skip
    assert result.stderr == "" and f"wrote the model to {folder}" in result.stdout and "Test-0" not in result.stdout
    description = json.loads((folder / "description.json").read_text())
    assert sorted(os.listdir(folder)) == sorted([*description["files"], "README.md", "description.json"])
    assert os.listdir(folder.parent) == ["exported"]
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
    export.export(network, settings, str(target), np.array([3, 5]))
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
    with pytest.raises(UserError, match="a file, not a folder"):
        export.check_export_folder(str(tmp_path / "own" / "thesis.tex"))


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
