"""Optimizers, learning-rate schedules and parameter groups."""

from solo_ext.optim.config import (
    OptimizerConfig,
    SchedulerConfig,
    build_optimizer,
    build_scheduler,
    effective_lrs,
    split_no_decay,
)
from solo_ext.optim.lars import LARS
from solo_ext.optim.schedules import ClosedFormLR, multi_step_lr, warmup_cosine_lr

__all__ = [
    "LARS",
    "ClosedFormLR",
    "OptimizerConfig",
    "SchedulerConfig",
    "build_optimizer",
    "build_scheduler",
    "effective_lrs",
    "multi_step_lr",
    "split_no_decay",
    "warmup_cosine_lr",
]
