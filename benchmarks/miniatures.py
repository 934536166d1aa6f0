"""Every study, and every picture of the papers, once in miniature on the bundled images: docs/figures.

    python benchmarks/miniatures.py [NAME ...] [--out miniatures]

Three epochs of one seed on 5,000 images (500 where the study is about large networks) say nothing about a method: they
show what each command computes and draws. It takes two hours on one core, and the same command continues it. Detectors
find bundled images pasted on gray.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "evaluation")]

from test_detection import write_coco, write_voc  # noqa: E402, images with boxes

from solo_ext.data.datasets import BUNDLED, MINI  # noqa: E402
from solo_ext.training.recipes import summary  # noqa: E402

STUDIES, FIGURES = ROOT / "scripts" / "studies", ROOT / "docs" / "figures"
COMMON = ["max_epochs=3", "scheduler.warmup_epochs=1", "data.num_workers=0"]
LINEAR = ["max_epochs=2"]
DETECT = [
    *("detector.min_size=[64]", "detector.max_size=64", "detector.anchors=[16,28]", "detector.precise_bn=0"),
    *("optimizer.batch_size=4", "max_steps=20", "max_epochs=10", "check_val_every_n_epoch=10", "data.num_workers=0"),
    *("scheduler.warmup_steps=5", "scheduler.lr_decay_steps=[15]"),
]
SWITCH = {"residual/figure12": ("intra.every=8000", "intra.every=19")}  # of an epoch's steps
PICTURES = {"residual_figure9": "features", "residual_figure10": "gradcam"}


def solo_ext(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "solo_ext", *map(str, words)], check=True)


def miniature(name: str, out: Path, boxes: dict[str, list[str]]) -> Path:
    """Runs the study `name` by a copy of its file beside its results; returns their folder."""
    spec = yaml.safe_load((STUDIES / f"{name}.yaml").read_text().replace(*SWITCH.get(name, ("", ""))))
    varied = [text for axis in spec.get("grid", {}).values() for own in axis.values() for text in own or ()]
    varied += [text for cell in spec.get("cells", ()) for text in cell["overrides"]]
    own = ["backbone.name=resnet10_w16"]
    if any("backbone.name" in text for text in varied):
        own = ["data.fraction=0.1", "optimizer.batch_size=64"]
    spec.setdefault("title", summary(STUDIES / f"{name}.yaml"))
    spec |= {"seeds": [5], "results": str(STUDIES / "paper_results.yaml")}
    for evaluation, words in spec.get("evaluate", {}).items():
        words += [*DETECT, *boxes[evaluation]] if words[0] == "detect" else LINEAR
    folder = out / name.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (file := folder / f"{Path(name).name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    common = [text for text in COMMON if not any(text.split("=")[0] in one for one in varied)]
    solo_ext("study", file, f"dataset={BUNDLED}", *common, *own, "--out", folder)
    return folder


def keep(picture: Path, name: str) -> None:
    """Puts a picture into the documentation, small."""
    FIGURES.mkdir(exist_ok=True)
    with Image.open(picture) as image:
        image.thumbnail((1200, 2400))
        image.convert("RGB").quantize(256).save(FIGURES / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help="studies, such as residual/table2 (default: all)")
    parser.add_argument("--out", type=Path, default=Path("miniatures"))
    args = parser.parse_args()
    out, failed = args.out.absolute(), []
    boxes = {}
    for name, write in (("voc", write_voc), ("coco", write_coco)):
        if not (folder := out / name).exists():
            write(folder, 16)
        listed = next(folder.glob("ImageSets/Main/*.txt" if name == "voc" else "annotations/*.json"))
        boxes[name] = [f"data.train_path={listed}", f"data.val_path={listed}"]
    for file in sorted(file for paper in ("projector_ema", "residual") for file in STUDIES.glob(f"{paper}/*.yaml")):
        name = f"{file.parent.name}/{file.stem}"
        if not args.names or name in args.names:
            try:
                keep(miniature(name, out, boxes) / "study.png", name.replace("/", "_"))
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                failed.append(f"{name}: {error}")
    runs, filters = (
        sorted((out / name / "runs").glob("*/*/*")) for name in ("residual_figure4", "projector_ema_figure2")
    )
    if not args.names and runs and filters:
        drawn = out / "projector_ema_appendixE.png"
        solo_ext("trajectories", *filters, "--filters", *range(16), "--flat", "--out", drawn)
        keep(drawn, drawn.stem)
        images = out / "images"
        images.mkdir(exist_ok=True)
        with np.load(MINI) as arrays:
            for i, pixels in enumerate(arrays["test_images"][:8]):
                Image.fromarray(pixels).save(images / f"{i}.png")
        for name, kind in PICTURES.items():
            solo_ext("pictures", *runs, "--images", images, "--kind", kind, "--out", out / f"{name}.png")
            keep(out / f"{name}.png", name)
    sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
