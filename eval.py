"""Measures a network on a labelled list: recall@k, MAP@R and R-precision over the whole list, and, where the list's
classes are ones that the softmax head knows, its loss and top-1/top-5 accuracy.

    python eval.py --pretrained_model=output/ResNet50/best

The network is rebuilt from the checkpoint. Every image is a query against all others; with --gallery_list against the
images of that list. Similarity is the cosine of the embeddings.
"""

import json
import os
import time

import numpy as np

import engine
import files
import metrics
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
    add = parser.add_argument_group("evaluation").add_argument
    add("--batch_size", type=number(int, low=1), default=32, help="images at once; changes no figure")
    add("--recall_at", type=utility.comma_separated(number(int, low=1)), default=[1, 2, 4, 8], help="the k of recall@k")
    add("--gallery_list", default="", help="search in this list rather than in --val_list itself")
    add("--exclude_self", type=boolean, default=True,
        help="with --gallery_list, leave a query's own picture (the same file) out of what it can find")
    add("--head_labels", type=boolean, default=False,
        help="the list's labels are the class numbers of a head that came without labels, as with an ImageNet list and "
        "an ImageNet model: print its loss and accuracy")
    add("--output_json", default="", help="write all figures to this file, too")
    add("--with_mem_opt", type=boolean, default=False, help="taken as in the original; evaluation keeps no activations")
    # fmt: on
    return parser.parse_args()


def main():
    args = parse_args()
    utility.join_early(args)
    query = reader.read_list(args.val_list, args.data_dir)
    gallery = reader.read_list(args.gallery_list, args.data_dir) if args.gallery_list else None
    if gallery and not np.isin(query.labels, gallery.labels).any():
        raise UserError(f"{args.gallery_list}: has no image of any class of {args.val_list}: nothing to find")
    for samples in [query, gallery] if gallery else [query]:
        if args.on_bad_image == "fail":
            reader.check_files(samples)
        if parallel.is_first():
            reader.report_repeated(samples)
    if args.output_json:
        files.check_output(args.output_json, is_figures, "a file of figures that eval.py wrote")
    utility.start_paddle(args.use_gpu, args.seed)
    network, head_labels, trained = models.load_network(args)
    utility.print_arguments(args)

    start = time.time()
    network = engine.prepare(network, args, sum(len(samples.paths) for samples in (query, gallery) if samples))
    classes = head_classes(args, query, head_labels, trained)
    features, index, result = run_list(network, query, args, classes)
    if gallery:
        gallery_features, gallery_index, _ = run_list(network, gallery, args, None)
    if not parallel.is_first():
        return
    labels = query.labels[index]
    if gallery:
        own = own_pictures(query, index, gallery, gallery_index)
        count = sum(len(found) > 0 for found in own)
        if count:
            what = "left out of what it can find" if args.exclude_self else "found, too (--exclude_self=False)"
            print(f"note: {count} of {len(own)} queries are in the gallery themselves: a query's own picture is {what}")
        result.update(
            metrics.retrieval_metrics(
                features, labels, args.recall_at, gallery_features, gallery.labels[gallery_index],
                own=own if args.exclude_self else None,
            )
        )  # fmt: skip
    else:
        result.update(metrics.retrieval_metrics(features, labels, args.recall_at))
    result["seconds"] = round(time.time() - start, 2)
    for name, value in result.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    if args.output_json:
        with files.atomic_write(args.output_json) as file:
            json.dump({**result, "args": vars(args)}, file, indent=1)


def is_figures(path):
    """Whether a file is one that --output_json has written before."""
    try:
        with open(path) as file:
            figures = json.load(file)
        return "queries" in figures and "args" in figures
    except (OSError, ValueError, TypeError):
        return False


def own_pictures(query, query_index, gallery, gallery_index):
    """For each query, the rows of the gallery's features that are the same file, links followed: int64 [0 or more].

    Args:
        query_index, gallery_index: which pictures of the Samples were read, int64 [N], [M].
    """
    rows = {}
    for row, index in enumerate(gallery_index):
        rows.setdefault(os.path.realpath(gallery.paths[index]), []).append(row)
    return [np.array(rows.get(os.path.realpath(query.paths[index]), []), np.int64) for index in query_index]


def head_classes(args, samples, head_labels, trained):
    """Class index of each image, int64 [N], or None with a line why where the head does not know the list's classes.

    Args:
        head_labels, trained: what models.load_network returned. A head may have classes that no image trained.
    """
    if not args.class_dim:
        print("top-1/top-5: not applicable: this network has no softmax head")
    elif head_labels is None and not args.head_labels:
        print(
            "top-1/top-5: not applicable: which labels the head's classes stand for is not known; --head_labels=True "
            "says that the labels of the list are its class numbers"
        )
    else:
        order = np.arange(args.class_dim) if head_labels is None else head_labels
        unknown = np.setdiff1d(samples.labels, order if args.head_labels else trained)
        if not len(unknown):
            return np.searchsorted(order, samples.labels)
        if args.head_labels:
            raise UserError(f"{samples.source}: --head_labels=True, but the head has no class {unknown[0]}")
        count = len(np.unique(samples.labels))
        print(f"top-1/top-5: not applicable: {len(unknown)} of the list's {count} classes are not among the head's")
    return None


def run_list(network, samples, args, classes):
    """Runs the network over a list; prints the head's loss and accuracy every ten batches where `classes` are given.

    Returns: features float32 [N, D], indices into the list int64 [N], {"loss", "acc1", "acc5"} or {}; (None, None, {})
        in all but the first of several processes
    """
    losses, ranks = [], []
    start = time.time()

    def measure_head(index, logits):
        nonlocal start
        wanted = classes[index]
        own = logits[np.arange(len(wanted)), wanted]
        top = logits.max(axis=1)
        losses.append(top - own + np.log(np.exp(logits - top[:, None]).sum(axis=1)))
        ranks.append((logits >= own[:, None]).sum(axis=1))  # 1 is best; ties count against the head
        if len(ranks) % 10 == 1:
            print(
                f"Testbatch {len(ranks) - 1},loss {losses[-1].mean():.6f}, acc1 {(ranks[-1] <= 1).mean():.4f},"
                f"acc5 {(ranks[-1] <= 5).mean():.4f},time {time.time() - start:.2f} sec",
                flush=True,
            )
        start = time.time()

    bad = []
    batches = reader.read_in_order(samples, args, args.batch_size, bad)
    features, index = utility.extract(network, samples, batches, bad, None if classes is None else measure_head)
    if not parallel.is_first():
        return None, None, {}
    reader.report_bad_images(samples, bad)
    if classes is None:
        return features, index, {}
    rank = np.concatenate(ranks)
    head = {"loss": np.concatenate(losses).mean(), "acc1": (rank <= 1).mean(), "acc5": (rank <= 5).mean()}
    return features, index, {name: float(value) for name, value in head.items()}


if __name__ == "__main__":
    utility.run_script(main)
