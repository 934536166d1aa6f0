"""Whether heads are better run in float32: the gap of trained runs, 2 - 2 cos of student and teacher on the same view.

    python benchmarks/precision.py trained_models/res_mocov3/RUN ...

For each run: the gap in float64, and what of it is seen in float32, in bfloat16 autocast, and in bfloat16 autocast with
the last layer, or all layers of the heads, in float32; then the time of a step (forward, backward) with them,
in parts of the step in bfloat16. One batch of 256 images, with its augmentations, on the CPU.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from solo_ext.data.modules import PretrainData
from solo_ext.losses import cosine_distance
from solo_ext.methods import METHODS
from solo_ext.runs.checkpoints import open_checkpoint
from solo_ext.training.config import resolve

IMAGES, ROUNDS = 256, 25


def wide(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return forward(x.float())


def widened(method, layers: str):
    """A copy whose heads' `last` layer, or `all` of their layers, run in float32."""
    method = copy.deepcopy(method)
    for part in [name for name in method.parts if name != "backbone"]:
        for head in (method.part(part), getattr(method, f"momentum_{method.parts[part]}", nn.Identity())):
            chosen = [layer for layer in head.modules() if isinstance(layer, nn.Linear | nn.BatchNorm1d)]
            for layer in chosen if layers == "all" else chosen[-1:] if part == method.last else []:
                layer.forward = partial(wide, layer.forward)
    return method


@torch.no_grad()
def gap(method, views: list[Tensor], autocast: bool = False) -> float:
    method = copy.deepcopy(method)
    distances = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for x in views:
            x = x.to(next(method.parameters()).dtype)
            student = method.student(x)
            teacher = method.teach(x, student, method.last)
            distances.append(cosine_distance(student[method.last], teacher[method.gap_at]).item())
    return sum(distances) / len(distances)


def costs(methods: list, batch: list) -> list[float]:
    """Seconds of a step of each, in parts of the first one's: medians over interleaved rounds."""
    seconds: list[list[float]] = [[] for _ in methods]
    for i in range(ROUNDS + 2):
        for method, taken in zip(methods, seconds, strict=True):
            method.log = method.log_dict = lambda *_, **__: None
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = method.training_step(batch, 0)
            loss.backward()
            method.zero_grad()
            if i >= 2:
                taken.append(time.perf_counter() - start)
    return [statistics.median(a / b for a, b in zip(taken, seconds[0], strict=True)) for taken in seconds]


def main(runs: list[str]) -> None:
    columns = ["run", "gap, float64", "float32", "bfloat16", "last layer float32", "heads float32"]
    columns += ["time: last layer float32", "heads float32"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for run in runs:
        checkpoint = open_checkpoint(run)
        cfg = resolve(checkpoint.config)
        method = METHODS[cfg.method](cfg).train()
        method.load_state_dict(checkpoint.state)
        data = PretrainData(cfg.data, cfg.augmentations, IMAGES, cfg.seed)
        data.check(1)
        batch = next(iter(data.train_dataloader()))
        exact = gap(copy.deepcopy(method).double(), batch[1])
        kept = [method, widened(method, "last"), widened(method, "all")]
        seen = [gap(method, batch[1]), *(gap(one, batch[1], autocast=True) for one in kept)]
        parts = [*(value / exact for value in seen), *costs(kept, batch)[1:]]
        print(f"| {cfg.method} | {exact:.6f} | {' | '.join(f'{part:.4f}' for part in parts)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
