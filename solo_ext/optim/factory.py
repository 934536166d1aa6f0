"""From configuration and parameter groups to optimizer and scheduler."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from solo_ext.errors import ConfigError
from solo_ext.optim.config import DEFAULTS, OPTIMIZERS, OptimizerConfig, SchedulerConfig
from solo_ext.optim.schedules import ClosedFormLR, multi_step_lr, warmup_cosine_lr


def effective_lrs(
    lr: float, classifier_lr: float | None, batch_size: int, world_size: int = 1, accumulate: int | None = 1
) -> tuple[float, float | None]:
    """solo-learn's rule: both rates are per 256 images and grow with the images of one optimizer step.

    batch_size: per device. world_size: devices times nodes. accumulate: batches per optimizer step (None: 1).
    """
    scale = batch_size * world_size * (accumulate or 1) / 256
    return lr * scale, None if classifier_lr is None else classifier_lr * scale


def split_no_decay(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group in two: biases and norms (ndim <= 1) move to `<name>_no_decay`, without weight decay.

    Empty parts are left out; all other options are kept.
    """
    out = []
    for group in groups:
        params = list(group["params"])
        decayed, plain = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        if decayed:
            out.append({**group, "params": decayed})
        if plain:
            name = {"name": f"{group['name']}_no_decay"} if group.get("name") else {}
            out.append({**group, **name, "params": plain, "weight_decay": 0.0})
    return out


def build_optimizer(groups: Iterable[dict[str, Any]], cfg: OptimizerConfig, lr: float) -> Optimizer:
    """The optimizer that `cfg`, the `optimizer` section, describes.

    groups: dicts with `params` and, where they differ from the section, `lr` and `weight_decay`;
    `static_lr: True` keeps the lr constant (see `ClosedFormLR`). lr: the effective rate of the groups that
    do not set their own.
    """
    groups = split_no_decay(groups) if cfg.exclude_bias_n_norm_wd else list(groups)
    kwargs = {**DEFAULTS.get(cfg.name, {}), **cfg.kwargs}
    return OPTIMIZERS[cfg.name](groups, lr=lr, weight_decay=cfg.weight_decay, **kwargs)


def build_scheduler(
    optimizer: Optimizer,
    cfg: SchedulerConfig,
    total_steps: float,
    max_epochs: int,
    accumulate: int | None = 1,
) -> dict[str, Any] | None:
    """Lightning's entry for the scheduler that `cfg`, the `scheduler` section, describes; None: constant lr.

    total_steps: optimizer steps of the whole run. accumulate: batches per optimizer step (None: 1); it
    multiplies `min_lr` and `warmup_start_lr`, as `effective_lrs` does with the rates that they belong to.
    """
    if cfg.name == "none":
        return None
    interval = cfg.interval if cfg.name == "warmup_cosine" else "epoch"
    if cfg.name == "step":
        schedule = partial(multi_step_lr, milestones=cfg.lr_decay_steps or ())
    else:
        if not (math.isfinite(total_steps) and max_epochs > 0):
            raise ConfigError("scheduler.name: warmup_cosine needs to know the run's length; set max_epochs")
        total = total_steps if interval == "step" else max_epochs
        schedule = partial(
            warmup_cosine_lr,
            warmup_steps=cfg.warmup_epochs * total / max_epochs,
            total_steps=total,
            start_lr=cfg.warmup_start_lr * (accumulate or 1),
            min_lr=cfg.min_lr * (accumulate or 1),
        )
    return {"scheduler": ClosedFormLR(optimizer, schedule), "interval": interval, "frequency": 1}
