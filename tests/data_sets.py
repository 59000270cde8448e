"""Small copies of published data sets, in exactly their layouts and with their known errors."""

import hashlib
import io
import os
import sys
import zipfile

import cv2
import numpy as np
from conftest import FORKS, ROOT

sys.path.insert(0, os.path.join(ROOT, "data"))


def jpeg(seed, width=40, height=30, grey=False):
    """The bytes of a JPEG: the upper left quarter in a colour of the seed, on another one."""
    rng = np.random.default_rng(seed)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = rng.integers(0, 256, 3)
    image[: height // 2, : width // 2] = rng.integers(0, 256, 3)
    return cv2.imencode(".jpg", image[:, :, 0] if grey else image)[1].tobytes()


def write(folder, files):
    """Writes dict path -> bytes or text below a folder."""
    for name, content in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())


def zipped(members):
    """The bytes of a zip with dict name -> bytes or text; a ZipInfo as name says more of its member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def prepare(script, *flags, status=0, cwd=ROOT):
    """Runs a script of data/; a failure has exactly one line on stderr, an `error:`. -> CompletedProcess"""
    result = FORKS.run([sys.executable, os.path.join(ROOT, "data", script), *map(str, flags)], cwd)
    assert result.returncode == status, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    if status:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    return result


def mac(name):
    """What macOS puts beside a file."""
    return os.path.join(os.path.dirname(name), f"._{os.path.basename(name)}")


# ---------------------------------------------------------------- the data sets


def sop(classes=4, images=2):
    """Stanford_Online_Products/: so many classes train, as many don't; the first picture is grey."""
    files, rows, number = {}, {}, 0
    for part, first in (("train", 1), ("test", 11319)):
        rows[part] = []
        for label in range(first, first + classes):
            kind = ("bicycle", "coffee_maker")[label % 2]
            for i in range(images):
                number += 1
                path = f"{kind}_final/{111000 + label}_{i}.JPG"
                files[path] = jpeg(label, grey=number == 1)
                rows[part].append(f"{number} {label} {1 + label % 2} {path}")
    head = "image_id class_id super_class_id path\n"
    for part, lines in {**rows, "info": rows["train"] + rows["test"]}.items():
        files[f"Ebay_{part}.txt"] = head + "".join(f"{line}\n" for line in lines)
    return {**files, mac(path): b"mac"}


CAR_NAMES = [f"Car {number} 2012" for number in range(1, 197)]
CAR_NAMES[0], CAR_NAMES[2] = "Zeta C/V Van 2012", "AM General 2000"  # a slash, and no order of the alphabet
CAR_LABELS = [1, 1, 2, 2, 3, 3, 99, 99, 100, 100, 196, 196]
CAR_BOX = (3, 5, 20, 15)  # from 1, and the last is inside


def mat(path, **arrays):
    """Writes a .mat file as scipy does: tables are lists of dicts, lists of texts are cells."""
    import scipy.io

    def as_array(value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            table = np.empty((1, len(value)), [(name, object) for name in value[0]])
            for number, row in enumerate(value):
                table[0, number] = tuple(row.values())
            return table
        return np.array([value], object) if isinstance(value, list) else value

    os.makedirs(os.path.dirname(path), exist_ok=True)
    compressed = arrays.pop("compressed", True)
    scipy.io.savemat(path, {name: as_array(value) for name, value in arrays.items()}, do_compression=compressed)


def car_rows(field, names, labels=CAR_LABELS, box=CAR_BOX):
    """The table of annotations; its flags `test` are another split than the one by class, as the released ones are."""
    corners = dict(zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), map(np.uint16, box)))
    rows = [{**corners, "class": np.uint8(label), field: name} for name, label in zip(names, labels)]
    return [{**row, "test": np.uint8(number % 2)} for number, row in enumerate(rows)]


def cars_combined(folder, compressed=True, **options):
    """car_ims/ and cars_annos.mat; the third picture is grey."""
    names = [f"car_ims/{number:06d}.jpg" for number in range(1, 1 + len(CAR_LABELS))]
    write(folder, {name: jpeg(label, grey=i == 2) for i, (name, label) in enumerate(zip(names, CAR_LABELS))})
    write(folder, {"car_ims/._000001.jpg": b"mac"})
    rows = car_rows("relative_im_path", names, **options)
    mat(os.path.join(folder, "cars_annos.mat"), annotations=rows, class_names=CAR_NAMES, compressed=compressed)


def cars_devkit(folder):
    """cars_train/, cars_test/ and devkit/; of each class a picture is in either."""
    for part, labelled in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        labels = CAR_LABELS[::2]
        names = [f"{number:05d}.jpg" for number in range(1, 1 + len(labels))]
        write(folder, {f"cars_{part}/{name}": jpeg(label) for name, label in zip(names, labels)})
        mat(os.path.join(folder, labelled), annotations=car_rows("fname", names, labels))
    mat(os.path.join(folder, "devkit", "cars_meta.mat"), class_names=CAR_NAMES)


def cars_by_folders():
    """The copy on Kaggle: names of folders have no slash."""
    files = {"names.csv": "".join(f"{name}\n" for name in CAR_NAMES)}
    for part in ("train", "test"):
        rows = []
        for number, label in enumerate(CAR_LABELS[::2], 1):
            image, name = f"{number:05d}.jpg", CAR_NAMES[label - 1].replace("/", "-")
            files[f"car_data/car_data/{part}/{name}/{image}"] = jpeg(label)
            rows.append(",".join(map(str, (image, *CAR_BOX, label))))
        files[f"anno_{part}.csv"] = "".join(f"{row}\n" for row in rows)
    return files


def inshop(train=4, items=3, size=256):
    """Img/img.zip's content under img/, and the two files; the boxes are the upper left quarter."""
    files, rows, boxes = {}, [], []
    for number in range(1, 1 + train + items):
        parts = ["train"] * 2 if number <= train else ["query", "query", "gallery", "gallery"]
        for i, part in enumerate(parts, 1):
            item = f"id_{number:08d}"
            path = f"img/WOMEN/Blouses_Shirts/{item}/{i:02d}_1_front.jpg"
            files[path] = jpeg(number, size, size)
            rows.append(f"{path}      {item}     {part}\n")
            boxes.append(f"{path}   3   1   000  000  {size // 2}  {size // 2}\n")
    head = "image_name item_id evaluation_status\n"
    columns = "image_name clothes_type pose_type x_1 y_1 x_2 y_2\n"
    return files, {
        "Eval/list_eval_partition.txt": f"{len(rows)}\n{head}{''.join(rows)}",
        "Anno/list_bbox_inshop.txt": f"{len(rows)}\n{columns}{''.join(boxes)}",
    }


def birds(top="images", classes=(1, 2, 101, 102), images=2):
    """CUB's class folders; the first picture is grey, as eight of CUB-200-2011 are."""
    files = {
        f"{top}/{c:03d}.Bird/Bird_{c}_{i}.jpg": jpeg(c, grey=(c, i) == (1, 0)) for c in classes for i in range(images)
    }
    return {**files, f"{top}/001.Bird/._Bird_1_0.jpg": b"mac", f"{top}/._001.Bird": b"mac"}


def birds_2011(**options):
    """CUB_200_2011/ with its files; boxes are corner and size, in floats."""
    pictures = [name[len("images/") :] for name in birds(**options) if "._" not in name]
    files = {f"CUB_200_2011/{name}": content for name, content in birds(**options).items()}
    rows = list(enumerate(pictures, 1))
    files["CUB_200_2011/images.txt"] = "".join(f"{n} {name}\n" for n, name in rows)
    files["CUB_200_2011/image_class_labels.txt"] = "".join(f"{n} {int(name[:3])}\n" for n, name in rows)
    files["CUB_200_2011/train_test_split.txt"] = "".join(f"{n} {n % 2}\n" for n, _ in rows)
    files["CUB_200_2011/bounding_boxes.txt"] = "".join(f"{n} 2.0 4.0 18.0 11.0\n" for n, _ in rows)
    return files
