"""recipes/compare.py: runs and seeds in a table, paired differences, and files that are none."""

import json
import os
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, run

sys.path.insert(0, os.path.join(ROOT, "recipes"))
import compare

LABELS, COUNTS = [3, 5, 9], [4, 10, 6]
ZERO = {"label": LABELS, "queries": COUNTS, "recall@1": [0, 0, 0], "MAP@R": [0, 0, 0]}


def write(path, recalls, seed=1, loss="softmax", **changes):
    recall = float(np.dot(recalls, COUNTS) / sum(COUNTS))
    classes = {"label": LABELS, "queries": COUNTS, "recall@1": recalls, "MAP@R": recalls}
    content = {
        "recall@1": recall, "MAP@R": recall, "queries": 20, "seconds": 1, "list": "a", "gallery": None,
        "classes": classes, "args": {"pretrained_model": f"run{seed}/ResNet8/best", "output_json": str(path)},
        "trained_with": {"seed": seed, "loss_name": loss, "model_save_dir": f"run{seed}"},
    }  # fmt: skip
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_seeds_are_one_row_and_methods_are_compared(tmp_path):
    one = write(tmp_path / "1.json", [0.5, 0.5, 0.5])
    two = write(tmp_path / "2.json", [0.5, 0.7, 0.5], seed=2)
    other = write(tmp_path / "o.json", [0.75, 0.7, 0.5], loss="npairs")
    out = run("recipes/compare.py", one, two, other).stdout
    spread = np.std([50, 60], ddof=1)
    assert f"| {one} and 1 more | 2 | 55.00 ± {spread:.2f} |" in out and f"| {other} | 1 | 65.00 |" in out
    assert f"{other} minus {one} and 1 more: recall@1 +10.00 [" in out
    # The means of all 27 draws of three classes, by hand.
    sums, counts = np.array([1.0, 1.0, 0.0]), np.array(COUNTS)
    draws = [[a, b, c] for a in range(3) for b in range(3) for c in range(3)]
    means = [sums[draw].sum() / counts[draw].sum() for draw in draws]
    low, high = 100 * np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert out.count(f"[{low:+.2f}, {high:+.2f}]") == 2


def test_averages_of_other_shares_are_other_methods(tmp_path):
    """Of the same shares they are one; where the page of a report went says nothing."""
    for seed, (share, report) in enumerate(((0.9, "a.html"), (0.9, ""), (0.2, ""))):
        averaged = f"{share} run{seed}/ResNet8/latest + {1 - share:g} imagenet"
        write(
            tmp_path / f"{seed}.json",
            [0.5] * 3,
            seed,
            averaged=averaged,
            args={"pretrained_model": f"a{seed}", "report": report},
        )
    out = run("recipes/compare.py", *(tmp_path / f"{seed}.json" for seed in range(3))).stdout
    assert f"| {tmp_path}/0.json and 1 more | 2 |" in out and f"| {tmp_path}/2.json | 1 |" in out


def test_a_run_that_was_measured_twice_is_one(tmp_path):
    paths = [write(tmp_path / f"{n}.json", [0.5] * 3, args={"recall_at": [n]}) for n in (1, 2)]
    error = run("recipes/compare.py", *paths, status=2).stderr
    assert error == f"error: {paths[0]} and {paths[1]}: one run, measured twice: leave one of them out\n"


def test_two_seeds_are_compared_with_each_other(tmp_path):
    paths = [write(tmp_path / f"{n}.json", [0.5, 0.1 * n, 0.5], seed=n) for n in (1, 2)]
    assert f"{paths[1]} minus {paths[0]}: recall@1 +5.00 [+0.00" in run("recipes/compare.py", *paths).stdout


@pytest.mark.parametrize(
    ("changes", "why"),
    (
        ({"list": "b"}, "of another list"),
        ({"gallery": "b"}, "of another list"),
        ({"classes": None}, "older version"),
        ({"classes": {**ZERO, "label": [3, 5, 8]}}, "not the same"),
        ({"classes": {**ZERO, "queries": [4, 10, 5]}}, "not the same"),
    ),
)
def test_what_can_not_be_compared(changes, why, tmp_path):
    groups = [[compare.read_run(write(tmp_path / "1.json", [0.5, 0.5, 0.5]))]]
    groups.append([compare.read_run(write(tmp_path / "2.json", [0.5, 0.5, 0.5], loss="x", **changes))])
    assert why in compare.difference(*groups)


@pytest.mark.parametrize(
    "changes",
    (
        *(
            {"args": 1},
            {"trained_with": []},
            {"averaged": 1},
            {"recall@1": "1"},
            {"recall@1": 2},
            {"recall@1": 10**400},
            {"list": 1},
        ),
        *({"MAP@R": True}, {"gallery": []}, {"classes": []}, {"classes": {"label": [1]}}),
        {"classes": {**ZERO, "label": [1, 2]}},
        {"classes": {**ZERO, "label": [1, 2, 2**63]}},
        {"classes": {**ZERO, "label": [[1], 2, 3]}},
        {"classes": {**ZERO, "queries": [0, 1, 1]}},
        {"classes": {**ZERO, "queries": [1.5, 1, 1]}},
        {"classes": {**ZERO, "recall@1": [0, 0, -1]}},
        {"classes": {**ZERO, "MAP@R": [0, 0, "x"]}},
        {"classes": {name: [] for name in ZERO}},
    ),
)
def test_foreign_figures_are_one_line(changes, tmp_path):
    with pytest.raises(compare.UserError, match=r"1\.json: not a file that eval.py --output_json wrote"):
        compare.read_run(write(tmp_path / "1.json", [0.5, 0.5, 0.5], **changes))


@pytest.mark.parametrize("text", ("", "[]", "{", "{}", '{"args": {}}', "[" * 100000, '{"recall@1": NaN, "args": {}}'))
def test_foreign_files_are_one_line(text, tmp_path):
    (tmp_path / "1.json").write_text(text)
    with pytest.raises(compare.UserError, match=r"1\.json: (not a file that|cannot read)"):
        compare.read_run(tmp_path / "1.json")


def test_mistakes_have_status_2(tmp_path):
    one = write(tmp_path / "1.json", [0.5, 0.5, 0.5])
    os.mkfifo(tmp_path / "pipe")
    for paths in ((), (one, one), (one, tmp_path / "none"), (one, tmp_path), (tmp_path / "pipe",)):
        result = run("recipes/compare.py", *paths, status=2)
        assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_figures_of_eval(birds, trained, tmp_path):
    best = f"--pretrained_model={trained}/ResNet8/best"
    paths = [tmp_path / f"{name}.json" for name in ("plain", "flip")]
    flags = [best, f"--val_list={birds.val_list}", "--quiet"]
    out = run("eval.py", *flags, "--rerank=k-reciprocal", "--query_expansion=2", f"--output_json={paths[0]}").stdout
    run("eval.py", *flags, "--flip=True", f"--output_json={paths[1]}")
    for line in (
        "recall@1: 0.",
        "mAP: 0.",
        "mINP: 0.",
        "recall@1 interval: [",
        "threshold for 1.0% false accepts: cos",
    ):
        assert f"\n{line}" in out
    assert "recall@1 (k-reciprocal): " in out and "MAP@R (query expansion 2): " in out
    found = json.loads(paths[0].read_text())
    assert found["trained_with"]["train_batch_size"] == int(TINY[3].partition("=")[2])
    recalls, counts = np.array(found["classes"]["recall@1"]), np.array(found["classes"]["queries"])
    assert (recalls * counts).sum() / counts.sum() == pytest.approx(found["recall@1"])
    assert len(found["failed_queries"]) == round((1 - found["recall@1"]) * found["queries"])
    for row in found["failed_queries"]:
        assert os.path.isfile(row["path"]) and os.path.isfile(row["neighbour"])
        assert row["label"] != row["neighbour_label"] and row["rank"] > 1
    low, high = found["recall@1 interval"]
    assert low <= found["recall@1"] <= high
    assert f"{paths[1]} minus {paths[0]}: recall@1 " in run("recipes/compare.py", *paths).stdout
