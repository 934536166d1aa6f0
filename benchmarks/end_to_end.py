"""Images a second of a whole pre-training of BYOL with a ResNet-18 on CIFAR-10, ours and solo-learn's, on a CPU.

    python benchmarks/end_to_end.py ~/solo-learn cifar10_jpeg --out docs/results/end_to_end.json

solo-learn runs its own recipe, which on CPUs means Pillow, workers and float32. Each contender trains one epoch of few
and one of more batches: the difference is what their images cost, with loading and logging, without start and end.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from parity import command, subset
from timing import in_turn, ratios, spread

from solo_ext.runs.environment import environment

BATCH = 256
# a ResNet-18 with the stem for small images, which solo-learn keeps for sets that it knows by name
NETWORK = {"backbone.name": "resnet10_w16", "backbone.kwargs.layers": "[2,2,2,2]", "backbone.kwargs.width": 64}
NETWORK |= {"backbone.kwargs.stem": "small"}
CONTENDERS = {  # side, recipe and what differs from it
    "solo-learn, BYOL, float32": ("solo-learn", "byol", {"precision": 32, "data.num_workers": 4}),
    "BYOL, float32": ("solo_ext", "cifar10/byol", {"precision": 32}),
    "BYOL, as shipped": ("solo_ext", "cifar10/byol", {}),
    "ProjectorEMA-BYOL, as shipped": ("solo_ext", "cifar10/projector_ema_byol", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solo_learn", type=Path, help="a checkout")
    parser.add_argument("data", type=Path, help="with train/<class>/")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 6), help="of the short and of the long epoch")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {steps: subset(args.data, Path(scratch), -(-steps * BATCH // 10) * 10) for steps in args.steps}

        def train(name: str, steps: int) -> None:
            side, recipe, values = CONTENDERS[name]
            given = {
                "data.train_path": folders[steps].resolve(),
                "max_epochs": 1,
                "checkpoint.enabled": False,
                **values,
            }
            done = subprocess.run(command(side, args.solo_learn, recipe, given), cwd=scratch, **quiet)
            if done.returncode:
                raise SystemExit(f"{name}:\n{done.stdout}")

        runs = {(name, steps): lambda cell=(name, steps): train(*cell) for name in CONTENDERS for steps in args.steps}
        seconds = in_turn(runs, args.rounds, "cpu", warm_up=0)
    few, many = args.steps
    rates = {
        name: [BATCH * (many - few) / (b - a) for a, b in zip(seconds[name, few], seconds[name, many], strict=True)]
        for name in CONTENDERS
    }
    first = next(iter(rates.values()))
    rows = {name: {"images/s": spread(rate), "ratio": ratios(rate, first)} for name, rate in rates.items()}
    report = {"rows": rows, "rounds": args.rounds, "steps": args.steps, "batch": BATCH, "environment": environment()}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
