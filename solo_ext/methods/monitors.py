"""What reads a training step without changing it: the spread of the outputs, the gap between student and teacher."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.methods.step import Step
from solo_ext.momentum import similarity
from solo_ext.text import Metric


@dataclass(frozen=True)
class Monitor:
    """Subclass it with `__call__`, which gives {metric: scalar} of a step, under no-grad.

    every: steps between two readings. at: the part whose outputs of the teacher it reads; None: none.
    on_step: log single steps, too, not only the mean over an epoch.
    """

    every: int = 1
    at: str | None = None
    on_step: bool = False
    metrics: ClassVar[tuple[Metric, ...]] = ()

    def due(self, step: int) -> bool:
        """Whether it reads optimizer step number `step`."""
        return step % self.every == 0

    def __call__(self, step: Step) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Spread(Monitor):
    """1 / sqrt(D) for spread-out outputs of the student's projector, 0 when they have collapsed."""

    large_crops: int = 2
    metrics = (Metric("train_z_std", "Spread of the projector's outputs"),)

    def __call__(self, step: Step) -> dict[str, Tensor]:
        outputs = torch.stack([out["projector"].float() for i, out in step.students.items() if i < self.large_crops])
        return {"train_z_std": F.normalize(outputs, dim=-1).std(1).mean()}


@dataclass(frozen=True)
class Gap(Monitor):
    """Cosine similarity of student and teacher on the same view (residual momentum, Fig. 6-8)."""

    on_step: bool = True
    metrics = (
        Metric("gap_sim", "Outputs, cosine similarity", "similarity to teacher", "{:.4f}", "gap", progress=True),
        Metric("gap_sim_feats", "Backbone features, cosine similarity", form="{:.4f}", section="gap"),
    )

    def __call__(self, step: Step) -> dict[str, Tensor]:
        students, teachers = zip(*step.both(), strict=True)
        return {
            name: similarity([s[part] for s in students], [t[part] for t in teachers])
            for name, part in (("gap_sim", self.at or "projector"), ("gap_sim_feats", "backbone"))
        }
