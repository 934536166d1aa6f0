"""What the benchmarks share: a device's clock and memory, contenders measured in turn, medians with their quartiles."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from solo_ext.runs.environment import environment
from solo_ext.training.trainer import keep_freed_memory

Figures = dict[str, Any]


def clock(device: str) -> float:
    """Seconds, once the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def allocated(device: str, peak: bool = False) -> int:
    """Bytes on the GPU now, or at most since this was last asked; 0 on a CPU, which does not say."""
    if device != "cuda":
        return 0
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def in_turn(
    contenders: dict[str, Callable[[], Any]], rounds: int, device: str, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender in each round: a busy machine slows all alike, and memory is as in a training."""
    if device == "cpu":
        keep_freed_memory()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warm_up + rounds):
        for name, contender in contenders.items():
            start = clock(device)
            contender()
            if i >= warm_up:
                seconds[name].append(clock(device) - start)
    return seconds


def spread(values: Sequence[float], scale: float = 1.0) -> Figures:
    low, median, high = (scale * np.percentile(values, (25, 50, 75))).tolist()
    return {"median": median, "quartiles": [low, high], "n": len(values)}


def ratios(some: Sequence[float], others: Sequence[float]) -> Figures:
    """Of values of the same rounds."""
    return spread([a / b for a, b in zip(some, others, strict=True)])


def shown(figures: Figures, digits: int, unit: str = "") -> str:
    low, high = figures["quartiles"]
    return f"{figures['median']:,.{digits}f}{unit} ({low:,.{digits}f}-{high:,.{digits}f})"


def origin(about: dict[str, Any] | None = None) -> str:
    """The hardware and versions of a report, in a line."""
    about = about or environment()
    where = ", ".join(about["gpus"]) or f"{about['cpu']}, {about['threads']} threads"
    return f"{where}, Python {about['python']}, PyTorch {about['packages']['torch']}"
