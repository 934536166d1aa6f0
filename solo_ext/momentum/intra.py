"""Intra-momentum: pull the student to the teacher on the same view (residual momentum, Sec. 3.3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from solo_ext.losses import cosine_distance, mean, printed_cross_entropy, soft_cross_entropy, softmax_mse
from solo_ext.schema import Config, Count, NonNegative, Positive


@dataclass(frozen=True)
class IntraMomentum(Config, section="intra"):
    """weight * 1/2 (D(q_1, q_1m) + D(q_2, q_2m)), added to any framework's loss (residual momentum, Eq. 8 and 9).

    weight: 0 is off; the paper uses 1.
    distance: cosine (Eq. 5), ce (Eq. 6, towards the teacher's distribution; ce_printed: in the order of its print) or
        mse (Eq. 7, summed over dimensions; mse_mean: averaged).
    target: predictor (q_m) or projector (g_m, the asymmetric ablation of Sec. 3.3), both compared with the
        student's last head; or a stage, compared with the student's own.
    every: optimizer steps after which the term is switched off, and on again (Fig. 12); null: always on.
    temperature: of the softmax of `ce` and `ce_printed`; the paper names 3, 4, 5 without choosing.
    """

    weight: NonNegative = 0.0
    distance: Literal["cosine", "ce", "ce_printed", "mse", "mse_mean"] = "cosine"
    target: str = "predictor"
    every: Count | None = None
    temperature: Positive = 4.0

    def active(self, step: int) -> bool:
        """Whether the term is on at optimizer step `step`."""
        return self.weight > 0 and (self.every is None or step // self.every % 2 == 0)

    def __call__(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The unweighted term: the mean over views of D(student [B, D], teacher [B, D]), a scalar."""
        distances: dict[str, Callable[..., Tensor]] = {
            "cosine": cosine_distance,
            "ce": partial(soft_cross_entropy, temperature=self.temperature),
            "ce_printed": partial(printed_cross_entropy, temperature=self.temperature),
            "mse": softmax_mse,
            "mse_mean": partial(softmax_mse, over="mean"),
        }
        distance = distances[self.distance]
        return mean([distance(student, teacher) for student, teacher in zip(students, teachers, strict=True)])
