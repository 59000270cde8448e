"""Builds ResNet50 and SE_ResNeXt50_32x4d as the fluid programs of PaddlePaddle/models did, and saves them.

    FLAGS_enable_pir_api=0 python tests/write_fluid.py FOLDER

Its layers and `save_vars` are what today's Paddle keeps of fluid (`paddle.static`): the names it generates and the
files it writes are Paddle's own. Writes, for each of the two networks with generated names (2018) and given ones
(2019), a directory FOLDER/<network>_<year> and, with the suffix .npz, an `image` [2, 3, 64, 64] and the network's
`embedding` [2, 2048] and `logits` [2, 7].
"""

import os
import sys

import numpy as np
import paddle
from paddle.static import nn

BLOCKS = (3, 4, 6, 3)


def conv_bn(x, filters, size, stride=1, groups=1, act=None, conv=None, norm=None):
    """`conv` and `norm` are the beginnings of the variables' names, None for generated ones."""
    x = nn.conv2d(
        x, filters, size, stride, (size - 1) // 2, groups=groups, bias_attr=False,
        param_attr=paddle.ParamAttr(name=conv and f"{conv}_weights"),
    )  # fmt: skip
    if norm is None:
        return nn.batch_norm(x, act=act, is_test=True)
    return nn.batch_norm(
        x, act=act, is_test=True, param_attr=paddle.ParamAttr(f"{norm}_scale"),
        bias_attr=paddle.ParamAttr(f"{norm}_offset"), moving_mean_name=f"{norm}_mean",
        moving_variance_name=f"{norm}_variance",
    )  # fmt: skip


def linear(x, size, act=None, name=None):
    return nn.fc(
        x, size, activation=act, weight_attr=paddle.ParamAttr(name=name and f"{name}_weights"),
        bias_attr=paddle.ParamAttr(name=name and f"{name}_offset"),
    )  # fmt: skip


def pooled(x):
    return paddle.nn.functional.adaptive_avg_pool2d(x, 1)


def resnet(x, named):
    x = conv_bn(x, 64, 7, 2, act="relu", conv="conv1" if named else None, norm="bn_conv1" if named else None)
    x = paddle.nn.functional.max_pool2d(x, 3, 2, 1)
    for stage, blocks in enumerate(BLOCKS):
        for i in range(blocks):
            at = f"{stage + 2}{chr(ord('a') + i)}_branch"

            def names(part, at=at):
                return {"conv": f"res{at}{part}", "norm": f"bn{at}{part}"} if named else {}

            width, stride = 64 * 2**stage, 2 if i == 0 and stage else 1
            y = conv_bn(x, width, 1, act="relu", **names("2a"))
            y = conv_bn(y, width, 3, stride, act="relu", **names("2b"))
            y = conv_bn(y, width * 4, 1, **names("2c"))
            if i == 0:
                x = conv_bn(x, width * 4, 1, stride, **names("1"))
            x = paddle.nn.functional.relu(x + y)
    x = pooled(x)
    return x, linear(x, 7)


def se_resnext(x, named):
    x = conv_bn(x, 64, 7, 2, act="relu", conv="conv1" if named else None, norm="conv1_bn" if named else None)
    x = paddle.nn.functional.max_pool2d(x, 3, 2, 1)
    for stage, blocks in enumerate(BLOCKS):
        for i in range(blocks):
            at = f"{stage + 2}_{i + 1}"

            def names(part, at=at):
                return {"conv": f"conv{at}_{part}", "norm": f"conv{at}_{part}_bn"} if named else {}

            width, stride = 128 * 2**stage, 2 if i == 0 and stage else 1
            y = conv_bn(x, width, 1, act="relu", **names("x1"))
            y = conv_bn(y, width, 3, stride, groups=32, act="relu", **names("x2"))
            y = conv_bn(y, width * 2, 1, **names("x3"))
            s = linear(pooled(y), width * 2 // 16, "relu", f"fc{at}_sqz" if named else None)
            s = linear(s, width * 2, "sigmoid", f"fc{at}_exc" if named else None)
            y = y * paddle.unsqueeze(s, [2, 3])
            if i == 0:
                x = conv_bn(x, width * 2, 1, stride, **names("prj"))
            x = paddle.nn.functional.relu(x + y)
    x = pooled(x)
    return x, linear(x, 7, name="fc6" if named else None)


def write(folder, build, named):
    program, startup = paddle.static.Program(), paddle.static.Program()
    with paddle.static.program_guard(program, startup), paddle.utils.unique_name.guard():
        image = paddle.static.data("image", [None, 3, 64, 64], "float32")
        embedding, logits = build(image, named)
    executor, scope, rng = paddle.static.Executor(), paddle.static.Scope(), np.random.default_rng(0)
    with paddle.static.scope_guard(scope):
        executor.run(startup)
        for parameter in program.all_parameters():
            shape = parameter.shape
            if len(shape) == 1:  # batch norm and biases: nothing at its neutral start
                value = rng.uniform(0.5, 1.5, shape)
            else:
                value = rng.uniform(-1, 1, shape) * (2 / np.prod(shape[1:] if len(shape) == 4 else shape[:1])) ** 0.5
            scope.var(parameter.name).get_tensor().set(value.astype(np.float32), paddle.CPUPlace())
        values = {"image": rng.normal(size=(2, 3, 64, 64)).astype(np.float32)}
        values["embedding"], values["logits"] = executor.run(program, values, [embedding, logits])
        paddle.static.io.save_vars(executor, folder, program, predicate=lambda v: v.persistable)
    values["embedding"] = values["embedding"].reshape(2, -1)
    np.savez(f"{folder}.npz", **values)


if __name__ == "__main__":
    paddle.enable_static()
    for build, network in ((resnet, "ResNet50"), (se_resnext, "SE_ResNeXt50_32x4d")):
        for year, named in ((2018, False), (2019, True)):
            write(os.path.join(sys.argv[1], f"{network}_{year}"), build, named)
