"""ReSSL: view 0 is strong, view 1 weak."""

import formulas
from frameworks import TWICE, Framework

NO_PROBE = {"method_kwargs__weak_probe": False}
NO_TEACHER = {"momentum__inter": False}

SPEC = Framework(
    kwargs={"temperature_q": 0.1, "temperature_k": 0.04, "queue_size": 24},
    loss=lambda n, q, k: formulas.relational(q[0], k[0], n.queue, n.temperature_q, n.temperature_k),
    heads={"projector.fc1": ["projector.0"], "projector.fc2": ["projector.2"]},
    memory=lambda model: {"queue": model.queue},
    one_direction=True,
    steps=[("ressl", NO_PROBE), ("projector_ema_ressl", NO_PROBE)],
    passes=[
        ("ressl", {}, [True, False], 1, 1),
        ("ressl", NO_PROBE, [True], 1, 1),
        ("projector_ema_ressl", {}, [True, False], 0, 1),
        ("projector_ema_ressl", NO_PROBE, [True, False], 0, 1),
        ("res_ressl", {}, TWICE, 2, 2),
        ("res_ressl", NO_PROBE, TWICE, 2, 2),
        ("ressl", {"momentum__classifier": True}, [True, False], 2, 2),
        ("ressl", NO_TEACHER, [True, False], 0, 0),
        ("ressl", {**NO_TEACHER, **NO_PROBE}, [True, False], 0, 0),
        ("ressl", {"momentum__stages": "none"}, [True, False], 0, 0),
        ("ressl", {"data__num_classes": 0}, [True], 1, 1),
        ("projector_ema_ressl", {"data__num_classes": 0}, [True, False], 0, 1),
    ],
    refused=[
        ("ressl", {"method_kwargs__temperature_k": -0.04}, "method_kwargs.temperature_k must be"),
        (
            "ressl",
            {"data__num_small_crops": 4},
            "ReSSL takes a strong and a weak view, not 2 large and 4 small",
        ),
        ("ressl", {"data__num_large_crops": 3}, "not 3 large and 0 small"),
    ],
    ranks=[("ressl", {}), ("projector_ema_ressl", {})],
    solo_learn={},
)
