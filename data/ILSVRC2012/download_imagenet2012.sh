#!/bin/sh
# Prepares ImageNet (ILSVRC2012): see usage below.

functions_only=yes
# shellcheck source=data/download_cub200.sh
. "$(dirname -- "$0")/../download_cub200.sh" || exit 2

usage() {
    cat <<'EOF'
Prepares ImageNet (ILSVRC2012) from its official files: unpacks the images to train/ and val/ and writes train_list.txt
and val_list.txt, a line `<path> <label>` for each image. A label is the rank, 0 to 999, of the class's WordNet id.

    sh download_imagenet2012.sh                   the three files lie beside this script
    sh download_imagenet2012.sh /mnt/tars         they lie there
    IMAGENET_URL=https://name:password@host/folder sh download_imagenet2012.sh
                                                  those that are missing are downloaded from there

    ILSVRC2012_img_train.tar        138 GB    images to train on
    ILSVRC2012_img_val.tar          6.7 GB    images to test on
    ILSVRC2012_devkit_t12.tar.gz    2.5 MB    their labels

ImageNet gives them to registered users: https://image-net.org/download-images. The script keeps no password. It needs
as much free space as the files take again; their inner archives are unpacked in passing. Interrupted, it goes on where
it was when you run it again. Once train/ and val/ are there, the two large files are no longer needed.

  --output_dir=DIR    where train/, val/ and the lists go (default: this script's own folder)
  --help              this text

Environment:
  PYTHON              interpreter for checking and unpacking (default: python3)
  IMAGENET_URL        the folder URL of the three files
  IMAGENET_TRAIN_SIZE, IMAGENET_TRAIN_MD5, IMAGENET_VAL_SIZE, IMAGENET_VAL_MD5, IMAGENET_DEVKIT_MD5, IMAGENET_CLASSES
                      bytes and MD5 of the files and the number of classes, for another pack
EOF
}

# write_lists DEVKIT FOLDER: FOLDER/train_list.txt and val_list.txt for the images in FOLDER/train and FOLDER/val.
write_lists() {
    PYTHONPATH=$here/.. "$PYTHON" - "$@" "${IMAGENET_CLASSES:-1000}" <<'EOF' || exit 2
import os
import struct
import sys
import tarfile
import zlib

import split
from utility import UserError

# Of MATLAB 5 files (which the devkit's meta.mat is): data types, and the two array classes that are not numbers.
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q", 16: "B", 17: "H", 18: "I"}
COMPRESSED = 15
STRUCT, TEXT = 2, 4


def elements(data, at=0):
    """Yields (data type, content) of the elements that follow one another in a MATLAB 5 file."""
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # up to 4 bytes: the size is in the upper half of the first word, the content in the second
            yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
            at += 8
            continue
        content = data[at + 8 : at + 8 + size]
        if kind == COMPRESSED:
            yield from elements(zlib.decompress(content))
        else:
            yield kind, content
        at += 8 + size + (0 if kind == COMPRESSED else -size % 8)


def numbers(element):
    kind, content = element
    return struct.unpack(f"<{len(content) // struct.calcsize(NUMBERS[kind])}{NUMBERS[kind]}", content)


def value(array):
    """The text or the single number of an array."""
    flags, _dimensions, _name, content = elements(array)
    if numbers(flags)[0] & 0xFF == TEXT:
        return "".join(map(chr, numbers(content)))
    return int(numbers(content)[0])


def read_classes(mat):
    """-> dict ILSVRC2012_ID -> WordNet id of the classes proper; meta.mat also has the groups above them."""
    for _, array in elements(mat, 128):
        flags, _dimensions, _name, *rest = elements(array)
        if numbers(flags)[0] & 0xFF != STRUCT:
            continue
        (_, width), (_, names), *fields = rest
        width = struct.unpack("<i", width)[0]
        names = [names[i : i + width].split(b"\0")[0].decode() for i in range(0, len(names), width)]
        column = {name: [array for _, array in fields[i :: len(names)]] for i, name in enumerate(names)}
        rows = zip(column["ILSVRC2012_ID"], column["WNID"], column["num_children"])
        return {value(number): value(wnid) for number, wnid, children in rows if value(children) == 0}
    raise UserError("no table of classes in it")


def read_devkit(path):
    """-> dict ILSVRC2012_ID -> WordNet id; list of the ILSVRC2012_ID of each validation image."""
    folder = "ILSVRC2012_devkit_t12/data/"
    try:
        with tarfile.open(path) as archive:
            mat = archive.extractfile(folder + "meta.mat").read()
            truth = archive.extractfile(folder + "ILSVRC2012_validation_ground_truth.txt").read()
        classes, truth = read_classes(mat), [int(line) for line in truth.split()]
    except (UserError, tarfile.TarError, zlib.error, struct.error, EOFError, LookupError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise UserError(f"{path}: cannot read the classes: {reason}") from None
    if not set(truth) <= set(classes):
        raise UserError(f"{path}: its validation images have classes that it does not name")
    return classes, truth


def write_lists(devkit, root, expected):
    classes, truth = read_devkit(devkit)
    if str(len(classes)) != expected:
        raise UserError(f"{devkit}: {len(classes)} classes instead of {expected} (IMAGENET_CLASSES)")
    label = {wnid: rank for rank, wnid in enumerate(sorted(classes.values()))}
    folder = os.path.join(root, "train")
    odd = set(label) ^ {name for name in os.listdir(folder) if not name.startswith(".")}
    if odd:
        problem = "missing" if min(odd) in label else "no class of the devkit"
        raise UserError(f"{os.path.join(folder, min(odd))} is {problem}: move {folder} away and run this again")
    train = []
    for wnid in sorted(label):
        names = sorted(name for name in os.listdir(os.path.join(folder, wnid)) if not name.startswith("."))
        train += [f"train/{wnid}/{name} {label[wnid]}\n" for name in names]

    folder = os.path.join(root, "val")
    names, val = set(os.listdir(folder)), []
    for number, identity in enumerate(truth, 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        if name not in names:
            raise UserError(f"{os.path.join(folder, name)} is missing: move {folder} away and run this again")
        val.append(f"val/{name} {label[classes[identity]]}\n")

    lists = {os.path.join(root, "train_list.txt"): train, os.path.join(root, "val_list.txt"): val}
    split.write_lists({path: "".join(rows) for path, rows in lists.items()})
    for path, rows in lists.items():
        print(f"{path}: {len(rows)} images, labels 0-{len(label) - 1}")
    if len(classes) == 1000 and len(train) != 1281167:
        print(f"warning: {len(train)} training images instead of 1281167: files added or removed?", file=sys.stderr)


try:
    write_lists(sys.argv[1], sys.argv[2], sys.argv[3])
except UserError as error:
    sys.exit(f"error: {error}")
except OSError as error:
    sys.exit(f"error: {error.filename}: {error.strerror}")
except KeyboardInterrupt:
    sys.exit("interrupted")
EOF
}

main() {
    here=$(dirname -- "$0")
    tars=$here output=$here
    trap 'exit 130' INT
    for argument in "$@"; do
        case $argument in
        -h | --help) usage && exit 0 ;;
        --output_dir=*) output=${argument#--output_dir=} ;;
        -*) fail "what is '$argument'? (see --help)" ;;
        *) tars=$argument ;;
        esac
    done
    need_python
    [ -d "$tars" ] || fail "$tars: no such folder"
    mkdir -p "$output" 2>/dev/null || fail "$output: cannot make this folder"

    # What is missing is said at once, not after hours of unpacking.
    files=ILSVRC2012_devkit_t12.tar.gz missing=
    for part in val train; do
        if [ -d "$output/$part" ]; then
            echo "$output/$part is here already"
        else
            files="$files ILSVRC2012_img_$part.tar"
        fi
    done
    for file in $files; do [ -e "$tars/$file" ] || missing="$missing $file"; done
    where="get it from https://image-net.org/download-images (for registered users), put it into $tars, run this again"
    [ -z "$missing" ] || [ -n "${IMAGENET_URL:-}" ] ||
        fail "not in $tars:$missing; $where, or set IMAGENET_URL (see --help)"
    for wanted in $files; do
        case $wanted in
        *devkit*) size='' md5=${IMAGENET_DEVKIT_MD5:-fa75699e90414af021442c21a62c3abf} ;;
        *val*) size=${IMAGENET_VAL_SIZE:-6744924160} md5=${IMAGENET_VAL_MD5:-29b22e2961454d5413ddabcf34fc5622} ;;
        *) size=${IMAGENET_TRAIN_SIZE:-147897477120} md5=${IMAGENET_TRAIN_MD5:-1d675b47d978889d74fa0da5fadfb00e} ;;
        esac
        fetch "ImageNet's $wanted" "$tars/$wanted" "$size" "md5:$md5" "$where" "${IMAGENET_URL%/}/$wanted"
    done
    for part in val train; do
        [ -d "$output/$part" ] || unpack "$tars/ILSVRC2012_img_$part.tar" "$output/$part" ""
    done
    write_lists "$tars/ILSVRC2012_devkit_t12.tar.gz" "$output"
    echo "next: python train.py --train_list=$output/train_list.txt --val_list=$output/val_list.txt --class_dim=1000"
}

main "$@"
