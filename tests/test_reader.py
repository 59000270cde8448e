"""List files, and what the scripts say of them."""

import dataclasses
import hashlib
import os

import numpy as np
import pytest
from PIL import Image
from test_transforms import RGB, encode, jpeg_that_claims, noise

import infer
import lists
import reader
import transforms
import utility
from reader import Reading
from utility import UserError


def write_list(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_list_with_all_that_people_write(tmp_path):
    path = write_list(
        tmp_path / "list.txt",
        b"\xef\xbb\xbfa.jpg 1\r\nmy birds/b 2.jpg\t-3\r\n\r\n  c.jpg   +4  \r\n/abs/d.jpg 5\r\na.jpg 1\r\n../e.jpg 0\n",
    )
    samples = reader.read_list(path)
    root = str(tmp_path)
    names = ["a.jpg", "my birds/b 2.jpg", "c.jpg", "/abs/d.jpg", "a.jpg", "../e.jpg"]
    assert samples.paths == [os.path.join(root, name) for name in names]
    assert samples.labels.tolist() == [1, -3, 4, 5, 1, 0] and samples.labels.dtype == np.int64
    assert samples.lines == [1, 2, 4, 5, 6, 7]  # the blank line counts
    assert reader.where(samples, 2) == f"{path}:4: {root}/c.jpg"
    assert reader.read_list(path, "/data").paths[:4] == [
        "/data/a.jpg",
        "/data/my birds/b 2.jpg",
        "/data/c.jpg",
        names[3],
    ]
    assert reader.read_list(path, "").paths[0] == "a.jpg"


def test_labels_take_all_of_int64(tmp_path):
    path = write_list(tmp_path / "list.txt", f"a {2**63 - 1}\nb {-(2**63)}\nc 007")
    assert reader.read_list(path).labels.tolist() == [2**63 - 1, -(2**63), 7]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ("b.jpg", "no label on this line: expected '<path> <label>', found 'b.jpg'"),
        ("7", "no label on this line"),
        ("b.jpg cat", "the label 'cat' is no integer"),
        ("b.jpg 1.0", "the label '1.0' is no integer"),
        ("b.jpg 1_0", "the label '1_0' is no integer"),
        ("b.jpg \N{FULLWIDTH DIGIT ONE}", "is no integer"),
        ("b.jpg --1", "the label '--1' is no integer"),
        (f"b.jpg {2**63}", f"the label {2**63} does not fit into 64 bits"),
        (f"b.jpg {-(2**63) - 1}", "does not fit into 64 bits"),
        ("b.jpg " + "9" * 5000, "is no integer"),
    ],
)
def test_bad_rows(tmp_path, row, wanted):
    path = write_list(tmp_path / "list.txt", f"a.jpg 1\n\n{row}\n")
    with pytest.raises(UserError) as error:
        reader.read_list(path)
    assert str(error.value).startswith(f"{path}:3: ") and wanted in str(error.value)


@pytest.mark.parametrize(
    ("there", "rows", "wanted"),
    [
        (["a b.jpg", "c.jpg"], ["a b.jpg 7 0", "c.jpg\t-8  12"], [("a b.jpg", 7), ("c.jpg", -8)]),
        (["b.jpg"], ["a.jpg 7 0", "b.jpg 8 1"], [("a.jpg", 7), ("b.jpg", 8)]),  # the second says it
        (["a.jpg 7"], ["a.jpg 7 0", "b.jpg 8 1"], [("a.jpg 7", 0), ("b.jpg 8", 1)]),
        (["a.jpg 7", "a.jpg"], ["a.jpg 7 0"], [("a.jpg 7", 0)]),  # what is there is named as it always was
        (["bird", "bird 7"], ["bird 7 0"], [("bird 7", 0)]),
        (["bird"], ["bird 7 0"], [("bird", 7)]),
        (["bird 7"], ["bird 7 0"], [("bird 7", 0)]),
        ([], ["bird 7 0", "b.jpg 7 0"], [("bird 7", 0), ("b.jpg 7", 0)]),
        ([], ["x/A.JPG 7 0", "bird 8 1"], [("x/A.JPG", 7), ("bird", 8)]),
        ([], ["x/a.jpg 7 12|3", "bird 8 1|0"], [("x/a.jpg", 7), ("bird", 8)]),
        ([], ["bird 7 12|3"], [("bird", 7)]),
        ([], ["a 3.jpg 7", "b.jpg 4 5"], [("a 3.jpg", 7), ("b.jpg 4", 5)]),  # the first has no number to spare
        ([], ["1 2 3"], [("1 2", 3)]),
    ],
)  # fmt: skip
def test_the_third_column_of_paddleclas(tmp_path, capsys, there, rows, wanted):
    for name in there:
        (tmp_path / name).write_bytes(b"")
    path = write_list(tmp_path / "list.txt", "\n".join(rows))
    for needed in (True, False):
        samples = reader.read_list(path, need_labels=needed)
        assert samples.paths == [os.path.join(tmp_path, name) for name, _ in wanted]
        assert samples.labels.tolist() == [label for _, label in wanted]
    passed_over = "note: " in capsys.readouterr().out
    assert passed_over == (len(samples.paths[0]) + len(str(wanted[0][1])) + 1 < len(os.path.join(tmp_path, rows[0])))


def test_a_third_column_that_ends(tmp_path):
    path = write_list(tmp_path / "list.txt", "a.jpg 7 0\n\nb.jpg 8\n")
    with pytest.raises(UserError) as error:
        reader.read_list(path)
    assert str(error.value) == f"{path}:3: expected '<path> <label> <id>' as on the first line, found 'b.jpg 8'"


def test_missing_empty_and_foreign_lists(tmp_path):
    for content in ("", "\n \t\r\n", b"\xef\xbb\xbf"):
        with pytest.raises(UserError, match=r"list\.txt: the list is empty"):
            reader.read_list(write_list(tmp_path / "list.txt", content))
    with pytest.raises(UserError, match=r"none\.txt: cannot read this list file: No such file"):
        reader.read_list(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="a folder, not a list file"):
        reader.read_list(str(tmp_path))
    with pytest.raises(UserError, match=r"list\.txt: is in UTF-16"):
        reader.read_list(write_list(tmp_path / "list.txt", "a.jpg 1\n".encode("utf-16")))
    with pytest.raises(UserError, match=r"list\.txt: is in UTF-16"):
        reader.read_list(write_list(tmp_path / "list.txt", "birds/a.jpg 1\n".encode("utf-16-le")))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"a.jpg 1\nb\0.jpg 1\n", ":2: a zero byte: this is no text, and no list file"),
        (b"a.jpg 1\n" + b"x" * 3_000_000, ":2: more than 65536 characters: this is no list file"),
        (b"a.jpg 1\nb.jpg " + b"9" * 60_000, ":2: the label '99999"),
        (b"\xff\xd8\xff\xe0" + b"x" * 100, ": a picture (JPEG), not a list file: a list has '<path> <label>' on each"),
        (b"PK\3\4" + b"\0" * 100, ": an .npz or another zip archive, not a list file"),
        (b"\x80\2}q\0", ": a pickle, such as .pdparams, not a list file"),
        (b"a.jpg 1\n\x1b[31mb.jpg", ":2: no label on this line: expected '<path> <label>', found '\\x1b[31mb.jpg'"),
    ],
)
def test_lists_that_are_none(tmp_path, content, wanted):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        reader.read_list(str(path))
    assert str(error.value).startswith(f"{path}{wanted}") and len(str(error.value)) < 500


def test_a_list_that_is_no_file(tmp_path):
    """A pipe would be waited for, a device read for ever, and a file of nothing but zeros held as one line."""
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "zeros", "wb") as file:
        file.truncate(2**36)
    for path, reason in ((tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device"), (tmp_path / "zeros", "zero byte")):
        with pytest.raises(UserError, match=reason):
            reader.read_list(str(path))


def test_pictures_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with open(tmp_path / "zeros.jpg", "wb") as file:
        file.truncate(2**36)
    samples = reader.Samples([str(tmp_path / "pipe.jpg"), "/dev/zero", str(tmp_path / "zeros.jpg")], None, None, None)
    batches = reader.read_batches(samples, [[0], [1], [2]], lambda image, _: image, (8, 8), skip_bad=True)
    pipe, device, zeros = (batch.bad[0][1] for batch in batches)
    assert (pipe, device) == ("a pipe, not a file", "a device, not a file") and "more than the" in zeros
    assert not reader.is_binary(str(tmp_path / "pipe.jpg"))
    with pytest.raises(UserError, match="neither a file nor a folder"):
        reader.find_images([str(tmp_path / "pipe.jpg")])


def test_names_are_shown_in_one_line():
    name = "a\nTest-9-score: [1.0], class [1]\x1b[31m.jpg"
    samples = reader.Samples([name, "long" * 9999], None, "a\nlist.txt", [1, 2])
    shown = reader.where(samples, 0)
    assert shown == r"a\nlist.txt:1: a\nTest-9-score: [1.0], class [1]\x1b[31m.jpg"
    assert len(reader.where(samples, 1)) < 1100


def test_list_without_labels(tmp_path):
    path = write_list(tmp_path / "list.txt", "a.jpg\nmy birds/b 2.jpg\n")
    samples = reader.read_list(path, need_labels=False)
    assert samples.labels is None and samples.paths == [f"{tmp_path}/a.jpg", f"{tmp_path}/my birds/b 2.jpg"]
    path = write_list(tmp_path / "list.txt", "a.jpg 1\nb.jpg 2\n")
    assert reader.read_list(path, need_labels=False).labels.tolist() == [1, 2]
    with pytest.raises(UserError, match=r"list\.txt:2: no label"):
        reader.read_list(write_list(tmp_path / "list.txt", "a.jpg 1\nb.jpg\n"), need_labels=False)


def test_file_name_that_is_not_utf8(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"\xe9.png"), "wb") as file:
        file.write(encode(Image.new("RGB", (2, 3)), "PNG"))
    samples = reader.read_list(write_list(tmp_path / "list.txt", b"\xe9.png 1\n"))
    lists.check_files(samples)
    assert transforms.load(samples.paths[0]).shape == (3, 2, 3)


def test_find_images(tmp_path, capsys):
    """What a picture is test_find_pictures.py says; a file that is named is taken, whatever it is."""
    for name in ("b/2.JPG", "b/1.png", "a.webp", "c/d/x.bmp", "c/.hidden.jpg", "c/notes.txt", "c/y", "c/empty.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"text" if "notes" in name else b"\xff\xd8\xff")
    root = str(tmp_path)
    found = reader.find_images([root])
    names = ["a.webp", "b/1.png", "b/2.JPG", "c/d/x.bmp", "c/y"]
    assert found.paths == [f"{root}/{name}" for name in names] and found.labels is None
    assert reader.where(found, 1) == f"{root}/b/1.png"
    assert capsys.readouterr().err == (
        f"left out 3 files: 1 hidden (first: {root}/c/.hidden.jpg), 1 empty (first: {root}/c/empty.jpg), 1 no pictures "
        f"(first: {root}/c/notes.txt)\n"
    )
    inputs = [f"{root}/c/notes.txt", f"{root}/b", f"{root}/c/empty.jpg"]
    assert reader.find_images(inputs).paths == [inputs[0], f"{root}/b/1.png", f"{root}/b/2.JPG", inputs[2]]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        reader.find_images([f"{root}/nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no images in this folder$"):
        reader.find_images([f"{root}/empty"])
    (tmp_path / "empty" / "x").write_bytes(b"text")
    with pytest.raises(
        UserError, match=r"no images in this folder \(left out 1 file: 1 no pictures \(first: .*empty/x"
    ):
        reader.find_images([f"{root}/empty"])


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a", b"\xff\xd8\xff\xe0" + b"x" * 2000, True),  # no zero byte in its first KB
        ("list.txt", b"BMW/1.jpg 1\nP1/2.jpg 2\nGIF89a/3.jpg 1\nP5 7\n", False),
        ("list.txt", b"BMW/1.jpg 1\n" * 200, False),
        ("list", "a.jpg 1\n".encode("utf-16"), False),  # read_list says of it what it is
        ("list", "birds/a.jpg 1\n".encode("utf-16-le"), False),
        ("list", "birds/a.jpg 1\n".encode("utf-16-be"), False),
        ("unknown", bytes(1000), True),
        ("a.jpg", b"", True),
        ("a.TIFF", b"no picture", True),
        ("a.pdf", b"%PDF\0", True),
        ("list.txt", b"", False),
    ],
)
def test_what_is_a_list_and_what_a_picture(tmp_path, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    assert reader.is_binary(str(tmp_path / name)) == wanted
    if wanted:
        assert infer.find_samples([str(tmp_path / name)], None).paths == [str(tmp_path / name)]


def test_fingerprint():
    """Names that repeat in every class folder are told apart; the folders above may move."""
    labels = np.array([0, 1])
    first, other, moved = (
        reader.Samples([f"{a}/0.jpg", f"{b}/0.jpg"], labels, None, None)
        for a, b in (("x/cat", "x/dog"), ("x/cow", "x/dog"), ("y/z/cat", "y/./dog"))
    )
    assert reader.fingerprint(first) == reader.fingerprint(moved) != reader.fingerprint(other)
    assert reader.fingerprint(first, components=1) == reader.fingerprint(other, components=1)
    # Crops are called as the whole pictures are.
    whole, crops, wider = (
        reader.Samples([f"cub/{folder}images/{n}/0.jpg" for n in "ab"], labels, None, None)
        for folder in ("", "boxes/", "boxes_margin_0.1_context/")
    )
    assert len({reader.fingerprint(samples) for samples in (whole, crops, wider)}) == 3
    digest = reader.fingerprint(whole)
    assert reader.is_fingerprint(digest, whole) and not reader.is_fingerprint(digest, crops, early=False)
    # As checkpoints of before have it.
    for text in ("a/0.jpg 0\nb/0.jpg 1\n", "0.jpg 0\n0.jpg 1\n"):
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert reader.is_fingerprint(digest, crops) and not reader.is_fingerprint(digest, crops, early=False)


def test_a_bomb_is_one_bad_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg_that_claims(65000, 65000))
    (tmp_path / "b.jpg").write_bytes(encode(RGB, "JPEG"))
    samples = reader.Samples([str(tmp_path / n) for n in ("a.jpg", "b.jpg")], None, "list", [1, 2])
    [batch] = reader.read_batches(samples, [[0, 1]], lambda image, position: image, RGB.shape[:2], skip_bad=True)
    assert batch.index.tolist() == [1] and batch.bad == [(0, "65000 x 65000 pixels, more than --max_pixels=67108864")]


@pytest.fixture()
def folder(tmp_path):
    """23 JPEGs of different sizes; -> Samples."""
    rows = []
    for i in range(23):
        (tmp_path / f"{i}.jpg").write_bytes(encode(noise(20 + i, 40 - i, seed=i), "JPEG"))
        rows.append(f"{i}.jpg {100 + i // 4}\n")
    return reader.read_list(write_list(tmp_path / "list.txt", "".join(rows)))


def data_arguments(*flags):
    parser = utility.make_parser("test")
    reader.add_data_arguments(parser)
    return parser.parse_args(flags)


def test_flags():
    args = data_arguments()
    assert (args.train_list, args.val_list) == ("data/CUB200_train.txt", "data/CUB200_val.txt")
    assert (args.data_dir, args.num_workers, args.seed, args.on_bad_image) == (None, None, None, "fail")
    args = data_arguments("--image_shape=3,32,48", "--test_transform=resize", "--num_workers=3", "--seed=0")
    assert args.image_shape == [3, 32, 48] and args.test_transform == "resize"
    for flag in ("--image_shape=3,32", "--image_shape=1,32,32", "--image_shape=3,4,32", "--num_workers=0", "--seed=-1"):
        with pytest.raises(UserError, match=flag.split("=")[0]):
            data_arguments(flag)


@pytest.mark.parametrize("transform", ["center_crop", "resize"])
def test_read_in_order(folder, transform, capsys):
    reading = Reading([3, 16, 20], transform, num_workers=2, on_bad_image="skip")
    with open(folder.paths[9], "wb") as file:
        file.write(b"hello")
    os.remove(folder.paths[11])
    batches = list(reader.read_in_order(folder, reading, 8))
    bad = [pair for batch in batches for pair in batch.bad]
    left = [i for i in range(23) if i not in (9, 11)]
    assert np.concatenate([batch.index for batch in batches]).tolist() == left
    assert [len(batch.index) for batch in batches] == [8, 6, 7]
    wanted = [transforms.TEST_TRANSFORMS[transform](transforms.load(folder.paths[i]), (16, 20)) for i in left]
    assert np.array_equal(np.concatenate([batch.image for batch in batches]), wanted)
    reader.report_bad_images(folder, bad)
    message = capsys.readouterr().err
    assert message == (
        f"warning: skipped 2 bad images; the first: {folder.source}:10: {folder.paths[9]}: "
        "not an image, or in no format that is known here\n"
    )
    reader.report_bad_images(folder, [])
    assert capsys.readouterr().err == ""
    reading = dataclasses.replace(reading, on_bad_image="fail")
    with pytest.raises(UserError, match=r"list\.txt:10: .*9\.jpg: not an image"):
        list(reader.read_in_order(folder, reading, 8))
