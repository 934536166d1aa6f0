"""Time of a training step by teacher scope, side by side: what projector-only momentum saves.

    python benchmarks/step_time.py --backbone resnet18 --batch 64 --steps 15 --threads 2

One step = forward of two views, backward, SGD, EMA update. Scopes are interleaved step by step, so that a busy machine
slows all of them alike; the figures are medians and ratios to the full momentum encoder. Writes JSON next to the table.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from solo_ext.methods import METHODS
from solo_ext.methods.module import LightningMethod
from solo_ext.planning.plan import anatomy
from solo_ext.runs.environment import environment

SCOPES = ("full", "backbone", "block4", "projector", "none")


def build(scope: str, args: argparse.Namespace) -> tuple[LightningMethod, torch.optim.Optimizer]:
    cfg = OmegaConf.create(
        {
            "method": args.method,
            "backbone": {"name": args.backbone},
            "method_kwargs": {"proj_hidden_dim": 4096, "proj_output_dim": 256, "pred_hidden_dim": 4096},
            "momentum": {"stages": scope},
            "gap": {"enabled": False},
            "data": {"dataset": args.dataset, "num_classes": 10, "num_large_crops": 2, "num_small_crops": 0},
            "optimizer": {
                "name": "sgd",
                "batch_size": args.batch,
                "lr": 0.03,
                "classifier_lr": 0.1,
                "weight_decay": 0.0,
            },
            "scheduler": {"name": "none"},
        }
    )
    model = METHODS[args.method](cfg).to(args.device, memory_format=torch.channels_last).train()
    model.log = model.log_dict = lambda *_, **__: None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    return model, optimizer


def step(model: LightningMethod, optimizer: torch.optim.Optimizer, batch: tuple, args: argparse.Namespace) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        loss = model.training_step(batch, 0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.teacher.update(0, 100)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="byol")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--dataset", default="cifar10", help="decides the stem")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("step_time.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    views = [torch.randn(args.batch, 3, args.size, args.size, device=args.device) for _ in range(2)]
    batch = (torch.arange(args.batch), views, torch.randint(0, 10, (args.batch,), device=args.device))
    models = {scope: build(scope, args) for scope in SCOPES}
    seconds: dict[str, list[float]] = {scope: [] for scope in SCOPES}
    for i in range(args.steps + 2):
        for scope, (model, optimizer) in models.items():
            took = step(model, optimizer, batch, args)
            if i >= 2:
                seconds[scope].append(took)

    full = seconds["full"]
    rows = {}
    for scope, times in seconds.items():
        ratios = [a / b for a, b in zip(full, times, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows[scope] = {
            "median_ms": 1000 * statistics.median(times),
            "speedup": statistics.median(ratios),
            "speedup_quartiles": [quartiles[0], quartiles[2]],
            "teacher_parameters": anatomy(models[scope][0])["teacher_parameters"],
        }
    report = {
        "command": vars(args) | {"out": args.out.name},
        "n": args.steps,
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else environment()["cpu"],
        "scopes": rows,
    }
    args.out.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"{report['hardware']}, torch {torch.__version__}, {args.threads} threads, n = {args.steps}")
    print(f"{'teacher':<10} {'ms/step':>8} {'vs full':>8} {'quartiles':>13} {'teacher params':>15}")
    for scope, row in rows.items():
        low, high = row["speedup_quartiles"]
        print(
            f"{scope:<10} {row['median_ms']:8.0f} {row['speedup']:7.2f}x {low:6.2f}-{high:.2f} "
            f"{row['teacher_parameters']:15,}"
        )


if __name__ == "__main__":
    main()
