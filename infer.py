"""Runs a network on any images: prints the best class of each, and writes their features.

    python infer.py --pretrained_model=output/ResNet50/best --input photos/ --feature_file=features.npz

--feature_file holds `features` float32 [N, D] (the embeddings, not normalised), `paths` and, where the input is a list
with labels, `labels` int64 [N], all in the order of the input.

    python infer.py --pretrained_model=output/ResNet50/best --export_dir=exported

writes a model for Paddle Inference that takes pictures and returns embeddings, without any of these scripts, and run.py
that runs it on files. --pretrained_model takes this folder, too.
"""

import dataclasses
import os

import numpy as np

import files
import models
import reader
import utility
import weights
from retrieval import engine, export, exported_run, extraction, refine
from runtime import parallel, process
from utility import UserError, boolean, number, plain


def parse_args():
    parser = utility.make_parser(__doc__)
    reader.add_data_arguments(parser)
    models.add_model_arguments(parser)
    weights.add_weight_arguments(parser)
    engine.add_engine_arguments(parser)
    refine.add_refine_arguments(parser)
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
    process.join_early(args.use_gpu, args.seed)
    if args.export_dir:
        export.check_export_folder(args.export_dir)
    if args.export_dir and not typed & {"input", "val_list", "feature_file"}:
        samples = None
    elif args.input:
        samples = find_samples(args.input, args.data_dir)
    else:
        samples = reader.read_list(args.val_list, args.data_dir, need_labels=False)
    if args.feature_file:
        if not args.feature_file.endswith(".npz"):
            raise UserError(f"--feature_file={args.feature_file}: must end in .npz")
        files.check_output(args.feature_file, exported_run.is_feature_file, "a feature file of infer.py")
    if samples and args.on_bad_image == "fail":
        reader.check_files(samples)
    refinement = utility.fill(refine.Refinement, args)
    refine.check_refinement(refinement)
    process.start_paddle(args.use_gpu, args.seed)
    opened = extraction.open_network(vars(args), args.pretrained_model, args.allow_partial, args.weights)
    vars(args).update(dataclasses.asdict(opened.settings))
    utility.print_arguments(vars(args))

    options, reading = utility.fill(engine.EngineOptions, args), utility.fill(reader.Reading, args)
    network = refine.refined(opened.network, refinement)
    pictures = len(samples.paths) if samples else 0
    network = engine.prepare(network, options, args.image_shape, pictures, opened.file_name)
    whitening = refine.find_whitening(refinement, network, reading, args.batch_size, args.data_dir)
    if args.export_dir and parallel.is_first():
        whole = refine.refined(opened.network, refinement, whitening)
        how = refine.in_words(refinement, whitening)
        export.export(whole, opened.settings, args.export_dir, opened.trained_labels, how, opened.chosen_on)
        print(f"wrote the model to {args.export_dir}: README.md there says how to run it")
    if not samples:
        return
    if not args.class_dim:
        print("note: this network has no softmax head, so there are no scores; --feature_file writes the features")
    found = extraction.extract(network, samples, reading, args.batch_size, Scores(samples, opened.labels).show)
    if not parallel.is_first():
        return
    reader.report_bad_images(samples, found.bad)
    found = refine.whitened(found, whitening)
    if args.feature_file:
        write_features(args.feature_file, samples, found)


def write_features(path, samples, found):
    """Writes extraction.Features of Samples, with their paths and labels, to an .npz file."""
    arrays = {"features": found.features, "paths": np.array([samples.paths[i] for i in found.index])}
    if samples.labels is not None:
        arrays["labels"] = samples.labels[found.index]
    with files.atomic_write(path, "wb") as file:
        np.savez(file, **arrays)
    count, size = found.features.shape
    print(f"wrote {count} features of size {size} to {path}")


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


class Scores:
    """Prints the best class of every image of `samples`.

    Args:
        labels: int64, those of the head's classes; None: their numbers are printed.
    """

    def __init__(self, samples, labels):
        self.samples, self.labels, self.done = samples, labels, 0

    def show(self, picture_index, logits):
        """Takes logits float32 [B, C] of the images `picture_index`, or None."""
        if logits is None:
            return
        if self.labels is not None:
            logits = logits[:, : len(self.labels)]  # a wider head has outputs that stand for no label
        for index, score, best in zip(picture_index, logits.max(axis=1), logits.argmax(axis=1)):
            label = best if self.labels is None else self.labels[best]
            print(f"Test-{self.done}-score: [{score:.6f}], class [{label}], {plain(self.samples.paths[index], 1000)}")
            self.done += 1


if __name__ == "__main__":
    process.run_script(main)
