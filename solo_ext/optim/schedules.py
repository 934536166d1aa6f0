"""Learning rates as pure functions of the step, and the scheduler that applies them."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def warmup_cosine_lr(
    step: float, base: float, warmup_steps: float, total_steps: float, start_lr: float = 0.0, min_lr: float = 0.0
) -> float:
    """Linear from `start_lr` at step 0 to `base`, then half a cosine to `min_lr` at `total_steps` and after it.

    As in solo-learn, the linear increment is (base - start_lr) / (warmup_steps - 1): `base` is reached one step before
    the warm-up ends, and holds for two steps. `warmup_steps` may be fractional (up to 1: only step 0 has `start_lr`),
    and more than `total_steps` (a short run that ends in its warm-up).
    """
    if step < warmup_steps:
        progress = min(step / (warmup_steps - 1), 1.0) if warmup_steps > 1 else 0.0
        return start_lr + (base - start_lr) * progress
    if total_steps <= warmup_steps:
        return base
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    return min_lr + (base - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def multi_step_lr(
    step: int, base: float, milestones: Sequence[int], gamma: float = 0.1, warmup: int = 0, start_lr: float = 0.0
) -> float:
    """`base`, multiplied by `gamma` once for each of the `milestones` that `step` has reached, which may count epochs;
    before step `warmup`, linear from `start_lr` to `base` (detectron2's warm-up)."""
    if step < warmup:
        return start_lr + (base - start_lr) * step / warmup
    return base * gamma ** bisect_right(sorted(milestones), step)


class ClosedFormLR(LRScheduler):
    """Sets each group's lr to `schedule(step, base lr)`; groups with `"static_lr": True` keep theirs. The state is the
    step alone: a resumed run follows the schedule that it was configured with."""

    def __init__(self, optimizer: Optimizer, schedule: Callable[[int, float], float]):
        self.schedule = schedule
        # Noted here because loading an optimizer's state replaces its groups' options.
        self.static = [group.get("static_lr", False) for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        groups = zip(self.base_lrs, self.static, strict=True)
        return [base if static else self.schedule(self.last_epoch, float(base)) for base, static in groups]

    def state_dict(self) -> dict:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
