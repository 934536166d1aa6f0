"""Lightning's Trainer arguments, which a YAML has at its top level, checked without importing Lightning."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from solo_ext.errors import ConfigError
from solo_ext.schema import Bounds, Config, Count
from solo_ext.text import hint

OWN = {  # arguments that follow from other keys
    "logger": "use wandb.enabled",
    "enable_checkpointing": "use checkpoint.enabled",
    "default_root_dir": "use checkpoint.dir",
    "plugins": "they write the checkpoints",
}


@dataclass(frozen=True)
class _Known:
    """One of `common`, or else of what Lightning has registered."""

    common: Collection[str]
    registered: Callable[[], Collection[str]]

    def check(self, value: str, key: str) -> None:
        if value not in self.common and value not in (names := [*self.common, *self.registered()]):
            raise ConfigError(f"{key}: there is no '{value}'{hint(value, dict.fromkeys(names))}")


def _accelerators() -> Collection[str]:
    from lightning.pytorch.accelerators import AcceleratorRegistry

    return AcceleratorRegistry.available_accelerators()


def _strategies() -> Collection[str]:
    from lightning.pytorch.strategies import StrategyRegistry

    return StrategyRegistry.available_strategies()


class _Batches:
    """A number of batches, or a share of them."""

    def check(self, value: float, key: str) -> None:
        if value < 0 or (isinstance(value, float) and value > 1):
            raise ConfigError(f"{key} must be a number of batches or a share between 0.0 and 1.0, not {value}")


Batches = Annotated[int, _Batches()] | Annotated[float, _Batches()]
Precision = (
    Literal["transformer-engine", "transformer-engine-float16", "16-true", "16-mixed", "bf16-true", "bf16-mixed"]
    | Literal["32-true", "64-true", "64", "32", "16", "bf16", 64, 32, 16]
)


def parse_devices(devices: int | str | list[int]) -> int | list[int] | None:
    """How many devices, or their indices; None for all there are.

    Raises:
        ConfigError: neither of these.
    """
    wrong = ConfigError(
        f"devices must be a number of devices, a list of indices such as [0, 1], or auto, not {devices!r}"
    )
    if isinstance(devices, str):
        if not re.fullmatch(r"auto|-1|\d+(,\d+)*,?", devices):
            raise wrong
        if devices in ("auto", "-1"):
            return None
        numbers = [int(number) for number in devices.split(",") if number]
        devices = numbers if "," in devices else numbers[0]
    if isinstance(devices, int):
        if devices < 1 and devices != -1:
            raise wrong
        return None if devices == -1 else devices
    if not devices or len(set(devices)) < len(devices) or min(devices) < 0:
        raise wrong
    return list(devices)


@dataclass(kw_only=True)
class TrainerConfig(Config):
    """What goes to Lightning's Trainer, by its names; see there. Null stands for Lightning's default."""

    max_epochs: Count | None = None
    devices: list[int] | int | str = "auto"
    num_nodes: Count = 1
    accelerator: Annotated[str, _Known(("auto", "cpu", "gpu", "cuda", "mps", "tpu"), _accelerators)] = "auto"
    strategy: Annotated[str, _Known(("auto", "ddp"), _strategies)] = "auto"
    precision: Precision = "32-true"
    sync_batchnorm: bool = False
    accumulate_grad_batches: Count = 1
    min_epochs: Count | None = None
    max_steps: Annotated[int, Bounds(-1)] | None = None
    min_steps: int | None = None
    max_time: str | dict[str, int] | None = None
    fast_dev_run: bool | int | None = None
    limit_train_batches: Batches | None = None
    limit_val_batches: Batches | None = None
    limit_test_batches: Batches | None = None
    limit_predict_batches: Batches | None = None
    overfit_batches: Batches | None = None
    val_check_interval: Batches | str | dict[str, int] | None = None
    check_val_every_n_epoch: Count | None = None
    num_sanity_val_steps: Annotated[int, Bounds(-1)] | None = None
    log_every_n_steps: Annotated[int, Bounds(0)] | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    gradient_clip_val: Annotated[int, Bounds(0)] | Annotated[float, Bounds(0)] | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool | None = None
    use_distributed_sampler: bool | None = None
    profiler: str | None = None
    detect_anomaly: bool | None = None
    barebones: bool | None = None
    reload_dataloaders_every_n_epochs: int | None = None
    enable_autolog_hparams: bool | None = None
    model_registry: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_devices(self.devices)


TrainerConfig.when_given = frozenset(field.name for field in fields(TrainerConfig) if field.default is None)
