"""What it costs to save, to look for bad numbers, and to watch for collapse: short runs side by side.

    python benchmarks/safety_cost.py --steps 100 --rounds 7

A round trains the same BYOL once with nothing of it (bare), and once with each. A run's figure is the time of its steps
but for the first ten, with all that happens between them; the table has the median over rounds of the ratio to bare.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from solo_ext.runs.environment import environment
from solo_ext.training import trainer
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.finite import FiniteSteps
from solo_ext.training.pretrain import pretrain

WARM_UP = 10
RECIPE = Path(__file__).parents[1] / "scripts" / "pretrain" / "cifar10" / "byol.yaml"
VARIANTS = {
    "bare": [],
    "watched for collapse, every 50th step": ["collapse=warn"],
    "looked at for bad numbers, each step": [],
    "saved every 50th step": ["checkpoint.enabled=true", "checkpoint.every_n_steps=50"],
    "all of them": ["collapse=warn", "checkpoint.enabled=true", "checkpoint.every_n_steps=50"],
}
LOOKED_AT = {"looked at for bad numbers, each step", "all of them"}


class Views(pl.LightningDataModule):
    def __init__(self, batch: int, steps: int):
        super().__init__()
        views = [torch.randn(batch, 3, 32, 32) for _ in range(2)]
        self.batches = [(torch.arange(batch), views, torch.zeros(batch, dtype=torch.long))] * steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, collate_fn=tuple)


class Clock(pl.Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_start(self, *_) -> None:
        self.ends.append(time.perf_counter())


def seconds(variant: str, data: Views, batch: int) -> float:
    """Of a run's steps after the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["enable_progress_bar=false", "limit_val_batches=0", "data.num_workers=0", "knn_eval.enabled=false"]
        off = ["collapse=off", "checkpoint.enabled=false", f"checkpoint.dir={folder}", "auto_resume.enabled=false"]
        short = ["max_epochs=1", "scheduler.warmup_epochs=0", f"optimizer.batch_size={batch}", "accelerator=cpu"]
        cfg = resolve(compose(RECIPE.parent, RECIPE.name, [*quiet, *off, *short, "devices=1", *VARIANTS[variant]]))
        trainer.FiniteSteps = FiniteSteps if variant in LOOKED_AT else lambda skip: pl.Callback()
        pretrain(cfg, data=data, callbacks=[clock := Clock()])
    return clock.ends[-1] - clock.ends[WARM_UP]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = Views(args.batch, args.steps)
    rounds = [{name: seconds(name, data, args.batch) for name in VARIANTS} for _ in range(args.rounds)]
    step = statistics.median(times["bare"] for times in rounds) / (args.steps - WARM_UP - 1)
    print(f"{environment()['cpu']}, torch {torch.__version__}, {args.threads} threads, ResNet-18 at 32 px")
    print(f"{args.rounds} rounds of {args.steps} steps of {args.batch} images, {1000 * step:.0f} ms each")
    for name in VARIANTS:
        low, middle, high = statistics.quantiles([times[name] / times["bare"] - 1 for times in rounds], n=4)
        print(f"{name:<40} {middle:+7.2%}  (quartiles {low:+.2%} and {high:+.2%})")


if __name__ == "__main__":
    main()
