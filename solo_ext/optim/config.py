"""The `optimizer` and `scheduler` sections of a configuration, and what is built from them."""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch.optim import Optimizer

from solo_ext.errors import ConfigError, naming
from solo_ext.optim.lars import LARS
from solo_ext.optim.schedules import ClosedFormLR, multi_step_lr, warmup_cosine_lr
from solo_ext.schema import Bounds, Config, Count, Length, NonNegative, OneOf, Share, fit
from solo_ext.text import nearest

OPTIMIZERS = {"sgd": torch.optim.SGD, "lars": LARS, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
DEFAULTS = {"sgd": {"momentum": 0.9}, "lars": {"momentum": 0.9}}  # where solo-learn's differ from the class's


@dataclass
class OptimizerConfig(Config, section="optimizer"):
    """`optimizer`: solo-learn's keys. The joint batch and the effective rates are derived (`effective_lrs`)."""

    name: Annotated[str, OneOf(OPTIMIZERS)]  # sgd, lars, adam or adamw
    batch_size: Count  # per device
    lr: NonNegative  # per 256 images, as is classifier_lr
    classifier_lr: NonNegative | None = 0.1  # of the online probe
    weight_decay: NonNegative = 0.0
    exclude_bias_n_norm_wd: bool = False  # true: no weight decay on biases and norms
    layer_decay: Share = 0.0  # lr factor from one layer to the one before it, for fine-tuning; 0 switches it off
    kwargs: dict[str, Any] = field(default_factory=dict)  # further options of the optimizer's class
    joint_batch: Count | None = None  # derived: images of a batch on all devices; a run keeps its own on any of them
    effective_lr: NonNegative | None = None  # derived: lr x images of a step / 256
    effective_classifier_lr: NonNegative | None = None  # derived

    def __post_init__(self) -> None:
        super().__post_init__()
        parameters = inspect.signature(OPTIMIZERS[self.name]).parameters
        options = {k: v for k, v in parameters.items() if k not in ("params", "lr", "weight_decay")}
        for key, value in self.kwargs.items():
            if key not in options:
                hint = nearest(key, options) or f"; it has {', '.join(options)}"
                raise ConfigError(f"optimizer.kwargs.{key} is not an option of {self.name}{hint}")
            self.kwargs[key] = fit(_kind(options[key].default), value, f"optimizer.kwargs.{key}")
        # ranges and combinations are the optimizer's to judge; adding a parameter group would import torch.compile
        judge = type(self.name, (OPTIMIZERS[self.name],), {"add_param_group": lambda self, group: None})
        with naming(f"optimizer.kwargs does not suit {self.name}", ConfigError, ValueError, RuntimeError):
            judge([torch.nn.Parameter(torch.zeros(1))], lr=1.0, **DEFAULTS.get(self.name, {}) | self.kwargs)

    def scale(self, joint_batch: int, accumulate: int = 1) -> None:
        """Derives the rates of a batch of so many images on all devices."""
        rates = effective_lrs(self.lr, self.classifier_lr, joint_batch, accumulate=accumulate)
        self.joint_batch, (self.effective_lr, self.effective_classifier_lr) = joint_batch, rates

    def rates(self, accumulate: int = 1) -> tuple[float, float | None]:
        """The learning rates of the network and of the probe, as the optimizer takes them: the effective ones, or else
        the configured ones, which solo-learn has scaled by all but the accumulated batches."""
        lr = self.lr * accumulate if self.effective_lr is None else self.effective_lr
        if self.effective_classifier_lr is not None or self.classifier_lr is None:
            return lr, self.effective_classifier_lr
        return lr, self.classifier_lr * accumulate


@dataclass
class SchedulerConfig(Config, section="scheduler"):
    """`scheduler`: solo-learn's keys. Its rates are the same for all groups, and grow with accumulation as lr does."""

    name: Literal["warmup_cosine", "step", "warmup_step", "none"] = "warmup_cosine"
    min_lr: NonNegative = 0.0  # at the end of the cosine
    warmup_start_lr: NonNegative = 3e-5  # at the start of the warm-up
    warmup_epochs: NonNegative = 10.0
    warmup_steps: Annotated[int, Bounds(0)] = 0  # of warmup_step
    lr_decay_steps: list[Count] | None = None  # epochs; of warmup_step: steps
    interval: Literal["step", "epoch"] = "step"  # how often warmup_cosine moves; `step` always moves per epoch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name in ("step", "warmup_step"):
            unit = "epochs, such as [60, 80]" if self.name == "step" else "steps, such as [18000, 22000]"
            self.require(bool(self.lr_decay_steps), "lr_decay_steps", f"a list of {unit}, for the {self.name} schedule")


def effective_lrs(
    lr: float, classifier_lr: float | None, batch_size: int, world_size: int = 1, accumulate: int | None = 1
) -> tuple[float, float | None]:
    """solo-learn's rule: both rates are per 256 images and grow with the images of one optimizer step, `batch_size` on
    each of `world_size` devices, times the batches that are accumulated (None: 1)."""
    scale = batch_size * world_size * (accumulate or 1) / 256
    return lr * scale, None if classifier_lr is None else classifier_lr * scale


def split_no_decay(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group in two: biases and norms (ndim <= 1) move to `<name>_no_decay`, without weight decay."""
    out = []
    for group in groups:
        params = list(group["params"])
        name = {"name": f"{group['name']}_no_decay"} if group.get("name") else {}
        out.append({**group, "params": [p for p in params if p.ndim > 1]})
        out.append({**group, **name, "params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0})
    return [group for group in out if group["params"]]


def build_optimizer(groups: Iterable[dict[str, Any]], cfg: OptimizerConfig, lr: float) -> Optimizer:
    """The optimizer of `cfg` for `groups`, dicts with `params` and, where they differ from it, `lr` and `weight_decay`;
    `static_lr: True` keeps the lr constant. lr: the effective rate of the groups that do not set their own."""
    groups = split_no_decay(groups) if cfg.exclude_bias_n_norm_wd else list(groups)
    options = DEFAULTS.get(cfg.name, {}) | cfg.kwargs
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    if on_cpu and cfg.name.startswith("adam") and not options.keys() & {"fused", "foreach", "differentiable"}:
        options["fused"] = True  # torch's default is a loop over tensors, which takes six times as long
    return OPTIMIZERS[cfg.name](groups, lr=lr, weight_decay=cfg.weight_decay, **options)


def run_length(trainer: Any) -> tuple[float, float]:
    """The optimizer steps of a run and its epochs, with a fraction where `max_steps` ends it inside one."""
    steps, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    if not (math.isfinite(steps) and math.isfinite(batches) and batches):
        return steps, trainer.max_epochs
    return steps, steps / math.ceil(batches / trainer.accumulate_grad_batches)


def build_scheduler(
    optimizer: Optimizer, cfg: SchedulerConfig, total_steps: float, max_epochs: float, accumulate: int | None = 1
) -> dict[str, Any] | None:
    """Lightning's entry for the scheduler of `cfg`, None for a constant lr, in a run of the length that `run_length`
    gives. accumulate: batches per optimizer step (None: 1), by which `min_lr` and `warmup_start_lr` are multiplied."""
    if cfg.name == "none":
        return None
    interval = {"warmup_cosine": cfg.interval, "warmup_step": "step", "step": "epoch"}[cfg.name]
    if cfg.name in ("step", "warmup_step"):
        warmup = cfg.warmup_steps if cfg.name == "warmup_step" else 0
        milestones = cfg.lr_decay_steps or ()
        schedule = partial(multi_step_lr, milestones=milestones, warmup=warmup, start_lr=cfg.warmup_start_lr)
    elif not (math.isfinite(total_steps) and max_epochs > 0):
        raise ConfigError("scheduler.name: warmup_cosine needs to know the run's length; set max_epochs")
    else:
        total = total_steps if interval == "step" else max_epochs
        schedule = partial(
            warmup_cosine_lr,
            warmup_steps=cfg.warmup_epochs * total / max_epochs,
            total_steps=total,
            start_lr=cfg.warmup_start_lr * (accumulate or 1),
            min_lr=cfg.min_lr * (accumulate or 1),
        )
    return {"scheduler": ClosedFormLR(optimizer, schedule), "interval": interval, "frequency": 1}


def _kind(default: Any) -> Any:
    """The type of an optimizer's option with that default."""
    if default is None:
        return bool | None
    if isinstance(default, tuple):
        return Annotated[list[NonNegative], Length(len(default))]
    return bool if isinstance(default, bool) else NonNegative
