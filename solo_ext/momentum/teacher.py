"""The teacher: an EMA copy of the end of the network, from the first stage with momentum to the last.

With momentum on the projector only (paper A, Sec. 2.2 and Alg. 1) it holds no backbone and costs one head pass:
before its first stage it takes the student's activation of the same view. With `full` it is the classical momentum
encoder.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from solo_ext.momentum.tau import Tau
from solo_ext.networks.stages import Stage

SHARED = Tau(0.0, schedule="constant")


class Teacher:
    """EMA copies of some stages of a network, kept on that network as `momentum_<part>` modules.

    Args:
        network: the module that holds the student's parts (`backbone`, `projector`, ...) and will hold the copies.
        row: the stages that the teacher runs, in order.
        taus: stage name -> tau, for the stages with EMA. Stages after the first of them that have none are copies
            with tau 0: they follow the student after every step but keep their own BatchNorm buffers, so that the
            student's statistics never move twice (paper A's "sharing").
        buffers: `own`, `copy` or `ema`; see `MomentumConfig`.
    """

    def __init__(self, network: nn.Module, row: Sequence[Stage], taus: Mapping[str, Tau], buffers: str = "own"):
        first = next((i for i, stage in enumerate(row) if stage.name in taus), len(row))
        self.network = network
        self.row = list(row)
        self.stages = self.row[first:]
        self.taus = {stage.name: taus.get(stage.name, SHARED) for stage in self.stages}
        self.buffers = buffers
        self.whole: dict[str, bool] = {}
        self._entry: Tensor | None = None
        self._weights: dict[Tau, tuple[list[Tensor], list[Tensor]]] | None = None
        for part in dict.fromkeys(stage.part for stage in self.stages):
            self._copy_part(part)
        if 0 < first < len(row):
            network.get_submodule(row[first - 1].output).register_forward_hook(self._keep_entry)

    def _copy_part(self, part: str) -> None:
        owned = [stage for stage in self.stages if stage.part == part]
        self.whole[part] = owned == [stage for stage in self.row if stage.part == part]
        student = self.network.get_submodule(part)
        if self.whole[part]:
            twin = copy.deepcopy(student)
        else:
            twin = nn.Module()
            for child in (child for stage in owned for child in stage.children):
                twin.add_module(child, copy.deepcopy(student.get_submodule(child)))
        twin.requires_grad_(False)
        if self.buffers != "own":  # then only `update` may move them
            for module in twin.modules():
                if isinstance(module, _BatchNorm):
                    module.momentum = 0.0
        self.network.add_module(f"momentum_{part}", twin)

    def _keep_entry(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._entry = output.detach()

    def entry(self, x: Tensor) -> Tensor:
        """The teacher's input for the view that the student has just seen: `x`, or the student's activation."""
        entry, self._entry = self._entry, None
        return x if entry is None else entry

    @torch.no_grad()
    def __call__(self, entry: Tensor, student: Mapping[str, Tensor], upto: str) -> dict[str, Tensor]:
        """Runs the copies on one view.

        Args:
            entry: what `entry` gave for this view.
            student: the student's output of each part on this view, taken (detached) where the teacher has no copy.
            upto: the last part to run.

        Returns:
            part -> the teacher's output of it, without gradient.
        """
        outputs, x = {}, entry
        for part in dict.fromkeys(stage.part for stage in self.row):
            twin = getattr(self.network, f"momentum_{part}", None)
            if twin is None:
                outputs[part] = student[part].detach()
            elif self.whole[part]:
                outputs[part] = x = twin(x)
            else:
                for stage in (stage for stage in self.stages if stage.part == part):
                    x = stage(twin, x)
                outputs[part] = x
            if part == upto:
                break
        return outputs

    def modules(self, stage: Stage) -> list[tuple[nn.Module, nn.Module]]:
        """(teacher's, student's) modules of one owned stage."""
        twin, student = (
            self.network.get_submodule(f"momentum_{stage.part}"),
            self.network.get_submodule(stage.part),
        )
        return list(zip(stage.modules(twin), stage.modules(student), strict=True))

    @torch.no_grad()
    def update(self, step: int, total_steps: float) -> None:
        """The EMA update that follows optimizer step number `step` (from 0): one fused pass per distinct tau."""
        if self._weights is None:
            groups = defaultdict(lambda: ([], []))
            for stage in self.stages:
                for teacher, student in self.modules(stage):
                    groups[self.taus[stage.name]][0].extend(teacher.parameters())
                    groups[self.taus[stage.name]][1].extend(student.parameters())
            self._weights = {tau: pair for tau, pair in groups.items() if pair[0]}
        for tau, (teachers, students) in self._weights.items():
            if (value := tau(step, total_steps)) < 1:
                torch._foreach_lerp_(teachers, students, 1 - value)
        if self.buffers != "own":
            self._update_buffers(step, total_steps)

    def _update_buffers(self, step: int, total_steps: float) -> None:
        for stage in self.stages:
            tau = self.taus[stage.name](step, total_steps) if self.buffers == "ema" else 0.0
            for teacher, student in self.modules(stage):
                for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
                    if old.is_floating_point():
                        old.lerp_(new, 1 - tau)
                    else:
                        old.copy_(new)

    def tau(self, step: int, total_steps: float) -> float | None:
        """tau of the last stage with a tau of its own: the one to log. None without any."""
        own = [tau for tau in self.taus.values() if tau != SHARED]
        return own[-1](step, total_steps) if own else None
