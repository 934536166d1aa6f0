"""The parity certificate of `solo-ext data certify`: all data formats give solo-learn's views."""

import argparse
import json
from pathlib import Path

from solo_ext.cli.command import Command, option
from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.errors import ConfigError
from solo_ext.runs.environment import environment
from solo_ext.schema import build
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve

from .compare import DRAWS, certify


def run(args: argparse.Namespace) -> None:
    """Show that all data formats give solo-learn's views.

    Compares the views of each data format with those of solo-learn's chain of Pillow and torchvision: the drawn
    parameters (Kolmogorov-Smirnov), every operation with the same random numbers (mean difference, bias), and the whole
    chain with other ones; without a YAML, for all operations, on scikit-learn's two photographs and on bundled
    Fashion-MNIST images. Prints tables in Markdown, and exits 1 if a value is outside its bound.

      solo-ext data certify
      solo-ext data certify scripts/pretrain/imagenet-100/byol.yaml --images /data/imagenet100/val --json parity.json
    """
    augmentations = None
    if args.words:
        file = Path(args.words[0])
        if file.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"'{file}' is not a YAML, which comes first")
        cfg = resolve(compose(file.parent, file.name, args.words[1:]))
        augmentations = [build(AugmentationConfig, aug) for aug in cfg.augmentations]
    if args.draws < 1:
        raise ConfigError(f"--draws must be at least 1, not {args.draws}")
    certificate = certify(augmentations, args.images, args.formats, args.draws, args.seed, args.device)
    print(certificate)
    if args.json:
        record = {**certificate.record(), "environment": environment()}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not certificate.ok:
        raise SystemExit(1)


COMMAND = Command(
    "solo-ext data certify",
    run,
    [
        option("words [FILE.yaml] key=value", "whose augmentations (default: all operations)", nargs="*"),
        option("--images PATH", "folder, list of files (.txt, .csv) or HDF5 file (.h5)"),
        option("--formats NAME", "that have to pass (default: all here)", nargs="+", default=[]),
        option("--draws N", "views per operation and format (default: %(default)s)", type=int, default=DRAWS),
        option("--seed SEED", "of the views (default: %(default)s)", type=int, default=0),
        option("--device DEVICE", "where tensor and dali make their views (default: %(default)s)", default="cpu"),
        option("--json FILE", "also write all values to FILE"),
    ],
    own=None,
)
