"""eval.py --protocol: the k, the lists and what is said of them."""

import json
import re

import pytest
from conftest import SMALL, read_rows, run

from retrieval import protocols

K = {"cub": [1, 2, 4, 8], "cars": [1, 2, 4, 8], "sop": [1, 10, 100, 1000], "inshop": [1, 10, 20, 30]}


@pytest.fixture(scope="module")
def halves(birds, tmp_path_factory):
    """A list of every third picture of the test, as queries, and one of the others, as their gallery."""
    folder = tmp_path_factory.mktemp("inshop")
    rows = [f"{birds.root}/{row}\n" for row in read_rows(birds.val_list)]
    (folder / "X_query.txt").write_text("".join(rows[::3]))
    (folder / "X_gallery.txt").write_text("".join(row for i, row in enumerate(rows) if i % 3))
    return folder


def figures(folder, *flags):
    out = run("eval.py", *SMALL, "--seed=1", f"--output_json={folder}/e.json", *flags).stdout
    return out, json.loads((folder / "e.json").read_text())


@pytest.mark.parametrize("name", ["cub", "cars", "sop"])
def test_a_list_against_itself(birds, tmp_path, name):
    out, found = figures(tmp_path, f"--val_list={birds.val_list}", f"--protocol={name}")
    assert f"\nprotocol: {name}\n" in out.rpartition("---------\n")[2] and found["protocol"] == name
    assert [int(k) for k in re.findall(r"^recall@(\d+): ", out, re.MULTILINE)] == K[name]
    assert found["gallery"] is None and found["queries"] == 48
    sizes = {"cub": "5924 or 3043", "cars": "8131", "sop": "60502"}[name]
    assert f"note: {birds.val_list} has 48 images, that of {name} {sizes}: figures of others don't compare\n" in out


def test_inshop_takes_the_gallery_beside_the_queries(halves, tmp_path):
    out, found = figures(tmp_path, f"--val_list={halves}/X_query.txt", "--protocol=inshop")
    assert f"gallery_list: {halves}/X_gallery.txt\n" in out and found["queries"] == 16
    assert [int(k) for k in re.findall(r"^recall@(\d+): ", out, re.MULTILINE)] == K["inshop"]
    named = [f"--val_list={halves}/X_query.txt", f"--gallery_list={halves}/X_gallery.txt"]
    _, typed = figures(tmp_path, *named, "--recall_at=1,10,20,30")
    assert "protocol" not in typed and typed["gallery"] == found["gallery"]
    assert {name: typed[name] for name in typed if "@" in name} == {name: found[name] for name in found if "@" in name}


def test_a_typed_k_goes_before_the_protocols(birds, tmp_path):
    out, found = figures(tmp_path, f"--val_list={birds.val_list}", "--protocol=sop", "--recall_at=1,3")
    assert [name for name in found if re.fullmatch(r"recall@\d+", name)] == ["recall@1", "recall@3"]
    assert "note: --recall_at was typed and goes before the 1,10,100,1000 of --protocol=sop\n" in out


def fails(*flags):
    stderr = run("eval.py", *SMALL, *flags, status=2).stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


def test_lists_that_are_not_the_protocols(birds, halves, tmp_path):
    query = f"--val_list={halves}/X_query.txt"
    message = fails("--protocol=sop", query, f"--gallery_list={halves}/X_gallery.txt")
    assert "--protocol=sop: each image is a query against all others of --val_list: leave out --gallery_list" in message
    assert "name it, --gallery_list=" in fails("--protocol=inshop", f"--val_list={birds.val_list}")
    (tmp_path / "Y_query.txt").write_bytes((halves / "X_query.txt").read_bytes())
    assert "name it, --gallery_list=" in fails("--protocol=inshop", f"--val_list={tmp_path}/Y_query.txt")
    assert "did you mean inshop?" in fails("--protocol=in-shop")
    assert "did you mean --recall_at?" in fails("--recall_ks=1,2")


def test_lists_where_nobody_names_one():
    assert protocols.default_list(None, "other.txt") == "other.txt"
    assert {protocols.default_list(name, "") for name in K} > {"data/CUB200_val.txt", "data/SOP_val.txt"}
    flags = {"protocol": "cub", "recall_at": [1, 2], "gallery_list": "", "val_list": "a.txt"}
    assert protocols.follow(flags, set())["recall_at"] == [1, 2, 4, 8] and flags["recall_at"] == [1, 2]
    assert protocols.follow(flags, {"recall_at"})["recall_at"] == [1, 2]
