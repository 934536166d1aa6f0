"""What the data formats deliver, side by side with solo-learn's Pillow chain, and what loading costs a training step.

    python benchmarks/data.py --rounds 7
    python benchmarks/data.py --device cuda --only cifar,step

photos: two views of 224 px from JPEG files of 500 x 375 px, all of solo-learn's asymmetric augmentations.
cifar: two views of 32 px from images in memory, likewise.
step: the share of a training step (BYOL, SGD, format tensor) that passes in `next(loader)`.

The images are cuts of scikit-learn's two photographs. In each round every contender runs once, alone, in a process of
its own: its loader is made, its first batches are left out, then it is timed. Ratios are taken within a round, to the
Pillow DataLoader with the same augmentations. Figures are medians and quartiles of the rounds. On a GPU, tensor and
dali render there, and the step is in bfloat16. Writes JSON next to the table.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from certificate.reference import random_chain
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_images
from timing import clock
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.data.datasets import IMAGENET_MEAN, IMAGENET_STD, DataConfig, load_dataset, read_images
from solo_ext.data.images import ArrayImages, ImageSet
from solo_ext.data.loader import EpochSampler, ViewDataset, ViewLoader
from solo_ext.data.modules import make_loader
from solo_ext.data.transforms import Transform
from solo_ext.methods import METHODS
from solo_ext.runs.environment import environment
from solo_ext.schema import build
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve

RECIPES = Path(__file__).resolve().parents[1] / "scripts" / "pretrain"
RECIPE = {"photos": "imagenet_asymmetric", "cifar": "cifar_asymmetric"}
PILLOW, PLAIN = "pillow", ", crop + flip"
CONTENDERS = {
    "photos": [PILLOW, "image_folder", "h5", "dali", *(f"{name}{PLAIN}" for name in (PILLOW, "image_folder", "dali"))],
    "cifar": [PILLOW, "tensor", "image_folder"],
    "step": ["resnet10_w16, fashion_mnist_mini", "resnet10_w16, cifar10", "resnet18, cifar10"],
}
NEEDS = {"h5": ["h5py"], "dali": ["nvidia", "nvidia.dali"]}
TARGETS = {
    "cpu": {"photos: image_folder": 1.1, "photos: dali": 1.2, "cifar: tensor": 2, "step": "< 5"},
    "cuda": {"cifar: tensor": 20, "step": "< 5"},
}
EPOCH = 20_000  # images; there are fewer files, which are then read again: new workers are no part of the figures


# The images.


def cuts(number: int, width: int, height: int) -> Iterator[Image.Image]:
    """Random cuts of real photographs, resized."""
    draw = random.Random(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(number):
        photo = photos[i % len(photos)]
        h = draw.uniform(0.4, 1) * min(photo.height, photo.width * height / width)
        w = h * width / height
        left, top = draw.uniform(0, photo.width - w), draw.uniform(0, photo.height - h)
        yield photo.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))


def write_images(folder: Path, args: argparse.Namespace) -> None:
    """JPEG files, the same files in an HDF5 file, and small images in an array."""
    (folder / "jpeg" / "photos").mkdir(parents=True)
    for i, image in enumerate(cuts(args.files, 500, 375)):
        image.save(folder / "jpeg" / "photos" / f"{i:04}.jpg", quality=90)
    if installed("h5"):
        from solo_ext.data.h5 import write_h5

        write_h5(folder / "jpeg", folder / "photos.h5")
    np.save(folder / "small.npy", np.stack([np.asarray(cut) for cut in cuts(args.small, 32, 32)]))


def small_images(folder: Path) -> ImageSet:
    pixels = np.load(folder / "small.npy")
    return ImageSet(ArrayImages(pixels), np.zeros(len(pixels), np.int64))


def installed(name: str) -> bool:
    return all(map(find_spec, NEEDS.get(name, [])))


# Loaders of two views.


def recipe(nodes: Iterable, plain: bool = False) -> list[AugmentationConfig]:
    """One entry per view; of a plain one, crop and flip are left."""
    views = [build(AugmentationConfig, node) for node in nodes for _ in range(node.num_crops)]
    if plain:
        views = [AugmentationConfig(rrc=v.rrc, horizontal_flip=v.horizontal_flip, crop_size=v.crop_size) for v in views]
    return views


def pillow_chain(aug: AugmentationConfig) -> T.Compose:
    return T.Compose([*random_chain(aug), T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


class PillowViews(Dataset):
    """(index, views, target) of a folder or array of images, as solo-learn's data sets give them."""

    def __init__(self, images: ImageFolder | np.ndarray, rows: np.ndarray, views: list[AugmentationConfig]):
        self.images, self.rows, self.chains = images, rows, [pillow_chain(aug) for aug in views]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        item = self.images[self.rows[index]]
        image, target = item if isinstance(item, tuple) else (Image.fromarray(item), 0)
        return index, [chain(image) for chain in self.chains], target


def load(kind: str, name: str, folder: Path, args: argparse.Namespace) -> Iterator:
    """Batches of the contender `name`, without end."""
    reader = name.removesuffix(PLAIN)
    views = recipe(OmegaConf.load(RECIPES / "_shared" / "augmentations" / f"{RECIPE[kind]}.yaml"), reader != name)
    batch = args.batch or {"photos": 32, "cifar": 256}[kind]
    if kind == "cifar":
        images = small_images(folder)
    else:
        images = read_images(folder / ("photos.h5" if reader == "h5" else "jpeg"), reader)
    rows = np.tile(np.arange(len(images)), max(1, EPOCH // len(images)))
    if reader != PILLOW:
        return endless(ours(reader, images.subset(rows), views, batch, args))
    files = images.images.pixels if kind == "cifar" else ImageFolder(folder / "jpeg")
    options = {"num_workers": args.workers, "pin_memory": args.device == "cuda", "drop_last": True}
    return endless(DataLoader(PillowViews(files, rows, views), batch, shuffle=True, **options))


def ours(reader: str, images: ImageSet, views: list[AugmentationConfig], batch: int, args) -> ViewLoader:
    data = DataConfig(dataset="custom", format=reader, num_workers=args.workers)
    transforms = [Transform.random(aug, IMAGENET_MEAN, IMAGENET_STD) for aug in views]
    sampler = EpochSampler(len(images), seed=0)
    dataset, batching = ViewDataset(images, transforms, 0), {"sampler": sampler, "batch_size": batch, "drop_last": True}
    return make_loader(data, dataset, torch.device(args.device), **batching)


def endless(loader: Iterable) -> Iterator:
    for epoch in count():
        if isinstance(loader.sampler, EpochSampler):
            loader.sampler.set_epoch(epoch)
        yield from loader


# What is timed.


def throughput(kind: str, name: str, folder: Path, args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Measures images a second. The loader, with its workers and threads, lives as long as one measurement."""

    def measure() -> dict[str, float]:
        batches, images = load(kind, name, folder, args), 0
        for _ in range(3 * args.workers):  # more than the workers make before the first is asked for
            next(batches)
        start = clock(args.device)
        while not images or clock(args.device) - start < args.seconds:
            for _ in range(args.workers):  # which finish together
                indexes, views, _ = next(batches)
                views = [view.to(args.device, non_blocking=True) for view in views]
                images += len(indexes)
        return {"images/s": images / (clock(args.device) - start)}

    return measure


def training(name: str, folder: Path, args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Measures a step in milliseconds, and its batch's part of it."""
    backbone, data = name.split(", ")
    cfg = resolve(compose(RECIPES / data, "byol", [f"backbone.name={backbone}", "gap.enabled=False"]))
    model = METHODS["byol"](cfg).to(args.device, memory_format=torch.channels_last).train()
    model.log = model.log_dict = lambda *_, **__: None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    images = small_images(folder) if data == "cifar10" else load_dataset(DataConfig(dataset=data), "pretrain")
    # of the recipe's 256 images, resnet18 takes two CPU cores half a minute
    batch = args.batch or (32 if (args.device, backbone) == ("cpu", "resnet18") else cfg.optimizer.batch_size)
    loader = ours("tensor", images, recipe(cfg.augmentations), batch, args)
    batches = endless(loader)

    def step(batch) -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.teacher.update(0, 100)

    def timed(function: Callable, argument) -> tuple[float, Any]:
        start = clock(args.device)
        result = function(argument)
        return 1000 * (clock(args.device) - start), result

    def measure() -> dict[str, float]:
        step(next(batches))
        waits, steps, end = [], [], time.perf_counter() + args.seconds
        while not steps or time.perf_counter() < end:
            for place in range(loader.together):  # made at once, so all of them count
                wait, batch = timed(next, batches)
                waits.append(wait)
                if place == 0 or time.perf_counter() < end:
                    steps.append(timed(step, batch)[0])
        wait, rest = statistics.mean(waits), statistics.mean(steps)
        return {"batch ms": wait, "step ms": wait + rest, "share %": 100 * wait / (wait + rest)}

    return measure


# The comparison.


def serve(pipe, kind: str, name: str, folder: Path, args: argparse.Namespace) -> None:
    """A contender's process: a measurement for each `True` through the pipe."""
    torch.set_num_threads(args.threads)
    measure = training(name, folder, args) if kind == "step" else throughput(kind, name, folder, args)
    while pipe.recv():
        pipe.send(measure())


def compare(kind: str, folder: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """What each contender measured in each round."""
    fork, pipes, measured = multiprocessing.get_context("fork"), {}, {}
    for name in filter(lambda name: installed(name.removesuffix(PLAIN)), CONTENDERS[kind]):
        pipes[name], other = fork.Pipe()
        fork.Process(target=serve, args=(other, kind, name, folder, args)).start()
        other.close()
    try:
        for number in range(args.rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                measured.setdefault(name, []).append(pipe.recv())
            print(f"{kind}: round {number + 1} of {args.rounds}", flush=True)
    finally:
        for pipe in pipes.values():
            with suppress(BrokenPipeError):  # of one that failed
                pipe.send(False)
    for name, rounds in measured.items():
        if kind != "step":
            base = measured[PILLOW + name[len(name.removesuffix(PLAIN)) :]]
            for one, pillow in zip(rounds, base, strict=True):
                one["ratio"] = one["images/s"] / pillow["images/s"]
    return measured


def summary(kind: str, measured: dict[str, list[dict[str, float]]], device: str) -> dict[str, dict]:
    """Medians and quartiles of each contender's figures; `target` is that of the last of them."""
    rows = {}
    for name, rounds in measured.items():
        rows[name] = {}
        for key in rounds[0]:
            values = [one[key] for one in rounds]
            low, median, high = np.percentile(values, (25, 50, 75)).tolist()
            rows[name][key] = {"median": median, "quartiles": [low, high], "rounds": values}
        rows[name]["target"] = TARGETS[device].get(kind if kind == "step" else f"{kind}: {name}")
    return rows


def table(kind: str, rows: dict[str, dict]) -> str:
    keys = [key for key in next(iter(rows.values())) if key != "target"]
    lines = [f"{kind:<34}" + "".join(f"{key:>12}{'quartiles':>16}" for key in keys) + f"{'target':>8}"]
    for name, row in rows.items():
        cells = []
        for key in keys:
            digits = 0 if key == "images/s" else 2
            low, high = (f"{value:.{digits}f}" for value in row[key]["quartiles"])
            cells.append(f"{row[key]['median']:12.{digits}f}{f'{low}-{high}':>16}")
        lines.append(f"{name:<34}" + "".join(cells) + f"{row['target'] or '':>8}")
    return "\n".join(lines)


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*CONTENDERS], help="of photos,cifar,step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.5, help="of a measurement")
    parser.add_argument("--workers", type=int, default=cores, help="of a DataLoader; threads of DALI")
    parser.add_argument("--threads", type=int, default=cores, help="of torch outside of workers")
    parser.add_argument("--device", choices=[*TARGETS], default="cpu")
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--small", type=int, default=20_000, help="number of images of 32 px")
    parser.add_argument("--batch", type=int, help="by default 32 photos, 256 small images, a step's recipe")
    parser.add_argument("--out", type=Path, default=Path("data.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    report = {"load": os.getloadavg(), "rounds": args.rounds, "device": args.device}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args)
        for kind in args.only:
            report[kind] = summary(kind, compare(kind, Path(folder), args), args.device)
            print(table(kind, report[kind]), flush=True)
    report["environment"] = facts = environment()  # not before: a process that has used CUDA cannot fork
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    where = ", ".join(facts["gpus"]) if args.device == "cuda" else facts["cpu"]
    used = f"{args.workers} workers, {args.threads} threads, n = {args.rounds}"
    print(f"{where}, torch {facts['packages']['torch']}, {used}")


if __name__ == "__main__":
    main()
