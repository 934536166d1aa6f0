"""One training step as data: which network runs which view, what came out, and the terms of the loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Outputs = Mapping[str, Tensor]  # part (backbone, projector, predictor) or stage -> its output on one view


@dataclass(frozen=True)
class Passes:
    """Which network runs which views, by their places in the batch.

    Attributes:
        learning: views that the student runs with gradient.
        student: all views that it runs; on the others only a probe learns.
        targets: views whose target the framework's loss takes, from the teacher or, without gradient, the student.
        teacher: views that the teacher runs, up to the part `upto`.
        probed: views on which the online probes learn.
    """

    learning: tuple[int, ...]
    student: tuple[int, ...]
    targets: tuple[int, ...]
    teacher: tuple[int, ...]
    upto: str
    probed: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """A batch and the outputs of its views: what every term of the loss and every monitor reads.

    Attributes:
        number: optimizer steps before this one.
        indexes, labels: of the samples [B]; a label of -1 is none.
        views: the images [B, 3, H, W], large crops first.
        passes: who ran which of them.
        students: place of the view -> the student's outputs.
        teachers: place of the view -> the teacher's outputs, without gradient.
        metrics: what the terms log besides their values.
    """

    number: int
    indexes: Tensor
    views: list[Tensor]
    labels: Tensor
    passes: Passes
    students: dict[int, Outputs]
    teachers: dict[int, Outputs]
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def both(self) -> list[tuple[Outputs, Outputs]]:
        """(student's, teacher's) outputs of each view that both ran."""
        return [(self.students[i], out) for i, out in self.teachers.items() if i in self.students]


@dataclass(frozen=True)
class Term:
    """A term of the loss: `weight` times what `value` makes of a step, logged as `name`.

    active: whether it counts in optimizer step number n.
    """

    name: str
    value: Callable[[Step], Tensor]
    weight: float = 1.0
    active: Callable[[int], bool] = lambda step: True
