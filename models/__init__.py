"""The backbone zoo, by name. Importing this does not import paddle: `train.py --help` lists the names at once.

A new backbone is a file of its own and a row of MODELS.
"""

import argparse
import collections
import dataclasses
import importlib

from transforms import TEST_TRANSFORMS
from utility import UserError, check_values, make_parser, number

# dropout: in front of the head; channels: of the last feature map.
Row = collections.namedtuple("Row", "file class_name arguments dropout channels")
MODELS = {
    "ResNet50": Row("resnet", "ResNet", {"depth": 50}, 0.0, 2048),
    "ResNet101": Row("resnet", "ResNet", {"depth": 101}, 0.0, 2048),
    "ResNet152": Row("resnet", "ResNet", {"depth": 152}, 0.0, 2048),
    "ResNet50_va": Row("resnet", "ResNet", {"depth": 50, "stride_in_first": True}, 0.0, 2048),
    "ResNet50_vd": Row("resnet", "ResNet", {"depth": 50, "vd": True}, 0.0, 2048),
    "SE_ResNeXt50_vd_32x4d": Row("se_resnext", "SEResNeXt", {"depth": 50, "vd": True}, 0.5, 2048),
    "SE_ResNeXt50_32x4d": Row("se_resnext", "SEResNeXt", {"depth": 50}, 0.5, 2048),
    "SE_ResNeXt101_32x4d": Row("se_resnext", "SEResNeXt", {"depth": 101}, 0.5, 2048),
    "SE_ResNeXt152_32x4d": Row("se_resnext", "SEResNeXt", {"depth": 152}, 0.5, 2048),
    "ResNet18": Row("resnet", "ResNet", {"depth": 18}, 0.0, 512),
    "ResNet8": Row("resnet", "CifarResNet", {"depth": 8}, 0.0, 64),
}
POOLINGS = ("avg", "max", "gem", "avg+max")
HEADS = ("linear", "cosine")
NORMS = ("none", "layer")
DEFAULT_MODEL = "SE_ResNeXt50_32x4d"


def build_model(
    name,
    class_dim,
    pooling="avg",
    embedding_size=0,
    dropout=None,
    embedding_norm="none",
    head="linear",
    head_scale=20.0,
    last_stride=2,
):
    """An EmbeddingNet on the backbone `name`, randomly initialised.

    Args:
        class_dim: outputs of the softmax head; 0: no head.
        pooling, embedding_size, embedding_norm, head, head_scale: see EmbeddingNet.
        dropout: None takes the model's own (0.5 for SE-ResNeXt, 0 for ResNet).
        last_stride: of the last stage; 1 gives feature maps of twice the height and width.

    Raises: UserError for an unknown name, pooling, norm or head.
    """
    for what, value, known in (
        ("model", name, MODELS),
        ("pooling", pooling, POOLINGS),
        ("embedding_norm", embedding_norm, NORMS),
        ("head", head, HEADS),
    ):
        if value not in known:
            raise UserError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    from models.embedding_net import EmbeddingNet

    row = MODELS[name]
    backbone_class = getattr(importlib.import_module(f"models.{row.file}"), row.class_name)
    backbone = backbone_class(**row.arguments, last_stride=last_stride)
    dropout = row.dropout if dropout is None else dropout
    return EmbeddingNet(backbone, class_dim, pooling, embedding_size, dropout, embedding_norm, head, head_scale)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a checkpoint knows of its network, so that eval.py and infer.py need not be told, in the flags' words."""

    model: str = DEFAULT_MODEL
    pooling: str = "avg"
    embedding_norm: str = "none"
    embedding_size: int = 0
    head: str = "linear"
    head_scale: float = 20.0
    last_stride: int = 2
    image_shape: list = dataclasses.field(default_factory=lambda: [3, 224, 224])
    test_transform: str = "center_crop"
    class_dim: int = 0  # 0: no head

    @classmethod
    def settle(cls, asked, stored, fixed):
        """Settings as asked for; what was left open as stored in a checkpoint, else by default.

        Args:
            asked: {name: value}, None where it was left open.
            stored: {name: value} of a checkpoint, or {}.
            fixed: names of settings in which the user must not contradict the checkpoint.

        Raises: UserError where they do.
        """
        settled = {}
        for name in SETTLED:
            given, known = asked.get(name), stored.get(name)
            if given is not None and known is not None and given != known and name in fixed:
                raise UserError(f"--{name}={given}, but the checkpoint is one of {name} {known}")
            if given is not None or known is not None:
                settled[name] = known if given is None else given
        return cls(**settled, class_dim=asked.get("class_dim") or 0)

    def build(self, dropout=None):
        """The EmbeddingNet of these settings, see `build_model`."""
        names = ("pooling", "embedding_size", "embedding_norm", "head", "head_scale", "last_stride")
        return build_model(self.model, self.class_dim, dropout=dropout, **{name: getattr(self, name) for name in names})

    @staticmethod
    def check(stored, source):
        """Raises a UserError where the settings of a checkpoint, {name: value}, are none that flags can have.

        Args:
            source: the file that they are from.
        """
        parser = make_parser("")
        add_model_arguments(parser)
        add_picture_arguments(parser)
        check_values(parser, stored, source)
        if "model" not in stored or None in stored.values():
            raise UserError(f"{source}: settings without a model, or with one that is open")

    @property
    def channels(self):
        """Of the backbone's last feature map: the length of the pooled features."""
        return MODELS[self.model].channels

    def with_classes(self, class_dim):
        """These settings with a head of `class_dim` outputs; 0: none."""
        return dataclasses.replace(self, class_dim=class_dim)


# Those in which weights can't be used otherwise than they were trained.
IN_WEIGHTS = ("model", "pooling", "embedding_norm", "embedding_size", "head")
# All of them but class_dim, which the head in the weights or the training list says.
SETTLED = tuple(field.name for field in dataclasses.fields(Settings) if field.name != "class_dim")


def image_shape(text):
    """The type of --image_shape: 3,height,width."""
    try:
        channels, height, width = (int(part) for part in text.split(","))
        if channels != 3 or not 8 <= min(height, width) <= max(height, width) <= 4096:
            raise ValueError
    except ValueError:
        message = f"expected 3,height,width with 8 to 4096 pixels each way, such as 3,224,224, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return [channels, height, width]


image_shape.metavar = "3,H,W"


def add_picture_arguments(parser):
    """Adds the flags that say how pictures are brought to the network."""
    parser.add_argument(
        "--image_shape", type=image_shape, help="3,height,width (default: the checkpoint's, else 3,224,224)"
    )
    parser.add_argument(
        "--test_transform",
        choices=list(TEST_TRANSFORMS),
        help="center_crop: short side to 256/224 of the crop, then its centre, the original; resize: the whole "
        "picture, for images that are cut to the object already (default: the checkpoint's, else center_crop)",
    )


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
        "_vd are PaddleClas' variants with three convolutions in the stem and averages in the shortcuts; "
        "ResNet8 and ResNet18 are for small pictures and trials",
    )
    group.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="how the last feature map becomes one vector (default: the checkpoint's, else avg, the original); max or "
        "avg+max often find small telling parts better, gem learns its power",
    )
    group.add_argument(
        "--embedding_norm",
        choices=NORMS,
        help="layer: each picture's pooled features are brought to mean 0 and variance 1, which a cosine head and "
        "proxies train better with (default: the checkpoint's, else none)",
    )
    group.add_argument(
        "--embedding_size",
        type=number(int, low=0, high=2**16),
        help="size of a linear layer behind the pooling (default: the checkpoint's, else 0 = none: the pooled features "
        "are the embedding)",
    )
    group.add_argument(
        "--last_stride",
        type=int,
        choices=(1, 2),
        help="stride of the last stage; 1 keeps twice the resolution, for half as much time again (default: the "
        "checkpoint's, else 2)",
    )
    group.add_argument(
        "--head",
        choices=HEADS,
        help="scores of the classes: linear in the embedding, or its cosines to class weights times --head_scale "
        "(default: the checkpoint's, else linear; normsoftmax and arcmarginloss: cosine)",
    )
    group.add_argument(
        "--head_scale",
        type=number(float, above=0),
        help="of the cosine head (default: the checkpoint's, else 20, of arcmarginloss 80)",
    )
    group.add_argument(
        "--class_dim",
        type=number(int, low=1, high=10**7),
        help="outputs of the softmax head (default: the checkpoint's, else in train.py the number of classes in "
        "--train_list, elsewhere no head)",
    )
    return group
