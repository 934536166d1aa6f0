"""Format `h5`: encoded images in one HDF5 file.

The layout is solo-learn's: a group for each class folder, in it an HDF5 dataset for each image with the bytes of its
file. Files that `write_h5` made also list their images, in order, in the root's attribute `solo_ext_index`, which is
read at once; whoever changes such a file has to remove it.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from solo_ext.data.decode import ARRAY
from solo_ext.data.images import FileImages, ImageSet, by_class_folder, class_folder, read_folder, reading
from solo_ext.errors import DataError, SoloExtError, reason
from solo_ext.files import replacing

INDEX = "solo_ext_index"
MANY = 1 << 32  # bytes of a file whose images are too many to open each at the start of a run


class H5Images(FileImages):
    """Encoded images in the HDF5 file `root`, under the names `paths`. Each process opens the file for itself."""

    kind, formats, in_files = "an HDF5 file", ("dali", "h5", "tensor"), False

    def path(self, i: int) -> str:
        return f"{self.root}: {os.fsdecode(bytes(self.paths[i]))}"

    def read(self, i: int) -> bytes:
        # a third of the time of _shared(self.root)[name][()]
        dataset = h5py.h5d.open(_shared(self.root).id, bytes(self.paths[i]))
        data = np.empty(dataset.shape, dataset.dtype)
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, data)
        return data.tobytes()

    def sizes(self) -> np.ndarray | None:
        if os.path.getsize(self.root) > MANY:
            return None
        file = _shared(self.root).id
        return np.array([h5py.h5d.open(file, bytes(name)).get_storage_size() for name in self.paths], "<i8")


def read_h5(path: str | os.PathLike, key: str, labels: bool = True, only: Sequence[str] = ()) -> ImageSet:
    """The images of an HDF5 file that `write_h5` or solo-learn's converter made; `key` is the configuration's.

    The groups are the classes; without groups, or with `labels` false, the images are unlabelled. Classes that are not
    in `only` are left out if there are more. `DataError` for a file that is not HDF5, is cut short or lacks classes.
    """
    path = Path(path)
    with reading(key), open(path, "rb") as start:
        signature = start.read(4)
    try:
        with _open(path) as file:
            names = _names(file, key)
    except SoloExtError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        size, problem = path.stat().st_size, f"is a damaged HDF5 file ({reason(error)})"
        if signature != b"\x89HDF":
            problem = "is not an HDF5 file" if size else "is empty"
        elif sizes := re.search(r"truncated file: eof = \d+.* stored_eof = (\d+)", str(error)):
            problem = f"is cut short: it has {size} of {sizes[1]} bytes"
        raise DataError(f"{key}: '{path}' {problem}") from None
    classes = {class_folder(name) for name in names} - {b""}
    if len(classes) > len(only) > 0:
        selection = {*map(os.fsencode, only)}
        if missing := sorted(selection - classes):
            lost = f"{len(missing)} of the {len(only)} that the dataset takes are not among them"
            first = os.fsdecode(missing[0])
            raise DataError(f"{key}: '{path}' has {len(classes)} classes, but {lost} (first: {first})")
        names = [name for name in names if class_folder(name) in selection]
    if not names:
        raise DataError(f"{key}: no image in '{path}'")
    return by_class_folder(H5Images(path, np.array(names)), key, labels)


def write_h5(
    source: str | os.PathLike, destination: str | os.PathLike, progress: Callable[[Sequence[int]], Iterable[int]] = iter
) -> ImageSet:
    """Copies the image files of the folder `source` into the new HDF5 file `destination`, whole or not at all.
    `progress` wraps the iteration over the images. `DataError` if `destination` exists or cannot be written, or a file
    is not an image."""
    destination = Path(destination)
    if destination.exists():
        raise DataError(f"'{destination}' exists; remove it, or give another name")
    images = read_folder(source, "SRC")
    files: Any = images.images
    with replacing(destination, DataError, partial(_Output, mode="w+")) as file:
        assert isinstance(file, _Output)
        with h5py.File(file, "w") as h5:
            index = np.empty((), object)
            index[()] = np.frombuffer(b"\0".join(files.paths.tolist()), np.uint8)
            # variable-length, since other attributes end at 64 KiB
            h5.attrs.create(INDEX, index, dtype=h5py.vlen_dtype(np.uint8))
            for i in progress(range(len(images))):
                with files.named(i):
                    data = files.read(i)
                    if not data.startswith(ARRAY):
                        Image.open(BytesIO(data)).close()
                h5.create_dataset(bytes(files.paths[i]), data=np.frombuffer(data, np.uint8))
                if file.error:
                    break
        if file.error:
            raise file.error
    return images


def _open(path: Path) -> h5py.File:
    # locks are of no use on files that nobody writes, and fail on some network disks
    return h5py.File(path, "r", locking=False)


_shared = cache(_open)  # by all readers of this process
os.register_at_fork(after_in_child=_shared.cache_clear)  # a handle must not be shared with the parent


def _names(file: h5py.File, key: str) -> list[bytes]:
    """The images in order: class by class, each in sorted order."""
    if INDEX in file.attrs:
        return file.attrs[INDEX].tobytes().split(b"\0")
    names: list[str] = []
    for name in sorted(file):
        is_group = file.get(name, getclass=True) is h5py.Group
        inside = [f"{name}/{image}" for image in sorted(file[name])] if is_group else [name]
        if not inside:
            raise DataError(f"{key}: no image in '{file.filename}: {name}'")
        names += inside
    for name in (*names[:1], *names[-1:]):  # all would take minutes
        item = file[name]
        whole = isinstance(item, h5py.Dataset) and item.ndim < 2 and (item.dtype == np.uint8 or item.dtype.kind == "V")
        if not whole:
            kind = f"an array of {item.dtype} {item.shape}" if isinstance(item, h5py.Dataset) else "a group in a class"
            right = "solo-ext data to-h5 makes a file with one group for each class and one dataset for each image"
            raise DataError(f"{key}: '{file.filename}: {name}' is {kind}, not the bytes of an image file; {right}")
    return [os.fsencode(name) for name in names]


class _Output(FileIO):
    """A new file that hides its first error from HDF5, which would crash the process on closing the file."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        try:
            while rest and not self.error:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            super().truncate(size)
        except OSError as error:
            self.error = self.error or error
        return size or 0
