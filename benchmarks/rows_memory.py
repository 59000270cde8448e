"""How the memory of each loss, forward and backward, grows with the batch: twice the images have 4 times the pairs."""

from rows_losses import COUNTERPARTS, HEADS, ours  # noqa: F401 - ours is measured here

from comparison import Comparison, Value


def comparisons(tiny):
    small, large = (16, 32) if tiny else (1024, 2048)
    for name, mining in COUNTERPARTS:
        if name not in ("softmax", *HEADS):
            yield Comparison(
                f"memory of {name}, {mining}" if mining else f"memory of {name}",
                {n: ("ours", {"name": name, "mining": mining, "count": n, "dimension": 64}) for n in (small, large)},
                [
                    Value(
                        f"batch {large} over batch {small}, x 64: O(N^2) is 4",
                        lambda r: r[large]["memory"] / max(1, r[small]["memory"]),
                        4.5,
                        "x",
                    )
                ],
                1,
            )
