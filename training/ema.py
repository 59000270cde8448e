"""An average of the weights over the steps of a run, which often generalises better than the last ones.

    average = d * average + (1 - d) * weights after each step,  d = min(decay, (1 + steps so far) / (10 + steps so far))

Polyak and Juditsky, SIAM J. Control Optim. 30, 1992; the smaller d of the first steps lets it forget where it began.
"""

import contextlib


class Average:
    """The average of all that a network's state_dict holds, batch norm's statistics among it.

    Args:
        network: EmbeddingNet, with the weights to begin with.
        decay: in 0..1.
    """

    def __init__(self, network, decay):
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in network.state_dict().items()}

    def update(self, network, steps):
        """Takes in the weights after a step; `steps`: how many there were before, of all epochs."""
        import paddle

        decay = min(self.decay, (1 + steps) / (10 + steps))
        with paddle.no_grad():
            state = network.state_dict()
            copy({name: paddle.lerp(value, self.tensors[name], decay) for name, value in state.items()}, self.tensors)

    @contextlib.contextmanager
    def in_place(self, network):
        """For the time of a `with`, the network has the average in the place of its weights."""
        state = network.state_dict()
        weights = {name: value.detach().clone() for name, value in state.items()}
        copy(self.tensors, state)
        try:
            yield
        finally:
            copy(weights, state)


def copy(values, tensors):
    """Gives the tensors of a dict the values that another has under the same names."""
    import paddle

    with paddle.no_grad():
        for name, tensor in tensors.items():
            paddle.assign(values[name], output=tensor)
