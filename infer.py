"""Runs a network on any images: prints the best class of each, and writes their features.

    python infer.py --pretrained_model=output/ResNet50/best --input photos/ --feature_file=features.npz

--feature_file holds `features` float32 [N, D] (the embeddings, not normalised), `paths` and, where the input is a list
with labels, `labels` int64 [N], all in the order of the input.

    python infer.py --pretrained_model=output/ResNet50/best --export_dir=exported

writes a model for Paddle Inference that takes pictures and returns embeddings, without any of these scripts.
"""

import os
import zipfile

import numpy as np

import engine
import files
import models
import parallel
import reader
import utility
from utility import UserError, boolean, number


def parse_args():
    parser = utility.make_parser(__doc__)
    reader.add_data_arguments(parser)
    models.add_model_arguments(parser)
    engine.add_engine_arguments(parser)
    # fmt: off
    add = parser.add_argument_group("inference").add_argument
    add("--input", nargs="+", help="list files, folders (with their subfolders) or images (default: --val_list)")
    add("--feature_file", default="", help="write the features to this .npz file")
    add("--export_dir", default="",
        help="write a model for Paddle Inference to this folder: uint8 pictures in, embeddings of length 1 out; unless "
        "--input, --val_list or --feature_file is given, too, that is all that is done")
    add("--batch_size", type=number(int, low=1), default=32, help="images at once; changes no figure")
    add("--with_mem_opt", type=boolean, default=False, help="taken as in the original; inference keeps no activations")
    # fmt: on
    return utility.parse_typed(parser)


def main():
    args, typed = parse_args()
    utility.join_early(args)
    if args.export_dir:
        engine.check_export_folder(args.export_dir)
    if args.export_dir and not typed & {"input", "val_list", "feature_file"}:
        samples = None
    elif args.input:
        samples = find_samples(args.input, args.data_dir)
    else:
        samples = reader.read_list(args.val_list, args.data_dir, need_labels=False)
    if args.feature_file:
        if not args.feature_file.endswith(".npz"):
            raise UserError(f"--feature_file={args.feature_file}: must end in .npz")
        files.check_output(args.feature_file, is_feature_file, "a feature file of infer.py")
    if samples and args.on_bad_image == "fail":
        reader.check_files(samples)
    utility.start_paddle(args.use_gpu, args.seed)
    network, head_labels, trained = models.load_network(args)
    utility.print_arguments(args)
    if args.export_dir and parallel.is_first():
        engine.export(network, args.export_dir, args, trained)
        print(f"wrote the model to {args.export_dir}: README.md there says how to run it")
    if not samples:
        return
    if not args.class_dim:
        print("note: this network has no softmax head, so there are no scores; --feature_file writes the features")

    network = engine.prepare(network, args, len(samples.paths))
    features, index = run(network, samples, args, head_labels)
    if args.feature_file and parallel.is_first():
        arrays = {"features": features, "paths": np.array([samples.paths[i] for i in index])}
        if samples.labels is not None:
            arrays["labels"] = samples.labels[index]
        with files.atomic_write(args.feature_file, "wb") as file:
            np.savez(file, **arrays)
        print(f"wrote {len(index)} features of size {features.shape[1]} to {args.feature_file}")


def is_feature_file(path):
    """Whether a file is one that --feature_file has written before."""
    try:
        with np.load(path) as file:
            return {"features", "paths"} <= set(file.files) <= {"features", "paths", "labels"}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError):
        return False


def find_samples(inputs, data_dir):
    """Samples of list files, folders and images; labels only where all inputs are lists that have them."""
    parts = []
    for path in inputs:
        is_list = os.path.isfile(path) and not reader.is_binary(path)
        parts.append(reader.read_list(path, data_dir, need_labels=False) if is_list else reader.find_images([path]))
    if len(parts) == 1:
        return parts[0]
    labelled = all(part.labels is not None for part in parts)
    return reader.Samples(
        [path for part in parts for path in part.paths],
        np.concatenate([part.labels for part in parts]) if labelled else None,
        None,
        [
            f"{part.source}:{line}" if line else None
            for part in parts
            for line in part.lines or [None] * len(part.paths)
        ],
    )


def run(network, samples, args, head_labels):
    """Prints the best class of every image; -> features float32 [N, D], list indices int64 [N]."""
    done = 0

    def print_scores(picture_index, logits):
        nonlocal done
        if logits is not None:
            if head_labels is not None:
                logits = logits[:, : len(head_labels)]  # a wider head has outputs that stand for no label
            for index, score, best in zip(picture_index, logits.max(axis=1), logits.argmax(axis=1)):
                label = best if head_labels is None else head_labels[best]
                print(f"Test-{done}-score: [{score:.6f}], class [{label}], {samples.paths[index]}")
                done += 1

    bad = []
    batches = reader.read_in_order(samples, args, args.batch_size, bad)
    features, index = utility.extract(network, samples, batches, bad, print_scores)
    if parallel.is_first():
        reader.report_bad_images(samples, bad)
    return features, index


if __name__ == "__main__":
    utility.run_script(main)
