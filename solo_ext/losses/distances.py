"""Distances between paired outputs: the cosine on two scales, and two others (residual momentum, Table 7)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from solo_ext.losses.precision import in_float32


@in_float32
def cosine_distance(p: Tensor, z: Tensor) -> Tensor:
    """2 - 2 cos(p, z) = ||p/|p| - z/|z|||^2, averaged over the batch (residual momentum, Eq. 5; BYOL, Eq. 2).

    p, z: [B, D], not normalised. z carries no gradient. In [0, 4]; its gradient is twice `negative_cosine`'s. Computed
    as the squared length of the difference: 2 - 2 cos would lose the digits that nearly equal vectors have in common.
    """
    return (F.normalize(p, dim=-1) - F.normalize(z.detach(), dim=-1)).square().sum(-1).mean()


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos(p, z), averaged over the batch (ProjectorEMA, D of Alg. 1 and Eq. 5; SimSiam, Eq. 1).

    p, z: [B, D], not normalised. z carries no gradient. In [-1, 1].
    """
    return cosine_distance(p, z) / 2 - 1


@in_float32
def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """-sum P(teacher) log P(student), P = softmax(x / temperature), averaged over the batch.

    student, teacher: [B, D], not normalised. teacher carries no gradient. In nats.

    This is the knowledge distillation that the residual momentum paper cites. Its Eq. 6 prints the reverse, -P(student)
    log P(teacher), which a one-hot student minimises. The paper names temperatures 3, 4 and 5 without choosing one, and
    prints exp(x) / temperature, in which the temperature would cancel.
    """
    return F.cross_entropy(student / temperature, (teacher.detach() / temperature).softmax(-1))


@in_float32
def printed_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """-sum P(student) log P(teacher), as Eq. 6 of residual momentum prints it, else as `soft_cross_entropy`."""
    target = (teacher.detach() / temperature).log_softmax(-1)
    return -((student / temperature).softmax(-1) * target).sum(-1).mean()


@in_float32
def softmax_mse(student: Tensor, teacher: Tensor, over: Literal["sum", "mean"] = "sum") -> Tensor:
    """1/2 ||softmax(student) - softmax(teacher)||^2, averaged over the batch (residual momentum, Eq. 7).

    student, teacher: [B, D], not normalised. teacher carries no gradient. In [0, 1]. The paper leaves open whether
    dimensions are summed or averaged (`over`), and the temperature, here 1.
    """
    squares = (student.softmax(-1) - teacher.detach().softmax(-1)).square()
    return 0.5 * (squares.sum(-1) if over == "sum" else squares).mean()
