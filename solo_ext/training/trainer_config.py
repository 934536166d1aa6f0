"""Lightning's Trainer arguments, which a YAML has at its top level, and its loggers', checked without Lightning."""

import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from solo_ext.errors import ConfigError, must_have, require
from solo_ext.schema import Bounds, Config, Count, Share

OWN = {  # arguments that follow from other keys
    "logger": "use wandb.enabled",
    "enable_checkpointing": "use checkpoint.enabled",
    "default_root_dir": "use checkpoint.dir",
    "plugins": "they write the checkpoints",
}

# values that are accepted without a look into Lightning's registry of them, which takes seconds to import
COMMON = {"accelerator": ("auto", "cpu", "gpu", "cuda", "mps", "tpu"), "strategy": ("auto", "ddp")}
REGISTRIES = {
    "accelerator": "lightning.pytorch.accelerators:AcceleratorRegistry",
    "strategy": "lightning.pytorch.strategies:StrategyRegistry",
}
Batches = Annotated[int, Bounds(0)] | Share  # a number of them, or a share
Precision = (
    Literal["transformer-engine", "transformer-engine-float16", "16-true", "16-mixed", "bf16-true", "bf16-mixed"]
    | Literal["32-true", "64-true", "64", "32", "16", "bf16", 64, 32, 16]
)


def device_indices(devices: int | str | list[int]) -> Sequence[int] | None:
    """The indices that `devices` names; None for all there are; ConfigError for anything else."""
    if devices in ("auto", "-1", -1):
        return None
    if isinstance(devices, str) and re.fullmatch(r"\d+(,\d+)*,?", devices):
        devices = [int(index) for index in devices.split(",") if index] if "," in devices else int(devices)
    if isinstance(devices, int) and devices > 0:
        return range(devices)
    if isinstance(devices, list) and devices and len(set(devices)) == len(devices) and min(devices) >= 0:
        return devices
    raise ConfigError(
        f"devices must be a number of devices, a list of indices such as [0, 1], or auto, not {devices!r}"
    )


@dataclass(kw_only=True)
class TrainerConfig(Config):
    """What Lightning's Trainer takes, under its names. Null stands for Lightning's default."""

    max_epochs: Count | None = None
    devices: list[int] | int | str = "auto"
    num_nodes: Count = 1
    accelerator: str = "auto"
    strategy: str = "auto"
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
        device_indices(self.devices)
        for key, common in COMMON.items():
            if (value := getattr(self, key)) not in common:
                must_have(
                    value, dict.fromkeys([*common, *pkgutil.resolve_name(REGISTRIES[key])]), f"{key}: there is no"
                )


TrainerConfig.when_given = frozenset(field.name for field in fields(TrainerConfig) if field.default is None)


@dataclass
class WandbConfig(Config, section="wandb"):
    """The YAML's `wandb`. The API key has no place here: `wandb login` or WANDB_API_KEY sets it."""

    enabled: bool = False
    entity: str | None = None
    project: str = "solo-ext"
    offline: bool = False  # true: log to the run folder; `wandb sync` uploads it later


@dataclass
class TensorboardConfig(Config, section="tensorboard"):
    """The YAML's `tensorboard`: event files in `<run folder>/tensorboard`."""

    enabled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enabled:
            require("tensorboard", "tensorboard.enabled", "viz")
