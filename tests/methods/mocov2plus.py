"""MoCo v2+: a query of view i is told from the earlier keys of view j, whose key it has to find."""

import formulas
from formulas import mean
from frameworks import Framework


def loss(n, q, k):
    pairs = [(i, j) for i in range(len(q)) for j in range(len(k)) if i != j]
    return mean(formulas.queue_nce(q[i], k[j], n.queue[j], n.temperature) for i, j in pairs)


SPEC = Framework(
    kwargs={"temperature": 0.2, "queue_size": 24},
    loss=loss,
    heads={"projector.fc1": ["projector.0"], "projector.fc2": ["projector.2"]},
    memory=lambda model: {"queue": model.queue.mT},
    refused=[("mocov2plus", {"method_kwargs__queue_size": 0}, "method_kwargs.queue_size must be")],
    solo_learn={},
)
