#!/usr/bin/env python3
"""Measures a network on a labelled list: recall@k, MAP@R, mAP and others over the whole list, and, where the list's
classes are ones that the softmax head knows, its loss and top-1/top-5 accuracy.

    python eval.py --pretrained_model=output/ResNet50/best

The network is rebuilt from the checkpoint; a folder of infer.py --export_dir is measured as it is. Every image is a
query against all others; with --gallery_list against the images of that list. Similarity is the cosine of the
embeddings.
"""

from runtime import packages

packages.check()

import argparse
import dataclasses
import json
import os
import sys
import time

import numpy as np

import files
import lists
import models
import reader
import utility
import weights
from retrieval import engine, extraction, features, figures, metrics, protocols, refine, report
from runtime import parallel, process
from training.run import Run
from utility import UserError, boolean, number


def build_parser():
    parser = utility.make_parser(__doc__)
    # fmt: off
    add = parser.add_argument_group("evaluation").add_argument
    add("--batch_size", type=number(int, low=1), help="images at once; changes no figure (default: 32; on a GPU 128)")
    add("--recall_at", type=utility.comma_separated(number(int, low=1)), default=[1, 2, 4, 8], help="the k of recall@k")
    add("--protocol", choices=tuple(protocols.PROTOCOLS), default=None,
        help="measure as the field does on CUB, Cars (both recall@1,2,4,8), SOP (1,10,100,1000) or In-shop "
        "(1,10,20,30, in a gallery: --gallery_list, or <name>_gallery.txt beside <name>_query.txt); a typed "
        "--recall_at counts")
    add("--gallery_list", default="", help="search in this list rather than in --val_list itself")
    add("--exclude_self", type=boolean, default=True,
        help="with --gallery_list, leave a query's own picture (the same file) out of what it can find")
    add("--head_labels", type=boolean, default=False,
        help="the list's labels are the class numbers of a head that came without labels, as with an ImageNet list and "
        "an ImageNet model: print its loss and accuracy")
    add("--output_json", default="",
        help="write all figures to this file, with those of each class and the queries that failed")
    add("--report", default="",
        help="write a page, .html, that shows where the network fails: its worst queries with their neighbours, the "
        "classes that it confuses, training's curves, a map of the features; one file, needs no network")
    add("--with_mem_opt", type=boolean, default=False, help="taken as in the original; evaluation keeps no activations")
    # fmt: on
    figures.add_figure_arguments(parser)
    refine.add_refine_arguments(parser)
    reader.add_data_arguments(parser, training=False)
    models.add_model_arguments(parser)
    weights.add_weight_arguments(parser)
    engine.add_engine_arguments(parser)
    first = ("val_list", "gallery_list", "pretrained_model", "protocol", "recall_at", "output_json", "report")
    utility.start_here(parser, first)
    return parser


def main():
    parser = build_parser()
    args, typed = utility.parse_typed(parser)
    process.join_early(args.use_gpu, args.seed)
    flags, train_data_dir = extraction.lists_of_run(vars(args), typed)
    own_data_dir, args = args.data_dir, argparse.Namespace(**protocols.follow(flags, typed))
    query = reader.read_list(args.val_list, args.data_dir)
    gallery_dir = own_data_dir if "gallery_list" in typed else args.data_dir
    gallery = reader.read_list(args.gallery_list, gallery_dir) if args.gallery_list else None
    refinement = utility.fill(refine.Refinement, args)
    to_learn_from = refine.check_refinement(refinement, own_data_dir, args.on_bad_image)
    trained = reader.read_list(args.train_list, train_data_dir, need_labels=False) if args.train_list else None
    warn_of_other_lists(args.pretrained_model, {"val_list": query, "train_list": trained}, typed)
    check_lists(query, gallery, trained, to_learn_from, args.on_bad_image)
    check_outputs(args.output_json, args.report)
    pictures = sum(len(samples.paths) for samples in (query, gallery) if samples)
    more = figures.check_options(utility.fill(figures.Options, args), pictures)
    process.start_paddle(args.use_gpu, args.seed)
    utility.note_idle(idle_flags(vars(args)), typed)
    opened = extraction.open_network(vars(args), args.pretrained_model, args.allow_partial, args.weights)
    vars(args).update(dataclasses.asdict(opened.settings))
    utility.print_arguments(vars(args), parser)
    note_choice(opened, query)
    start, reading = time.time(), utility.fill(reader.Reading, args)
    network = engine.prepare(
        refine.refined(opened.network, refinement), utility.fill(engine.EngineOptions, args), args.image_shape,
        pictures + refine.count_seen(refinement, to_learn_from), opened.file_name,
    )  # fmt: skip
    whitening = refine.find_whitening(
        refinement, opened, network, reading, args.batch_size, to_learn_from, engine.precision_in_use(args.precision)
    )
    head = HeadFigures(head_classes(opened, query, args.head_labels), args.quiet)
    on_batch, finish = head.add if head.classes is not None else None, refine.finish(whitening)
    found = extraction.extract(network, query, reading, args.batch_size, on_batch, finish=finish)
    found_gallery = extraction.extract(network, gallery, reading, args.batch_size, finish=finish) if gallery else None
    if not parallel.is_first():
        return
    search = searched(query, found, gallery, found_gallery, args.exclude_self)
    measured = figures.measure(search, args.recall_at, more, in_place=True, every_pair=bool(args.report))
    how = opened.refined or refine.in_words(refinement, whitening)
    result = {
        **protocols.in_words(args.protocol), **head.result(), **measured.figures,
        "seconds": round(time.time() - start, 2), "dimension": found.features.shape[1],
        **({"refined": how} if how else {}),
    }  # fmt: skip
    lines = figures.lines(measured, how)
    remarks = [
        *protocols.remarks(args.protocol, args.recall_at, query, gallery),
        *metrics.remarks(found.features, search.labels, result, search.gallery_labels),
    ]
    print_figures(result, how, refinement.views, lines, remarks)
    if args.output_json:
        about = {"args": vars(args), **extraction.origin(args.pretrained_model)}
        write_figures(args.output_json, {**result, **record(measured, query, found, gallery, found_gallery), **about})
    if args.report:
        title, log = f"{opened.settings.model} on {query.source}", log_of_run(args.pretrained_model)
        shown = [named(query, found), named(gallery, found_gallery) if gallery else None]
        report.write(
            args.report, report.Contents(title, result, lines, measured, *shown, search.own, log, args.max_pixels)
        )


# The figures that refined features change, and those of the head, which only views do.
REFINED = ("recall@", "MAP@R", "R-precision", "mAP", "mINP", "NMI")
OF_THE_HEAD = ("loss", "acc1", "acc5")


def idle_flags(flags):
    """{flag: why} of those that have no effect beside the others, {name: value}."""
    why = {**refine.idle_flags(flags), **extraction.idle_flags(flags)}
    return why if flags["gallery_list"] else {**why, "exclude_self": "no --gallery_list"}


def note_choice(opened, query):
    """Says where the epoch of a checkpoint, extraction.Opened, was chosen by its recall on the queries, Samples."""
    if reader.is_fingerprint(opened.chosen_on, query):
        print("note: recall on this list chose the epoch of this checkpoint: on classes that chose nothing it is lower")


def print_figures(result, how, views, lines, remarks):
    """Prints figures {name: value}, the lines of figures.lines, and remarks.

    Args:
        how: refine.in_words; views: of the pictures, in words.
    """
    with process.even_unread():
        for name, value in result.items():
            figure = f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}"
            of = how if name.startswith(REFINED) else views if name in OF_THE_HEAD else ""
            print(figure + (f" ({of})" if of else ""))
        for line in [*lines, *(f"note: {remark}" for remark in remarks)]:
            print(line)


def record(measured, query, found, gallery, found_gallery):
    """What --output_json has beside the figures with a line of their own, {name: value}.

    Args:
        measured: figures.Measured.
        query, gallery: reader.Samples; found, found_gallery: extraction.Features (of the gallery: None without one).
    """
    others, other_index = (gallery, found_gallery.index) if gallery else (query, found.index)
    failed = figures.failed(
        measured.ranked,
        [query.paths[i] for i in found.index], query.labels[found.index],
        [others.paths[i] for i in other_index], others.labels[other_index],
    )  # fmt: skip
    return {
        "recall@1 interval": measured.interval,
        "thresholds": measured.thresholds,
        "list": reader.fingerprint(query),
        "gallery": reader.fingerprint(gallery) if gallery else None,
        "classes": measured.classes,
        "failed_queries": failed,
        **reader.list_bad_images(query, found.bad),
        **(reader.list_bad_images(gallery, found_gallery.bad, "bad_gallery_images") if gallery else {}),
    }


def write_figures(path, result):
    """Writes --output_json."""
    with files.atomic_write(path) as file:
        json.dump(result, file, indent=1)


def named(samples, found):
    """features.Gallery of extraction.Features of reader.Samples, with the names of classes where a file has them."""
    return features.gather(samples, found, reader.read_class_names(samples.source), None, samples.source)


def log_of_run(pretrained_model):
    """The records of the log of the run that made a checkpoint; None for other weights, or without a log."""
    path = weights.checkpoint.resolve(pretrained_model)
    return Run(os.path.dirname(path)).read_log() if extraction.description_of(path) else None


def warn_of_other_lists(pretrained_model, lists_read, typed):
    """Says where a list that was taken over from a checkpoint's run is not the one that the run had.

    Args:
        lists_read: {flag: Samples or None}; typed: the names of the flags that were typed.
    """
    state = extraction.description_of(pretrained_model)
    for flag in sorted({"train_list", "val_list"} - typed):
        samples, then = lists_read[flag], state.get(flag)
        if then is None or samples is None or samples.labels is None or not parallel.is_first():
            continue
        if flag == "train_list":  # of which train.py knows the classes by their indices
            samples = samples._replace(labels=np.searchsorted(state["labels"], samples.labels))
        if not reader.is_fingerprint(then, samples, "digests" not in state):
            print(f"warning: {samples.source}: not what it was when the run had it as --{flag}", file=sys.stderr)


def check_lists(query, gallery, trained, to_learn_from, on_bad_image):
    """Raises a UserError where there is nothing to find, or where pictures are missing; reports what is there twice.

    Args:
        trained, to_learn_from: Samples of training and of --whiten, or None: they should have none of the queries.
    """
    if gallery and not np.isin(query.labels, gallery.labels).any():
        raise UserError(f"{gallery.source}: has no image of any class of {query.source}: nothing to find")
    both = [query, gallery] if gallery else [query]
    if on_bad_image == "fail":
        for samples in both:
            lists.check_files(samples)
    if parallel.is_first():
        apart = {"training images": trained, "learned from by --whiten": to_learn_from}
        apart = {what: samples for what, samples in apart.items() if samples}
        identities = lists.identify(*both, *apart.values())
        for samples, identity in zip(both, identities):
            lists.report_repeated(samples, identity)
        for what, identity in zip(apart, identities[len(both) :]):
            lists.report_shared(query, identities[0], identity, what)
        if gallery:
            report_copies(query, *identities[:2])


def report_copies(query, identity, other):
    """Says how many queries have a copy in the gallery that is not the query's own file: each finds it first.

    Args:
        identity, other: lists.Identity of queries and gallery.
    """
    if identity.content is None:
        return
    places = {}
    for place, content in zip(other.place.tolist(), other.content.tolist()):
        places.setdefault(content, set()).add(place)
    pairs = zip(identity.place.tolist(), identity.content.tolist())
    copied = [index for index, (place, content) in enumerate(pairs) if places.get(content, set()) - {place}]
    if copied:
        first = reader.where(query, copied[0])
        count = f"{len(copied)} of {len(query.paths)} queries"
        print(f"warning: {count} find a copy in the gallery under another name; the first: {first}", file=sys.stderr)


def check_outputs(output_json, page):
    """Raises a UserError where --output_json or --report can't be written, or would replace what is no such file."""
    if output_json:
        files.check_output(output_json, is_figures, "a file of figures that eval.py wrote")
    if page:
        report.check_report(page)


def is_figures(path):
    """Whether a file is one that --output_json has written before."""
    try:
        with open(path) as file:
            figures = json.load(file)
        return isinstance(figures["queries"], int) and isinstance(figures["args"], dict) and "seconds" in figures
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def own_pictures(query, query_index, gallery, gallery_index):
    """For each query, the rows of the gallery's features that are the same file, links followed: int64 [0 or more].

    Args:
        query_index, gallery_index: which pictures of the Samples were read, int64 [N], [M].
    """
    rows = {}
    for row, path in enumerate(lists.real_paths([gallery.paths[index] for index in gallery_index])):
        rows.setdefault(path, []).append(row)
    own = lists.real_paths([query.paths[index] for index in query_index])
    return [np.array(rows.get(path, []), np.int64) for path in own]


def searched(query, found, gallery, found_gallery, exclude_self):
    """figures.Search of what was found of the Samples; says how many queries are in the gallery themselves.

    Args:
        exclude_self: whether a query's own picture is left out of the gallery.
    """
    labels = query.labels[found.index]
    if not gallery:
        return figures.Search(found.features, labels)
    own = own_pictures(query, found.index, gallery, found_gallery.index)
    count = sum(len(rows) > 0 for rows in own)
    if count:
        what = "left out of what it can find" if exclude_self else "found, too (--exclude_self=False)"
        print(f"note: {count} of {len(own)} queries are in the gallery themselves: a query's own picture is {what}")
    own = own if exclude_self else None
    return figures.Search(found.features, labels, found_gallery.features, gallery.labels[found_gallery.index], own)


def head_classes(opened, samples, by_number):
    """Class index of each image, int64 [N], or None with a line why where the head does not know the list's classes.

    Args:
        opened: extraction.Opened. Its head may have classes that no image trained.
        by_number: --head_labels, whether the list's labels are the head's class numbers.
    """
    class_dim, known = opened.settings.class_dim, opened.labels
    if not class_dim:
        print("top-1/top-5: not applicable: this network has no softmax head")
    elif not opened.head_trained:
        print("top-1/top-5: not applicable: the run did not train the softmax head (--alpha=0)")
    elif known is None and not by_number:
        print(
            "top-1/top-5: not applicable: which labels the head's classes stand for is not known; --head_labels=True "
            "says that the labels of the list are its class numbers"
        )
    else:
        order = np.arange(class_dim) if known is None else known
        unknown = np.setdiff1d(samples.labels, order if by_number else opened.trained_labels)
        if not len(unknown):
            return np.searchsorted(order, samples.labels)
        if by_number:
            raise UserError(f"{samples.source}: --head_labels=True, but the head has no class {unknown[0]}")
        count = len(np.unique(samples.labels))
        print(f"top-1/top-5: not applicable: {len(unknown)} of the list's {count} classes are not among the head's")
    return None


class HeadFigures:
    """Loss and accuracy of the softmax head, batch by batch; prints those of every tenth.

    Args:
        classes: class index of each image of the list, int64 [N], or None: no figures.
        quiet: prints nothing.
    """

    def __init__(self, classes, quiet=False):
        self.classes, self.quiet = classes, quiet
        self.losses, self.ranks = [], []
        self.start = time.time()

    def add(self, index, logits):
        """Takes in the logits float32 [B, C] of the list's images `index`."""
        wanted = self.classes[index]
        own = logits[np.arange(len(wanted)), wanted]
        top = logits.max(axis=1)
        loss = top - own + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        rank = logits.shape[1] - (logits < own[:, None]).sum(axis=1)  # 1 is best; ties and NaN count against the head
        self.losses.append(loss)
        self.ranks.append(rank)
        if len(self.ranks) % 10 == 1 and not self.quiet:
            print(
                f"Testbatch {len(self.ranks) - 1},loss {loss.mean():.6f}, acc1 {(rank <= 1).mean():.4f},"
                f"acc5 {(rank <= 5).mean():.4f},time {time.time() - self.start:.2f} sec",
                flush=True,
            )
        self.start = time.time()

    def result(self):
        """{"loss", "acc1", "acc5"} of all, or {}."""
        if not self.ranks:
            return {}
        loss, rank = np.concatenate(self.losses), np.concatenate(self.ranks)
        return {"loss": float(loss.mean()), "acc1": float((rank <= 1).mean()), "acc5": float((rank <= 5).mean())}


if __name__ == "__main__":
    process.run_script(main)
