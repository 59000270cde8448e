"""The optimizer's state in a checkpoint, and the learning rate."""

import os

import numpy as np
import paddle
import pytest

from training import optimizers
from training.parts import Parts, arrays
from training.run import Run
from utility import UserError
from weights import checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:When training, we now always track", "ignore:The input state dict is empty"
)

OPTIMIZERS = {
    "momentum": lambda p: paddle.optimizer.Momentum(0.1, momentum=0.9, parameters=p, weight_decay=1e-3),
    "momentum fused": lambda p: paddle.optimizer.Momentum(0.1, 0.9, p, weight_decay=1e-3, use_multi_tensor=True),
    "adamw": lambda p: paddle.optimizer.AdamW(0.01, parameters=p, weight_decay=0.1),
    "adam": lambda p: paddle.optimizer.Adam(0.01, parameters=p),
    "adam fused": lambda p: paddle.optimizer.Adam(0.01, parameters=p, use_multi_tensor=True),
    "sgd": lambda p: paddle.optimizer.SGD(0.1, parameters=p),
}


def build(optimizer="momentum"):
    """-> a network of so many layers that linear_1's name begins linear_10's, and its optimizer; layer 3 is frozen."""
    layers = [paddle.nn.Linear(3, 3) for _ in range(12)]
    network = paddle.nn.Sequential(*layers, paddle.nn.BatchNorm1D(3))
    network[3].weight.stop_gradient = True
    return network, begin(optimizer, network)


def begin(optimizer, network):
    parameters = [p for p in network.parameters() if not p.stop_gradient]
    optimizer = OPTIMIZERS[optimizer](parameters)
    optimizers.make_optimizer_state(optimizer, parameters)
    return optimizer


def step(network, optimizer, seed):
    x = paddle.to_tensor(np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32))
    (network(x)[:, 0] * x[:, 1]).sum().backward()
    optimizer.step()
    optimizer.clear_grad()


def state_of(network, optimizer):
    return {
        key: value.numpy().copy()
        for key, (_, value) in optimizers.optimizer_entries(dict(network.named_parameters()), optimizer).items()
    }


def save(run_dir, network, optimizer, description):
    parts = Parts(network, paddle.nn.Layer(), optimizer, None)
    return Run(run_dir).save(arrays(parts), description)


def at(epoch, step=8):
    """The state of a run with 8 steps an epoch."""
    return {"epoch": epoch, "step": step, "steps": 8, "evaluated": False}


def values(network):
    return {name: value.numpy() for name, value in network.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_checkpoint_continues_with_the_same_step(tmp_path, optimizer_name):
    network, optimizer = build(optimizer_name)
    for seed in range(3):
        step(network, optimizer, seed)
    path = save(tmp_path, network, optimizer, {**at(4), "labels": [3, 5]})
    assert path == f"{tmp_path}/4" and os.readlink(tmp_path / "latest") == "4"
    assert sorted(os.listdir(path)) == ["checkpoint.json", "model.pdopt", "model.pdparams"]
    state = checkpoint.read_description(f"{tmp_path}/latest")
    assert sorted(state.pop("sums")) == ["model.pdopt", "model.pdparams"]
    assert state == {"format": checkpoint.FORMAT, **at(4), "labels": [3, 5]}
    saved = values(network)
    step(network, optimizer, 3)
    wanted = values(network)

    # Another process builds other layers before: the generated names differ.
    paddle.nn.Linear(2, 2)
    again, other_optimizer = build(optimizer_name)
    assert again[0].weight.name != network[0].weight.name
    again.set_state_dict(paddle.load(f"{path}/{checkpoint.WEIGHTS_FILE}"))
    assert same(values(again), saved)
    named = paddle.load(f"{path}/{checkpoint.PART_FILES['optimizer']}", return_numpy=True)
    assert all(isinstance(value, np.ndarray) for value in named.values())
    optimizers.load_optimizer_state(dict(again.named_parameters()), other_optimizer, named, path)
    step(again, other_optimizer, 3)
    assert same(values(again), wanted)

    # Without the optimizer's state it would be another step.
    again.set_state_dict(saved)
    step(again, begin(optimizer_name, again), 3)
    assert same(values(again), wanted) == (optimizer_name == "sgd")


def test_optimizer_state_of_another_network():
    network, optimizer = build()
    step(network, optimizer, 0)
    named = state_of(network, optimizer)
    trained = [name for name, p in network.named_parameters() if not p.stop_gradient]
    assert sorted({name.rsplit("/", 1)[0] for name in named}) == sorted(trained)
    small = paddle.nn.Sequential(paddle.nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"model.pdopt: has '.*', which this network lacks"):
        optimizers.load_optimizer_state(dict(small.named_parameters()), begin("momentum", small), named, "model.pdopt")


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_an_optimizer_with_its_state_made_early_does_the_same_steps(optimizer_name):
    network, optimizer = build(optimizer_name)
    assert all("_pow_" in key or not value.any() for key, value in state_of(network, optimizer).items())
    late, _ = build()
    late.set_state_dict(network.state_dict())
    as_paddle_does = OPTIMIZERS[optimizer_name]([p for p in late.parameters() if not p.stop_gradient])
    for seed in range(3):
        step(network, optimizer, seed)
        step(late, as_paddle_does, seed)
        assert same(values(network), values(late))
        assert same(state_of(network, optimizer), state_of(late, as_paddle_does))


@pytest.mark.parametrize("optimizer_name", sorted(set(OPTIMIZERS) - {"sgd"}))
def test_what_a_saved_optimizer_lacks_is_named_and_nothing_is_loaded(optimizer_name):
    network, optimizer = build(optimizer_name)
    step(network, optimizer, 0)
    whole = state_of(network, optimizer)
    again = begin(optimizer_name, network)
    first = state_of(network, again)
    kind = "moment1_0" if "adam" in optimizer_name else "velocity_0"
    key = f"4.weight/{kind}"
    for saved, message in (
        ({}, f"incomplete: {len(whole)} entries are missing"),
        (
            {name: value for name, value in whole.items() if name != key},
            f"incomplete: 1 entries are missing, such as '{key}'",
        ),
        ({**whole, key: whole[key][:2]}, rf"'{key}' is \[2, 3\] in place of \[3, 3\]"),
        ({**whole, key: whole[key].astype(np.float64)}, f"'{key}' is float64 in place of float32"),
    ):
        with pytest.raises(UserError, match=message):
            optimizers.load_optimizer_state(dict(network.named_parameters()), again, saved, "model.pdopt")
        assert same(state_of(network, again), first)


def test_state_without_an_owner_is_not_dropped():
    network, _ = build()
    proxies = paddle.nn.Linear(2, 2)
    optimizer = begin("momentum", proxies)
    with pytest.raises(RuntimeError, match="of no parameter that is saved"):
        optimizers.optimizer_entries(dict(network.named_parameters()), optimizer)


def test_optimizer_state_of_parameters_whose_names_begin_alike():
    def build():
        names = ["w_moment", "w", "w_moment_1"]
        layers = [paddle.nn.Linear(3, 3, weight_attr=paddle.ParamAttr(name=name), bias_attr=False) for name in names]
        network = paddle.nn.Sequential(*layers)
        return network, OPTIMIZERS["adam"](network.parameters())

    network, optimizer = build()
    step(network, optimizer, 0)
    named = state_of(network, optimizer)
    kinds = {key.split("/")[1] for key in named}
    assert sorted(named) == sorted(f"{layer}.weight/{kind}" for layer in range(3) for kind in kinds)


def test_a_warmup_of_a_part_of_an_epoch():
    """The steps in it have the rate of their end, those after it of their start."""
    schedule = optimizers.Schedule(lr=1.0, lr_strategy="cosine_decay", warmup_epochs=0.5, num_epochs=1)
    found = [optimizers.rate_of_step(schedule, 0, step, 4) for step in range(4)]
    assert found == pytest.approx([0.5, 1, 1, 0.5])


@pytest.mark.parametrize("strategy", ["piecewise_decay", "cosine_decay", "constant"])
def test_a_warmup_ends_at_the_rate(strategy):
    """Also where the first decay is due at its end."""
    schedule = optimizers.Schedule(lr=1.0, lr_strategy=strategy, warmup_epochs=1, num_epochs=4)
    found = [optimizers.rate_of_step(schedule, 0, step, 4) for step in range(4)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1])
    after = {"piecewise_decay": 0.1, "cosine_decay": 1.0, "constant": 1.0}
    assert optimizers.rate_of_step(schedule, 1, 0, 4) == pytest.approx(after[strategy])
