"""Images a second of a whole pre-training of BYOL with a ResNet-18 on CIFAR-10, ours and solo-learn's.

    python benchmarks/end_to_end.py ~/solo-learn cifar10_jpeg --out docs/results/end_to_end.json

solo-learn runs its own recipe, with Pillow in workers, and on a CPU in float32. Each contender trains for few and for
more steps: the difference is what their images cost, with loading and logging, without start and end.
"""

import argparse
import json
import os
import pickle
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from parity import command
from PIL import Image
from timing import in_turn, ratios, spread

from solo_ext.runs.environment import environment

BATCH = 256
# side, recipe and what differs from it
CPU = {
    "solo-learn, BYOL, float32": ("solo-learn", "byol", {"precision": 32}),
    "BYOL, float32": ("solo_ext", "cifar10/byol", {"precision": 32}),
    "BYOL, as shipped (bfloat16)": ("solo_ext", "cifar10/byol", {}),
    "ProjectorEMA-BYOL, as shipped (bfloat16)": ("solo_ext", "cifar10/projector_ema_byol", {}),
}
GPU = {
    "solo-learn, BYOL": ("solo-learn", "byol", {}),
    "BYOL": ("solo_ext", "cifar10/byol", {}),
    "ProjectorEMA-BYOL": ("solo_ext", "cifar10/projector_ema_byol", {}),
}
# these files hold pixels of JPEGs, so that torchvision would not know them by their sums
TRUSTING = "import torchvision.datasets.cifar as cifar\ncifar.check_integrity = lambda *_, **__: True\n"


def make_cifar(images: Path, out: Path) -> None:
    """torchvision's files of CIFAR-10 in `out`, of the JPEGs in `images`/<class>/."""
    classes = sorted(folder.name for folder in images.iterdir())
    files = [(file, classes.index(file.parent.name)) for file in sorted(images.glob("*/*"), key=lambda f: f.name)]
    folder = out / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    parts = {f"data_batch_{i + 1}": files[i::5] for i in range(5)} | {"test_batch": files[:100]}
    for name, part in parts.items():
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1).ravel() for file, _ in part])
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [label for _, label in part]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solo_learn", type=Path, help="a checkout")
    parser.add_argument("data", type=Path, help="with train/<class>/")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, nargs=2, help="few and more (default: 1 4, on a GPU 20 120)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    contenders = GPU if args.device == "cuda" else CPU
    few, more = args.steps or ((20, 120) if args.device == "cuda" else (1, 4))
    with tempfile.TemporaryDirectory() as scratch:
        make_cifar(args.data / "train", Path(scratch))
        (Path(scratch) / "sitecustomize.py").write_text(TRUSTING)
        environ = os.environ | {"PYTHONPATH": os.pathsep.join([scratch, os.environ.get("PYTHONPATH", "")])}
        shared = {"data.dataset": "cifar10", "data.train_path": scratch, "data.val_path": scratch, "max_epochs": 1}
        shared |= {"data.num_workers": 4, "checkpoint.enabled": False, "limit_val_batches": 0}
        shared |= {"accelerator": "gpu" if args.device == "cuda" else "cpu"}

        def train(name: str, steps: int) -> None:
            side, recipe, values = contenders[name]
            words = command(side, args.solo_learn, recipe, {**shared, "limit_train_batches": steps, **values})
            done = subprocess.run(words, cwd=scratch, env=environ, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}:\n{done.stdout}\n{done.stderr}")

        runs = {(name, steps): lambda cell=(name, steps): train(*cell) for name in contenders for steps in (few, more)}
        seconds = in_turn(runs, args.rounds, args.device, warm_up=0)
    rates = {
        name: [BATCH * (more - few) / (b - a) for a, b in zip(seconds[name, few], seconds[name, more], strict=True)]
        for name in contenders
    }
    first = next(iter(rates.values()))
    rows = {name: {"images/s": spread(rate), "ratio": ratios(rate, first)} for name, rate in rates.items()}
    report = {"rows": rows, "rounds": args.rounds, "steps": [few, more], "batch": BATCH, "environment": environment()}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
