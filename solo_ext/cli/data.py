"""Convert, select and identify sets of images, and certify how they are read.

solo-ext data imagenet100 /data/imagenet /data/imagenet100
solo-ext data to-h5 /data/imagenet100/train imagenet100-train.h5
"""

import sys
from argparse import Namespace
from functools import partial
from importlib import import_module
from pathlib import Path

from solo_ext.cli.command import SOLO_EXT, option
from solo_ext.errors import ConfigError, naming, require

DATA = SOLO_EXT.group("data", __doc__)


@DATA.command(
    option("source SRC", "folder of images, with class sub-folders or without"),
    option("destination DST.h5", "the file to make; one that exists is refused"),
)
def to_h5(args: Namespace) -> None:
    """Copy a folder of images into one HDF5 file.

    The image files are copied unchanged. data.train_path and data.val_path take the HDF5 file in the folder's place:
    one large file where a million small ones are slow. solo-learn reads it, too. Nothing is left behind if it fails,
    as it does at a file that is not an image. It needs h5py: pip install 'solo-ext[h5]'.

      solo-ext data to-h5 /data/imagenet/train /data/imagenet-train.h5
      solo-ext data to-h5 images images.h5
    """
    from rich.console import Console
    from rich.progress import track

    from solo_ext.data.datasets import H5_SUFFIXES

    if not args.destination.lower().endswith(H5_SUFFIXES):
        raise ConfigError(f"DST: '{args.destination}' must end in {' or '.join(H5_SUFFIXES)}")
    require("h5py", "to-h5: HDF5", "h5")
    from solo_ext.data.h5 import write_h5

    console = Console(stderr=True)
    progress = partial(track, description="copying", console=console, disable=not sys.stderr.isatty(), transient=True)
    images = write_h5(args.source, args.destination, progress)
    print(f"{args.destination}: {len(images):,} images, {len(images.classes):,} classes")


@DATA.command(
    option("source SRC", "ImageNet's folder: train/ and val/, both with class sub-folders"),
    option("destination DST", "the folder to make; one that differs is refused"),
)
def imagenet100(args: Namespace) -> None:
    """Make ImageNet-100 out of ImageNet, with links.

    Makes DST/train and DST/val with links to the class folders of ImageNet that make up ImageNet-100, for
    data.train_path and data.val_path. Nothing is copied, and SRC has to stay where it is. Repeating the command
    changes nothing.

      solo-ext data imagenet100 /data/imagenet /data/imagenet100
      solo-ext data imagenet100 ILSVRC/Data/CLS-LOC datasets/imagenet100
    """
    from solo_ext.data.imagenet100 import SIZES, build_imagenet100

    sets = build_imagenet100(args.source, args.destination)
    counts = [f"{len(images):,} {split} images" for split, images in sets.items()]
    print(f"{args.destination}: links to {len(sets['train'].classes)} classes; {', '.join(counts)}")
    for split, images in sets.items():
        if len(images) != SIZES[split]:
            print(f"solo-ext: ImageNet-100 has {SIZES[split]:,} {split} images, not {len(images):,}", file=sys.stderr)


@DATA.command(option("path PATH", "folder, list of files (.txt, .csv) or HDF5 file (.h5)"))
def fingerprint(args: Namespace) -> None:
    """Identify a set of images by its file names and labels.

    Prints the number of images and classes that a run would read at PATH, and the SHA-256 of its file names and
    labels, which is also in the environment.json of each run (for sets in memory, the SHA-256 of the pixels). A
    folder, links to it and an HDF5 file made from it have the same fingerprint; the contents of the files do not
    count.

      solo-ext data fingerprint /data/imagenet100/train
      solo-ext data fingerprint /data/imagenet-train.h5
    """
    from solo_ext.data.datasets import read_images

    for name, value in read_images(args.path, "PATH").record().items():
        print(f"{name:<11}  {value}")


@DATA.command(own=0)
def certify(args: Namespace) -> None:
    """Show that all data formats give solo-learn's views.

    The certificate is in the benchmarks of a checkout, where --help says what it compares and takes.

      solo-ext data certify
      solo-ext data certify scripts/pretrain/imagenet-100/byol.yaml --images /data/imagenet100/val --json parity.json
    """
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    if not (benchmarks / "certificate").is_dir():
        raise ConfigError("data certify needs a checkout of solo-ext: the certificate is no part of the package")
    sys.path.insert(0, str(benchmarks))
    with naming("data certify needs pip install -e '.[dev]'", ImportError):
        certificate = import_module("certificate")
    certificate.COMMAND(args.others)
