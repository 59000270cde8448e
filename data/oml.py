"""The table of Open Metric Learning (OML): a CSV with a line for each picture, read, checked and written.

    path,label,split,is_query,is_gallery           and, if you like: x_1,x_2,y_1,y_2, category and others
    images/7/a.jpg,7,train,,
    images/9/b.jpg,9,validation,True,True

split: train, or validation, of which each picture is a query, in the gallery, or both. A path counts from the folder of
the CSV. A box (x_1 <= x < x_2, y_1 <= y < y_2, in pixels of the upright picture) is what is looked at: it is cut out.
"""

import collections
import csv
import io
import itertools
import os
import re
import sys

import files
import pictures
from listing import as_listed
from runtime import packages, process
from utility import UserError, plain

MOST_LINE = 2**16  # characters of a line
COLUMNS = ("path", "label", "split", "is_query", "is_gallery")
BOX = ("x_1", "x_2", "y_1", "y_2")
MOST_SIDE = 65535  # of a JPEG
OWN_CROP = re.compile(r"\d+_\w+\.jpg")  # what `crop` writes

# A picture. line: in the CSV; query, gallery: bool, both False of one that trains; box: (x_1, x_2, y_1, y_2) or None;
# category: text, "" where there is none.
Row = collections.namedtuple("Row", "line path label query gallery box category")


# ---------------------------------------------------------------- read


def read(path):
    """The Rows of a CSV, checked. Raises: UserError that names the line of what is wrong."""
    try:
        table = csv.reader(_lines(path), strict=True)
        columns = _read_header(path, next(table, []))
        rows = [_row(path, table.line_num, columns, values) for values in table if values]
    except csv.Error as error:
        raise UserError(f"{path}:{table.line_num}: not a line of a CSV: {plain(error)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise UserError(f"{path}: has no pictures")
    _check_queries(path, rows)
    _check_files(path, rows)
    _report_categories(path, rows)
    return rows


def _lines(path):
    """Yields the lines of a text file. Raises: OSError, ValueError; UserError where one shows that it is no text."""
    with io.TextIOWrapper(files.open_file(path), "utf-8-sig", "surrogateescape", newline="") as file:
        for number in itertools.count(1):
            line = file.readline(MOST_LINE)
            if not line:
                return
            if "\0" in line:
                raise UserError(f"{path}:{number}: a zero byte: no CSV, or one in UTF-16: save it as UTF-8")
            if len(line) == MOST_LINE:
                raise UserError(f"{path}:{number}: more than {MOST_LINE} characters: this is no CSV of pictures")
            yield line


def _read_header(path, names):
    """{name: column} of the header. Raises: UserError where columns are missing, or there twice."""
    columns = {name.strip(): place for place, name in reversed(list(enumerate(names)))}
    boxes = [name for name in BOX if name in columns]
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        has = ", ".join(plain(name, 50) for name in names[:20]) or "nothing"
        raise UserError(f"{path}:1: no column {missing[0]}: a CSV of OML has {', '.join(COLUMNS)}, this has {has}")
    twice = next((name for place, name in enumerate(names) if columns[name.strip()] != place), None)
    if twice is not None:
        raise UserError(f"{path}:1: the column '{plain(twice, 50)}' is there twice")
    if 0 < len(boxes) < 4:
        missing = next(name for name in BOX if name not in columns)
        raise UserError(f"{path}:1: the column {boxes[0]} without {missing}: a box needs {', '.join(BOX)}, or none")
    return columns


def _row(path, line, columns, values):
    """The Row of a line. Raises: UserError."""
    place = f"{path}:{line}"
    if len(values) != len(columns):
        raise UserError(f"{place}: {len(values)} fields, {len(columns)} were expected, as in the first line")
    cell = {name: values[column].strip() for name, column in columns.items()}
    name = values[columns["path"]]
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", cell["label"]) or not -(2**63) <= int(cell["label"]) < 2**63:
        raise UserError(f"{place}: the label '{plain(cell['label'], 50)}' is no integer of 64 bits")
    if not as_listed(name):
        raise UserError(f"{place}: a list cannot hold the path '{plain(name)}'")
    if cell["split"] not in ("train", "validation"):
        raise UserError(f"{place}: split is '{plain(cell['split'], 50)}': train or validation was expected")
    flags = [_flag(place, name, cell[name], cell["split"]) for name in ("is_query", "is_gallery")]
    if cell["split"] == "validation" and not any(flags):
        raise UserError(f"{place}: neither is_query nor is_gallery: a picture of validation is one of them, or both")
    return Row(line, name, int(cell["label"]), *flags, _box(place, cell), cell.get("category", ""))


def _flag(place, name, text, split):
    """The bool of is_query or is_gallery, False in train, where there is none. Raises: UserError."""
    if split == "train":
        if text.lower() not in ("", "nan", "none"):
            raise UserError(f"{place}: {name} is '{plain(text, 50)}': nothing was expected, for split is train")
        return False
    values = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if text.lower() not in values:
        raise UserError(f"{place}: {name} is '{plain(text, 50)}': True or False was expected")
    return values[text.lower()]


def _box(place, cell):
    """The box of a line, or None where it has none. Raises: UserError."""
    texts = [cell.get(name, "") for name in BOX]
    if not any(texts):
        return None
    for name, text in zip(BOX, texts):
        if not re.fullmatch(r"[0-9]{1,9}(\.0)?", text):  # pandas writes 7.0 where another line has no box
            raise UserError(f"{place}: {name} is '{plain(text, 50)}': an integer of 0 or more was expected")
    x_1, x_2, y_1, y_2 = (int(text.partition(".")[0]) for text in texts)
    if x_1 >= x_2 or y_1 >= y_2:
        axis, low, high = ("x", x_1, x_2) if x_1 >= x_2 else ("y", y_1, y_2)
        raise UserError(f"{place}: {axis}_1 is {low}, {axis}_2 {high}: a box has {axis}_1 < {axis}_2")
    return x_1, x_2, y_1, y_2


def _check_queries(path, rows):
    """Raises a UserError where a query has no picture of its class in the gallery."""
    found = {row.label for row in rows if row.gallery}
    for row in rows:
        if row.query and row.label not in found:
            raise UserError(f"{path}:{row.line}: a query of the label {row.label}, of which the gallery has no picture")


def _check_files(path, rows):
    """Raises a UserError that names the first file that is not there, or no picture, and how many there are."""
    folder, known = os.path.dirname(path), {}
    for row in rows:
        if row.path not in known:
            known[row.path] = pictures.reason_against(os.path.join(folder, row.path))
    bad = [(row, *known[row.path]) for row in rows if known[row.path][0]]
    if bad:
        row, reason, why = bad[0]
        more = f" ({len(bad)} of {len(rows)} such lines)" if len(bad) > 1 else ""
        what = {pictures.UNREADABLE: why, pictures.NO_PICTURE: "no picture"}.get(reason, reason)
        where = plain(os.path.join(folder, row.path), 1000)
        raise UserError(f"{path}:{row.line}: {where}: {what}{more}")


def _report_categories(path, rows):
    """Says on stderr how many labels have more than one category."""
    found = collections.defaultdict(set)
    for row in rows:
        found[row.label].add(row.category)
    several = {label: names for label, names in found.items() if len(names) > 1}
    if several:
        label, names = next(iter(several.items()))
        names = plain(" and ".join(repr(name) for name in sorted(names)[:2]))
        what = f"{len(several)} labels have several categories; the first: {label} has {names}"
        print(f"warning: {plain(path, 1000)}: {what}", file=sys.stderr)


# ---------------------------------------------------------------- cut boxes out


def crop(path, rows, output):
    """Writes what is in the boxes of these rows to the folder `output`, as JPEGs called `crop_name`.

    A folder of such pictures that an earlier run has written is replaced, any other is kept under another name.
    Raises: UserError where a picture can't be read, or a box leaves it.
    """
    packages.check(("numpy", "cv2", "PIL"))
    from concurrent.futures import ThreadPoolExecutor

    files.make_directory(os.path.dirname(output) or os.curdir)
    with files.temporary_folder(output) as folder, ThreadPoolExecutor(process.cpu_count()) as pool:
        try:
            list(pool.map(lambda row: _cut(path, row, folder), rows))
        finally:
            pool.shutdown(cancel_futures=True)
        if os.path.lexists(output) and files.foreign_entry(output, OWN_CROP):
            files.keep(output)
        files.replace_folder(folder, output)


def crop_name(row):
    """The name of the file with what is in a row's box."""
    name = re.sub(r"\W+", "_", os.path.splitext(os.path.basename(row.path))[0], flags=re.ASCII)[:80]
    return f"{row.line}_{name or 'picture'}.jpg"


def _cut(path, row, folder):
    """Writes what is in a row's box into `folder`. Raises: UserError."""
    import boxes  # which needs packages that nothing else here needs
    import transforms

    place = f"{path}:{row.line}"
    try:
        picture = transforms.load(os.path.join(os.path.dirname(path), row.path))
    except transforms.BadImage as error:
        raise UserError(f"{place}: {plain(row.path, 1000)}: {error}") from None
    x_1, x_2, y_1, y_2 = row.box
    height, width = picture.shape[:2]
    if x_2 > width or y_2 > height:
        raise UserError(f"{place}: the box ends at {x_2}, {y_2}, the picture at {width}, {height}")
    if max(x_2 - x_1, y_2 - y_1) > MOST_SIDE:
        raise UserError(f"{place}: the box is {x_2 - x_1} x {y_2 - y_1}, and a JPEG at most {MOST_SIDE} each way")
    with open(os.path.join(folder, crop_name(row)), "wb") as file:
        file.write(boxes.jpeg(picture[y_1:y_2, x_1:x_2]))


# ---------------------------------------------------------------- write


def text_of(lists):
    """The text of a CSV, of {list: [(path, label)]}: train, and val or query and gallery."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows((path, label, "train", "", "") for path, label in lists.get("train", ()))
    query = set(lists.get("query", lists.get("val", ())))
    gallery = set(lists.get("gallery", lists.get("val", ())))
    for path, label in lists.get("val", ()):
        table.writerow((path, label, "validation", (path, label) in query, (path, label) in gallery))
    return text.getvalue()
