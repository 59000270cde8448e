"""Bad and odd pictures in the scripts."""

import os
import re

import numpy as np
import pytest
from conftest import read_rows, run
from PIL import Image
from test_faults import start

import infer
import reader


def faulty_pictures(folder):
    """Writes pictures of every bad and odd kind; -> ({name: reason} of the bad ones, names of the odd but good)."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    half = (folder / "whole.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(half[: len(half) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"no picture")
    (folder / "folder.jpg").mkdir()
    Image.new("1", (15000, 15000)).save(folder / "bomb.png")
    Image.fromarray(noise[:1, :1]).save(folder / "dot.png")
    Image.new("RGB", (1, 30000), (200, 30, 30)).save(folder / "tall.png")
    Image.new("RGB", (30000, 1), (200, 30, 30)).save(folder / "wide.jpg")
    return {
        "half.jpg": "truncated",
        "empty.jpg": "an empty file",
        "text.jpg": "not an image",
        "folder.jpg": "Is a directory",
        "absent.jpg": "No such file",
        "bomb.png": "15000 x 15000 pixels, more than --max_pixels=67108864",
    }, ["dot.png", "tall.png", "wide.jpg"]


def test_bad_pictures_cost_warnings_and_never_the_run(birds, tmp_path):
    bad, odd = faulty_pictures(tmp_path)
    rows = read_rows(birds.train_list)
    rows += [f"{tmp_path}/{name} {label}" for label, name in enumerate([*bad, *odd], 1)]  # some in a class of their own
    (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
    flags = [f"--data_dir={birds.root}", f"--train_list={tmp_path}/list.txt", f"--val_list={tmp_path}/list.txt"]
    flags += ["--on_bad_image=skip", "--num_epochs=2"]
    process = start(birds, tmp_path / "out", *flags)
    out, err = process.communicate()
    assert process.returncode == 0, err
    warnings = re.findall(
        r"^warning: skipped (\d+) bad images; the first: .*list\.txt:\d+: \S+: .+$", err, re.MULTILINE
    )
    assert len(warnings) == 4 and [int(count) for count in warnings[1::2]] == [len(bad)] * 2  # training and evaluation
    assert out.count("trainbatch") == 2 * (len(rows) // 8)
    assert "recall@8 " in out and f"{len(rows) - len(bad)} images of" in out
    assert "recall@1" in out


@pytest.mark.parametrize("name", ["half.jpg", "empty.jpg", "text.jpg", "folder.jpg", "absent.jpg", "bomb.png"])
def test_each_bad_picture_is_named_with_its_line(birds, trained, tmp_path, name):
    reason = faulty_pictures(tmp_path)[0][name]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/whole.jpg 1\n{tmp_path}/{name} 1\n")
    best = f"--pretrained_model={trained}/ResNet8/best"
    err = run("eval.py", best, f"--val_list={tmp_path}/list.txt", "--use_gpu=False", status=2).stderr
    assert err.startswith(f"error: {tmp_path}/list.txt:2: {tmp_path}/{name}: ") and err.count("\n") == 1
    assert (reason if os.path.isfile(tmp_path / name) else "no such image") in err


def test_odd_pictures_are_pictures(birds, trained, tmp_path):
    _, odd = faulty_pictures(tmp_path)
    best = f"--pretrained_model={trained}/ResNet8/best"
    for transform in ("resize", "center_crop"):
        flags = ["--input", *(f"{tmp_path}/{name}" for name in odd), f"--feature_file={tmp_path}/f.npz"]
        run("infer.py", best, *flags, f"--test_transform={transform}", "--use_gpu=False")
        assert np.isfinite(np.load(tmp_path / "f.npz")["features"]).all()
    rows = [f"{tmp_path}/{name} {label}" for name in odd for label in (1, 2, 3, 4)]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    process = start(birds, tmp_path / "out", f"--train_list={tmp_path}/list.txt", "--num_epochs=1", "--eval_every=0")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "list.txt:2: " in err and "is on line 1 with another label, too (9 such lines)" in err


def test_a_name_forges_no_line(capsys):
    names = ["a\nTest-9-score: [1.000000], class [1], b.jpg", "\x1b[31mred.jpg"]
    infer.Scores(reader.Samples(names, None, None, None), None).show([0, 1], np.ones((2, 1), np.float32))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.isprintable() for line in lines)


def test_max_pixels(trained, tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.jpg")
    flags = [f"--pretrained_model={trained}/ResNet8/best", "--use_gpu=False", "--input", f"{tmp_path}/a.jpg"]
    run("infer.py", *flags, "--max_pixels=8000")
    err = run("infer.py", *flags, "--max_pixels=7999", status=2).stderr
    assert f"{tmp_path}/a.jpg: 100 x 80 pixels, more than --max_pixels=7999" in err
