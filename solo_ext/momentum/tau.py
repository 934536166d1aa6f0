"""tau (the papers' beta), the EMA coefficient, as a pure function of the optimizer step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tau:
    """target <- tau * target + (1 - tau) * online (ProjectorEMA, Eq. 6; residual momentum, Eq. 1)."""

    base: float  # tau of the first update
    final: float = 1.0  # where the cosine schedule ends, after `total_steps` updates
    schedule: str = "cosine"  # BYOL's and solo-learn's; or `constant` (ProjectorEMA, Eq. 6)

    def __str__(self) -> str:
        return f"{self.base:g}" if self.schedule == "constant" else f"{self.base:g} to {self.final:g}, {self.schedule}"

    def always(self, value: float) -> bool:
        """Whether it is `value` from the first update to the last."""
        return self.base == value and (self.schedule == "constant" or self.final == value)

    def __call__(self, step: int, total_steps: float) -> float:
        """tau of the update that follows optimizer step number `step`, counted from 0."""
        if self.schedule == "constant":
            return self.base
        return self.final - (self.final - self.base) * (math.cos(math.pi * step / total_steps) + 1) / 2
