"""DINO, at an epoch after the warm-up of the teacher's temperature."""

import formulas
from formulas import directions, mean
from frameworks import Framework


def loss(n, q, k):
    return mean(
        directions(lambda s, t: formulas.dino(s, t, n.center, n.student_temperature, n.teacher_temperature), q, k)
    )


SPEC = Framework(
    kwargs={"num_prototypes": 12},
    defaults={"student_temperature": 0.1, "teacher_temperature": 0.07},
    loss=loss,
    heads={
        **{f"projector.fc{i}": [f"head.mlp.{2 * i - 2}"] for i in (1, 2, 3)},
        "projector.prototypes": ["head.last_layer"],
    },
    head="head",
    memory=lambda model: {"center": model.dino_loss_func.center[0]},
    refused=[
        (
            "dino",
            {"method_kwargs__num_prototypes": 0},
            "method_kwargs.num_prototypes must be a whole number of at least 1",
        ),
        (
            "dino",
            {"method_kwargs__warmup_teacher_temperature_epochs": 9},
            "warmup_teacher_temperature_epochs must be at most max_epochs, 2, not 9",
        ),
        (
            "projector_ema_dino",
            {"momentum__classifier": True},
            "momentum.classifier needs labels and a teacher with a back",
        ),
    ],
    ranks=[("dino", {"method_kwargs__freeze_last_layer": 0, "method_kwargs__clip_grad": 0.1})],
    solo_learn={
        "method_kwargs__clip_grad": 0.05,
        "method_kwargs__warmup_teacher_temperature_epochs": 2,
        "method_kwargs__teacher_temperature": 0.06,
    },
)
