"""What test_parallel.py launches several times at once: checks of runtime/parallel.py, or one step of training for each
loss, whose losses and gradients process 0 writes to a file.

    python tests/programs/parallel_worker.py collectives
    python tests/programs/parallel_worker.py gradients <file.npz>
"""

import os
import sys
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import losses
import models
from losses import LossSettings
from losses.objective import Objective
from runtime import parallel, process

LOSSES = [name for name in losses.LOSSES if name != "tripletloss"]
LOSSES += [f"tripletloss {mining}" for mining in losses.MINING]
BATCH = 12


def collectives():
    paddle = process.start_paddle()
    rank, size = parallel.rank(), parallel.world_size()
    assert size == int(os.environ["PADDLE_TRAINERS_NUM"])
    shares = parallel.gather_objects(parallel.share(BATCH * size))
    assert [i for part in shares for i in range(part.start, part.stop)] == list(range(BATCH * size))
    assert parallel.from_first({"value": rank}) == {"value": 0}
    assert parallel.largest(rank) == size - 1
    assert parallel.gather_objects("a" * rank) == ["a" * other for other in range(size)]
    draw = paddle.rand([4]).numpy().tolist()  # without a seed, but alike
    assert parallel.from_first(draw) == draw

    means = [paddle.full([2, 3], float(rank)), paddle.full([4], 10.0 * rank)]
    parallel.average(means)
    assert (means[0].numpy() == (size - 1) / 2).all() and (means[1].numpy() == 10 * (size - 1) / 2).all()

    x = paddle.create_parameter([2, 3], "float32", default_initializer=paddle.nn.initializer.Constant(rank + 1.0))
    whole = parallel.gather(x)
    assert whole.numpy()[:, 0].tolist() == [r + 1.0 for r in range(size) for _ in range(2)]
    (whole**2).sum().backward()
    assert (x.grad.numpy() == 2 * (rank + 1)).all()  # of the one loss, counted once
    parallel.sum_gradients([x])
    assert (x.grad.numpy() == size * (size + 1)).all()

    # Uneven numbers of items, and none at all.
    for counts in ([3] * size, list(range(size)), [0] * size):
        found = list(parallel.collect(iter([(rank, i) for i in range(counts[rank])])))
        if rank:
            assert found == []
        else:
            assert sorted(found) == [(r, i) for r in range(size) for i in range(counts[r])]
    # A signal in one process ends it in all.
    signals = process.Signals()
    signals.number = 15 * (rank == size - 1)
    try:
        list(parallel.collect(iter([1, 2]), signals))
        raise AssertionError("goes on")
    except parallel.Signalled as error:
        assert error.number == 15
    # gloo alone would give up after 30 seconds.
    if rank == 0 and "slow" in sys.argv:
        time.sleep(35)
    assert parallel.largest(rank) == size - 1
    print("all is well")


def gradients(path):
    """One step of each loss on the same weights and pictures, shared out."""
    paddle = process.start_paddle(seed=5)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    own = parallel.share(BATCH)
    labels = np.repeat(np.arange(BATCH // 4), 4)[rng.permutation(BATCH)]
    network = models.build_model("ResNet8", 6, embedding_size=16)
    network.start_training(freeze_bn=True)
    parameters = [p for p in network.parameters() if not p.stop_gradient]
    result = {}
    for name in LOSSES:
        loss_name, mining = (name + " random").split(" ")[:2]
        options = {"margin": 0.3, "triplet_mining": mining}
        paddle.seed(6)
        settings = LossSettings(loss_name, 1.0, 0.1, options=options, memory_size=20 * losses.LOSSES[loss_name].memory)
        objective = Objective(settings, 6, 16)
        image, label = paddle.to_tensor(pictures[own]), parallel.gather(paddle.to_tensor(labels[own]))
        embedding, logits = (parallel.gather(tensor) for tensor in network(image))
        paddle.seed(7)
        loss = objective(embedding, logits, label)["loss"]
        loss.backward()
        parallel.sum_gradients(parameters)
        result[f"{name}/loss"] = loss.numpy()
        for parameter_name, parameter in network.named_parameters():
            if parameter.grad is not None:
                result[f"{name}/{parameter_name}"] = parameter.grad.numpy()
        for parameter in parameters:
            parameter.clear_gradient()
    if parallel.is_first():
        np.savez(path, **result)


if __name__ == "__main__":
    process.run_script(collectives if sys.argv[1] == "collectives" else lambda: gradients(sys.argv[2]))
