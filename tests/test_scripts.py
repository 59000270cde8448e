"""The three scripts, run as a user runs them, on a small folder of drawn pictures."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, read_rows, run
from PIL import Image

import losses
from weights import read_pickle
from weights.checkpoint import PART_FILES

QUICK = [*TINY, "--num_epochs=1", "--log_every=10"]
LOG_LINE = re.compile(
    r"^Pass (\d+), trainbatch (\d+), lr [\d.e-]+, loss_metric [\d.]+, loss_cls [\d.]+, acc1 [\d.]+, acc5 [\d.]+, "
    r"time [\d.]+ sec",
    re.MULTILINE,
)


def train(birds, folder, *flags, status=0):
    return run("train.py", *birds.lists, f"--model_save_dir={folder}", *flags, status=status)


def test_train_writes_what_it_says(trained):
    folder, stdout = trained, (trained / "stdout.txt").read_text()
    lines = LOG_LINE.findall(stdout)
    assert [int(step) for _, step in lines] == [0, 2, 4, 5]  # every other of 6 steps, and the last
    run_dir = folder / "ResNet8"
    assert sorted(os.listdir(run_dir)) == ["0", "best", "latest", "train_log.jsonl"]
    assert os.readlink(run_dir / "latest") == os.readlink(run_dir / "best") == "0"
    records = [json.loads(line) for line in (run_dir / "train_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "step" in r] == [0, 2, 4, 5]
    assert [r["epoch"] for r in records if "eval" in r] == [-1, 0]
    assert all(0 <= r["data_wait"] <= 1 and r["img_per_sec"] > 0 for r in records if "step" in r)


def test_eval_and_infer_agree_with_brute_force_on_the_features(trained, birds, tmp_path):
    folder, stdout = trained, (trained / "stdout.txt").read_text()
    best = f"--pretrained_model={folder}/ResNet8/best"
    run("infer.py", *birds.lists, best, "--use_gpu=False", f"--feature_file={tmp_path}/f.npz")
    run("eval.py", *birds.lists, best, "--use_gpu=False", "--recall_at=1,3", f"--output_json={tmp_path}/e.json")
    saved = np.load(tmp_path / "f.npz")
    rows = [row.rsplit(" ", 1) for row in read_rows(birds.val_list)]
    assert [os.path.relpath(p, birds.root) for p in saved["paths"]] == [path for path, _ in rows]
    assert saved["labels"].tolist() == [int(label) for _, label in rows]
    assert saved["features"].dtype == np.float32 and saved["features"].shape == (len(rows), 64)

    unit = saved["features"].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    hits = {1: 0, 3: 0}
    for i, row in enumerate(unit @ unit.T):
        order = [j for j in np.argsort(-row, kind="stable") if j != i]
        for k in hits:
            hits[k] += any(saved["labels"][j] == saved["labels"][i] for j in order[:k])
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["recall@1"] == pytest.approx(hits[1] / len(rows))
    assert figures["recall@3"] == pytest.approx(hits[3] / len(rows))
    # The figure that train.py printed for this checkpoint is the same one.
    printed = float(re.search(r"^Pass 0, recall@1 ([\d.]+)", stdout, re.MULTILINE)[1])
    assert printed == pytest.approx(figures["recall@1"], abs=5e-5)


def test_infer_prints_the_originals_lines_with_the_classes_own_labels(trained, birds):
    folder = trained
    best = f"--pretrained_model={folder}/ResNet8/best"
    out = run("infer.py", *birds.lists, best, "--use_gpu=False", "--input", birds.train_list).stdout
    found = re.findall(r"^Test-(\d+)-score: \[(-?[\d.]+)\], class \[(\d+)\], (.*)$", out, re.MULTILINE)
    assert [int(n) for n, *_ in found] == list(range(48))
    assert {int(label) for _, _, label, _ in found} <= set(range(1, 7))  # labels of the list, not class indices 0..5
    assert all(os.path.exists(path) for *_, path in found)


def test_infer_takes_folders_images_and_lists_of_paths_for_every_batch_size(trained, birds, tmp_path):
    folder = trained
    common = [f"--pretrained_model={folder}/ResNet8/best", "--use_gpu=False"]
    run("infer.py", *common, "--input", f"{birds.root}/images", f"--feature_file={tmp_path}/a.npz", "--batch_size=7")
    folder_run = np.load(tmp_path / "a.npz")
    assert len(folder_run["paths"]) == 96
    folders = [os.path.basename(os.path.dirname(path)) for path in folder_run["paths"]]
    assert folder_run["labels"].tolist() == [int(folder[:3]) for folder in folders]  # NNN.Name
    some = [str(p) for p in folder_run["paths"][[5, 0, 50]]]
    run("infer.py", *common, "--input", *some, f"--feature_file={tmp_path}/b.npz", "--batch_size=1")
    single = np.load(tmp_path / "b.npz")
    assert single["paths"].tolist() == some
    np.testing.assert_allclose(single["features"], folder_run["features"][[5, 0, 50]], rtol=1e-4, atol=1e-5)
    (tmp_path / "paths.txt").write_text("\n".join(os.path.abspath(p) for p in some))
    run("infer.py", *common, "--input", f"{tmp_path}/paths.txt", f"--feature_file={tmp_path}/c.npz", "--batch_size=1")
    assert np.array_equal(np.load(tmp_path / "c.npz")["features"], single["features"])


def test_accuracy_of_the_head_is_that_of_inference_and_only_for_known_classes(trained, birds, tmp_path):
    folder = trained
    common = [*birds.lists, f"--pretrained_model={folder}/ResNet8/best", "--use_gpu=False"]
    out = run("eval.py", *common, f"--val_list={birds.train_list}", f"--output_json={tmp_path}/e.json").stdout
    assert re.search(r"^Testbatch 0,loss [\d.]+, acc1 [\d.]+,acc5 [\d.]+,time [\d.]+ sec$", out, re.MULTILINE)
    figures = json.loads((tmp_path / "e.json").read_text())
    lines = run("infer.py", *common, "--input", birds.train_list).stdout
    predicted = [int(label) for label in re.findall(r", class \[(\d+)\]", lines)]
    truth = [int(row.split()[-1]) for row in read_rows(birds.train_list)]
    assert figures["acc1"] == pytest.approx(np.mean(np.array(predicted) == truth))
    out = run("eval.py", *common).stdout
    assert "not applicable: 6 of the list's 6 classes are not among the head's" in out and "Testbatch" not in out


def log_without_times(folder):
    records = [json.loads(line) for line in (folder / "ResNet8" / "train_log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if k not in ("sec", "img_per_sec", "data_wait", "peak_memory")}
        for record in records
        if "epoch" in record
    ]


def test_same_seed_same_run_and_a_continued_run_is_the_uninterrupted_one(birds, tmp_path):
    """Two epochs at once, and two epochs with a new process in between, give the same log to the last digit."""
    flags = [*QUICK, "--optimizer=adamw", "--lr_strategy=constant", "--num_workers=3"]
    train(birds, tmp_path / "a", *flags, "--num_epochs=2")
    train(birds, tmp_path / "b", *flags, "--num_epochs=1", "--num_workers=1")
    train(birds, tmp_path / "b", *flags, "--num_epochs=2", "--checkpoint=latest")
    assert log_without_times(tmp_path / "a") == log_without_times(tmp_path / "b")
    assert len(log_without_times(tmp_path / "a")) == 2 * (2 + 1)
    weights = [(tmp_path / x / "ResNet8" / "1" / "model.pdparams").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "flags",
    [
        *(
            [f"--loss_name={name}"]
            for name in losses.LOSSES
            if name not in ("tripletloss", "quadrupletloss", "softmax")
        ),
        [
            "--loss_name=contrastiveloss",
            "--memory_size=30",
            "--head=cosine",
            "--embedding_norm=layer",
            "--last_stride=1",
        ],
        ["--loss_name=quadrupletloss", "--margin=0.2", "--pooling=avg+max"],
        ["--loss_name=softmax", "--label_smoothing=0.1", "--train_batch_size=7", "--optimizer=sgd"],
        ["--triplet_mining=semihard", "--pooling=max", "--freeze_bn=True", "--warmup_epochs=0.5"],
        ["--triplet_mining=hard", "--pooling=gem", "--with_mem_opt=True", "--optimizer=adam", "--lr=0.001"],
        ["--triplet_mining=distance", "--embedding_size=16", "--zero_init_residual=True", "--lr_strategy=cosine_decay"],
        ["--alpha=0", "--total_images=16", "--eval_every=0", "--class_dim=50", "--lr_epochs=0.5,2"],
    ],
    ids=lambda flags: " ".join(flags[:2])[2:],
)
def test_losses_and_options_train(birds, tmp_path, flags):
    result = train(birds, tmp_path, *QUICK, *flags)
    found = re.findall(r"loss_metric ([\d.]+), loss_cls ([\d.]+)", result.stdout)
    assert found and all(float(m) < 100 and 0 < float(c) < 100 for m, c in found)
    assert re.findall("note: without effect.*: (.*)", result.stdout) in ([], ["--samples_each_class"])
    untrained = "--alpha=0" in flags or "--loss_name=proxyanchorloss" in flags
    assert ("note: --alpha=0: the head is not trained" in result.stdout) == untrained
    # The checkpoint is rebuilt without any of the flags.
    out = run("eval.py", *birds.lists, f"--pretrained_model={tmp_path}/ResNet8/latest", "--use_gpu=False").stdout
    assert ("not applicable: the run did not train the softmax head (--alpha=0)" in out) == untrained


def test_a_head_that_was_not_trained_gives_no_scores(birds, trained, tmp_path):
    before = f"--pretrained_model={trained}/ResNet8/latest"
    train(birds, tmp_path, *QUICK, "--alpha=0", "--eval_every=0", "--total_images=8", "--optimizer=adam", before)
    weights = [read_pickle(f"{path}/ResNet8/latest/{PART_FILES['model']}") for path in (trained, tmp_path)]
    same = {name for name in weights[0] if np.array_equal(*(some[name] for some in weights))}
    assert same == {"head.weight", "head.bias"}  # which weight decay does not wear away, either
    command = [
        "infer.py",
        f"--pretrained_model={tmp_path}/ResNet8/latest",
        f"--input={birds.val_list}",
        "--use_gpu=False",
    ]
    out = run(*command).stdout
    assert "note: the run did not train the softmax head (--alpha=0), so there are no scores" in out
    assert "Test-0-score" not in out
    out = run(*command, f"--feature_file={tmp_path}/features.npz").stdout
    assert "Test-0-score" not in out and (tmp_path / "features.npz").exists()


def test_flags_of_other_losses_are_named(birds, tmp_path):
    out = train(birds, tmp_path, *QUICK, "--loss_name=normsoftmax", "--margin=1", "--alpha=2").stdout
    assert "note: without effect on normsoftmax: --margin, --alpha, --samples_each_class\n" in out
    assert "\nhead: cosine\nhead_lr_scale: 10.0\nhead_scale: 20.0\n" in out


def test_another_loss_takes_its_own_defaults(birds, trained, tmp_path):
    flags = ["--num_epochs=2", f"--checkpoint={trained}/ResNet8/latest", "--force=True", "--loss_name=contrastiveloss"]
    out = train(birds, tmp_path, "--use_gpu=False", *flags).stdout
    assert "the run goes on with --loss_name=contrastiveloss (was tripletloss)" in out
    assert "\nmargin: 1.0\n" in out


def test_training_learns(birds, tmp_path):
    """Twelve epochs on six colours raise recall@1 on six other colours."""
    flags = [*QUICK, "--num_epochs=12", "--optimizer=adam", "--lr=0.003", "--eval_every=12", "--eval_at_start=True"]
    out = train(birds, tmp_path, *flags, "--min_area=0.5", "--lr_strategy=cosine_decay").stdout
    before, after = (float(r) for r in re.findall(r"^Pass -?\d+, recall@1 ([\d.]+)", out, re.MULTILINE))
    first, *_, last = (float(c) for c in re.findall(r"loss_cls ([\d.]+)", out))
    assert last < 0.7 * first and after >= before


def test_two_stages_with_another_head_and_embedding(birds, tmp_path):
    train(birds, tmp_path / "one", *QUICK, "--loss_name=softmax", "--class_dim=20")
    start = f"--pretrained_model={tmp_path}/one/ResNet8/best"
    out = train(birds, tmp_path / "two", *QUICK, start, "--embedding_size=16").stdout
    assert "loaded 45 of 45 backbone tensors" in out
    assert "(this project ResNet8, epoch 0); embedding starts anew: none there; head skipped: 20 classes there" in out


def test_keep_bounds_the_epochs_on_disk(birds, tmp_path):
    train(birds, tmp_path, *QUICK, "--num_epochs=4", "--total_images=8", "--keep=2")
    names = {n for n in os.listdir(tmp_path / "ResNet8") if n.isdigit()}
    best = os.readlink(tmp_path / "ResNet8" / "best")
    assert names == {"2", "3", best}


def test_skipped_images_are_counted_and_the_rest_is_right(trained, birds, tmp_path):
    folder = trained
    rows = read_rows(birds.val_list)[:10]
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    rows.insert(4, f"{tmp_path}/broken.jpg 7")
    rows.insert(7, f"{tmp_path}/absent.jpg 7")
    (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
    flags = [f"--pretrained_model={folder}/ResNet8/best", "--use_gpu=False", f"--data_dir={birds.root}"]
    flags += ["--on_bad_image=skip", f"--feature_file={tmp_path}/f.npz", f"--val_list={tmp_path}/list.txt"]
    result = run("infer.py", *flags)
    assert "skipped 2 bad images; the first: " in result.stderr and "list.txt:5: " in result.stderr
    assert len(np.load(tmp_path / "f.npz")["paths"]) == 10
    out = train(birds, tmp_path, *QUICK, "--on_bad_image=skip", f"--val_list={tmp_path}/list.txt",
                f"--data_dir={birds.root}")  # fmt: skip
    assert "10 images of" in out.stdout


def test_help_teaches_and_does_not_import_paddle():
    for script in ("train.py", "eval.py", "infer.py"):
        code = (
            f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
            f"try: runpy.run_path({script!r}, run_name='__main__')\n"
            "finally: assert 'paddle' not in sys.modules"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and "--val_list" in result.stdout, result.stderr


def test_pictures_of_any_kind_in_one_list(trained, birds, tmp_path):
    """The same picture as JPEG, PNG, BMP, WebP and in other colour modes gives nearly the same feature."""
    folder = trained
    with Image.open(os.path.join(birds.root, read_rows(birds.val_list)[0].rsplit(" ", 1)[0])) as image:
        image.save(tmp_path / "a.png")
        image.save(tmp_path / "b.bmp")
        image.save(tmp_path / "c.webp", lossless=True)
        image.convert("RGBA").save(tmp_path / "d.png")
    run("infer.py", f"--pretrained_model={folder}/ResNet8/best", "--use_gpu=False", "--input", str(tmp_path),
        f"--feature_file={tmp_path}/f.npz")  # fmt: skip
    features = np.load(tmp_path / "f.npz")["features"]
    assert features.shape == (4, 64)
    np.testing.assert_allclose(features, np.repeat(features[:1], 4, axis=0), rtol=1e-5)


def test_a_continued_run_takes_over_every_flag_that_is_not_typed(birds, tmp_path):
    flags = ["--lr_strategy=constant", "--margin=0.7", "--weight_decay=0.01", "--min_area=0.6", "--lr=0.02"]
    train(birds, tmp_path / "a", *QUICK, *flags, "--num_epochs=2")
    train(birds, tmp_path / "b", *QUICK, *flags)
    checkpoint = f"--checkpoint={tmp_path}/b/ResNet8/latest"
    run("train.py", checkpoint, "--num_epochs=2")
    assert log_without_times(tmp_path / "a") == log_without_times(tmp_path / "b")
    out = run("train.py", checkpoint, "--num_epochs=3", "--lr=0.5", "--margin=0.7").stdout
    assert "note: the run goes on with --lr=0.5 (was 0.02), --num_epochs=3 (was 2)" in out
    assert ", lr 0.5, " in out


def test_a_run_continued_in_another_folder_and_with_another_optimizer(trained, birds, tmp_path):
    folder = trained
    flags = [f"--checkpoint={folder}/ResNet8/0", f"--model_save_dir={tmp_path}", "--num_epochs=2", "--optimizer=adamw"]
    out = run("train.py", *flags, "--force=True").stdout
    assert "note: adamw starts anew: it can't use the state of momentum" in out
    assert os.readlink(tmp_path / "ResNet8" / "best") == "1"  # not 0, which is in the other folder


def test_overwriting_keeps_the_old_run_until_the_new_one_has_a_checkpoint(birds, tmp_path):
    train(birds, tmp_path, *QUICK)
    run_dir = tmp_path / "ResNet8"
    weights = (run_dir / "0" / "model.pdparams").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    rows = [*read_rows(birds.train_list), *(f"{tmp_path}/bad.jpg {c}" for c in range(1, 7) for _ in range(20))]
    (tmp_path / "bad.txt").write_text("\n".join(rows))
    bad = [f"--train_list={tmp_path}/bad.txt", f"--data_dir={birds.root}", "--overwrite=True"]
    for _ in range(2):
        result = train(birds, tmp_path, *QUICK, *bad, status=2)
        assert "bad.jpg: " in result.stderr
        assert (run_dir / "replaced" / "0" / "model.pdparams").read_bytes() == weights
    # What is left of that try does not stand in the way of the next.
    train(birds, tmp_path, *QUICK, "--seed=4")
    assert sorted(os.listdir(run_dir)) == ["0", "best", "latest", "train_log.jsonl"]
    assert (run_dir / "0" / "model.pdparams").read_bytes() != weights


def test_an_evaluation_that_fails_does_not_cost_the_epoch(birds, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "val.txt").write_text("\n".join([*read_rows(birds.val_list), f"{tmp_path}/bad.jpg 7"]))
    flags = [f"--val_list={tmp_path}/val.txt", f"--data_dir={birds.root}"]
    assert "bad.jpg: " in train(birds, tmp_path, *QUICK, *flags, status=2).stderr
    assert (tmp_path / "ResNet8" / "latest" / "model.pdparams").exists()


def test_a_head_that_is_wider_than_the_labels(birds, tmp_path):
    """Labels 501..506 in a head of 50: every printed class is a label. Labels 1..6 in one of 50: 7..12 are unknown."""
    rows = [row.rsplit(" ", 1) for row in read_rows(birds.train_list)]
    (tmp_path / "far.txt").write_text("\n".join(f"{path} {500 + int(label)}" for path, label in rows))
    far = [f"--train_list={tmp_path}/far.txt", f"--data_dir={birds.root}", "--class_dim=50", "--eval_every=0"]
    train(birds, tmp_path / "far", *QUICK, *far, "--total_images=8")
    out = run("infer.py", *birds.lists, f"--pretrained_model={tmp_path}/far/ResNet8/latest", "--use_gpu=False").stdout
    classes = {int(label) for label in re.findall(r", class \[(\d+)\]", out)}
    assert classes and classes <= set(range(501, 507))

    train(birds, tmp_path / "near", *QUICK, "--class_dim=50", "--total_images=8")
    out = run("eval.py", *birds.lists, f"--pretrained_model={tmp_path}/near/ResNet8/latest", "--use_gpu=False").stdout
    assert "not applicable: 6 of the list's 6 classes are not among the head's" in out


def test_pictures_with_any_name_and_a_list_beside_them(trained, birds, tmp_path):
    folder = trained
    with Image.open(os.path.join(birds.root, read_rows(birds.val_list)[0].rsplit(" ", 1)[0])) as image:
        image.save(tmp_path / "picture", format="JPEG")
        image.save(tmp_path / "a.gif")
    inputs = [str(tmp_path / "picture"), str(tmp_path / "a.gif"), birds.val_list]
    run("infer.py", f"--pretrained_model={folder}/ResNet8/best", "--use_gpu=False", "--input", *inputs,
        f"--feature_file={tmp_path}/f.npz")  # fmt: skip
    assert len(np.load(tmp_path / "f.npz")["paths"]) == 50


def test_queries_in_their_own_gallery(birds, tmp_path):
    """A list searched in a copy of itself, links and another order included, gives what it gives alone."""
    (tmp_path / "pictures").symlink_to(os.path.dirname(birds.val_list))
    with open(birds.val_list) as file:
        rows = [f"{tmp_path}/pictures/{row}" for row in file.read().splitlines()]
    gallery = tmp_path / "gallery.txt"
    gallery.write_text("\n".join(rows[::-1]) + "\n")
    flags = ["--model=ResNet8", "--image_shape=3,32,32", "--seed=1", "--use_gpu=False", f"--val_list={birds.val_list}"]
    figures = {}
    for name, more in {"alone": [], "dropped": [f"--gallery_list={gallery}"],
                       "kept": [f"--gallery_list={gallery}", "--exclude_self=False"]}.items():  # fmt: skip
        result = run("eval.py", *flags, *more, f"--output_json={tmp_path}/{name}.json")
        assert ("48 of 48 queries are in the gallery themselves" in result.stdout) == (name != "alone")
        figures[name] = json.loads((tmp_path / f"{name}.json").read_text())
    for name in ("recall@1", "recall@8", "MAP@R"):
        assert figures["dropped"][name] == figures["alone"][name]
    assert figures["kept"]["recall@1"] == 1
