"""Detection of blood cells (BCCD, VOC's layout) by an encoder of ours, and by the same network from scratch.

    python benchmarks/bccd.py FOLDER [--seeds 5 6] [--out bccd]

Res-MoCo learns on crops of the 292 training images at half their size; Faster R-CNN is then trained on them from these
weights, from random ones, and on either kept frozen, and tested on the 72 test images. The same command continues it.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from solo_ext.runs.environment import environment
from solo_ext.runs.evaluations import read_results
from solo_ext.runs.run import DETECTION, find_runs
from solo_ext.text import markdown_table

PRETRAIN = [
    *(NETWORK := ["backbone.name=resnet10_w16"]),
    *("data.format=tensor", "data.num_workers=0", "optimizer.batch_size=64"),
    *("augmentations.0.crop_size=64", "augmentations.1.crop_size=64", "accelerator=cpu", "name=bccd"),
]
DETECT = [
    *NETWORK,
    *("detector.min_size=[240]", "detector.max_size=320", "detector.anchors=[16,32,64,128]", "detector.regions=64"),
    *("detector.precise_bn=20", "optimizer.batch_size=4", "optimizer.lr=1.28", "scheduler.warmup_steps=50"),
    *("max_epochs=1000", "check_val_every_n_epoch=1000", "data.num_workers=0", "accelerator=cpu", "devices=1"),
]
VARIANTS = {  # what it begins with, and whether that is trained
    "ours": (True, True),
    "scratch": (False, True),
    "ours, frozen": (True, False),
    "scratch, frozen": (False, False),
}
FIGURES = ("ap", "ap50", "ap75")


def solo_ext(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "solo_ext", *map(str, words)], check=True)


def halved(data: Path, folder: Path) -> None:
    """The training images at half their size."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (data / "ImageSets" / "Main" / "trainval.txt").read_text().split():
        if not (file := folder / f"{name}.png").exists():
            with Image.open(data / "JPEGImages" / f"{name}.jpg") as image:
                image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="FOLDER", type=Path, help="with Annotations, ImageSets and JPEGImages")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--epochs", type=int, default=200, help="of the pre-training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of a detector (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bccd"))
    args = parser.parse_args()
    data, out = args.data.absolute(), args.out.absolute()
    halved(data, out / "images")
    place, words = f"checkpoint.dir={out / 'runs'}", [f"data.train_path={out / 'images'}", f"max_epochs={args.epochs}"]
    if not any((out / "runs").glob("res_mocov3/*/result.json")):
        solo_ext("pretrain", "custom/res_mocov3", *PRETRAIN, *words, place)
    [run] = find_runs(out / "runs" / "res_mocov3")
    paths = [
        f"data.{key}_path={data}/ImageSets/Main/{name}.txt" for key, name in (("train", "trainval"), ("val", "test"))
    ]
    steps = [f"max_steps={args.steps}", f"scheduler.lr_decay_steps=[{args.steps * 3 // 4}]"]
    found: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for seed in args.seeds:
        for name, (trained, finetuned) in VARIANTS.items():
            results = run.dir if trained else out / f"untrained-seed{seed}"
            begin = ["--run", run.dir] if trained else ["untrained=true", "--out", results]

            def rows(results=results, seed=seed, finetuned=finetuned) -> list[dict]:
                wanted = {"seed": seed, "finetune": finetuned, "max_steps": args.steps}
                every = read_results(results / DETECTION)
                return [row for row in every if wanted.items() <= row["protocol"].items()]

            if not rows():
                solo_ext(
                    "detect", "voc/c4", *begin, *DETECT, *paths, *steps, f"seed={seed}", f"finetune={finetuned}", place
                )
            found[name] += rows()[-1:]
    print(f"{environment()['cpu']}, torch {torch.__version__}")
    print(f"{args.epochs} epochs, {args.steps} steps, seeds {args.seeds}\n")
    lines = []
    for name, results in found.items():
        columns = [[row[figure] for row in results] for figure in FIGURES]
        lines.append([name, *(f"{statistics.fmean(x):.1f} ({', '.join(f'{y:.1f}' for y in x)})" for x in columns)])
    print(markdown_table(["encoder", "AP", "AP50", "AP75"], lines, (1, 2, 3)))


if __name__ == "__main__":
    main()
