"""The teacher: an EMA copy of the end of the network, from the first stage with momentum to the last.

With momentum on the projector only (ProjectorEMA, Sec. 2.2 and Alg. 1) it holds no backbone and costs one head pass:
it continues from the student's activation of the same view. With `full` it is the classical momentum encoder.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from solo_ext.momentum.scope import MomentumConfig
from solo_ext.momentum.tau import Tau
from solo_ext.networks.stages import Stage, kept_outputs, stage_row

SHARED = Tau(0.0, schedule="constant")
TensorsByTau = dict[Tau, tuple[list[Tensor], list[Tensor]]]  # the teacher's and the student's


class Teacher:
    """EMA copies of some stages of a network, kept on that network as `<prefix><part>` modules.

    Args:
        network: holds the student's parts (`backbone`, `projector`, ...) and will hold the copies.
        row: the stages that the teacher runs, in order.
        taus: stage name -> tau, for the stages with EMA. Later stages without one are copies with tau 0: they follow
            the student after every step but keep their own BatchNorm buffers, so that the student's statistics never
            move twice (ProjectorEMA's "sharing").
        buffers: `own`, `copy` or `ema`; see `MomentumConfig`.
        prefix: of the copies' names; several teachers of one network need several.

    Attributes:
        stages: those with a copy.
        whole: whether all have one.
        entry: the student's stage whose output it continues from; None: it starts from the image.
    """

    def __init__(
        self,
        network: nn.Module,
        row: Sequence[Stage],
        taus: Mapping[str, Tau],
        buffers: str = "own",
        prefix: str = "momentum_",
    ):
        first = next((i for i, stage in enumerate(row) if stage.name in taus), len(row))
        self.network, self.prefix, self.buffers = network, prefix, buffers
        self.row = list(row)
        self.stages = self.row[first:]
        self.whole = first == 0
        self.entry = self.row[first - 1] if 0 < first < len(self.row) else None
        self.taus = {stage.name: taus.get(stage.name, SHARED) for stage in self.stages}
        self.parts = {
            part: [stage for stage in self.stages if stage.part == part]
            for part in dict.fromkeys(stage.part for stage in self.row)
        }
        self._weights: TensorsByTau | None = None
        self._calm: list[nn.Module] | None = None  # the modules of the copies that are kept in eval mode
        for stages in self.parts.values():
            if stages:
                network.add_module(prefix + stages[0].attribute, self._copy(stages))

    @classmethod
    def of(
        cls,
        network: nn.Module,
        stages: str | Sequence[str] | Mapping[str, float] = "full",
        tau: float | Tau = 0.99,
        parts: Sequence[str] | Mapping[str, str] = (),
        buffers: str = "own",
    ) -> "Teacher":
        """A teacher for a training loop of one's own, of a network that runs its children one after the other.

        Args:
            network: its children, in order, are the parts; it gets the copies, as further children.
            stages: with a copy, as in the YAML's `momentum.stages`: a preset, a part or stage, a list, {stage: tau}.
            tau: constant, or a schedule.
            parts: those children that count, or {part: child}. As `backbone`, a ResNet or ViT is a row of stages
                (conv1, block1 to block4), and any other module is one; of a Sequential, each linear layer is one
                (projector.fc1, ...).
            buffers: see `MomentumConfig`.

        Raises:
            ConfigError: a stage that the network lacks, with the list of valid names.
        """
        names = [*parts] or [name for name, _ in network.named_children()]
        children = parts if isinstance(parts, Mapping) else dict(zip(names, names, strict=True))
        row = stage_row({part: network.get_submodule(child) for part, child in children.items()}, children)
        tau = tau if isinstance(tau, Tau) else Tau(tau, schedule="constant")
        own: Any = stages if isinstance(stages, str | Mapping) else [*stages]
        config = MomentumConfig(tau.base, tau.final, stages=own, schedule=tau.schedule)  # type: ignore[arg-type]
        return cls(network, row, config.taus(row), buffers)

    def both(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The student's outputs on the view x, part by part, and the teacher's, without gradient."""
        student: dict[str, Tensor] = {}
        attributes, h = {stage.part: stage.attribute for stage in self.row}, x
        with kept_outputs(self.network, [self.entry] if self.entry else []) as inner:
            for part, attribute in attributes.items():
                student[part] = h = self.network.get_submodule(attribute)(h)
        return student, self(x, student | inner, upto=self.row[-1].part)

    def _whole(self, stages: Sequence[Stage]) -> bool:
        """Whether `stages` are all stages of their part."""
        return len(stages) == sum(stage.part == stages[0].part for stage in self.row)

    def _copy(self, stages: Sequence[Stage]) -> nn.Module:
        """The student's part with the tensors of `stages` only, and without hooks; the rest of the part is None."""
        student = self.network.get_submodule(stages[0].attribute)
        memo = {} if self._whole(stages) else dict.fromkeys(_strangers(student, stages))
        for module in student.modules():
            hooks = (value for name, value in vars(module).items() if name.endswith("_hooks"))
            memo |= {id(registered): OrderedDict() for registered in hooks if isinstance(registered, dict)}
        twin = copy.deepcopy(student, memo)
        twin.requires_grad_(False)
        if self.buffers != "own":  # then only `update` may move them
            for module in twin.modules():
                if isinstance(module, _BatchNorm):
                    module.momentum = 0.0
        return twin

    @torch.no_grad()
    def __call__(
        self, x: Tensor, student: Mapping[str, Tensor], upto: str, keep: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Runs the copies on one view: part, or stage of `keep` -> the teacher's output, without gradient.

        BatchNorm runs as in the student, as in solo-learn; dropout and stochastic depth do nothing, as in DINO: targets
        are not drawn, except by the student where the teacher continues from its output.

        Args:
            x: the images [B, 3, H, W], where there is no `entry`.
            student: the student's outputs on this view, by the names of stages and parts: of `entry`, and of each part
                without a copy.
            upto: the last part to run.
        """
        if self._calm is None:
            copies = [self.pair(stages[0])[0] for stages in self.parts.values() if stages]
            self._calm = [m for twin in copies for m in twin.modules() if not isinstance(m, _BatchNorm)]
        for module in self._calm:
            module.training = False
        h = x if self.entry is None else student[self.entry.name].detach()
        outputs = {name: student[name].detach() for name in keep if name not in self.taus}
        for part, stages in self.parts.items():
            if not stages:
                outputs[part] = student[part].detach()
            else:
                h, inner = self._run(stages, h, keep)
                outputs |= {part: h, **inner}
            if part == upto:
                break
        return outputs

    def _run(self, stages: Sequence[Stage], h: Tensor, keep: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The output of the copies of one part, and those of the stages in `keep`."""
        twin = self.network.get_submodule(self.prefix + stages[0].attribute)
        kept = [stage for stage in stages if stage.name in keep]
        if self._whole(stages):
            with kept_outputs(self.network, kept, self.prefix) as inner:
                return twin(h), inner
        inner = {}
        for stage in stages:
            h = stage(twin, h)
            if stage in kept:
                inner[stage.name] = h
        return h, inner

    @torch.no_grad()
    def restart(self) -> None:
        """Makes the copies equal to the student."""
        for tensors in (Stage.parameters, Stage.buffers):
            for teachers, students in self._by_tau(tensors).values():
                torch._foreach_copy_(teachers, students)

    def pair(self, stage: Stage) -> tuple[nn.Module, nn.Module]:
        """(teacher's, student's) part that an owned stage belongs to, e.g. for `stage.parameters(part)`."""
        return self.network.get_submodule(self.prefix + stage.attribute), self.network.get_submodule(stage.attribute)

    @torch.no_grad()
    def update(self, step: int, total_steps: float) -> None:
        """The EMA update that follows optimizer step number `step` (from 0): one fused pass per distinct tau."""
        if self._weights is None:
            self._weights = self._by_tau(Stage.parameters)
        for tau, (teachers, students) in self._weights.items():
            if (value := tau(step, total_steps)) < 1:
                torch._foreach_lerp_(teachers, students, 1 - value)
        if self.buffers != "own":
            self._update_buffers(step, total_steps)

    def _by_tau(self, tensors: Callable[[Stage, nn.Module], Sequence[Tensor]]) -> TensorsByTau:
        """tau -> (teacher's, student's) tensors of all owned stages that have it."""
        groups: TensorsByTau = defaultdict(lambda: ([], []))
        for stage in self.stages:
            for group, part in zip(groups[self.taus[stage.name]], self.pair(stage), strict=True):
                group.extend(tensors(stage, part))
        return {tau: pair for tau, pair in groups.items() if pair[0]}

    def _update_buffers(self, step: int, total_steps: float) -> None:
        # collected anew: moving a module to a device replaces its buffers
        for tau, (teachers, students) in self._by_tau(Stage.buffers).items():
            value = tau(step, total_steps) if self.buffers == "ema" else 0.0
            pairs = list(zip(teachers, students, strict=True))
            averaged = [pair for pair in pairs if value and pair[0].is_floating_point()]
            if averaged and value < 1:
                torch._foreach_lerp_([old for old, _ in averaged], [new for _, new in averaged], 1 - value)
            if copied := [pair for pair in pairs if not (value and pair[0].is_floating_point())]:
                torch._foreach_copy_([old for old, _ in copied], [new for _, new in copied])

    @torch.no_grad()
    def distance(self) -> dict[str, Tensor]:
        """Owned stage -> ||student - teacher|| / ||student|| over its parameters, for stages that have any (residual
        momentum, Tables 14-15)."""
        distances = {}
        for stage in self.stages:
            if pairs := list(zip(*map(stage.parameters, self.pair(stage)), strict=True)):
                difference = torch.stack([(theirs - ours).norm() for ours, theirs in pairs]).norm()
                norm = torch.stack([theirs.norm() for _, theirs in pairs]).norm()
                distances[stage.name] = difference / norm.clamp_min(1e-12)
        return distances

    def tau(self, step: int, total_steps: float) -> float | None:
        """tau of the last stage with a tau of its own: the one to log. None without any."""
        own = [tau for tau in self.taus.values() if tau != SHARED]
        return own[-1](step, total_steps) if own else None


def _strangers(part: nn.Module, stages: Sequence[Stage]) -> list[int]:
    """The ids of the modules, parameters and buffers of `part` that belong to none of `stages`."""
    holders = {own.rsplit(".", i)[0] for stage in stages for own in stage.owns for i in range(own.count(".") + 1)}
    everything = [*part.named_modules(), *part.named_parameters(), *part.named_buffers()]
    return [
        id(thing)
        for path, thing in everything
        if path and path not in holders and not any(stage.holds(path) for stage in stages)
    ]
