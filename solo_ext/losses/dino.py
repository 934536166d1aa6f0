"""DINO's self-distillation between prototype scores (Caron et al., 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solo_ext.losses.distributed import mean_over_ranks
from solo_ext.losses.precision import in_float32


@in_float32
def dino(
    student: Tensor, teacher: Tensor, center: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """-sum P(teacher) log P(student), averaged over the batch (DINO, Eq. 1 and Sec. 3.1).

    student, teacher: scores [B, K] of two views; P is the softmax at the temperature of each, the teacher's after
    `center` [1, K] is subtracted. teacher carries no gradient. In nats.
    """
    target = ((teacher.detach() - center) / teacher_temperature).softmax(-1)
    return F.cross_entropy(student / student_temperature, target)


class Center(nn.Module):
    """The running mean `center` [1, K] of the teacher's scores, equal on all ranks (DINO, Eq. 4)."""

    center: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    @torch.no_grad()
    def update(self, teachers: Tensor) -> None:
        """Moves the centre towards the mean of the scores `teachers` [V, B, K] of all views and ranks."""
        mean = mean_over_ranks(teachers.flatten(0, 1).mean(0, keepdim=True, dtype=self.center.dtype))
        self.center.lerp_(mean, 1 - self.momentum)
