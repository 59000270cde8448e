"""The backbone zoo, by name. Importing this does not import paddle: `train.py --help` lists the names at once."""

import importlib
import sys

import numpy as np

from models.pretrained import find_weights, layer_size, load_weights, read_state, read_weights
from models.weight_files import read_pickle
from utility import UserError, boolean, number

__all__ = [
    "MODELS",
    "build_model",
    "find_weights",
    "load_network",
    "load_weights",
    "read_pickle",
    "read_state",
    "read_weights",
]

# name -> file, class, arguments, dropout in front of the head
MODELS = {
    "ResNet50": ("resnet", "ResNet", {"depth": 50}, 0.0),
    "ResNet101": ("resnet", "ResNet", {"depth": 101}, 0.0),
    "ResNet152": ("resnet", "ResNet", {"depth": 152}, 0.0),
    "ResNet50_va": ("resnet", "ResNet", {"depth": 50, "stride_in_first": True}, 0.0),
    "SE_ResNeXt50_32x4d": ("se_resnext", "SEResNeXt", {"depth": 50}, 0.5),
    "SE_ResNeXt101_32x4d": ("se_resnext", "SEResNeXt", {"depth": 101}, 0.5),
    "SE_ResNeXt152_32x4d": ("se_resnext", "SEResNeXt", {"depth": 152}, 0.5),
    "ResNet18": ("resnet", "ResNet", {"depth": 18}, 0.0),
    "ResNet8": ("resnet", "CifarResNet", {"depth": 8}, 0.0),
}
POOLINGS = ("avg", "max", "gem", "avg+max")
DEFAULT_MODEL = "SE_ResNeXt50_32x4d"


def build_model(name, class_dim, pooling="avg", embedding_size=0, dropout=None):
    """An EmbeddingNet on the backbone `name`, randomly initialised.

    Args:
        class_dim: outputs of the softmax head; 0: no head.
        pooling, embedding_size: see EmbeddingNet.
        dropout: None takes the model's own (0.5 for SE-ResNeXt, 0 for ResNet).

    Raises: UserError for an unknown name or pooling.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    if pooling not in POOLINGS:
        raise UserError(f"unknown pooling {pooling!r}; known: {', '.join(POOLINGS)}")
    from models.embedding_net import EmbeddingNet

    file, class_name, arguments, default_dropout = MODELS[name]
    backbone = getattr(importlib.import_module(f"models.{file}"), class_name)(**arguments)
    dropout = default_dropout if dropout is None else dropout
    return EmbeddingNet(backbone, class_dim, pooling, embedding_size, dropout)


# What a checkpoint knows about its network and eval.py and infer.py need not be told again, with the values for where
# there is no checkpoint.
SETTINGS = {
    "model": DEFAULT_MODEL,
    "pooling": "avg",
    "embedding_size": 0,
    "image_shape": [3, 224, 224],
    "test_transform": "center_crop",
}


def settle_arguments(args, state, fixed):
    """Fills what the user left open in `args`: from the checkpoint's `state`, or by default where that is None.

    Args:
        fixed: names of settings in which the user must not contradict the checkpoint.

    Raises: UserError where they do.
    """
    known = state["settings"] if state else {}
    for name, default in SETTINGS.items():
        given, stored = getattr(args, name), known.get(name)
        if given is None:
            setattr(args, name, default if stored is None else stored)
        elif stored is not None and given != stored and name in fixed:
            raise UserError(f"--{name}={given}, but the checkpoint is one of {name} {stored}")


def load_network(args):
    """The network that eval.py and infer.py run: as --pretrained_model says, or random where none is given.

    Settles the model flags in `args`. `args.class_dim` becomes the number of classes of the head, 0 without one.

    Returns: (EmbeddingNet, the labels of the head's classes in their order, the sorted labels of those that were
        trained); the last two are int64 or None where they are not known
    """
    weights = read_weights(args.pretrained_model, args.model or DEFAULT_MODEL) if args.pretrained_model else None
    state = weights.state if weights else None
    if weights and state is None:  # a file without its description: its tensors say the rest
        args.embedding_size = layer_size(weights, "embedding") if args.embedding_size is None else args.embedding_size
        args.pooling = args.pooling or ("gem" if "pool.power" in weights.tensors else None)
    settle_arguments(args, state, fixed=("model", "pooling", "embedding_size"))
    if weights:
        known = layer_size(weights, "embedding")
        if args.embedding_size != known:
            has = f"an embedding layer of {known}" if known else "no embedding layer"
            raise UserError(f"--embedding_size={args.embedding_size}, but {weights.file_name} has {has}")
        known = layer_size(weights, "head")
        if args.class_dim and args.class_dim != known:
            raise UserError(f"--class_dim={args.class_dim}, but the head in {weights.file_name} has {known} classes")
        args.class_dim = known
    args.class_dim = args.class_dim or 0
    network = build_model(args.model, args.class_dim, args.pooling, args.embedding_size)
    if weights:
        head = "fit" if state is None or args.allow_partial else "must"
        print(load_weights(network, weights, args.model, head, args.allow_partial))
    else:
        print(f"note: no --pretrained_model: this {args.model} has random weights", file=sys.stderr)
    network.eval()
    labels = [np.array(state[name], np.int64) if state else None for name in ("labels", "trained_labels")]
    return network, *labels


def add_model_arguments(parser):
    """Adds the flags that describe the network, alike in all scripts.

    Their defaults are None: eval.py and infer.py take what is not given from the checkpoint.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=list(MODELS),
        help=f"backbone (default: that of the checkpoint, else {DEFAULT_MODEL}); ResNet50_va is the "
        "original ResNet with stride 2 in the first 1x1 convolution of a stage, as Caffe and Keras weights want it; "
        "ResNet8 and ResNet18 are for small pictures and trials",
    )
    group.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="how the last feature map becomes one vector (default: the checkpoint's, else avg, the original); max or "
        "avg+max often find small telling parts better, gem learns its power",
    )
    group.add_argument(
        "--embedding_size",
        type=number(int, low=0),
        help="size of a linear layer behind the pooling (default: the checkpoint's, else 0 = none: the pooled features "
        "are the embedding)",
    )
    group.add_argument(
        "--class_dim",
        type=number(int, low=1),
        help="outputs of the softmax head (default: the checkpoint's, else the number of classes in --train_list)",
    )
    group.add_argument(
        "--pretrained_model",
        default="",
        help="weights to start from: a checkpoint directory of train.py (such as output/ResNet50/best); a .pdparams "
        "file of paddle.vision or PaddleClas, with or without the suffix; a directory of fluid's save_vars with one "
        "file a variable; a .safetensors file with the names of torchvision or timm; or imagenet: the official "
        "ImageNet file of --model, downloaded once. Where a stage halves the resolution cannot be seen in a file: "
        "Caffe and Keras do it in the first 1x1 convolution (va: --model=ResNet50_va); paddle.vision, PaddleClas, "
        "torchvision, timm and Paddle's own fluid models in the 3x3 (vb: --model=ResNet50). The wrong one loads "
        "without an error and costs accuracy",
    )
    group.add_argument(
        "--allow_partial",
        type=boolean,
        default=False,
        help="load the tensors of --pretrained_model that fit the backbone, and name the others, rather than refuse "
        "the file; the others keep their random start",
    )
    return group
