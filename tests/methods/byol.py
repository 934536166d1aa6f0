"""BYOL."""

import formulas
from formulas import directions, mean
from frameworks import Framework


def loss(n, q, k):
    """solo-learn: the sum; ProjectorEMA, Eq. 5, and residual momentum, Eq. 3 and 5: the mean."""
    if n.loss_scale == "solo":
        return sum(directions(formulas.cosine_distance, q, k))
    return mean(directions(formulas.cosine_distance if n.method == "res_byol" else formulas.negative_cosine, q, k))


SPEC = Framework(
    kwargs={"pred_hidden_dim": 16},
    loss=loss,
    heads={"projector.fc1": ["projector.0", "projector.1"], "projector.fc2": ["projector.3"]},
    cases=[("res_byol", {"method_kwargs__loss_scale": "paper"})],
    predictor=True,
    loss_scale={"res_byol": "paper"},
    steps=[
        ("projector_ema_byol", {"method_kwargs__loss_scale": "paper"}),  # ProjectorEMA, Alg. 1
        # ProjectorEMA's BN1 and BN2 (Tables C.8 and D.9)
        ("byol", {"backbone__last_norm": True, "method_kwargs__proj_last_norm": True}),
        # an intra term on any stages
        ("byol", {"intra__weight": 0.5, "momentum__stages": "projector"}),
    ],
    refused=[
        ("byol", {"method_kwargs__proj_hidden_dim": 0}, "method_kwargs.proj_hidden_dim must be"),
        ("byol", {"momentum__stages": ["block9"]}, "no stage 'block9' with a teacher; did you mean 'block4'"),
    ],
    solo_learn={},
)
