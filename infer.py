#!/usr/bin/env python3
"""Runs a network on any images: prints the best class of each, and writes their features.

    python infer.py --pretrained_model=output/ResNet50/best --input photos/ \\
        --feature_file=features.npz

--feature_file=*.npz holds `features` float32 [N, D] (the embeddings, not normalised), `paths` and, where the input is
a list with labels, `labels` int64 [N], all in the order of the input; *.csv has the same as a table with the columns
path, label, f0, f1 ...

    python infer.py --pretrained_model=output/ResNet50/best \\
        --export_dir=exported

writes a model for Paddle Inference that takes pictures and returns embeddings, without any of these scripts, and run.py
that runs it on files. --pretrained_model takes this folder, too.
"""

from runtime import packages

packages.check()

import csv
import dataclasses
import os

import numpy as np

import files
import lists
import models
import reader
import utility
import weights
from retrieval import engine, export, exported_run, extraction, refine
from runtime import parallel, process
from utility import UserError, boolean, number, plain


def build_parser():
    parser = utility.make_parser(__doc__)
    # fmt: off
    add = parser.add_argument_group("inference").add_argument
    add("--input", nargs="+", help="list files, folders (with their subfolders) or images (default: --val_list)")
    add("--feature_file", default="", help="write the features to this file, .npz or .csv")
    add("--export_dir", default="",
        help="write a model for Paddle Inference to this folder: uint8 pictures in, embeddings of length 1 out; unless "
        "--input, --val_list or --feature_file is given, too, that is all that is done")
    add("--batch_size", type=number(int, low=1), default=32, help="images at once; changes no figure")
    add("--with_mem_opt", type=boolean, default=False, help="taken as in the original; inference keeps no activations")
    # fmt: on
    refine.add_refine_arguments(parser)
    reader.add_data_arguments(parser, training=False)
    models.add_model_arguments(parser)
    weights.add_weight_arguments(parser)
    engine.add_engine_arguments(parser)
    utility.start_here(parser, ("input", "pretrained_model", "feature_file", "export_dir"))
    return parser


def main():
    parser = build_parser()
    args, typed = utility.parse_typed(parser)
    idle = {"train_list": "nothing is trained", **refine.idle_flags(vars(args)), **extraction.idle_flags(vars(args))}
    utility.note_idle({**idle, **({"val_list": "--input is given"} if args.input else {})}, typed)
    process.join_early(args.use_gpu, args.seed)
    if args.export_dir:
        export.check_export_folder(args.export_dir)
    samples = read_input(vars(args), typed)
    if args.feature_file:
        if not args.feature_file.endswith((".npz", ".csv")):
            raise UserError(f"--feature_file={args.feature_file}: must end in .npz or .csv")
        files.check_output(args.feature_file, is_feature_file, "a feature file of infer.py")
    if samples and args.on_bad_image == "fail":
        lists.check_files(samples)
    refinement = utility.fill(refine.Refinement, args)
    refine.check_refinement(refinement)
    process.start_paddle(args.use_gpu, args.seed)
    opened = extraction.open_network(vars(args), args.pretrained_model, args.allow_partial, args.weights)
    vars(args).update(dataclasses.asdict(opened.settings))
    utility.print_arguments(vars(args), parser)

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
    scores = Scores(samples, opened)
    show = None if args.quiet and args.feature_file else scores.show
    found = extraction.extract(network, samples, reading, args.batch_size, show)
    if not parallel.is_first():
        return
    scores.show_names()
    reader.report_bad_images(samples, found.bad)
    found = refine.whitened(found, whitening)
    if args.feature_file:
        write_features(args.feature_file, samples, found)


def read_input(flags, typed):
    """The Samples to look at, or None where a model is exported and nothing else asked for.

    Args:
        flags: {name: value}; typed: the names of those that were not left at their default.
    """
    if flags["export_dir"] and not typed & {"input", "val_list", "feature_file"}:
        return None
    if flags["input"]:
        return find_samples(flags["input"], flags["data_dir"])
    flags = extraction.lists_of_run(flags, typed)
    return reader.read_list(flags["val_list"], flags["data_dir"], need_labels=False)


def write_features(path, samples, found):
    """Writes extraction.Features of Samples, with their paths and labels, to an .npz or a .csv file."""
    paths = [samples.paths[index] for index in found.index]
    labels = None if samples.labels is None else samples.labels[found.index]
    if path.endswith(".csv"):
        write_csv(path, paths, labels, found.features)
    else:
        arrays = {"features": found.features, "paths": np.array(paths)}
        if labels is not None:
            arrays["labels"] = labels
        with files.atomic_write(path, "wb") as file:
            np.savez(file, **arrays)
    count, size = found.features.shape
    print(f"wrote {count} features of size {size} to {path}")


def write_csv(path, paths, labels, features):
    """Writes a line for each picture: path, label where there are labels, and the values f0, f1, ... of its feature."""
    with files.atomic_write(path) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["path", *(["label"] if labels is not None else []), *(f"f{n}" for n in range(features.shape[1]))]
        )
        for index, name in enumerate(paths):
            label = [] if labels is None else [labels[index]]
            rows.writerow([name, *label, *(np.format_float_positional(x, trim="0") for x in features[index])])


def is_feature_file(path):
    """Whether a file is one that --feature_file has written before."""
    try:
        if path.endswith(".csv"):
            with files.open_file(path) as file:
                return file.readline(100).startswith((b"path,label,f0,", b"path,f0,"))
        return exported_run.is_feature_file(path)
    except OSError:
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


class Scores:
    """Prints the best class of every image of `samples`.

    Args:
        opened: extraction.Opened, with the labels of the head's classes; without them their numbers are printed.
    """

    def __init__(self, samples, opened):
        self.samples, self.labels, self.names = samples, opened.labels, opened.class_names
        self.found, self.done = set(), 0

    def show(self, picture_index, logits):
        """Takes logits float32 [B, C] of the images `picture_index`, or None."""
        if logits is None:
            return
        if self.labels is not None:
            logits = logits[:, : len(self.labels)]  # a wider head has outputs that stand for no label
        for index, score, best in zip(picture_index, logits.max(axis=1), logits.argmax(axis=1)):
            label = best if self.labels is None else self.labels[best]
            path = plain(self.samples.paths[index], 1000)
            print(f"Test-{self.done}-score: [{score:.6f}], class [{label}], {path}")
            self.found.add(int(best))
            self.done += 1

    def show_names(self):
        """Prints what the classes that were found are called, where that is known."""
        for best in sorted(self.found) if self.names else ():
            print(f"[{self.labels[best]}] = {plain(self.names[best])}")


if __name__ == "__main__":
    process.run_script(main)
