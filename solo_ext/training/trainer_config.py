"""Lightning's Trainer arguments, which a YAML has at its top level, and its loggers', checked without Lightning."""

import math
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Annotated, Literal

import torch

from solo_ext.errors import ConfigError, must_have, naming, require
from solo_ext.files import log
from solo_ext.losses.precision import check_precision
from solo_ext.schema import Bounds, Config, Count, Positive, Share

OWN = {  # arguments that follow from other keys
    "logger": "use wandb.enabled",
    "enable_checkpointing": "use checkpoint.enabled",
    "default_root_dir": "use checkpoint.dir",
    "plugins": "they write the checkpoints",
}
NO_LOOP = ("limit_test_batches", "limit_predict_batches")  # arguments about loops that no command has
# where Lightning registers the values, which takes seconds to import, and values that are known without it
VALUES = {
    "accelerator": ("lightning.pytorch.accelerators:AcceleratorRegistry", ("auto", "cpu", "gpu", "cuda", "mps", "tpu")),
    "strategy": ("lightning.pytorch.strategies:StrategyRegistry", ("auto", "ddp")),
}
Batches = Annotated[int, Bounds(0)] | Share  # a number of them, or a share
Precision = (
    Literal["16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true", "64", "32", "16", "bf16"]
    | Literal[64, 32, 16]
)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX), so that bf16 is faster than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, hence guarded
    return any(getattr(torch.cpu, check, bool)() for check in checks)


@dataclass(kw_only=True)
class TrainerConfig(Config):
    """What Lightning's Trainer takes, under its names. Null stands for Lightning's default."""

    max_epochs: Count | None = None
    devices: list[int] | int | str = "auto"
    num_nodes: Count = 1
    collective_timeout: Positive = 30.0  # minutes that a process waits for the others; not an argument of the Trainer
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
    overfit_batches: Batches | None = None
    val_check_interval: Batches | str | dict[str, int] | None = None
    check_val_every_n_epoch: Count | None = None
    num_sanity_val_steps: Annotated[int, Bounds(-1)] | None = None
    log_every_n_steps: Count | None = None
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
        _ = self.device_indices, self.seconds
        check_precision(self.precision)
        if re.search("spawn|fork|notebook", self.strategy):
            raise ConfigError(f"strategy: {self.strategy} trains in processes that give nothing back; use ddp")
        self.require(self.val_check_interval not in (0, 0.0), "val_check_interval", "above 0")
        for key, (registry, common) in VALUES.items():
            if (value := getattr(self, key)) not in common:
                must_have(value, dict.fromkeys([*common, *pkgutil.resolve_name(registry)]), f"{key}: there is no")

    @property
    def device_indices(self) -> Sequence[int] | None:
        """The indices that `devices` names; None for all there are; ConfigError for anything else."""
        devices = self.devices
        if devices in ("auto", "-1", -1):
            return None
        if isinstance(devices, str) and re.fullmatch(r"\d+(,\d+)*,?", devices):
            devices = [int(index) for index in devices.split(",") if index] if "," in devices else int(devices)
        if isinstance(devices, int) and devices > 0:
            return range(devices)
        if isinstance(devices, list) and devices and len(set(devices)) == len(devices) and min(devices) >= 0:
            return devices
        expected = "a number of devices, a list of indices such as [0, 1], or auto"
        raise ConfigError(f"devices must be {expected}, not {devices!r}")

    @property
    def seconds(self) -> float:
        """`max_time`, of this process."""
        if self.max_time is None:
            return math.inf
        units = self.max_time
        if isinstance(units, str):
            if not (parts := re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", units.strip())):
                raise ConfigError(f"max_time must be days, hours, minutes, seconds as in 00:12:00:00, not {units!r}")
            units = dict(zip(("days", "hours", "minutes", "seconds"), map(int, parts.groups()), strict=True))
        with naming("max_time", TypeError):
            return timedelta(**units).total_seconds()

    @property
    def on_gpu(self) -> bool:
        return self.accelerator in ("gpu", "cuda") or (self.accelerator == "auto" and torch.cuda.is_available())

    @property
    def device_count(self) -> int:
        """The number of devices per node; only `auto` and -1 look at this machine."""
        if indices := self.device_indices:
            return len(indices)
        return max(1, torch.cuda.device_count()) if self.accelerator in ("auto", "gpu", "cuda") else 1

    @property
    def processes(self) -> int:
        """The number of devices on all nodes."""
        return self.device_count * self.num_nodes

    @property
    def trainer_devices(self) -> int | str | list[int]:
        """`devices` as Lightning takes it on this machine: without GPUs a number, not indices or -1."""
        return self.devices if self.on_gpu else self.device_count

    @property
    def first_device(self) -> torch.device:
        """The device of a command that uses only one: a CUDA GPU or the CPU."""
        if self.on_gpu and torch.cuda.is_available():
            return torch.device("cuda", (self.device_indices or [0])[0])
        return torch.device("cpu")

    @property
    def devices_text(self) -> str:
        """Where the run is, in words: `cpu`, `cuda:0 (NVIDIA H100)`, `cuda:0,1 (NVIDIA A100), 2 nodes`."""
        count = self.device_count
        nodes = f", {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        if self.on_gpu and torch.cuda.is_available():
            indices = self.device_indices or range(count)
            names = dict.fromkeys(torch.cuda.get_device_name(index) for index in indices)
            return f"cuda:{','.join(map(str, indices))} ({', '.join(names)}){nodes}"
        kind = {"auto": "cpu", "gpu": "mps"}.get(self.accelerator, self.accelerator)
        return (kind if count == 1 else f"{count} processes on the {kind}") + nodes

    def check_hardware(self) -> None:
        """Raises ConfigError if this machine has no such accelerator, or fewer of them."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        mps = torch.backends.mps.is_available()
        if not {"gpu": gpus or mps, "cuda": gpus, "mps": mps}.get(self.accelerator, True):
            found = f"PyTorch {torch.__version__} finds none here; use accelerator=cpu"
            raise ConfigError(f"accelerator={self.accelerator} asks for a GPU, but {found}")
        most = max(self.device_indices or [0]) + 1
        if most > gpus and (self.accelerator == "cuda" or (self.accelerator in ("auto", "gpu") and gpus)):
            raise ConfigError(f"devices={self.devices} asks for {most} GPUs, but there are {gpus}; use devices={gpus}")

    def pick_precision(self, warn: bool = True) -> str:
        """Lightning's name of `precision` (solo-learn's 16 is 16-mixed), or of the nearest one that the hardware has:
        instead of mixed ones bf16-mixed or 32 on a CPU, and 16-mixed on a GPU. `warn`: with a warning that says so."""
        precision = {"16": "16-mixed", "bf16": "bf16-mixed"}.get(str(self.precision), str(self.precision))
        nearest, why = precision, ""
        gpu_there = torch.cuda.is_available() or torch.backends.mps.is_available()
        on_cpu = self.accelerator == "cpu" or (self.accelerator == "auto" and not gpu_there)
        if on_cpu and precision in ("16-mixed", "bf16-mixed"):
            has_16 = "bf16-mixed", "this CPU has bfloat16, not float16"
            nearest, why = has_16 if cpu_has_bf16() else ("32", "this CPU has no 16-bit instructions")
        elif precision == "bf16-mixed" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
            nearest, why = "16-mixed", "this GPU has no bfloat16"
        if nearest != precision and warn:
            log.warning("precision %s instead of %s: %s", nearest, self.precision, why)
        return nearest


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
    enabled: bool = False  # true: event files in `<run folder>/tensorboard`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enabled:
            require("tensorboard", "tensorboard.enabled", "viz")
