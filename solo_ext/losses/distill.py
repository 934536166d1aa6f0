"""Two other distances between student and teacher outputs of the same view (residual momentum, Table 7)."""

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 4.0, literal: bool = False) -> Tensor:
    """-sum P(teacher) log P(student), P = softmax(x / temperature), averaged over the batch.

    student, teacher: [B, D], not normalised. teacher carries no gradient. In nats.

    This is the knowledge distillation that the paper cites. Its Eq. 6 prints the reverse, -P(student) log
    P(teacher), which is least for a one-hot student; `literal=True` computes that. The paper names
    temperatures 3, 4 and 5 without choosing, and prints exp(x) / temperature, where the temperature would
    cancel.
    """
    student, teacher = student / temperature, teacher.detach() / temperature
    weight, of = (student, teacher) if literal else (teacher, student)
    return F.cross_entropy(of, weight.softmax(-1))


def softmax_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """1/2 ||softmax(student) - softmax(teacher)||^2, averaged over the batch (residual momentum, Eq. 7).

    student, teacher: [B, D], not normalised. teacher carries no gradient. In [0, 1]. The paper leaves open
    whether dimensions are summed or averaged: they are summed, at temperature 1.
    """
    return 0.5 * (student.softmax(-1) - teacher.detach().softmax(-1)).square().sum(-1).mean()
