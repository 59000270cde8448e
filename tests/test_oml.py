"""Tables of Open Metric Learning, read and written by data/split.py as a user runs it."""

import csv
import json
import os
import re
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT, SMALL, TINY, listing, read_rows, run

sys.path.insert(0, os.path.join(ROOT, "data"))

import oml
import reader
from utility import UserError

HEAD = "path,label,split,is_query,is_gallery"
BOXED = HEAD + ",x_1,x_2,y_1,y_2"


def picture(label, number, size=(30, 40)):
    """A picture of the class's colour in a frame of another one."""
    image = np.full((*size, 3), 255, np.uint8)
    image[5:25, 10:35] = np.random.default_rng(label).integers(0, 200, 3)
    image[5:25, 10:35, 0] += number
    return image


@pytest.fixture
def folder(tmp_path):
    """Pictures c/n.png of 6 classes, 4 of each, in a folder with a space in its name."""
    root = tmp_path / "my set"
    for label in range(6):
        (root / str(label)).mkdir(parents=True)
        for number in range(4):
            cv2.imwrite(str(root / str(label) / f"{number}.png"), picture(label, number))
    return root


def rows_of(part=lambda n: (True, True)):
    """Lines of a table: classes 0-2 train; part(n) is (is_query, is_gallery) of the n-th picture of the others."""
    train = [f"{label}/{n}.png,{label},train,," for label in range(3) for n in range(4)]
    both = [(label, n, *part(n)) for label in range(3, 6) for n in range(4)]
    return train + [f"{label}/{n}.png,{label},validation,{q},{g}" for label, n, q, g in both]


def write(folder, rows, head=HEAD, name="df.csv"):
    (folder / name).write_text("\n".join([head, *rows]) + "\n")
    return folder / name


def test_each_against_all_others(folder):
    table = write(folder, rows_of())
    out = run("data/split.py", table).stdout
    assert sorted(os.listdir(folder)) == ["0", "1", "2", "3", "4", "5", "df.csv", "df_train.txt", "df_val.txt"]
    assert read_rows(folder / "df_train.txt") == [f"{label}/{n}.png {label}" for label in range(3) for n in range(4)]
    assert read_rows(folder / "df_val.txt") == [f"{label}/{n}.png {label}" for label in range(3, 6) for n in range(4)]
    assert f"found 24 images of 6 classes in {table}\n" in out and "\nnext: python train.py" in out


def test_queries_and_a_gallery(folder, tmp_path):
    write(folder, rows_of(lambda n: (n < 2, n > 0)))
    where = tmp_path / "lists"
    run("data/split.py", folder / "df.csv", f"--output_dir={where}", "--name=shop", "--holdout=0.34")
    parts = {
        part: [os.path.relpath(path, folder) for path in reader.read_list(str(where / f"shop_{part}.txt")).paths]
        for part in ("train", "val", "query", "gallery", "fit", "holdout")
    }
    assert parts["query"] == [f"{label}/{n}.png" for label in range(3, 6) for n in (0, 1)]
    assert parts["gallery"] == [f"{label}/{n}.png" for label in range(3, 6) for n in (1, 2, 3)]
    assert parts["val"] == [f"{label}/{n}.png" for label in range(3, 6) for n in range(4)]
    assert parts["fit"] + parts["holdout"] == parts["train"] and len(parts["holdout"]) == 4
    flags = [f"--val_list={where}/shop_query.txt", "--protocol=inshop", f"--output_json={tmp_path}/e.json"]
    run("eval.py", *SMALL, "--seed=1", *flags)
    assert json.loads((tmp_path / "e.json").read_text())["queries"] == 6


def test_only_one_of_the_parts(folder):
    train, validation = rows_of()[:12], rows_of()[12:]
    run("data/split.py", write(folder, train, name="a.csv"))
    run("data/split.py", write(folder, validation, name="b.csv"))
    assert {"a_train.txt", "b_val.txt"} == {name for name in os.listdir(folder) if name.endswith(".txt")}


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize("suffix", ["", ".0"])  # as pandas writes them where some are empty
def test_boxes_are_cut_out(folder, tmp_path, suffix):
    box = ",".join(f"{value}{suffix}" for value in (10, 35, 5, 25))
    rows = [f"{row},{box}" if place % 2 else f"{row},,,," for place, row in enumerate(rows_of())]
    write(folder, rows, BOXED)
    where = tmp_path / "out"
    out = run("data/split.py", folder / "df.csv", f"--output_dir={where}").stdout
    assert f"boxes: 12 images cut out in {where}/df_crops\n" in out and " --test_transform=resize " in out
    samples = [reader.read_list(str(where / f"df_{part}.txt")) for part in ("train", "val")]
    paths = [path for part in samples for path in part.paths]
    labels = np.concatenate([part.labels for part in samples])
    for place, (path, label) in enumerate(zip(paths, labels)):
        found = cv2.imread(path)
        wanted = picture(label, place % 4)[5:25, 10:35] if place % 2 else picture(label, place % 4)
        assert found.shape == wanted.shape and np.abs(found.astype(int) - wanted).max() <= (6 if place % 2 else 0)
    before = listing(where)
    run("data/split.py", folder / "df.csv", f"--output_dir={where}")
    assert listing(where) == before and len(os.listdir(where / "df_crops")) == 12
    (where / "df_crops" / "mine.txt").write_text("dear")
    out = run("data/split.py", folder / "df.csv", f"--output_dir={where}").stdout
    assert f"note: {where}/df_crops was in the way and is kept: it is now {where}/df_crops.kept1\n" in out
    assert (where / "df_crops.kept1" / "mine.txt").read_text() == "dear"


def test_a_box_beyond_its_picture_leaves_nothing(folder):
    rows = [f"{row},10,35,5,25" for row in rows_of()]
    rows[7] = rows_of()[7] + ",10,41,5,25"
    table = write(folder, rows, BOXED)
    before = listing(folder)
    assert f"error: {table}:9: the box ends at 41, 25, the picture at 40, 30\n" == fails(table)
    cv2.imwrite(str(folder / "0" / "2.png"), np.zeros((2, 70000), np.uint8))
    long = write(folder, [rows_of()[2] + ",0,66000,0,2"], BOXED, "long.csv")
    assert "long.csv:2: the box is 66000 x 2, and a JPEG at most 65535 each way" in fails(long)
    os.remove(long)
    good = write(folder, [f"{row},10,35,5,25" for row in rows_of()], BOXED, "good.csv")
    (folder / "dir.csv").mkdir()
    assert "dir.csv: a directory, not a file to write" in fails(good, f"--csv={folder}/dir.csv")
    assert "--holdout=0.1: 0 of the 3 training classes" in fails(good, "--holdout=0.1")
    os.remove(good)
    os.rmdir(folder / "dir.csv")
    (folder / "0" / "1.png").write_bytes((folder / "0" / "1.png").read_bytes()[:60])
    assert f"{table}:3: 0/1.png: " in fails(table)
    assert listing(folder).keys() == before.keys()


# ---------------------------------------------------------------- mistakes


def fails(*flags):
    """Runs split.py, which must end with one error line and status 2; -> that line."""
    stderr = run("data/split.py", *flags, status=2).stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


GOOD, QUERY = "0/0.png,0,train,,", "3/0.png,3,validation,True,True"


@pytest.mark.parametrize(
    ("head", "rows", "wanted"),
    [
        ("path,label,split,is_query", [GOOD], ":1: no column is_gallery: a CSV of OML has path, label, split, is"),
        ("0/0.png 0", ["0/1.png 0"], ":1: no column path: "),
        (HEAD + ",label", [GOOD + ",0"], ":1: the column 'label' is there twice"),
        (HEAD + ",x_1,x_2,y_1", [GOOD + ",,,"], ":1: the column x_1 without y_2: a box needs x_1, x_2, y_1, y_2"),
        (HEAD, [], ": has no pictures"),
        (HEAD, [GOOD, "0/0.png,0,train"], ":3: 3 fields, 5 were expected, as in the first line"),
        (HEAD, [GOOD, "", "0/0.png,cat,train,,"], ":4: the label 'cat' is no integer of 64 bits"),
        (HEAD, [GOOD, f"0/0.png,{2**63},train,,"], ":3: the label '9223372036854775808' is no integer"),
        (HEAD, [GOOD, "0/0.png,1.5,train,,"], ":3: the label '1.5' is no integer"),
        (HEAD, [GOOD, "0/0.png,0,test,,"], ":3: split is 'test': train or validation was expected"),
        (HEAD, [GOOD, "0/0.png,0,train,True,"], ":3: is_query is 'True': nothing was expected, for split is train"),
        (HEAD, [GOOD, "0/0.png,0,train,,0"], ":3: is_gallery is '0': nothing was expected, for split is train"),
        (HEAD, [QUERY, "3/1.png,3,validation,,True"], ":3: is_query is '': True or False was expected"),
        (HEAD, [QUERY, "3/1.png,3,validation,True,2"], ":3: is_gallery is '2': True or False was expected"),
        (HEAD, [QUERY, "3/1.png,3,validation,False,False"], ":3: neither is_query nor is_gallery: a picture of"),
        (HEAD, [QUERY, "4/1.png,4,validation,True,False"], ":3: a query of the label 4, of which the gallery has no"),
        (HEAD, [GOOD, "0/9.png,0,train,,", "0/8.png,0,train,,"], "0/9.png: No such file or directory (2 of 3 such"),
        (HEAD, [GOOD, "df.csv,0,train,,"], "df.csv: no picture"),
        (HEAD, [GOOD, "0,0,train,,"], "/0: Is a directory"),
        (HEAD, [GOOD, '"a\nb.png",0,train,,'], ":4: a list cannot hold the path 'a\\nb.png'"),
        (HEAD, [GOOD, '0/1.png,0,"train,,'], ":3: not a line of a CSV: unexpected end of data"),
        (HEAD, [GOOD, '"0/1.png"x,0,train,,'], ":3: not a line of a CSV: ',' expected after '\"'"),
        (HEAD, [GOOD, "0/1\0.png,0,train,,"], ":3: a zero byte: no CSV, or one in UTF-16: save it as UTF-8"),
        (HEAD, [GOOD, "a" * 70000 + ",0,train,,"], ":3: more than 65536 characters"),
        (BOXED, [GOOD + ",1,2,3,"], ":2: y_2 is '': an integer of 0 or more was expected"),
        (BOXED, [GOOD + ",-1,2,3,4"], ":2: x_1 is '-1': an integer of 0 or more was expected"),
        (BOXED, [GOOD + ",1.5,2,3,4"], ":2: x_1 is '1.5': an integer"),
        (BOXED, [GOOD + ",2,2,3,4"], ":2: x_1 is 2, x_2 2: a box has x_1 < x_2"),
        (BOXED, [GOOD + ",1,2,4,3"], ":2: y_1 is 4, y_2 3: a box has y_1 < y_2"),
        (HEAD, [GOOD, "0/1.png,\x1b[31m,train,,"], r":3: the label '\x1b[31m' is no integer"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table(folder, head, rows, wanted):
    table = write(folder, rows, head)
    with pytest.raises(UserError) as error:
        oml.read(str(table))
    assert str(error.value).startswith(f"{table}:") and wanted in str(error.value)
    assert str(error.value).isprintable()


def test_flags_that_contradict_a_table(folder):
    table = write(folder, rows_of())
    (folder / "wide.csv").write_bytes((folder / "df.csv").read_text().encode("utf-16"))
    before = listing(folder)
    for flag in ("--train_classes=2", "--within_classes=0.2"):
        assert "says itself what trains: no --train_classes or --within_classes" in fails(table, flag)
    assert "that is what is read" in fails(table, f"--csv={folder}/../{folder.name}/df.csv")
    assert "must not name a folder" in fails(table, "--name=a/b")
    assert "wide.csv:1: " in fails(folder / "wide.csv")
    assert listing(folder) == before
    assert "has no column" in fails(folder / "0" / "0.png") or "0.png:1: " in fails(folder / "0" / "0.png")


def test_several_categories_of_a_label_are_said(folder):
    rows = [f"{row},{'cat' if place else 'dog'}" for place, row in enumerate(rows_of())]
    stderr = run("data/split.py", write(folder, rows, HEAD + ",category")).stderr
    assert "df.csv: 1 labels have several categories; the first: 0 has 'cat' and 'dog'\n" in stderr


def test_byte_order_marks_other_columns_and_spellings(folder):
    rows = [re.sub("True", "1.0", row).replace("train,,", "train,nan,None") for row in rows_of()]
    text = "\r\n".join([",sequence," + HEAD, *(f"{n},s," + row for n, row in enumerate(rows))])
    (folder / "df.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    run("data/split.py", folder / "df.csv")
    assert len(read_rows(folder / "df_train.txt")) == len(read_rows(folder / "df_val.txt")) == 12


# ---------------------------------------------------------------- written


def test_a_split_as_a_table_and_back(birds, tmp_path):
    out = run("data/split.py", birds.root, f"--output_dir={tmp_path}/a", f"--csv={tmp_path}/b/birds.csv").stdout
    assert f"as a table of Open Metric Learning: {tmp_path}/b/birds.csv\n" in out
    with open(tmp_path / "b" / "birds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 96 and list(rows[0]) == HEAD.split(",")
    for row in rows:
        assert os.path.isfile(tmp_path / "b" / row["path"])
        validation = int(row["label"]) > 6
        assert row["split"] == ("validation" if validation else "train")
        assert row["is_query"] == row["is_gallery"] == ("True" if validation else "")
    run("data/split.py", tmp_path / "b" / "birds.csv", f"--output_dir={tmp_path}/c")
    for part in ("train", "val"):
        (name,) = (name for name in os.listdir(tmp_path / "a") if name.endswith(f"_{part}.txt"))
        one, two = (reader.read_list(str(path)) for path in (tmp_path / "a" / name, tmp_path / f"c/birds_{part}.txt"))
        assert [os.path.realpath(path) for path in one.paths] == [os.path.realpath(path) for path in two.paths]
        assert one.labels.tolist() == two.labels.tolist()
    lists = [f"--train_list={tmp_path}/c/birds_train.txt", f"--val_list={tmp_path}/c/birds_val.txt"]
    run("train.py", *lists, *TINY, "--num_epochs=1", f"--model_save_dir={tmp_path}/run")


def test_queries_stay_queries_and_names_with_commas_are_written(folder):
    os.rename(folder / "3" / "0.png", folder / "3" / 'a, "b".png')
    rows = [row.replace("3/0.png", '"3/a, ""b"".png"') for row in rows_of(lambda n: (n < 2, n > 0))]
    run("data/split.py", write(folder, rows), f"--csv={folder}/again.csv")
    before, after = (sorted(csv.reader(open(folder / name, newline=""))) for name in ("df.csv", "again.csv"))  # noqa: SIM115
    assert before == after


def test_a_test_part_is_left_out(folder):
    for part, labels in (("train", (0, 1)), ("val", (2, 3)), ("test", (4, 5))):
        (folder / part).mkdir()
        for label in labels:
            os.rename(folder / str(label), folder / part / str(label))
    out = run("data/split.py", folder, f"--csv={folder}/set.csv").stdout
    assert "set.csv (test is left out: such a table has none)\n" in out
    assert len(read_rows(folder / "set.csv")) == 1 + 16
