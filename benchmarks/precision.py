"""Whether heads are better run in float32: the gap of trained runs, 2 - 2 cos of student and teacher on the same view.

    python benchmarks/precision.py trained_models/res_mocov3/RUN ...

For each run: the gap in float64, and what of it is seen in float32, in bfloat16 autocast, and in bfloat16 autocast with
the last layer, or all layers of the heads, in float32. One batch of 256 images, with its augmentations, on the CPU.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from solo_ext.data.modules import PretrainData
from solo_ext.losses import cosine_distance
from solo_ext.methods import METHODS
from solo_ext.runs.checkpoints import open_checkpoint
from solo_ext.training.config import resolve

IMAGES = 256


def wide(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return forward(x.float())


@torch.no_grad()
def gap(method, views: list[Tensor], layers: str = "", autocast: bool = False) -> float:
    """layers: of the heads that run in float32: `last`, `all`, or none."""
    method = copy.deepcopy(method)
    for part in [name for name in method.parts if name != "backbone"] if layers else []:
        for head in (method.part(part), getattr(method, f"momentum_{method.parts[part]}", nn.Identity())):
            chosen = [layer for layer in head.modules() if isinstance(layer, nn.Linear | nn.BatchNorm1d)]
            for layer in chosen if layers == "all" else chosen[-1:] if part == method.last else []:
                layer.forward = partial(wide, layer.forward)
    distances = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for x in views:
            x = x.to(next(method.parameters()).dtype)
            student = method.student(x)
            teacher = method.teach(x, student, method.last)
            distances.append(cosine_distance(student[method.last], teacher[method.gap_at]).item())
    return sum(distances) / len(distances)


def main(runs: list[str]) -> None:
    print("| run | gap, float64 | float32 | bfloat16 | last layer float32 | heads float32 |\n|---|---|---|---|---|---|")
    for run in runs:
        checkpoint = open_checkpoint(run)
        cfg = resolve(checkpoint.config)
        method = METHODS[cfg.method](cfg).train()
        method.load_state_dict(checkpoint.state)
        data = PretrainData(cfg.data, cfg.augmentations, IMAGES, cfg.seed)
        data.check(1)
        views = next(iter(data.train_dataloader()))[1]
        exact = gap(copy.deepcopy(method).double(), views)
        rest = [gap(method, views), *(gap(method, views, layers, autocast=True) for layers in ("", "last", "all"))]
        print(f"| {cfg.method} | {exact:.6f} | {' | '.join(f'{value / exact:.4f}' for value in rest)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
