"""Optimizers, learning-rate schedules and parameter groups."""

from solo_ext.optim.config import OptimizerConfig, SchedulerConfig, build_optimizer, build_scheduler, run_length
from solo_ext.optim.lars import LARS

__all__ = ["LARS", "OptimizerConfig", "SchedulerConfig", "build_optimizer", "build_scheduler", "run_length"]
