"""The official ImageNet weights: which file for which model, and a folder to keep them in."""

import collections
import contextlib
import hashlib
import os
import sys

import files
from utility import UserError
from weights.formats import read_tensors

CACHE_VARIABLE = "DEEP_METRIC_LEARNING_CACHE"
MOST = 1 << 30  # bytes of a file; the largest has a quarter of them

Official = collections.namedtuple("Official", "url md5")
_VISION = "https://paddle-hapi.bj.bcebos.com/models"
_CLAS = "https://paddle-imagenet-models-name.bj.bcebos.com/dygraph"
# paddle.vision publishes checksums, PaddleClas does not. A size is what the server says.
IMAGENET = {
    "ResNet18": Official(f"{_VISION}/resnet18.pdparams", "cf548f46534aa3560945be4b95cd11c4"),
    "ResNet50": Official(f"{_VISION}/resnet50.pdparams", "ca6f485ee1ab0492d38f323885b0ad80"),
    "ResNet50_vd": Official(f"{_CLAS}/legendary_models/ResNet50_vd_ssld_pretrained.pdparams", None),
    "SE_ResNeXt50_vd_32x4d": Official(f"{_CLAS}/SE_ResNeXt50_vd_32x4d_pretrained.pdparams", None),
    "ResNet101": Official(f"{_VISION}/resnet101.pdparams", "02f35f034ca3858e1e54d4036443c92d"),
    "ResNet152": Official(f"{_VISION}/resnet152.pdparams", "7ad16a2f1e7333859ff986138630fd7a"),
    "SE_ResNeXt50_32x4d": Official(f"{_CLAS}/SE_ResNeXt50_32x4d_pretrained.pdparams", None),
    "SE_ResNeXt101_32x4d": Official(f"{_CLAS}/SE_ResNeXt101_32x4d_pretrained.pdparams", None),
}
_NONE = {
    "ResNet50_va": "Keras and Caffe publish such weights, as other files",
    "SE_ResNeXt152_32x4d": "PaddleClas' SE_ResNeXt152_64x4d is another network",
}


def cache_folder():
    """Where official files are kept: $DEEP_METRIC_LEARNING_CACHE, else below $XDG_CACHE_HOME or ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get(CACHE_VARIABLE) or os.path.join(caches, "deep_metric_learning")


def imagenet_file(model):
    """The path of the official ImageNet weights of `model`, which are downloaded where they are not in the cache.

    Raises: UserError where there is no such file, or where it can't be had: with the place to put it by hand.
    """
    if model not in IMAGENET:
        why = f" ({_NONE[model]})" if model in _NONE else ""
        raise UserError(
            f"imagenet: there is no official ImageNet file for {model}{why}; there is one for {', '.join(IMAGENET)}"
        )
    url, md5 = IMAGENET[model]
    path = os.path.join(cache_folder(), url.rsplit("/", 1)[1])
    if not os.path.exists(path):
        files.make_directory(cache_folder())
        _download(url, path, md5)
    return path


def _download(url, path, md5):
    """Fetches `url` under a temporary name, which becomes `path` once its size and content are right."""
    from runtime import web  # a tenth of the time that --help takes

    by_hand = f"without a network, bring this file yourself and put it at {path}"
    with files.atomic_write(path, "wb") as file:
        try:
            done, total, found = _fetch(url, file)
        except web.Failed as error:
            raise UserError(f"cannot download {url} ({error}); {by_hand}") from None
        if total is not None and done != total:
            raise UserError(f"{url}: the download ended after {done} of {total} bytes; try again, or {by_hand}")
        if md5 and found != md5:
            raise UserError(f"{url}: the download has MD5 {found} instead of {md5}; try again, or {by_hand}")
        if not md5:
            file.flush()
            try:
                read_tensors(file.name)  # at least it is whole and a file of weights
            except UserError as error:
                why = str(error).removeprefix(f"{file.name}: ")
                raise UserError(f"{url}: what came is no file of weights ({why}); try again, or {by_hand}") from None


def _fetch(url, file):
    """-> (bytes written, bytes announced or None, MD5); says how far it is where stderr is a terminal, else once.

    Raises: web.Failed
    """
    import urllib.request

    from runtime import web

    digest, done = hashlib.md5(), 0
    with contextlib.closing(web.ask(urllib.request.Request(url))) as answer:
        total, terminal = web.announced(answer), sys.stderr.isatty()
        if total is not None and total > MOST:
            raise web.Failed(f"it says that it has {total} bytes, more than {MOST}")
        print(f"downloading {url} ({(total or 0) / 1e6:.0f} MB)", file=sys.stderr, flush=True)
        for chunk in web.blocks(answer):
            done += len(chunk)
            if done > MOST:
                raise web.Failed(f"it has more than {MOST} bytes")
            file.write(chunk)
            digest.update(chunk)
            if terminal:
                share = f", {done / total:.0%}" if total else ""
                print(f"\r{done / 1e6:.0f} MB{share} ", end="", file=sys.stderr, flush=True)
        if terminal:
            print(file=sys.stderr)
    return done, total, digest.hexdigest()
