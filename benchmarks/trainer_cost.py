"""What a whole training adds to bare passes: all of it a step, and the monitors' and the safety's shares of the time.

    OMP_NUM_THREADS=2 python benchmarks/trainer_cost.py --steps 60 --out docs/results/trainer_cost.json

Trains BYOL on a CPU, where nothing runs on behind a call that has returned. After each step of the Trainer comes one of
bare copies of the networks (the floor of step_time.py), so that a busy machine slows both alike. The parts' times are
added up inside them: two trainings side by side differ by more. Checkpoints are written by a thread of its own, whose
CPU time is lost to a training that has no core to spare.
"""

import argparse
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from step_time import RECIPES, Setting, floor
from timing import Figures, ratios, spread
from torch.utils.data import DataLoader

from solo_ext.methods.step import Gap, Rank
from solo_ext.runs.environment import environment
from solo_ext.training.callbacks.collapse import CollapseWatch
from solo_ext.training.callbacks.gradients import GradientMonitor
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.finite import FiniteSteps
from solo_ext.training.pretrain import pretrain
from solo_ext.training.safety import Checkpointer, CheckpointIO

WARM_UP = 5
STEP = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
PARTS: dict[str, list[tuple[type, tuple[str, ...]]]] = {
    "looking for bad numbers, each step": [(FiniteSteps, STEP)],
    "watching for collapse, every 50th step": [(Rank, ("__call__",)), (CollapseWatch, STEP)],
    "the gap between student and teacher, every 10th step": [(Gap, ("__call__",))],
    "the gradients of stages, every 50th step": [(GradientMonitor, (*STEP, "on_after_backward", "_watch", "_keep"))],
    "saving, every 50th step: training waits": [(Checkpointer, STEP)],
    "saving, every 50th step: written behind it": [(CheckpointIO, ("_write",))],
}


class Views(pl.LightningDataModule):
    def __init__(self, batch: list, steps: int):
        super().__init__()
        self.batches = [batch] * steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, collate_fn=tuple)


class Clock(pl.Callback):
    """Seconds of each step and of the floor's after it, and within the parts."""

    def __init__(self, floor: Callable[[], None]) -> None:
        self.floor, self.floors, self.steps = floor, list[float](), list[float]()
        self.spent: Counter[str] = Counter()
        self.began = 0.0

    def timed(self, part: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            own = threading.current_thread() is not threading.main_thread()
            now = time.thread_time if own else time.perf_counter
            began = now()
            try:
                return call(*args, **kwargs)
            finally:
                if len(self.floors) > WARM_UP:
                    self.spent[part] += now() - began

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as watched:
            for part, places in PARTS.items():
                for cls, name in ((cls, name) for cls, names in places for name in names if name in vars(cls)):
                    watched.enter_context(patch.object(cls, name, self.timed(part, getattr(cls, name))))
            yield

    def on_train_batch_start(self, *_: Any) -> None:
        if self.began:
            self.steps.append(time.perf_counter() - self.began - self.floors[-1])
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        began = time.perf_counter()
        self.floor()
        self.floors.append(time.perf_counter() - began)


def training(bf16: bool, steps: int, batch: int) -> Figures:
    """ms of a step and of its floor, their ratio, and each part's share of the time of all steps."""
    shape = batch, 3, 32, 32
    views = [torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2)]
    images = [torch.arange(batch), views, torch.randint(0, 10, (batch,))]
    clock = Clock(floor(Setting(batch=batch, bf16=bf16), images, "full"))
    with tempfile.TemporaryDirectory() as folder, clock.watching():
        words = ["enable_progress_bar=false", "limit_val_batches=0", "knn_eval.enabled=false", "gradients.enabled=true"]
        words += ["max_epochs=1", "scheduler.warmup_epochs=0", f"optimizer.batch_size={batch}", "accelerator=cpu"]
        words += ["checkpoint.every_n_steps=50", f"checkpoint.dir={folder}", "auto_resume.enabled=false", "devices=1"]
        cfg = resolve(compose(RECIPES / "cifar10", "byol", [*words, f"precision={'bf16-mixed' if bf16 else 32}"]))
        pretrain(cfg, data=Views(images, steps), callbacks=[clock])
    ours, floors = clock.steps[WARM_UP:], clock.floors[WARM_UP:-1]
    shares = {part: clock.spent[part] / sum(ours) for part in PARTS}
    return {"ms": spread(ours, 1000), "floor": spread(floors, 1000), "ratio": ratios(ours, floors), "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("trainer_cost.json"))
    args = parser.parse_args()
    rows = {name: training(bf16, args.steps, args.batch) for name, bf16 in (("float32", False), ("bfloat16", True))}
    report = {"steps": args.steps, "batch": args.batch, "rows": rows, "environment": environment()}
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
