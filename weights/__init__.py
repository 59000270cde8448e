"""Weights that somebody has: formats, the names that others give, official files, loading; and our own checkpoint."""

from utility import boolean
from weights.load import DESCRIBED, Weights, check_layers, layer_size, load_weights, read_weights, without_head
from weights.pickles import read_pickle

__all__ = [
    "DESCRIBED",
    "Weights",
    "add_weight_arguments",
    "check_layers",
    "layer_size",
    "load_weights",
    "read_pickle",
    "read_weights",
    "without_head",
]


def add_weight_arguments(parser):
    """Adds the flags that say which weights to start from, alike in all scripts."""
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--pretrained_model",
        default="",
        help="the weights: a checkpoint directory of train.py (such as output/ResNet50/best); imagenet: the "
        "official ImageNet file of --model, downloaded once; or a file or folder of others (.pdparams, .safetensors, "
        ".h5, fluid's save_vars; docs/weights.md). Where a stage halves the resolution "
        "cannot be seen in a file: Caffe and Keras do it in the first 1x1 convolution (--model=ResNet50_va); the wrong "
        "network loads without an error and costs accuracy. "
        "eval.py and infer.py also take a folder of infer.py --export_dir",
    )
    group.add_argument(
        "--weights",
        default="",
        metavar="NAME",
        help="of a checkpoint directory: ema (also where nothing is given): the average over the steps, where the run "
        "kept one (--ema_decay); model: the weights of the last step. Of a file that holds several sets of weights: "
        "the sub-dict or prefix of the one to take, such as ema or encoder_q; a message lists them",
    )
    group.add_argument(
        "--allow_partial",
        type=boolean,
        default=False,
        help="load the tensors of --pretrained_model that fit the backbone, and name the others, rather than refuse "
        "the file; the others keep their random start",
    )
