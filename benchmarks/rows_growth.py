"""How the time of training, evaluation and search grows with the data: N, 2N and 4N pictures."""

import os
import sys
import tempfile

import numpy as np

from comparison import Comparison, Value


def comparisons(tiny):
    works = [  # name, what the time should grow like and its bar at 4N, N, function
        ("train.py, an epoch of ResNet8 at 32 px", "linear is 4", 5, 64 if tiny else 2000, "train"),
        ("evaluation of N x 512", "quadratic is 16", 18, 200 if tiny else 10_000, "evaluate"),
        ("exact search of N x 512, 200 queries", "linear is 4", 5, 200 if tiny else 100_000, "search"),
    ]
    for what, law, bar, count, function in works:
        sizes = [count, 2 * count, 4 * count]
        yield Comparison(
            f"{what}, N = {count}",
            {size: (function, {"count": size}) for size in sizes},
            [
                Value("2N over N", lambda r, s=sizes: r[s[1]]["seconds"] / r[s[0]]["seconds"], None, "x"),
                Value(f"4N over N: {law}", lambda r, s=sizes: r[s[2]]["seconds"] / r[s[0]]["seconds"], bar, "x"),
            ],
            3,
        )


def train(count):
    """train.py from its start to its end, an epoch of `count` pictures, without an evaluation."""
    from runtime import process

    process.start_paddle(seed=0)
    from rows_reader import find

    import train as script

    folder = tempfile.mkdtemp()
    images = os.path.join(folder, "list.txt")
    with open(images, "w") as file:
        file.writelines(f"{os.path.abspath(path)} {i // 4}\n" for i, path in enumerate(find("", (64, 64), count, 1)))
    flags = (
        f"--train_list={images} --model=ResNet8 --image_shape=3,32,32 --train_batch_size=64 --lr=0.001 "
        "--num_epochs=1 --eval_every=0 --overwrite=True --seed=0 --quiet --model_save_dir="
    )

    def run():
        sys.argv = ["train.py", *(flags + tempfile.mkdtemp(dir=folder)).split()]
        script.main()

    return run


def evaluate(count):
    from rows_recall import draw

    from retrieval import figures

    features, labels = draw(count, 512, count // 5, 2.4)
    return lambda: figures.measure(figures.Search(features, labels)) and None


def search(count):
    from retrieval import neighbours

    rng = np.random.default_rng(0)
    gallery, queries = (rng.standard_normal((rows, 512), np.float32) for rows in (count, 200))
    return lambda: neighbours.nearest(queries, gallery, 10) and None
