"""`solo-ext data`: converts, selects and identifies sets of images, and certifies how they are read."""

import argparse
import sys
from functools import partial

from solo_ext.cli.command import Command, Group


def _to_h5_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder of images, with class sub-folders or without")
    parser.add_argument("destination", metavar="DST.h5", help="the file to make; one that exists is refused")


def _to_h5(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from solo_ext.data.h5 import SUFFIXES, write_h5
    from solo_ext.errors import ConfigError

    if not args.destination.lower().endswith(SUFFIXES):
        raise ConfigError(f"DST: '{args.destination}' must end in {' or '.join(SUFFIXES)}")
    console = Console(stderr=True)
    shown = partial(track, description="copying", console=console, disable=not sys.stderr.isatty(), transient=True)
    images = write_h5(args.source, args.destination, shown)
    print(f"{args.destination}: {len(images):,} images, {len(images.classes):,} classes")


def _imagenet100_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="ImageNet's folder: train/ and val/, both with class sub-folders")
    parser.add_argument("destination", metavar="DST", help="the folder to make; one that differs is refused")


def _imagenet100(args: argparse.Namespace) -> None:
    from solo_ext.data.imagenet100 import SIZES, build_imagenet100

    sets = build_imagenet100(args.source, args.destination)
    counts = [f"{len(images):,} {split} images" for split, images in sets.items()]
    print(f"{args.destination}: links to {len(sets['train'].classes)} classes; {', '.join(counts)}")
    for split, images in sets.items():
        if len(images) != SIZES[split]:
            print(f"solo-ext: ImageNet-100 has {SIZES[split]:,} {split} images, not {len(images):,}", file=sys.stderr)


def _fingerprint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder, list of files (.txt) or HDF5 file (.h5)")


def _fingerprint(args: argparse.Namespace) -> None:
    from solo_ext.data.datasets import read_images

    for name, value in read_images(args.path, "PATH").record().items():
        print(f"{name:<11}  {value}")


def _certify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="[FILE.yaml] key=value", help="whose augmentations (default: all operations)"
    )
    parser.add_argument("--images", metavar="PATH", help="folder, list of files (.txt) or HDF5 file (.h5)")
    parser.add_argument(
        "--formats", nargs="+", default=[], metavar="NAME", help="that have to pass (default: all here)"
    )
    parser.add_argument("--draws", type=int, metavar="N", help="views per operation and format (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the views (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where tensor and dali make their views (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all values, too")


def _certify(args: argparse.Namespace) -> None:
    import importlib
    from pathlib import Path

    import solo_ext
    from solo_ext.errors import ConfigError

    benchmarks = Path(solo_ext.__file__).parents[1] / "benchmarks"
    if not (benchmarks / "certificate").is_dir():
        raise ConfigError("data certify needs a checkout of solo-ext: the certificate is no part of the package")
    sys.path.insert(0, str(benchmarks))
    try:
        certificate = importlib.import_module("certificate")
    except ImportError as error:
        raise ConfigError(f"data certify needs {error.name}: pip install -e '.[dev]'") from error
    certificate.run(args)


_COMMANDS = (
    Command(
        "data to-h5",
        "copy a folder of images into one HDF5 file",
        """\
Copies the image files of a folder, unchanged, into one HDF5 file, which data.train_path and data.val_path take in
the folder's place: one large file where a million small ones are slow. solo-learn reads it, too. Nothing is left
behind if it fails, as it does at a file that is not an image. It needs h5py: pip install 'solo-ext[h5]'.""",
        (
            "data to-h5 /data/imagenet/train /data/imagenet-train.h5",
            "data to-h5 images images.h5",
        ),
        _to_h5_arguments,
        _to_h5,
    ),
    Command(
        "data imagenet100",
        "make ImageNet-100 out of ImageNet, with links",
        """\
Makes DST/train and DST/val with links to the class folders of ImageNet that make up ImageNet-100, for
data.train_path and data.val_path. Nothing is copied, and SRC has to stay where it is. Repeating the command
changes nothing.""",
        (
            "data imagenet100 /data/imagenet /data/imagenet100",
            "data imagenet100 ILSVRC/Data/CLS-LOC datasets/imagenet100",
        ),
        _imagenet100_arguments,
        _imagenet100,
    ),
    Command(
        "data fingerprint",
        "identify a set of images by its file names and labels",
        """\
Prints the number of images and classes that a run would read at PATH, and the SHA-256 of its file names and
labels, which is also in the environment.json of each run (for sets in memory, the SHA-256 of the pixels). A
folder, links to it and an HDF5 file made from it have the same fingerprint; the contents of the files do not
count.""",
        (
            "data fingerprint /data/imagenet100/train",
            "data fingerprint /data/imagenet-train.h5",
        ),
        _fingerprint_arguments,
        _fingerprint,
    ),
    Command(
        "data certify",
        "show that all data formats give solo-learn's views",
        """\
Compares the views of each data format with those of solo-learn's chain of Pillow and torchvision: the parameters
that are drawn (Kolmogorov-Smirnov), every operation by the same numbers (mean difference, bias), and the whole
chain by other numbers. Prints tables in Markdown, and exits 1 if a value is outside its bound. It needs a checkout.

Without a YAML: all operations, on scikit-learn's two photographs and on bundled Fashion-MNIST images.""",
        (
            "data certify",
            "data certify scripts/pretrain/imagenet-100/byol.yaml --images /data/imagenet100/val --json parity.json",
            "data certify --formats dali tensor --draws 200",
        ),
        _certify_arguments,
        _certify,
    ),
)

DATA = Group(
    "data",
    "convert, select and identify sets of images, and certify how they are read",
    "Prepares sets of images, and shows what a run would read.",
    ("data imagenet100 /data/imagenet /data/imagenet100", "data to-h5 /data/imagenet100/train imagenet100-train.h5"),
    {command.name.split()[1]: command for command in _COMMANDS},
)
