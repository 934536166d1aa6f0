"""What it costs to save, to look for bad numbers, and to watch for collapse, as shares of a training's time.

    python benchmarks/safety_cost.py --steps 100 --rounds 5

Trains BYOL on a CPU, where nothing runs on behind a call that has returned, and adds up the time inside the callbacks
themselves: two trainings side by side differ by more than what is measured here. Writing goes on in a thread of its
own; what it takes is that thread's CPU time, all of which is lost to a training that has one core.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from solo_ext.methods.step import Rank
from solo_ext.runs.environment import environment
from solo_ext.training.callbacks.collapse import CollapseWatch
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.finite import FiniteSteps
from solo_ext.training.pretrain import pretrain
from solo_ext.training.safety import Checkpointer, CheckpointIO

WARM_UP = 10
RECIPE = Path(__file__).parents[1] / "scripts" / "pretrain" / "cifar10" / "byol.yaml"
STEP = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
PARTS = {
    "looking for bad numbers, each step": [(FiniteSteps, STEP)],
    "watching for collapse, every 50th step": [(Rank, ("__call__",)), (CollapseWatch, STEP)],
    "saving, every 50th step: training waits": [(Checkpointer, STEP)],
    "saving, every 50th step: written behind it": [(CheckpointIO, ("_write",))],
}


class Views(pl.LightningDataModule):
    def __init__(self, batch: int, steps: int):
        super().__init__()
        views = [torch.randn(batch, 3, 32, 32) for _ in range(2)]
        self.batches = [(torch.arange(batch), views, torch.zeros(batch, dtype=torch.long))] * steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, collate_fn=tuple)


class Clock(pl.Callback):
    """Adds up, from a training's tenth step on, the time in the parts, and that between the steps' beginnings."""

    def __init__(self) -> None:
        self.spent, self.begins = Counter(), []
        for part, places in PARTS.items():
            for cls, names in places:
                for name in names:
                    if name in vars(cls):
                        setattr(cls, name, self.timed(part, getattr(cls, name)))

    def timed(self, part: str, call):
        def run(*args, **kwargs):
            own = threading.current_thread() is not threading.main_thread()
            now = time.thread_time if own else time.perf_counter
            began = now()
            try:
                return call(*args, **kwargs)
            finally:
                if len(self.begins) > WARM_UP:
                    self.spent[part] += now() - began

        return run

    def on_train_batch_start(self, *_) -> None:
        self.begins.append(time.perf_counter())


def shares(clock: Clock, data: Views, batch: int) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and each part's share of all steps' time."""
    clock.spent.clear()
    clock.begins.clear()
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["enable_progress_bar=false", "limit_val_batches=0", "data.num_workers=0", "knn_eval.enabled=false"]
        short = ["max_epochs=1", "scheduler.warmup_epochs=0", f"optimizer.batch_size={batch}", "accelerator=cpu"]
        saved = ["checkpoint.every_n_steps=50", f"checkpoint.dir={folder}", "auto_resume.enabled=false", "devices=1"]
        pretrain(resolve(compose(RECIPE.parent, RECIPE.name, [*quiet, *short, *saved])), data=data, callbacks=[clock])
    whole = clock.begins[-1] - clock.begins[WARM_UP]
    return whole / (len(clock.begins) - 1 - WARM_UP), {part: clock.spent[part] / whole for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, clock = Views(args.batch, args.steps), Clock()
    rounds = [shares(clock, data, args.batch) for _ in range(args.rounds)]
    step = statistics.median(seconds for seconds, _ in rounds)
    print(f"{environment()['cpu']}, torch {torch.__version__}, {args.threads} threads, ResNet-18 at 32 px")
    print(f"{args.rounds} rounds of {args.steps} steps of {args.batch} images, {1000 * step:.0f} ms each; of the time:")
    for part in PARTS:
        values = sorted(found[part] for _, found in rounds)
        print(f"{part:<44} {statistics.median(values):7.3%}  ({values[0]:.3%} to {values[-1]:.3%})")


if __name__ == "__main__":
    main()
