"""One training step as data: which network runs which view, the outputs, the terms of the loss, and the monitors that
read it without changing it: the spread of the outputs, the gap between student and teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.evaluation.quality import rankme
from solo_ext.schema import Config, Count
from solo_ext.text import Metric

Outputs = Mapping[str, Tensor]  # part (backbone, projector, predictor) or stage -> its output on one view


@dataclass(frozen=True)
class Passes:
    """Which network runs which views, by their places in the batch."""

    learning: tuple[int, ...]  # views that the student runs with gradient
    student: tuple[int, ...]  # all views that it runs; on the others only a probe learns
    targets: tuple[int, ...]  # views whose target the loss takes, from the teacher or, without gradient, the student
    teacher: tuple[int, ...]  # views that the teacher runs
    upto: str  # the last part of the teacher that runs
    probed: tuple[int, ...]  # views on which the online probes learn


@dataclass(frozen=True)
class Step:
    """A batch and the outputs of its views: what every term of the loss and every monitor reads."""

    number: int  # optimizer steps before this one
    indexes: Tensor  # of the samples [B]
    views: list[Tensor]  # the images [B, 3, H, W], large crops first
    labels: Tensor  # [B]; -1 is none
    passes: Passes
    students: dict[int, Outputs]  # place of the view -> the student's outputs
    teachers: dict[int, Outputs]  # place of the view -> the teacher's outputs, without gradient
    metrics: dict[str, Tensor] = field(default_factory=dict)  # what the terms log besides their values


@dataclass(frozen=True)
class Term:
    """A term of the loss: `weight` times what `value` makes of a step, logged as `name`.

    active: whether it counts in optimizer step number n.
    """

    name: str
    value: Callable[[Step], Tensor]
    weight: float = 1.0
    active: Callable[[int], bool] = lambda step: True


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
        z = F.normalize(outputs, dim=-1)
        apart = z - z.mean(1, keepdim=True)  # torch.std takes ten times as long
        return {"train_z_std": (apart.square_().sum(1) / (z.shape[1] - 1)).sqrt_().mean()}


@dataclass(frozen=True)
class Rank(Monitor):
    """How many directions the projector's outputs of the student fill, on up to 256 images of the first view."""

    every: int = 50
    metrics = (Metric("train_rankme", "Effective rank (RankMe) of the projector's outputs"),)

    def __call__(self, step: Step) -> dict[str, Tensor]:
        return {"train_rankme": rankme(step.students[min(step.students)]["projector"][:256])}


@dataclass
class GapConfig(Config, section="gap"):
    """The YAML's `gap`: what is monitored. It never changes what is trained.

    at: outputs to compare; `predictor` gives a baseline a momentum predictor just to measure by (the paper's (q, q_m)),
        `auto` takes the predictor where the intra term has one already, else the projector.
    every: steps of the optimizer between two measurements.
    place: derived: where it is measured; the projector where a framework has no predictor.
    """

    enabled: bool = True
    at: Literal["auto", "projector", "predictor"] = "auto"
    every: Count = 10
    place: str | None = None


@dataclass(frozen=True)
class Gap(Monitor):
    """Mean cosine similarity of student and teacher on the same view, over samples and the views that targets are made
    of: all large ones, in ReSSL the weak one (residual momentum, Fig. 6-8); the paper's gap is 2 - 2 times this."""

    on_step: bool = True
    metrics = (
        Metric("gap_sim", "Outputs, cosine similarity", "similarity to teacher", "{:.4f}", "gap", progress=True),
        Metric("gap_sim_feats", "Backbone features, cosine similarity", form="{:.4f}", section="gap"),
    )

    def __call__(self, step: Step) -> dict[str, Tensor]:
        both = [i for i in step.teachers if i in step.students]
        # where a framework has targets of some views only, these: with and without intra-momentum the same
        views = [i for i in both if i in step.passes.targets] or both

        def similarity(part: str) -> Tensor:
            pairs = [(step.students[i][part], step.teachers[i][part]) for i in views]
            return torch.stack([F.cosine_similarity(s.float(), t.float(), dim=-1).mean() for s, t in pairs]).mean()

        return {"gap_sim": similarity(self.at or "projector"), "gap_sim_feats": similarity("backbone")}
