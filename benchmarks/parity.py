"""Accuracy after whole runs of solo-learn and of this package: its YAMLs, the same images, network and seeds.

    python benchmarks/parity.py ~/solo-learn cifar10_jpeg --out parity --jobs 2 > docs/results/parity.md

`cifar10_jpeg` has train/<class>/ and test/<class>/. Each side trains in float32, with its own data loading, on the
first images of each class, and logs the accuracy of the online classifier on them, as augmented, over the last epoch.
Both checkpoints are then read by this package and judged in one way, on all test images: by that classifier, and by
kNN. A finished run is not trained again.
"""

import argparse
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from solo_ext.data.modules import ClassificationData
from solo_ext.evaluation.features import extract_features
from solo_ext.evaluation.knn import knn_accuracy
from solo_ext.evaluation.linear import accuracy_at_k
from solo_ext.runs.checkpoints import open_checkpoint
from solo_ext.runs.encoder import load_encoder
from solo_ext.runs.run import Run, find_runs
from solo_ext.studies.scores import Score
from solo_ext.training.config import resolve, run_values

METHODS, SIDES = ("byol", "mocov3", "dino", "simclr"), ("solo-learn", "solo_ext")
SCORES = ("online probe, training", "online probe", "kNN-20")
Cell = tuple[str, int, str]  # method, seed, side


def subset(data: Path, out: Path, images: int) -> Path:
    """A folder of links to the first `images` training images, equally many of each class."""
    classes = sorted(folder for folder in (data / "train").iterdir() if folder.is_dir())
    for folder in classes:
        target = out / f"train-{images}" / folder.name
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir())[: images // len(classes)]:
            if not (target / file.name).exists():
                (target / file.name).symlink_to(file.resolve())
    return out / f"train-{images}"


def command(side: str, solo_learn: Path, recipe: str, values: dict[str, Any]) -> list[str]:
    """A process that trains on images of a folder; `recipe`: a YAML of solo-learn, or for solo_ext also one of ours."""
    shared = {
        "data.dataset": "custom",
        "data.val_path": "null",
        "wandb.enabled": False,
        "auto_resume.enabled": False,
        "devices": "'1'",  # solo-learn takes its length
        "sync_batchnorm": False,
        "accelerator": "cpu",
        "strategy": "auto",
    }
    script = ["pretrain"] if side == "solo_ext" else ["with-solo-learn", str(solo_learn.resolve()), "main_pretrain.py"]
    yaml = ["--config-path", str(solo_learn.resolve() / "scripts/pretrain/cifar"), "--config-name", f"{recipe}.yaml"]
    words = [f"++{key}={value}" for key, value in {**shared, **values}.items()]
    return [sys.executable, "-m", "solo_ext", *script, *([recipe] if "/" in recipe else yaml), *words]


def train(cell: Cell, args: argparse.Namespace, images: Path) -> Path:
    """The folder of the cell's run, which is trained if it is not there."""
    folder = args.out / f"{cell[0]}-seed{cell[1]}-{cell[2]}"
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            method, seed, side = cell
            values = {
                "backbone.name": "resnet10_w16",
                "backbone.kwargs.stem": "small",
                "data.train_path": images.resolve(),
                "data.num_workers": 0,
                "checkpoint.dir": folder.resolve(),
                "checkpoint.frequency": max(1, args.epochs - 1),  # solo-learn saves epoch 0 and its multiples
                "max_epochs": args.epochs,
                "seed": seed,
                "precision": 32,
            }
            run = command(side, args.solo_learn, method, values)
            threads = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(run, cwd=folder, env=threads, stdout=log, stderr=subprocess.STDOUT, check=True)
        done.touch()
    print(*cell, file=sys.stderr, flush=True)
    return folder


def logged(folder: Path, run: Run) -> float:
    """The online classifier's accuracy in training, over the last epoch: ours, or Lightning's log of solo-learn."""
    if (value := run.last("train_acc1")) is not None:
        return value
    events = EventAccumulator(str(max(folder.glob("lightning_logs/version_*"), key=lambda path: path.stat().st_mtime)))
    return events.Reload().Scalars("train_acc1_epoch")[-1].value


def judge(folder: Path, images: Path, test: Path) -> list[float]:
    """Top-1 of the online classifier in training and in test, and of kNN, %."""
    run = find_runs(folder)[-1]
    checkpoint = open_checkpoint(run.dir)
    data = [f"data.train_path={images.resolve()}", f"data.val_path={test.resolve()}", "data.augmentations.crop_size=32"]
    cfg = resolve(run_values(checkpoint.path, "knn", data), "knn")
    loaders = ClassificationData(cfg.data, 256, cfg.seed, augment=False)
    loaders.check(1)
    backbone, _ = load_encoder(checkpoint)
    bank, bank_labels = extract_features(backbone, loaders.train_dataloader())
    queries, labels = extract_features(backbone, loaders.val_dataloader())
    probe = (checkpoint.state[f"classifier.{name}"] for name in ("weight", "bias"))
    online = accuracy_at_k(torch.nn.functional.linear(queries, *probe), labels, (1,))[0].item()
    return [logged(folder, run), online, knn_accuracy(bank, bank_labels, queries, labels, 20)[20]["acc1"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solo_learn", type=Path, help="a checkout")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    images = subset(args.data, args.out, args.images)
    cells = list(product(METHODS, range(args.seeds), SIDES))
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = dict(zip(cells, pool.map(lambda cell: train(cell, args, images), cells), strict=True))

    print(f"| method | {' | '.join(f'{score}: {side}' for score in SCORES for side in (*SIDES, 'difference'))} |")
    print("|---|" + "---|" * (3 * len(SCORES)))
    scores = {cell: judge(folder, images, args.data / "test") for cell, folder in folders.items()}
    for method in METHODS:
        row = [method]
        for number in range(len(SCORES)):
            by_seed = [{seed: scores[method, seed, side][number] for seed in range(args.seeds)} for side in SIDES]
            theirs = Score(by_seed[0])
            ours = Score(by_seed[1], against=theirs)
            row += [theirs.texts(".1f")[0], ours.texts(".1f")[0], ours.compared(".1f")]
        print(f"| {' | '.join(row)} |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    print("\nMean ± sample standard deviation; difference with its 95% interval; in brackets the number of seeds.")
    print(f"{args.images} images, {args.epochs} epochs, float32, one thread per run;")
    print(f"Python {platform.python_version()}, {packages}.")


if __name__ == "__main__":
    main()
