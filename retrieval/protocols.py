"""How the field measures on its data sets: the k of recall@k, what is searched in what, and how large the test is."""

import collections
import os

from utility import UserError, number_of, plain

# recall_at: the k; val_list: where the list of the queries is if nobody says; sizes: images of the test, of each
# edition; gallery: images of the gallery, None where each picture is a query against all others.
Protocol = collections.namedtuple("Protocol", "recall_at val_list sizes gallery", defaults=[None])

PROTOCOLS = {
    # Classes 101-200, of 2011 and of 2010.
    "cub": Protocol([1, 2, 4, 8], "data/CUB200_val.txt", (5924, 3043)),
    "cars": Protocol([1, 2, 4, 8], "data/cars196_val.txt", (8131,)),
    "sop": Protocol([1, 10, 100, 1000], "data/SOP_val.txt", (60502,)),
    "inshop": Protocol([1, 10, 20, 30], "data/inshop_query.txt", (14218,), 12612),
}


def default_list(name, otherwise):
    """The list of the queries where nobody names one. `name`: of PROTOCOLS, or None."""
    return PROTOCOLS[name].val_list if name else otherwise


def follow(flags, typed):
    """The flags with the k and the gallery of --protocol, where it is given; a --recall_at that was typed stays.

    Args:
        flags: {name: value}; typed: the names of those that were not left at their default.

    Raises: UserError where the lists can't be those of the protocol.
    """
    name = flags["protocol"]
    if not name:
        return flags
    protocol, flags = PROTOCOLS[name], dict(flags)
    if "recall_at" not in typed:
        flags["recall_at"] = protocol.recall_at
    if protocol.gallery is None and flags["gallery_list"]:
        raise UserError(
            f"--protocol={name}: each image is a query against all others of --val_list: leave out --gallery_list"
        )
    if protocol.gallery and not flags["gallery_list"]:
        flags["gallery_list"] = _gallery_beside(flags["val_list"], name)
    return flags


def _gallery_beside(query, name):
    """The list `<name>_gallery.txt` beside `<name>_query.txt` or `<name>_val.txt`. Raises: UserError without one."""
    base, suffix = os.path.splitext(query)
    prefix, _, part = base.rpartition("_")
    path = f"{prefix}_gallery{suffix}"
    if part in ("query", "val") and os.path.isfile(path):
        return path
    raise UserError(
        f"--protocol={name}: the images of --val_list are searched in those of another list: name it, "
        "--gallery_list=<list of the gallery>"
    )


def in_words(name):
    """{"protocol": name} for the figures, {} without one."""
    return {"protocol": name} if name else {}


def remarks(name, recall_at, queries, gallery):
    """What a reader of the figures should know of how they were made, a list of sentences.

    Args:
        name: of PROTOCOLS, or None.
        recall_at: the k that were measured; queries, gallery: reader.Samples, None without a gallery.
    """
    if not name:
        return []
    protocol, found = PROTOCOLS[name], []
    if recall_at != protocol.recall_at:
        usual = ",".join(map(str, protocol.recall_at))
        found.append(f"--recall_at was typed and goes before the {usual} of --protocol={name}")
    for samples, sizes in ((queries, protocol.sizes), (gallery, [protocol.gallery])):
        if samples and len(samples.paths) not in sizes:
            test = " or ".join(map(str, sizes))
            images = number_of(len(samples.paths), "image")
            found.append(
                f"{plain(samples.source, 1000)} has {images}, that of {name} {test}: figures of others don't compare"
            )
    return found
