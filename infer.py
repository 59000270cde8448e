#!/usr/bin/env python3
"""Runs a network on any images: prints the best class of each, and writes their features.

    python infer.py --pretrained_model=output/ResNet50/best --input photos/ \\
        --feature_file=features.npz

--feature_file=*.npz holds `features` float32 [N, D] (the embeddings, of length 1 where they are refined or come
out of an exported model), `paths` and, where the input is a list with labels or a folder of class folders, `labels`
int64 [N], all in the order of the input; *.csv has the same as a table with the columns path, label, f0, f1 ... and
*.parquet with the column vector, and the rows of the nearest pictures in the file.

    python infer.py --pretrained_model=output/ResNet50/best --input query.jpg \\
        --gallery=features.npz --top_k=5

prints a line for each of the nearest pictures, fields with tabs between them: the query, rank, cosine, path, and where
they are known label and name of the class.

    python infer.py --pretrained_model=output/ResNet50/best \\
        --export_dir=exported

writes a model for Paddle Inference that takes pictures and returns embeddings, without any of these scripts, and run.py
that runs it on files. --pretrained_model takes this folder, too.
"""

from runtime import packages

packages.check()

import collections
import dataclasses
import os

import numpy as np

import lists
import models
import pictures
import reader
import utility
import weights
from retrieval import engine, export, extraction, features, refine, search
from runtime import parallel, process
from utility import UserError, boolean, number, plain


def build_parser():
    parser = utility.make_parser(__doc__)
    # fmt: off
    add = parser.add_argument_group("inference").add_argument
    add("--input", nargs="+", help="list files, folders (with their subfolders) or images (default: --val_list)")
    add("--feature_file", default="", help="write the features to this file, .npz, .csv or .parquet")
    add("--export_dir", default="",
        help="write a model for Paddle Inference to this folder: uint8 pictures in, embeddings of length 1 out; unless "
        "--input, --val_list, --gallery or --feature_file is given, too, that is all that is done")
    add("--batch_size", type=number(int, low=1), help="images at once; changes no figure (default: 32; on a GPU 128)")
    add("--with_mem_opt", type=boolean, default=False, help="taken as in the original; inference keeps no activations")
    # fmt: on
    search.add_search_arguments(parser)
    refine.add_refine_arguments(parser)
    reader.add_data_arguments(parser, training=False)
    models.add_model_arguments(parser)
    weights.add_weight_arguments(parser)
    engine.add_engine_arguments(parser)
    utility.start_here(parser, ("input", "pretrained_model", "feature_file", "gallery", "top_k", "export_dir"))
    return parser


def main():
    parser = build_parser()
    args, typed = utility.parse_typed(parser)
    process.join_early(args.use_gpu, args.seed)
    refinement, asked = utility.fill(refine.Refinement, args), utility.fill(search.Search, args)
    check_outputs(args.export_dir, args.feature_file, asked, refinement)
    samples = read_input(vars(args), typed)
    gallery = open_gallery(asked.gallery, args.data_dir)
    indexed = gallery if isinstance(gallery, reader.Samples) else None
    for some in (samples, indexed):
        if some and args.on_bad_image == "fail":
            lists.check_files(some)
    to_learn_from = refine.check_refinement(refinement, args.data_dir, args.on_bad_image)
    process.start_paddle(args.use_gpu, args.seed)
    utility.note_idle(idle_flags(vars(args)), typed)
    opened = extraction.open_network(vars(args), args.pretrained_model, args.allow_partial, args.weights)
    vars(args).update(dataclasses.asdict(opened.settings))
    utility.print_arguments(vars(args), parser)

    options, reading = utility.fill(engine.EngineOptions, args), utility.fill(reader.Reading, args)
    network = refine.refined(opened.network, refinement)
    count = sum(len(some.paths) for some in (samples, indexed) if some)
    count += refine.count_seen(refinement, to_learn_from)
    network = engine.prepare(network, options, args.image_shape, count, opened.file_name)
    whitening = refine.find_whitening(
        refinement, opened, network, reading, args.batch_size, to_learn_from, engine.precision_in_use(options.precision)
    )
    if args.export_dir and parallel.is_first():
        export_model(args.export_dir, opened, refinement, whitening)
    if not samples:
        return

    made_by = None
    if parallel.is_first() and (asked.gallery or args.feature_file):
        made_by = features.made_by(opened, refinement, whitening, engine.precision_in_use(options.precision))
        if gallery and not indexed:
            features.check_made_by(gallery.source, gallery.made_by, made_by)

    def embed(some, on_batch=None):
        """extraction.Features of Samples; None on all ranks but 0."""
        return extraction.extract(network, some, reading, args.batch_size, on_batch, finish=refine.finish(whitening))

    scores = None if asked.gallery else scores_of(samples, opened)
    if not (scores or asked.gallery or args.feature_file):
        return
    shown = scores and not (args.quiet and args.feature_file)
    found = embed(samples, scores.show if shown else None)
    there = embed(indexed) if indexed and indexed.paths != samples.paths else found
    if parallel.is_first():
        if scores:
            scores.show_names()
        queries = features.gather(samples, found, class_names(samples), made_by, "--input")
        if indexed:
            gallery = features.gather(indexed, there, class_names(indexed), made_by, asked.gallery)
        write_results(asked, args.feature_file, queries, gallery, args.max_pixels)


def idle_flags(flags):
    """{flag: why} of those that have no effect beside the others, {name: value}."""
    why = {"train_list": "nothing is trained", **({"val_list": "--input is given"} if flags["input"] else {})}
    return {**why, **refine.idle_flags(flags), **extraction.idle_flags(flags), **search.idle_flags(flags)}


def check_outputs(export_dir, feature_file, asked, refinement):
    """Raises a UserError where an output can't be written, or would replace what is none, another one, or an input.

    Args:
        asked: search.Search; refinement: refine.Refinement.
    """
    outputs = {
        "feature_file": feature_file, "neighbours_file": asked.neighbours_file, "index_file": asked.index_file,
        "save_whiten": refinement.save_whiten, "export_dir": export_dir,
    }  # fmt: skip
    seen = {}
    for name, path in {"gallery": asked.gallery, "whiten": refinement.whiten, **outputs}.items():
        other = seen.setdefault(os.path.realpath(path), name) if path else name
        if name in outputs and other not in (name, {"save_whiten": "whiten"}.get(name)):
            raise UserError(f"--{name}={path}: that is --{other}: give another name")
    if export_dir:
        export.check_export_folder(export_dir)
    if feature_file:
        features.check_feature_file(feature_file)
    search.check_search(asked)


def open_gallery(path, data_dir):
    """What --gallery means: features.Gallery of an .npz, Samples of a list, folder or picture, None for "" ."""
    if not path:
        return None
    if path.endswith(features.SUFFIXES) and not path.endswith(".npz"):
        raise UserError(
            f"--gallery={path}: of the files of features an .npz is searched: write one with --feature_file"
        )
    return features.open_features(path) if path.endswith(".npz") else find_samples([path], data_dir)


def export_model(folder, opened, refinement, whitening):
    """Writes the model of extraction.Opened, with all that refines its features, to a folder."""
    whole = refine.refined(opened.network, refinement, whitening)
    how = refine.in_words(refinement, whitening)
    made_by = features.made_by(opened, refinement, whitening, "float32")
    export.export(whole, opened.settings, folder, opened.trained_labels, how, opened.chosen_on, made_by)
    print(f"wrote the model to {folder}: README.md there says how to run it")


def class_names(samples):
    """{label: name} of the classes of lists that have a file of them beside them, or of class folders.

    A label that two lists use, and do not both have this name for, has none.
    """
    if samples.labels is None:
        return {}
    if samples.lines is None:
        folders = pictures.class_folders(samples.paths)
        return {label: folders[os.path.dirname(path)] for path, label in zip(samples.paths, samples.labels.tolist())}
    sources = [samples.source or str(line).rpartition(":")[0] for line in samples.lines]
    names = {path: reader.read_class_names(path) for path in set(sources)}
    found = collections.defaultdict(set)
    for path, label in set(zip(sources, samples.labels.tolist())):
        found[label].add(names[path].get(label))
    return {label: some.pop() for label, some in found.items() if len(some) == 1 and None not in some}


def scores_of(samples, opened):
    """Scores of extraction.Opened's head; None, with a line why, where it has no head that was trained."""
    if opened.settings.class_dim and opened.head_trained:
        return Scores(samples, opened.labels, opened.class_names)
    why = "this network has no softmax head"
    if opened.settings.class_dim:
        why = "the run did not train the softmax head (--alpha=0)"
    print(f"note: {why}, so there are no scores; --feature_file writes the features")
    return None


def write_results(asked, feature_file, found, gallery, max_pixels):
    """Writes features, and prints and writes neighbours.

    Args:
        asked: search.Search.
        found: features.Gallery of the pictures; gallery: that they are searched in, or None; max_pixels: of a picture.
    """
    if gallery:
        features.check_size(gallery, found.features.shape[1])
    if feature_file:
        own = None
        if feature_file.endswith(".parquet"):
            own = search.among_themselves(found, asked.top_k)
        features.write(feature_file, found, own)
    if gallery:
        search.report(asked, found, gallery, search.find(asked, found, gallery), max_pixels)


def read_input(flags, typed):
    """The Samples to look at, or None where a model is exported and nothing else asked for.

    Args:
        flags: {name: value}; typed: the names of those that were not left at their default.
    """
    if flags["export_dir"] and not typed & {"input", "val_list", "gallery", "feature_file"}:
        return None
    if flags["input"]:
        if "" in flags["input"]:
            raise UserError("--input: one of them is empty: a variable that is not set?")
        return find_samples(flags["input"], flags["data_dir"])
    flags, _ = extraction.lists_of_run(flags, typed)
    return reader.read_list(flags["val_list"], flags["data_dir"], need_labels=False)


def find_samples(inputs, data_dir):
    """Samples of list files, folders and images.

    Labels only where all inputs are lists that have them, or where the only one is a folder with class folders.
    """
    parts = []
    for path in inputs:
        is_list = os.path.isfile(path) and not reader.is_binary(path)
        parts.append(reader.read_list(path, data_dir, need_labels=False) if is_list else reader.find_images([path]))
    if len(parts) == 1:
        return reader.with_folder_labels(parts[0]) if os.path.isdir(inputs[0]) else parts[0]
    labelled = all(part.labels is not None for part in parts) and not clash(parts)
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


def clash(parts):
    """Says where two lists, Samples, have different classes under one label; -> whether they have."""
    known = {}
    for part in [part for part in parts if part.source]:
        names, source = reader.read_class_names(part.source), part.source
        for label, name in [(label, names[label]) for label in np.unique(part.labels).tolist() if label in names]:
            first, its_source = known.setdefault(label, (name, source))
            if name != first:
                what = f"label {label} is {plain(first)} in {its_source} and {plain(name)} in {source}"
                print(f"note: {what}: their labels are left out")
                return True
    return False


class Scores:
    """Prints the best class of every image of `samples`.

    Args:
        labels: int64, those of the head's classes; None: their numbers are printed.
        names: of the classes, list of str or None.
    """

    def __init__(self, samples, labels, names=None):
        self.samples, self.labels, self.names = samples, labels, names
        self.found, self.done = set(), 0

    def show(self, picture_index, logits):
        """Takes logits float32 [B, C] of the images `picture_index`."""
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
