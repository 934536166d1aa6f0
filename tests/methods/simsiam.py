"""SimSiam."""

import formulas
from formulas import directions, mean
from frameworks import Framework

SPEC = Framework(
    kwargs={"pred_hidden_dim": 16, "temperature": 0.2},
    loss=lambda n, q, k: mean(directions(formulas.negative_cosine, q, k)),
    heads={
        "projector.fc1": ["projector.0", "projector.1"],
        "projector.fc2": ["projector.3", "projector.4"],
        "projector.fc3": ["projector.6"],
    },
    predictor=True,
    teacher=False,
    steps=[
        ("simsiam", {"momentum__stages": "full"}),
        ("res_simsiam", {"intra__target": "projector"}),  # an intra term at the projector although there is a predictor
    ],
    refused=[
        ("simsiam", {"intra__weight": 1.0}, "intra.weight > 0 needs a teacher that differs from the student"),
    ],
    # solo-learn takes the predictor's first step at warmup_start_lr, and all others at the lr that it keeps: here equal
    solo_learn={"scheduler__warmup_start_lr": 0.05},
)
