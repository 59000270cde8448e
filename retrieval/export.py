"""A network as a model of Paddle Inference, with a script that runs it, which need nothing of this project."""

import contextlib
import json
import os
import re
import shutil

import numpy as np

import files
from retrieval import engine, exported_run
from retrieval.exported_run import DESCRIPTION
from runtime import gpu, process
from utility import UserError

# The script that runs an exported model, and what it imports of ours, by their names beside it: copies, byte for byte.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SCRIPTS = {
    "run.py": exported_run.__file__,
    **{name: os.path.join(_ROOT, name) for name in ("transforms.py", "jpeg.py", "files.py", "utility.py")},
}

_README = """# {model}: pictures -> embedding

Written by infer.py --export_dir: a model of Paddle Inference, `{program}` and `{parameters}`, by paddlepaddle {paddle}.
Its script needs this folder, Python 3.9 or later, and

```
pip install paddlepaddle=={paddle} "pillow>=11.3" {packages}
python run.py a.jpg b.png                            # a line a picture: its path, a tab, and {size} numbers
python run.py a.jpg b.png --output=embeddings.npz    # features float32 [N, {size}], and paths
```

For programs of your own, without the .py files:

Input `{input}`: uint8 [N, {height}, {width}, 3], any N, RGB, rows from the top. Mean and deviation are in the model.
Pictures are to be prepared as in training: {transform}.
Output `{output}`: float32 [N, {size}], each row of length 1{refined}; the dot product of two rows is their
cosine similarity.

```python
import numpy as np
from paddle import inference

predictor = inference.create_predictor(inference.Config("{program}", "{parameters}"))
image = predictor.get_input_handle(predictor.get_input_names()[0])
pictures = np.zeros((1, {height}, {width}, 3), np.uint8)
image.reshape(pictures.shape)
image.copy_from_cpu(pictures)
predictor.run()
embedding = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
```

For ONNX Runtime, with paddle2onnx:

```
paddle2onnx --model_dir . --model_filename {program} --params_filename {parameters} --save_file model.onnx
```
"""

# What goes with paddlepaddle 2.x and later, as in requirements-2.6.txt and requirements.txt.
_PACKAGES = {
    "model.pdmodel": 'setuptools "numpy<2" opencv-python-headless==4.11.0.86',
    "model.json": 'numpy "opencv-python-headless>=4.11"',
}

_TRANSFORMS = {
    "center_crop": "the short side resized to 256/224 of the crop's, then the centre of {width} x {height} cut out",
    "resize": "the whole picture resized to {width} x {height}, its aspect ratio not kept",
}


def check_export_folder(folder):
    """Raises a UserError where `export` could not write to `folder`: one that exists must be empty or an export."""
    folder = os.path.realpath(folder)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--export_dir={folder}: a file, not a folder")
    if os.path.isdir(folder) and not _is_export(folder):
        raise UserError(f"--export_dir={folder}: holds other files; give a new folder")
    files.make_directory(os.path.dirname(folder))


def _is_export(folder):
    """Whether all that `folder` holds is what `export` writes, so that it may be replaced; also where it is empty."""
    if not os.listdir(folder):
        return True
    try:
        description = files.read_json(os.path.join(folder, DESCRIPTION))
        ours = isinstance(description["transform"]["meaning"], str) and isinstance(description["paddle"], str)
        return ours and not files.foreign_entry(folder, _EXPORTED) and not _changed_scripts(folder, description)
    except (OSError, ValueError, KeyError, TypeError):
        return False


# Older exports have no scripts.
_EXPORTED = re.compile(
    r"model\.(json|pdmodel|pdiparams)|description\.json|README\.md|" + "|".join(map(re.escape, _SCRIPTS))
)


def _changed_scripts(folder, description):
    """Names of the scripts in an exported folder that are others than `export` has put there: somebody's own work."""
    there = [name for name in _SCRIPTS if os.path.exists(os.path.join(folder, name))]
    return [name for name in there if description["sums"][name] != files.sha256(os.path.join(folder, name))]


def export(network, settings, folder, labels=None, refined="", chosen_on=None, made_by=None):
    """Writes a model that needs nothing of this project, all of it or nothing; one that was there is replaced.

    Args:
        network: an EmbeddingNet, or what refine.refined made of one.
        settings: its models.Settings.
        labels: the labels of the classes it was trained on, or None.
        refined: in words, what it does beyond the network; "" for nothing.
        chosen_on: see extraction.list_that_chose.
        made_by: see features.made_by.

    Raises: UserError where it can't be traced or written, or where its outputs are not the network's.
    """
    folder = os.path.realpath(folder)
    network.eval()
    try:
        with files.temporary_folder(folder) as temporary, _on_cpu(network):
            with engine.silence():
                engine.trace(network, temporary, settings.image_shape, normalise=True)
                _write_something(temporary)
                run = engine.load(temporary, "float32")
                engine.check(run, _normalised(network), settings.image_shape, "float32")
            _describe(temporary, run, settings, labels, refined, chosen_on, made_by)
            if os.path.isdir(folder):
                check_export_folder(folder)  # again: minutes may have passed
            files.replace_folder(temporary, folder)
        files.sync_directory(os.path.dirname(folder))
    except UserError:
        raise
    except Exception as error:  # Paddle's have many types
        raise UserError(f"--export_dir={folder}: nothing written: {gpu.first_line(error)}") from None


def _write_something(folder):
    """Raises an OSError where the disk is full: Paddle writes what fits, and says nothing."""
    path = os.path.join(folder, "probe")
    with open(path, "wb") as file:
        file.write(bytes(4096))
        file.flush()
        files.sync(file.fileno())
    os.remove(path)


def _describe(folder, run, settings, labels, refined, chosen_on, made_by):
    """Writes scripts, README.md and description.json beside an exported model, `run` being the function over it."""
    import paddle

    _, height, width = settings.image_shape
    embedding, _ = run(np.zeros((1, height, width, 3), np.uint8))
    transform = _TRANSFORMS[settings.test_transform].format(height=height, width=width)
    program = os.path.basename(engine.program_file(folder))
    for name, source in _SCRIPTS.items():
        shutil.copyfile(source, os.path.join(folder, name))
    description = {
        "model": settings.model,
        "pooling": settings.pooling,
        "refined": refined,
        "files": [program, exported_run.PARAMETERS],
        "input": {
            "name": run.names[0],
            "dtype": "uint8",
            "shape": ["N", height, width, 3],
            "colours": "RGB",
            "normalisation": "in the model",
        },
        "transform": {"name": settings.test_transform, "meaning": transform},
        "output": {
            "name": run.names[1],
            "dtype": "float32",
            "shape": ["N", embedding.shape[1]],
            "normalisation": "L2",
        },
        "trained_labels": None if labels is None else [int(label) for label in labels],
        "chosen_on": chosen_on,
        "made_by": made_by,
        "paddle": paddle.__version__,
        "sums": {name: files.sha256(os.path.join(folder, name)) for name in sorted(os.listdir(folder))},
    }
    readme = _README.format(
        model=settings.model, paddle=paddle.__version__, program=program, parameters=exported_run.PARAMETERS,
        height=height, width=width, packages=_PACKAGES[program],
        input=run.names[0], output=run.names[1], size=embedding.shape[1], transform=transform,
        refined=f" ({refined}, which is in the model)" if refined else "",
    )  # fmt: skip
    with files.atomic_write(os.path.join(folder, "README.md")) as file:
        file.write(readme)
    with files.atomic_write(os.path.join(folder, DESCRIPTION)) as file:
        json.dump(description, file, indent=1)


@contextlib.contextmanager
def _on_cpu(network):
    """Has the network on the CPU for a while: a GPU's products are in TF32, and off by more than TOLERANCE."""
    import paddle

    if not process.on_gpu():
        yield
        return
    device = paddle.get_device()
    try:
        paddle.set_device("cpu")
        network.to("cpu")
        yield
    finally:
        paddle.set_device(device)
        network.to(device)


def _normalised(network):
    from models.embedding_net import Unit

    unit = Unit(network)
    return lambda pictures: [unit(pictures)]
