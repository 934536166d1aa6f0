"""Images with their labels, in memory or as files of a folder or list."""

import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from solo_ext.data.decode import AS_STORED, DecodeConfig, channels_first, decode, size_of
from solo_ext.errors import DataError, reason
from solo_ext.files import log

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ARRAYS = (".npy",)  # images where there are no others
# folders that file servers and systems put among the images: thumbnails, snapshots, what was deleted
FOREIGN = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp"),
    *("__macosx", "$recycle.bin", "system volume information", "lost+found"),
}
SMALL = 96  # pixels of a side, up to which a set is kept on the device
FEW, SOME = 1 << 26, 64  # bytes that are read at the start of a run; files of a larger set
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "unlabeled", "unlabelled"}


class ArrayImages:
    """Images of one size in memory: `pixels` is uint8 [N, H, W] (gray) or [N, H, W, C]."""

    # in words, and what can read them: auto takes the first, dali only for a GPU
    kind, formats = "images in memory", ("tensor", "image_folder")

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        """uint8 [C, H, W]."""
        return channels_first(torch.from_numpy(self.pixels[i][None]))[0]

    def to(self, device: torch.device) -> Tensor:
        """All of them on `device`: uint8 [N, C, H, W]."""
        return channels_first(torch.from_numpy(self.pixels).to(device)).contiguous()

    @property
    def channels(self) -> int:
        return self.pixels.shape[3] if self.pixels.ndim == 4 else 1

    def subset(self, rows: np.ndarray) -> "ArrayImages":
        return ArrayImages(self.pixels[rows])


class FileImages:
    """Image files under `root`, each read when it is needed, of 3 channels as RGB, or `DataError` with its path. Paths,
    with `/`, are one byte array: the reference counts of a million `str` would be copied into every worker."""

    kind: str = "image files"
    formats: tuple[str, ...] = ("dali", "image_folder", "tensor")
    in_files = True  # whether `path` can be opened

    def __init__(self, root: Path, paths: np.ndarray, how: DecodeConfig = AS_STORED, channels: int = 3):
        self.root, self.paths, self.how, self.channels = root, paths, how, channels

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[i])))

    @property
    def names(self) -> list[str]:
        """All paths below `root`."""
        return [os.fsdecode(path) for path in self.paths.tolist()]

    def read(self, i: int) -> bytes:
        at_once = getattr(os, "O_NONBLOCK", 0)  # a named pipe would wait for who writes into it
        with open(self.path(i), "rb", opener=lambda path, flags: os.open(path, flags | at_once)) as file:
            return file.read()

    def sizes(self) -> np.ndarray | None:
        """Bytes of each file, -1 where it cannot be found; None where that would take minutes."""

        def size(i: int) -> int:
            try:
                return os.stat(self.path(i)).st_size
            except OSError:
                return -1

        with ThreadPoolExecutor(16) as threads:  # for network disks
            return np.fromiter(threads.map(size, range(len(self)), chunksize=256), "<i8", len(self))

    def __getitem__(self, i: int) -> Tensor:
        """uint8 [channels, H, W]."""
        with self.named(i):
            return decode(self.read(i), self.how, self.channels)

    @cached_property
    def small_size(self) -> tuple[int, int] | None:
        """Height and width of all images that can be read, if they are the same and at most `SMALL`, else None."""
        found: set[tuple[int, int]] = set()
        for rows in (np.linspace(0, len(self) - 1, SOME).astype(int), range(len(self))):  # a few rule most sets out
            for i in rows:
                with suppress(OSError, ValueError):  # a file that cannot be read is for who needs it
                    found.add(size_of(self.read(i), self.how, self.channels))
                if len(found) > 1 or (found and max(map(max, found)) > SMALL):
                    return None
        return min(found, default=None)

    @contextmanager
    def named(self, i: int) -> Iterator[None]:
        """Turns whatever reading image `i` raises into a `DataError` that names it."""
        try:
            yield
        except Exception as error:  # on damaged files Pillow raises more types than it documents
            why = "of no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else reason(error)
            raise DataError(f"{self.path(i)}: not a readable image ({why})") from None

    def subset(self, rows: np.ndarray) -> "FileImages":
        return type(self)(self.root, self.paths[rows], self.how, self.channels)


@dataclass(frozen=True)
class ImageSet:
    """`images[i]` is uint8 [C, H, W], C 3 (RGB), 1 (gray) or any other; `targets[i]` its class or -1."""

    images: ArrayImages | FileImages
    targets: np.ndarray  # int64 [N]
    classes: tuple[str, ...] = ()  # names of class folders, or labels of a list

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, rows: np.ndarray) -> "ImageSet":
        return replace(self, images=self.images.subset(rows), targets=self.targets[rows])

    def evenly(self, count: int) -> "ImageSet":
        """`count` of them, from the first to the last."""
        return self.subset(np.linspace(0, len(self) - 1, count).astype(int))

    def padded(self, count: int) -> "ImageSet":
        """With `count` unlabelled copies of the first image at the end."""
        images = self.subset(np.append(np.arange(len(self)), np.zeros(count, np.int64)))
        return replace(images, targets=np.append(self.targets, np.full(count, -1)))

    def labelled(self) -> "ImageSet":
        return self if (self.targets >= 0).all() else self.subset(np.flatnonzero(self.targets >= 0))

    def unlabelled(self) -> "ImageSet":
        return replace(self, targets=np.full(len(self), -1), classes=())

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the pixels, or of the relative file names in order, and the labels: as HDF5, the same."""
        digest = hashlib.sha256()
        if isinstance(self.images, ArrayImages):
            digest.update(f"{self.images.pixels.shape}".encode())
            digest.update(np.ascontiguousarray(self.images.pixels).data)
        else:
            digest.update(b"\n".join(self.images.paths.tolist()))
        digest.update(self.targets.astype("<i8").tobytes())
        return digest.hexdigest()

    def content(self) -> dict[str, str | None]:
        """SHA-256, in hex, of the files' sizes, and of the bytes of all files, or of `SOME` if there are many."""
        if isinstance(self.images, ArrayImages):  # known by the fingerprint
            return {}
        sizes, digest = self.images.sizes(), hashlib.sha256()
        few = sizes is not None and sizes.sum() <= FEW
        for i in range(len(self)) if few else np.linspace(0, len(self) - 1, SOME).astype(int).tolist():
            with suppress(OSError, DataError):  # whether that ends the run is for data.corrupt to say
                digest.update(self.images.read(i) or b"")
        of_sizes = None if sizes is None else hashlib.sha256(sizes.tobytes()).hexdigest()
        return {"sizes": of_sizes, "bytes": digest.hexdigest()}

    def record(self) -> dict[str, Any]:
        classes = len(np.unique(self.targets[self.targets >= 0]))  # those that occur
        return {"images": len(self), "classes": classes, "fingerprint": self.fingerprint()}


def stratified_rows(labels: np.ndarray, size: int) -> np.ndarray:
    """`size` rows with the classes' shares: scikit-learn's `train_test_split(stratify=labels, random_state=42)`."""
    rng = np.random.RandomState(42)
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    drawn = _shares(counts, size, rng)
    _shares(counts - drawn, len(labels) - size, rng)  # consumes the random numbers of the other part
    classes = np.split(np.argsort(numbers, kind="stable"), np.cumsum(counts)[:-1])
    rows = [rows[rng.permutation(len(rows))[:number]] for rows, number in zip(classes, drawn, strict=True)]
    return rng.permutation(np.concatenate(rows))


def _shares(counts: np.ndarray, total: int, rng: np.random.RandomState) -> np.ndarray:
    """`total` in the proportions `counts`; what rounding loses goes to the largest remainders, ties by lot."""
    drawn, remainders = np.divmod(counts / counts.sum() * total, 1)
    for remainder in np.unique(remainders)[::-1]:
        ties = np.flatnonzero(remainders == remainder)
        if (missing := int(total - drawn.sum())) > 0:
            drawn[rng.choice(ties, min(len(ties), missing), replace=False)] += 1
    return drawn.astype(int)


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Turns an `OSError` into a `DataError` that names the file and the configuration's `key`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{key}: there is no file '{error.filename}'") from None
    except OSError as error:
        raise DataError(f"{key}: cannot read '{error.filename}' ({error.strerror})") from None


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """Sorted names of the visible sub-folders of `root`. Raises `OSError` if it cannot be listed."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not _foreign(e.name))


def _foreign(name: str) -> bool:
    """Whether a folder of this name is no part of a set."""
    return name.startswith(".") or name.lower() in FOREIGN


def read_folder(root: str | os.PathLike, key: str, labels: bool = True) -> ImageSet:
    """The images in the folder `root`; `key` is the configuration's that names it.

    Each sub-folder is a class, in sorted order, searched at any depth (as torchvision's ImageFolder does). Without
    sub-folders, or with `labels` false, all images are unlabelled. What is hidden, a file server's or of another ending
    is passed over, which is logged. Raises `DataError` for a folder that cannot be used or would be read twice, and for
    images beside the class folders, which have no label.
    """
    root = Path(root)
    if not root.is_dir():
        problem = "not a folder, list (.txt, .csv) or HDF5 file (.h5)" if root.exists() else "there is no folder"
        raise DataError(f"{key}: {problem} '{root}'")
    with reading(key):
        classes = class_folders(root) if labels else []
        names = _image_files(root, key) or _image_files(root, key, ARRAYS)
    if classes:
        names.sort(key=class_folder)
    missing = {*classes} - {os.fsdecode(class_folder(name)) for name in names}
    if missing or not names:
        empty = root / min(missing, default="")
        files = sorted(name for _, _, names in os.walk(empty, followlinks=True) for name in names)
        others = f"{len(files)} files such as '{files[0]}'" if files else "nothing"
        raise DataError(f"{key}: no image in '{empty}' (looked for {' '.join(EXTENSIONS + ARRAYS)}; found {others})")
    return by_class_folder(FileImages(root, np.array(names)), key, labels)


def class_folder(name: bytes) -> bytes:
    """The first folder in the path of an image; empty where there is none."""
    folder, slash, _ = name.partition(b"/")
    return folder if slash else b""


def by_class_folder(images: FileImages, key: str, labels: bool) -> ImageSet:
    """The images with their `class_folder` as class; unlabelled if none has one, or `labels` is false."""
    folders = [class_folder(name) for name in images.paths.tolist()]
    names = {*folders} - {b""}
    if names and {os.fsdecode(name).lower() for name in names} <= SPLITS:
        parts = " and ".join(sorted(map(os.fsdecode, names)))
        raise DataError(f"{key}: '{images.root}' holds {parts}, splits and not classes; name one of them")
    classes = sorted(names) if labels else []
    if not classes:
        return ImageSet(images, np.full(len(images), -1))
    if b"" in folders:
        problem = "lies beside the class folders and has no label (data.no_labels=true reads all images without labels)"
        raise DataError(f"{key}: '{images.path(folders.index(b''))}' {problem}")
    numbers = {name: i for i, name in enumerate(classes)}
    return ImageSet(images, np.array([numbers[name] for name in folders]), tuple(map(os.fsdecode, classes)))


def _image_files(root: Path, key: str, endings: tuple[str, ...] = EXTENSIONS) -> list[bytes]:
    """Paths below `root`, with `/`, of the visible files with these endings: folder by folder, sorted."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would skip a folder that cannot be listed

    start, tree = len(os.path.join(root, "")), []
    seen: dict[tuple[int, int], str] = {}  # as links lead in circles, or twice to one place
    passed: Counter[str] = Counter()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        place = os.stat(folder)
        if (first := seen.setdefault((place.st_dev, place.st_ino), folder)) != folder:
            raise DataError(f"{key}: '{folder}' is the same folder as '{first}': remove one of the links")
        passed.update(f"{name}/" for name in folders if name.lower() in FOREIGN)
        folders[:] = [name for name in folders if not _foreign(name)]
        images = [name for name in names if name.lower().endswith(endings) and not name.startswith(".")]
        passed.update(Path(name).suffix.lower() or name for name in {*names} - {*images})
        tree.append((folder[start:].replace(os.sep, "/"), sorted(images)))
    if passed and any(images for _, images in tree):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in passed.most_common(5))
        more = f" and {len(passed) - 5} more kinds" if len(passed) > 5 else ""
        log.warning("%s: passed over in '%s', since no image or hidden: %s%s", key, root, kinds, more)
    return [os.fsencode(posixpath.join(folder, name)) for folder, names in sorted(tree) for name in names]
