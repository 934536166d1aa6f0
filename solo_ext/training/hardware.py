"""What `devices` and `accelerator` ask for, and whether this machine has it."""

import torch

from solo_ext.errors import ConfigError
from solo_ext.training.trainer_config import TrainerConfig, parse_devices


def device_count(cfg: TrainerConfig) -> int:
    """Devices of a node that `cfg` runs on; `auto` and -1 ask this machine, the other values do not."""
    devices = parse_devices(cfg.devices)
    if devices is None:
        return max(1, torch.cuda.device_count()) if cfg.accelerator in ("auto", "gpu", "cuda") else 1
    return devices if isinstance(devices, int) else len(devices)


def on_gpu(cfg: TrainerConfig) -> bool:
    return cfg.accelerator in ("gpu", "cuda") or (cfg.accelerator == "auto" and torch.cuda.is_available())


def trainer_devices(cfg: TrainerConfig) -> int | str | list[int]:
    """`devices` as Lightning takes it on this machine: without GPUs a number, not indices or -1."""
    if not on_gpu(cfg):
        return device_count(cfg)
    return cfg.devices if isinstance(cfg.devices, int | str) else list(cfg.devices)


def devices_text(cfg: TrainerConfig) -> str:
    """Where `cfg` runs, for a reader: `cpu`, `cuda:0 (NVIDIA H100)`, `cuda:0,1 (NVIDIA A100), 2 nodes`."""
    devices, count = parse_devices(cfg.devices), device_count(cfg)
    nodes = f", {cfg.num_nodes} nodes" if cfg.num_nodes > 1 else ""
    if on_gpu(cfg) and torch.cuda.is_available():
        indices = devices if isinstance(devices, list) else range(count)
        names = dict.fromkeys(torch.cuda.get_device_name(index) for index in indices)
        return f"cuda:{','.join(map(str, indices))} ({', '.join(names)}){nodes}"
    kind = {"auto": "cpu", "gpu": "mps"}.get(cfg.accelerator, cfg.accelerator)
    return (kind if count == 1 else f"{count} processes on the {kind}") + nodes


def check_hardware(cfg: TrainerConfig) -> None:
    """Raises ConfigError if `cfg` asks for an accelerator, or for more of them, than this machine has."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if not {"gpu": gpus or mps, "cuda": gpus, "mps": mps}.get(cfg.accelerator, True):
        raise ConfigError(
            f"accelerator={cfg.accelerator} asks for a GPU, but PyTorch {torch.__version__} finds none here; "
            "use accelerator=cpu"
        )
    if cfg.accelerator == "cuda" or (cfg.accelerator in ("auto", "gpu") and gpus):
        devices = parse_devices(cfg.devices)
        most = devices if isinstance(devices, int) else max(devices or [0]) + 1
        if most > gpus:
            raise ConfigError(f"devices={cfg.devices} asks for {most} GPUs, but there are {gpus}; use devices={gpus}")
