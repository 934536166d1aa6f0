"""Images with their labels, in memory or as files of a folder."""

import gzip
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from solo_ext.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ArrayImages:
    """Equally sized images in memory: `pixels` is uint8 of shape [N, H, W] (gray) or [N, H, W, 3]."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i])

    def subset(self, rows: np.ndarray) -> "ArrayImages":
        return ArrayImages(self.pixels[rows])


class FileImages:
    """Image files under `root`, read as RGB when asked for.

    Paths are kept in one byte array: the reference counts of a million `str` would be copied into every
    worker. Raises `DataError` with the path of a file that Pillow cannot read.
    """

    def __init__(self, root: Path, paths: np.ndarray):
        self.root, self.paths = root, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Image.Image:
        path = os.path.join(self.root, os.fsdecode(bytes(self.paths[i])))
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # on damaged files Pillow raises more types than it documents
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{path}: not a readable image ({reason})") from None

    def subset(self, rows: np.ndarray) -> "FileImages":
        return FileImages(self.root, self.paths[rows])


@dataclass(frozen=True)
class ImageSet:
    """`images[i]` is a PIL image (RGB or gray), `targets[i]` its class or -1."""

    images: ArrayImages | FileImages
    targets: np.ndarray  # int64 [N]
    classes: tuple[str, ...] = ()  # names of class folders

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, rows: np.ndarray) -> "ImageSet":
        return replace(self, images=self.images.subset(rows), targets=self.targets[rows])

    def labelled(self) -> "ImageSet":
        return self if (self.targets >= 0).all() else self.subset(np.flatnonzero(self.targets >= 0))

    def unlabelled(self) -> "ImageSet":
        return replace(self, targets=np.full(len(self), -1), classes=())


def class_folders(root: str | os.PathLike) -> list[str]:
    """Sorted names of the visible sub-folders of `root`. Raises `OSError` if it cannot be listed."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def read_folder(root: str | os.PathLike, key: str, labels: bool = True) -> ImageSet:
    """The image folder `root`, given by the configuration's `key`.

    With class sub-folders each one is a class, in sorted order, searched at any depth (as torchvision's
    ImageFolder does). Without sub-folders, or with `labels` false, every image below `root` is unlabelled.
    Hidden files and folders are passed over. Raises `DataError` for a folder that cannot be used.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{key}: {'not a folder' if root.exists() else 'there is no folder'} '{root}'")
    try:
        classes = tuple(class_folders(root)) if labels else ()
        files = [_image_files(root / name) for name in classes] or [_image_files(root)]
    except OSError as error:
        raise DataError(f"{key}: cannot read '{error.filename}' ({error.strerror})") from None
    for name, found in zip(classes or (".",), files, strict=True):
        if not found:
            raise DataError(f"{key}: no image in '{root / name}' (looked for {' '.join(EXTENSIONS)})")
    start = len(os.path.join(root, ""))
    paths = np.array([os.fsencode(path[start:]) for found in files for path in found])
    targets = np.repeat(np.arange(len(files)), [len(found) for found in files])
    images = ImageSet(FileImages(root, paths), targets, classes)
    return images if classes else images.unlabelled()


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an idx file (MNIST's format), gzipped if its name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read()
        if raw[:3] != b"\0\0\x08":
            raise ValueError("no idx header of unsigned bytes")
        shape = np.frombuffer(raw, ">i4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: not a readable idx file ({error})") from None


def _image_files(root: Path) -> list[str]:
    def fail(error: OSError):
        raise error  # os.walk would pass over what it may not list

    tree = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        tree.append((folder, sorted(names)))
    return [
        os.path.join(folder, name)
        for folder, names in sorted(tree)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    ]
