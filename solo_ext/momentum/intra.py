"""Intra-momentum: pull the student to the teacher on the same view (paper B, Sec. 3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from solo_ext.errors import ConfigError, nearest
from solo_ext.losses import cosine_distance, soft_cross_entropy, softmax_mse

DISTANCES = ("cosine", "ce", "mse")
TARGETS = ("predictor", "projector")


@dataclass
class IntraMomentum:
    """weight * 1/2 (D(q_1, q_1m) + D(q_2, q_2m)), added to any framework's loss (paper B, Eq. 8 and 9).

    weight: 0 is off; the paper uses 1.
    distance: cosine (Eq. 5), ce (Eq. 6) or mse (Eq. 7).
    target: predictor (q_m) or projector (g_m, the asymmetric ablation of Sec. 3.3).
    every: switch the term off and on every so many optimizer steps, beginning with on (Fig. 12); None: always on.
    temperature: of the softmax of `ce`; the paper names 3, 4, 5 without choosing.
    """

    weight: float = 0.0
    distance: str = "cosine"
    target: str = "predictor"
    every: int | None = None
    temperature: float = 4.0

    def __post_init__(self):
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"intra.weight must be a finite number of at least 0, not {self.weight}")
        for key, choices in (("distance", DISTANCES), ("target", TARGETS)):
            value = getattr(self, key)
            if value not in choices:
                raise ConfigError(
                    f"intra.{key} must be one of {', '.join(choices)}, not '{value}'{nearest(value, choices)}"
                )
        if self.every is not None and self.every < 1:
            raise ConfigError(f"intra.every must be at least 1 step, or null for always on, not {self.every}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"intra.temperature must be a finite number above 0, not {self.temperature}")

    def active(self, step: int) -> bool:
        """Whether the term is on at optimizer step `step`."""
        return self.weight > 0 and (self.every is None or step // self.every % 2 == 0)

    def __call__(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The unweighted term: the mean over views of D(student [B, D], teacher [B, D]), a scalar."""
        distance = {
            "cosine": cosine_distance,
            "ce": partial(soft_cross_entropy, temperature=self.temperature),
            "mse": softmax_mse,
        }[self.distance]
        terms = [distance(student, teacher) for student, teacher in zip(students, teachers, strict=True)]
        return sum(terms) / len(terms)
