"""Time and memory of training steps on synthetic images, on the device at hand."""

import ctypes
import gc
import statistics
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from solo_ext.data.loader import identity
from solo_ext.errors import ConfigError
from solo_ext.methods import Method
from solo_ext.planning.anatomy import synthetic_batch
from solo_ext.runs.comparison import plain
from solo_ext.runs.environment import environment
from solo_ext.training.precision import pick_precision
from solo_ext.training.trainer import explained, make_trainer, quietly
from solo_ext.training.trainer_config import TrainerConfig

WARM_UP, LEAST, STEPS = 3, 3, 10  # optimizer steps: before those that count, and how few and many of these
SECONDS = 30.0  # after which LEAST steps are enough
PROBE = 8  # images of a first try, where running out of memory would end the process
# of the Trainer's arguments, those that change what a step does
STEP_KEYS = ("max_epochs", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark")


@dataclass(frozen=True)
class Measurement:
    """Training steps on synthetic images: forward, backward, optimizer and teacher, run by the trainer.

    Attributes:
        device: its model, and a CPU's number of threads.
        precision: Lightning's name of it, on this device.
        images: in a batch; fewer than asked for where those do not fit or take too long, and the rest is scaled.
        steps: how many optimizer steps `seconds` and `quartiles` are of.
        seconds: of an optimizer step with the full batch, the median.
        quartiles: the first and the third.
        memory: peak in bytes with the full batch; None where it cannot be measured.
        memory_of: what that is the peak of.
        fits: whether the full batch fits the memory that is free here, as far as that can be known.
    """

    device: str
    precision: str
    images: int
    steps: int
    seconds: float
    quartiles: tuple[float, float]
    memory: int | None
    memory_of: str
    fits: bool


class _Clock(pl.Callback):
    """Seconds of every batch: of those that end with an optimizer step, and of those that only accumulate."""

    def __init__(self):
        self.stepping: list[float] = []
        self.waiting: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, i: int) -> None:
        self.step, self.began = trainer.global_step, _now(module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        stepped = trainer.global_step > self.step
        (self.stepping if stepped else self.waiting).append(_now(module.device) - self.began)
        if stepped and len(self.stepping) >= WARM_UP + LEAST and sum(self.stepping) + sum(self.waiting) > SECONDS:
            trainer.should_stop = True


def _now(device: torch.device) -> float:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class _Trial:
    """A few optimizer steps: seconds of each, peak and lasting (weights, gradients, optimizer) bytes, where."""

    seconds: list[float]
    peak: int | None
    lasting: int
    device: torch.device


def measure_steps(cfg: DictConfig, method: Method) -> Measurement:
    """Time and memory of a step at `optimizer.batch_size`, or at fewer images and scaled."""
    accelerator = "cpu" if cfg.accelerator == "cpu" else "auto"
    gpu = accelerator == "auto" and torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if gpu else _free_memory()
    precision = pick_precision(cfg.precision, accelerator)
    images = asked = cfg.optimizer.batch_size
    trial, warm_up = None, WARM_UP
    if not gpu and asked > PROBE:
        probe = _try(cfg, method, PROBE, 3, accelerator, precision)
        # measuring one batch of an accumulated step, and one that steps, is enough
        batches = min(cfg.accumulate_grad_batches, 2) / cfg.accumulate_grad_batches
        most = SECONDS / ((WARM_UP + LEAST) * batches * min(probe.seconds))
        if probe.peak and free:
            most = min(most, (0.8 * free - probe.lasting) / max(probe.peak - probe.lasting, 1))
        images = min(asked, max(PROBE, int(PROBE * most)))
        if images == PROBE:
            trial, warm_up = probe, 1
    while not trial and not (trial := _try(cfg, method, images, WARM_UP + STEPS, accelerator, precision)):
        images //= 2
        if images < 2:
            raise ConfigError(f"backbone.name: {cfg.backbone.name} does not fit this GPU's memory")
    scale = asked / images
    seconds = [scale * step for step in trial.seconds[warm_up:]]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    memory = None if trial.peak is None else round(trial.lasting + scale * (trial.peak - trial.lasting))
    return Measurement(
        device=torch.cuda.get_device_name(trial.device) if gpu else _cpu(trial.device),
        precision=precision,
        images=images,
        steps=len(seconds),
        seconds=median,
        quartiles=(low, high),
        memory=memory,
        memory_of="torch.cuda.max_memory_allocated" if gpu else "the process, beyond what it took before",
        fits=not ((gpu and images < asked) or (memory and free and memory > free)),
    )


def _try(cfg: DictConfig, method: Method, images: int, steps: int, accelerator: str, precision: str) -> _Trial | None:
    """Trains `method` for so many optimizer steps on batches of so many images; None if they do not fit the GPU."""
    accumulate = min(cfg.accumulate_grad_batches, 2)  # of the batches that only accumulate, one speaks for all
    values = {key: value for key, value in plain(cfg).items() if key in STEP_KEYS}
    values |= {"accelerator": accelerator, "precision": precision, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    values |= {"max_steps": steps, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    values |= {"enable_progress_bar": False}
    size = SimpleNamespace(train_set=range(images * steps), batch_size=images)
    clock = _Clock()
    with quietly(), explained():
        trainer = make_trainer(TrainerConfig(**values), Path(), size, [clock])
        device = trainer.strategy.root_device
        if not cfg.performance.disable_channel_last:
            method = method.to(memory_format=torch.channels_last)
        method.zero_grad(set_to_none=True)
        weights = _bytes(method.state_dict().values())
        before = _reset_peak(device)
        batches = [synthetic_batch(cfg, images, device)] * (steps * accumulate)
        try:
            trainer.fit(method, DataLoader(batches, batch_size=None, collate_fn=identity))
        except torch.OutOfMemoryError:
            return None
        peak = _peak(device, before)
    states = [tensor for state in trainer.optimizers[0].state.values() for tensor in state.values()]
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    lasting = weights + _bytes(tensor for tensor in [*states, *gradients] if isinstance(tensor, Tensor))
    if peak is not None and device.type == "cpu":
        peak += weights  # they were there before
    waiting = clock.waiting or [0.0] * len(clock.stepping)
    more = cfg.accumulate_grad_batches - 1
    seconds = [step + more * wait for step, wait in zip(clock.stepping, waiting, strict=True)]
    return _Trial(seconds, peak, lasting, device)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _reset_peak(device: torch.device) -> int | None:
    """Has the peak of the memory in use measured from now on; on a CPU, the bytes in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if device.type == "cpu":
        with suppress(OSError, AttributeError):  # glibc keeps what was freed; Linux, the process' former peak
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            return _kilobytes("/proc/self/status", "VmRSS")
    return None


def _peak(device: torch.device, before: int | None) -> int | None:
    """The peak in bytes since `_reset_peak`, of a CPU beyond what that gave; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _kilobytes("/proc/self/status", "VmHWM")
    return None if before is None or peak is None else peak - before


def _kilobytes(file: str, name: str) -> int | None:
    """The line `name: 123 kB` of a file of Linux, in bytes."""
    with suppress(OSError, StopIteration):
        lines = Path(file).read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    return None


def _free_memory() -> int | None:
    """Bytes that this process may still take, by the machine and by its control group; None if not on Linux."""
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    with suppress(OSError, ValueError):  # no control group, or one without a limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        return min(limit - used, limit if free is None else free)
    return free


def _cpu(device: torch.device) -> str:
    return f"{environment()['cpu']}, threads: {torch.get_num_threads()}" if device.type == "cpu" else device.type
