"""MoCo v3."""

import formulas
from formulas import directions, mean
from frameworks import Framework


def loss(n, q, k):
    """solo-learn: the sum times 2 temperatures; residual momentum, Eq. 3: the mean."""
    losses = directions(lambda a, b: formulas.info_nce(a, b, n.temperature), q, k)
    return 2 * n.temperature * sum(losses) if n.loss_scale == "solo" else mean(losses)


SPEC = Framework(
    kwargs={"pred_hidden_dim": 16, "temperature": 0.2},
    loss=loss,
    heads={"projector.fc1": ["projector.0", "projector.1"], "projector.fc2": ["projector.3"]},
    predictor=True,
    loss_scale={"res_mocov3": "paper"},
    steps=[  # the same scale for a comparison
        ("mocov3", {"method_kwargs__loss_scale": "paper"}),
        ("res_mocov3", {"method_kwargs__loss_scale": "solo"}),
    ],
    refused=[
        (
            "mocov3",
            {"method_kwargs__temperature": 0},
            "method_kwargs.temperature must be a finite number of at least 1e-06, not 0.0",
        )
    ],
    ranks=[("mocov3", {}), ("res_mocov3", {})],
    solo_learn={},
)
