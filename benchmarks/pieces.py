"""What is not a training step, on any device: EMA and LARS against loops over tensors, kNN, linear evaluation; and how
long a command takes before it does anything."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from step_time import Setting, method
from timing import Figures, in_turn, ratios, shown, spread
from torch import Tensor, nn

from solo_ext.evaluation.knn import knn_accuracy
from solo_ext.evaluation.linear import fit_cached_linear
from solo_ext.optim import OptimizerConfig, SchedulerConfig
from solo_ext.optim.lars import LARS
from solo_ext.runs.environment import environment

COMMANDS = {
    "import solo_ext": ["-c", "import solo_ext"],
    "solo-ext --help": ["-m", "solo_ext", "--help"],
    "solo-ext pretrain cifar10/byol --cfg": ["-m", "solo_ext", "pretrain", "cifar10/byol", "--cfg"],
    "import lightning.pytorch": ["-c", "import lightning.pytorch"],
}
Rows = dict[str, Figures]  # name -> ms, and what else is known


def compared(ours: Callable, loop: Callable, rounds: int, device: str) -> Rows:
    seconds = in_turn({"ours": ours, "loop over tensors": loop}, rounds, device)
    base = seconds["loop over tensors"]
    return {name: {"ms": spread(times, 1000), "speedup": ratios(base, times)} for name, times in seconds.items()}


def network(device: str, tiny: bool) -> nn.Module:
    return method(Setting(backbone="resnet10_w16" if tiny else "resnet50", batch=8, device=device), "full")


@torch.no_grad()
def ema_loop(teacher: list[Tensor], student: list[Tensor], tau: float) -> None:
    for old, new in zip(teacher, student, strict=True):
        old.data = tau * old.data + (1 - tau) * new.data


@torch.no_grad()
def lars_loop(parameters: list[Tensor], buffers: list[Tensor], lr: float, decay: float, eta: float) -> None:
    """LARS with momentum 0.9, of solo-learn's semantics; each comparison of a norm waits for the device."""
    for p, buffer in zip(parameters, buffers, strict=True):
        update, weight, gradient = p.grad, p.norm(), p.grad.norm()
        if weight != 0 and gradient != 0:
            update = (update + decay * p) * (eta * weight / (gradient + decay * weight + 1e-8))
        buffer.mul_(0.9).add_(update)
        p.add_(buffer, alpha=-lr)


def ema(device: str, rounds: int = 20, tiny: bool = False) -> Rows:
    """The teacher's update, of a whole ResNet-50 with its head."""
    model = network(device, tiny)
    parts = [(stage, *model.teacher.pair(stage)) for stage in model.teacher.stages]
    teacher = [p.clone() for stage, part, _ in parts for p in stage.parameters(part)]
    student = [p for stage, _, part in parts for p in stage.parameters(part)]
    tau = model.teacher.tau(0, 100)
    return compared(lambda: model.teacher.update(0, 100), lambda: ema_loop(teacher, student, tau), rounds, device)


def lars(device: str, rounds: int = 20, tiny: bool = False) -> Rows:
    """A step of LARS on a ResNet-50 with its heads."""
    parameters = [p for p in network(device, tiny).parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.randn_like(p)
    others = [p.detach().clone() for p in parameters]
    for p, other in zip(parameters, others, strict=True):
        other.grad = p.grad
    buffers = [torch.zeros_like(p) for p in parameters]
    optimizer = LARS(parameters, lr=0.1, momentum=0.9, weight_decay=1e-6, eta=0.02)
    return compared(optimizer.step, lambda: lars_loop(others, buffers, 0.1, 1e-6, 0.02), rounds, device)


def features(device: str, tiny: bool) -> list[Tensor]:
    """Those of 50,000 images and their labels, of 10,000 and theirs, by 512 numbers each."""
    made = torch.Generator().manual_seed(0)
    parts = []
    for rows in (500, 100) if tiny else (50_000, 10_000):
        labels = torch.randint(10, (rows,), generator=made)
        x = torch.randn(rows, 512, generator=made) + torch.nn.functional.one_hot(labels, 512)
        parts += [x.to(device), labels.to(device)]
    return parts


def knn(device: str, rounds: int = 3, tiny: bool = False) -> Rows:
    data = features(device, tiny)
    seconds = in_turn({"kNN": lambda: knn_accuracy(*data, k=200, temperature=0.1)}, rounds, device)["kNN"]
    operations = 2 * len(data[0]) * len(data[2]) * data[0].size(1)
    rate = operations / spread(seconds)["median"] / 1e9
    return {f"{len(data[2]):,} x {len(data[0]):,} x 512": {"ms": spread(seconds, 1000), "GFLOP/s": rate}}


def linear(device: str, rounds: int = 3, tiny: bool = False) -> Rows:
    data, epochs = features(device, tiny), 2 if tiny else 10
    optimizer = OptimizerConfig(name="sgd", batch_size=256, lr=0.1)

    def fit() -> None:
        fit_cached_linear(*data, optimizers=[optimizer], scheduler=SchedulerConfig(name="none"), epochs=epochs)

    seconds = in_turn({"linear": fit}, rounds, device)["linear"]
    rate = epochs * len(data[0]) / spread(seconds)["median"]
    return {f"{epochs} epochs of {len(data[0]):,} x 512": {"ms": spread(seconds, 1000), "images/s": rate}}


def start_up(device: str, rounds: int = 5, tiny: bool = False) -> Rows:
    """Seconds from a command line to its end, with files in the cache."""
    commands = dict([*COMMANDS.items()][:2]) if tiny else COMMANDS
    run = {
        name: lambda words=words: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        for name, words in commands.items()
    }
    return {name: {"ms": spread(times, 1000)} for name, times in in_turn(run, rounds, "cpu").items()}


def cells(rows: Rows) -> list[list[str]]:
    """Of a table: what, ms, against the loop, rate."""
    lines = []
    for name, row in rows.items():
        rate = next((f"{row[key]:,.0f} {key}" for key in ("GFLOP/s", "images/s") if key in row), "")
        speedup = shown(row["speedup"], 2, "x") if "speedup" in row else ""
        lines.append([name, shown(row["ms"], 2 if row["ms"]["median"] < 10 else 0), speedup, rate])
    return lines


PIECES = {"EMA": ema, "LARS": lars, "kNN": knn, "linear": linear}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("pieces.json"))
    args = parser.parse_args()
    rows = {}
    for name, piece in {**PIECES, "start": start_up}.items():
        rows[name] = piece(args.device)
        for row in cells(rows[name]):
            print("{:<8} {:<40} {:>26} {:>24} {:>20}".format(name, *row), flush=True)
    args.out.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
