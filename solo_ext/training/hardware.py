"""What `devices`, `accelerator` and `precision` request, and what this machine provides."""

import logging

import torch

from solo_ext.errors import ConfigError
from solo_ext.training.trainer_config import TrainerConfig, device_indices

log = logging.getLogger("solo_ext")


def on_gpu(cfg: TrainerConfig) -> bool:
    return cfg.accelerator in ("gpu", "cuda") or (cfg.accelerator == "auto" and torch.cuda.is_available())


def device_count(cfg: TrainerConfig) -> int:
    """The number of devices per node; only `auto` and -1 look at this machine."""
    if indices := device_indices(cfg.devices):
        return len(indices)
    return max(1, torch.cuda.device_count()) if cfg.accelerator in ("auto", "gpu", "cuda") else 1


def processes(cfg: TrainerConfig) -> int:
    """The number of devices on all nodes."""
    return device_count(cfg) * cfg.num_nodes


def trainer_devices(cfg: TrainerConfig) -> int | str | list[int]:
    """`devices` as Lightning takes it on this machine: without GPUs a number, not indices or -1."""
    return cfg.devices if on_gpu(cfg) else device_count(cfg)


def first_device(cfg: TrainerConfig) -> torch.device:
    """The device of a command that uses only one: a CUDA GPU or the CPU."""
    if on_gpu(cfg) and torch.cuda.is_available():
        return torch.device("cuda", (device_indices(cfg.devices) or [0])[0])
    return torch.device("cpu")


def devices_text(cfg: TrainerConfig) -> str:
    """Where `cfg` runs, in words: `cpu`, `cuda:0 (NVIDIA H100)`, `cuda:0,1 (NVIDIA A100), 2 nodes`."""
    count = device_count(cfg)
    nodes = f", {cfg.num_nodes} nodes" if cfg.num_nodes > 1 else ""
    if on_gpu(cfg) and torch.cuda.is_available():
        indices = device_indices(cfg.devices) or range(count)
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
    most = max(device_indices(cfg.devices) or [0]) + 1
    if most > gpus and (cfg.accelerator == "cuda" or (cfg.accelerator in ("auto", "gpu") and gpus)):
        raise ConfigError(f"devices={cfg.devices} asks for {most} GPUs, but there are {gpus}; use devices={gpus}")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX), so that bf16 is faster than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, hence guarded
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def pick_precision(cfg: TrainerConfig) -> str:
    """Lightning's name of `precision`, or of the nearest one that the hardware has; a warning says so.

    solo-learn's 16 is 16-mixed. Mixed precision on a CPU becomes bf16-mixed if it has bfloat16 instructions, else 32;
    bf16-mixed on a GPU without bfloat16 becomes 16-mixed.
    """
    precision = {"16": "16-mixed", "bf16": "bf16-mixed"}.get(str(cfg.precision), str(cfg.precision))
    nearest, why = precision, ""
    gpu_there = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = cfg.accelerator == "cpu" or (cfg.accelerator == "auto" and not gpu_there)
    if on_cpu and precision in ("16-mixed", "bf16-mixed"):
        nearest, why = "32", "this CPU has no 16-bit instructions"
        if cpu_has_bf16():
            nearest, why = "bf16-mixed", "this CPU has bfloat16, not float16"
    elif precision == "bf16-mixed" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        nearest, why = "16-mixed", "this GPU has no bfloat16"
    if nearest != precision:
        log.warning("precision %s instead of %s: %s", nearest, cfg.precision, why)
    return nearest
