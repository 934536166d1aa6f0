"""Which stages have a momentum teacher, and with which tau: the YAML's `momentum` section."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from solo_ext.errors import ConfigError
from solo_ext.momentum.tau import Tau
from solo_ext.networks.stages import Stage
from solo_ext.schema import Config, Share
from solo_ext.text import nearest

PRESETS = {
    "full": ("backbone", "projector", "predictor"),
    "backbone": ("backbone",),
    # the end of the encoder: with an intra-momentum term the teacher has a predictor, which is averaged too
    "projector": ("projector", "predictor"),
    "none": (),
}


@dataclass
class MomentumConfig(Config, section="momentum"):
    """The YAML's `momentum`: solo-learn's base_tau, final_tau and classifier, and this library's keys.

    base_tau, final_tau: in [0, 1], base <= final under the cosine schedule.
    classifier: train a linear probe on the teacher's features too.
    stages: a preset (full, backbone, projector, none), a list of stages, or {stage: tau}; null: the method's own.
    schedule: cosine (base -> final) or constant (base).
    buffers: what happens to the teacher's BatchNorm buffers: its own running statistics (solo-learn), the student's
        copied after each step, or an EMA of the student's.
    inter: false makes the framework's target the student's own output with stop-gradient (residual momentum, Eq. 10).
    target: the part whose output the framework's loss aims at: projector, or predictor.
    """

    base_tau: Share = 0.99
    final_tau: Share = 1.0
    classifier: bool = False
    stages: str | list[str] | dict[str, Share] | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    buffers: Literal["own", "copy", "ema"] = "own"
    inter: bool = True
    target: Literal["projector", "predictor"] = "projector"

    def __post_init__(self) -> None:
        super().__post_init__()
        rises = self.schedule == "constant" or self.base_tau <= self.final_tau
        self.require(rises, "base_tau", f"at most final_tau ({self.final_tau}), or constant (momentum.schedule)")

    @property
    def preset(self) -> str | None:
        """The preset that `stages` names, or None where it names stages."""
        stages = "full" if self.stages is None else self.stages
        return stages if isinstance(stages, str) and stages in PRESETS else None

    def taus(self, row: Sequence[Stage]) -> dict[str, Tau]:
        """The stages of `row` that have an EMA copy, each with its tau.

        Raises:
            ConfigError: a stage that the network lacks, with the list of valid names.
        """
        stages: Any = self.stages
        known = dict.fromkeys(name for stage in row for name in (stage.part, stage.name))
        if self.preset:
            stages = [name for name in PRESETS[self.preset] if name in known]
        elif isinstance(stages, str):
            stages = [stages]
        common = Tau(self.base_tau, self.final_tau, self.schedule)
        taus = dict.fromkeys(stages, common)
        if isinstance(stages, Mapping):
            taus = {name: self._own(float(tau)) for name, tau in stages.items()}
        for name in taus:
            if name not in known:
                advice = nearest(name, known)
                if ":" in name:  # what a shell makes of braces
                    advice = "; put the option in quotes: 'momentum.stages={STAGE:TAU,STAGE:TAU}'"
                raise ConfigError(
                    f"momentum.stages: the network has no stage '{name}' with a teacher{advice} "
                    f"(valid: {', '.join(dict.fromkeys([*PRESETS, *known]))})"
                )
        # the more specific name wins: projector.fc2 over projector
        return {stage.name: tau for stage in row if (tau := taus.get(stage.name) or taus.get(stage.part))}

    def _own(self, tau: float) -> Tau:
        """A stage's own tau follows the schedule too, but 0 (sharing) and 1 (frozen) mean what they say."""
        constant = self.schedule == "constant" or tau == 0.0 or tau >= self.final_tau
        return Tau(tau, self.final_tau, "constant" if constant else "cosine")
