"""SimCLR: its positives and negatives have gradient; with momentum, the teacher gives them (ProjectorEMA, Table 1)."""

import formulas
from formulas import directions, mean
from frameworks import Framework

MOMENTUM = {"momentum__stages": "full"}
OPPOSITE = {**MOMENTUM, "method_kwargs__negatives": "opposite"}
SCALES = [{"method_kwargs__loss_scale": scale} for scale in ("solo", "paper")]


def loss(n, q, k):
    if n.negatives == "opposite":
        return mean(directions(lambda a, b: formulas.info_nce(a, b, n.temperature), q, k))
    return formulas.nt_xent(q, n.temperature, k)


SPEC = Framework(
    kwargs={"temperature": 0.2},
    defaults={"negatives": "both"},
    loss=loss,
    heads={"projector.fc1": ["projector.0"], "projector.fc2": ["projector.2"]},
    cases=[("simclr", {**changes, **scale}) for changes in (MOMENTUM, OPPOSITE) for scale in SCALES],
    teacher=False,
    own_targets=True,
    steps=[
        ("simclr", MOMENTUM),
        ("simclr", OPPOSITE),
        ("projector_ema_simclr", {"method_kwargs__negatives": "opposite"}),
    ],
    refused=[("simclr", {"method_kwargs__negatives": "opposit"}, "did you mean 'opposite'")],
    ranks=[("simclr", {}), ("simclr", MOMENTUM), ("simclr", OPPOSITE)],
    solo_learn={},
)
