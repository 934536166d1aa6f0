"""The gap between student and teacher on the same view (residual momentum, Fig. 6-8, Tables 14-15)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.momentum.teacher import Teacher
from solo_ext.schema import Config, Count


@dataclass
class GapConfig(Config, section="gap"):
    """The YAML's `gap`: what is monitored. It never changes what is trained.

    at: outputs to compare; `predictor` gives a baseline a momentum predictor just to measure by (the paper's (q, q_m)),
        `auto` takes the predictor where the intra term has one already, else the projector.
    every: steps of the optimizer between two measurements.
    """

    enabled: bool = True
    at: Literal["auto", "projector", "predictor"] = "auto"
    every: Count = 10


@torch.no_grad()
def similarity(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Mean cosine similarity of paired [B, D] outputs over samples and views; the paper's gap is 2 - 2 times this."""
    pairs = zip(students, teachers, strict=True)
    return torch.stack([F.cosine_similarity(s.float(), t.float(), dim=-1).mean() for s, t in pairs]).mean()


@torch.no_grad()
def weight_distance(teacher: Teacher) -> dict[str, Tensor]:
    """Per owned stage: ||student - teacher|| / ||student||, over all its parameters (0 for a stage without any)."""
    distances = {}
    for stage in teacher.stages:
        pairs = list(zip(*map(stage.parameters, teacher.pair(stage)), strict=True))
        if pairs:
            difference = torch.stack([(theirs - ours).norm() for ours, theirs in pairs]).norm()
            norm = torch.stack([theirs.norm() for _, theirs in pairs]).norm()
            distances[stage.name] = difference / norm.clamp_min(1e-12)
    return distances
