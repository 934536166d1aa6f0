"""From images to batches `(indexes, [view_1, ..., view_n], targets)`, reproducibly.

A view is a pure function of (seed, epoch, index, number of the view); torch's global generator is left alone.
"""

import math
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from struct import pack
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from solo_ext.data.images import ArrayImages, FileImages, ImageSet
from solo_ext.data.render import CHUNK, GPU_CHUNK
from solo_ext.data.transforms import Transform
from solo_ext.data.views import uniforms
from solo_ext.errors import DataError, reason
from solo_ext.files import log

Batch = tuple[Tensor, list[Tensor], Tensor]
Key = tuple[int, int] | int  # (epoch, index), or an index of epoch 0
Unreadable = list[tuple[int, str]]  # index of an image, and what is wrong with it
T = TypeVar("T")

GRACE = 30
SHARE = 0.8  # of the free memory that a set on the device may take
LIMIT = 1 << 32  # bytes of one that is kept there without being asked for
_RESIDENT: WeakKeyDictionary = WeakKeyDictionary()  # images -> device -> what `_load` gives; a run's loaders share it


def derive_seed(*numbers: int) -> int:
    """32 bits out of integers. With all but one number fixed, no two values below 2^32 give the same seed."""
    return zlib.crc32(pack(f"<{len(numbers)}q", *numbers))


class Skipped:
    """Counts the images that cannot be read, as `data.corrupt` and `data.corrupt_limit` say."""

    def __init__(self, size: int, policy: str = "error", limit: float = 0.01):
        self.policy, self.size, self.limit = policy, size, limit
        self.seen: set[int] = set()

    def add(self, unreadable: Unreadable) -> None:
        """Logs those that are new; a `DataError` under the policy `error`, or if they are more than the limit."""
        for index, message in unreadable:
            if self.policy == "error":
                raise DataError(message)
            if index in self.seen:
                continue
            self.seen.add(index)
            count = len(self.seen)
            if count > max(1, int(self.limit * self.size)):
                many = f"{count} of {self.size} images cannot be read, more than {self.limit:g} of them"
                raise DataError(f"data.corrupt_limit: {many}; the last: {message}")
            log.error("skipped image %d: %s", count, message)  # an error, which every process of a run reports


def read(get: Callable[[int], T], index: int, count: int, unreadable: Unreadable) -> tuple[int, T]:
    """Image `index` of `count`, or the next readable one, with its index; `unreadable` receives the others."""
    for i in range(index, index + count):
        try:
            return i % count, get(i % count)
        except DataError as error:
            unreadable.append((i % count, str(error)))
    raise DataError(f"none of {count} images can be read; the last: {unreadable[-1][1]}")


class ViewDataset(Dataset):
    """One view per transform of each image; the next readable image replaces an unreadable one."""

    def __init__(self, images: ImageSet, transforms: Sequence[Transform], seed: int):
        self.images, self.transforms, self.seed = images, list(transforms), seed

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray]:
        """The indexes of a batch, int64 [B], and the random numbers of its views, float64 [views, B, DRAWS]."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        epochs, indexes = np.array(pairs, dtype=np.int64).T.copy()
        return indexes, uniforms(self.seed, epochs, indexes, len(self.transforms)).swapaxes(0, 1)

    def transforms_of(self, keys: Sequence[Key]) -> list[Transform]:
        """Those of a batch, which is of one epoch."""
        return [transform.at(keys[0][0] if isinstance(keys[0], tuple) else 0) for transform in self.transforms]

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Batch, Unreadable]:
        """A whole batch, (int64 [B], [float32 [B, 3, H, W] per view], int64 [B]), and what could not be read."""
        indexes, numbers = self.draw(keys)
        unreadable: Unreadable = []
        transforms = self.transforms_of(keys)
        crops: list[list[Tensor]] = [[] for _ in transforms]
        for row, index in enumerate(indexes.tolist()):
            indexes[row], image = read(self.images.images.__getitem__, index, len(self), unreadable)
            for transform, view, u in zip(transforms, crops, numbers[:, row], strict=True):
                view.append(transform.crop(image, u))
        rows = zip(transforms, crops, numbers, strict=True)
        views = [transform.finish(torch.stack(view), u) for transform, view, u in rows]
        batch = torch.from_numpy(indexes), views, torch.from_numpy(self.images.targets[indexes])
        if get_worker_info():
            share([batch[0], *views, batch[2]])
        return batch, unreadable


def share(tensors: Iterable[Tensor]) -> None:
    """Moves what a worker hands over to shared memory. The queue would, in a thread whose errors reach nobody."""
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        full = f"no shared memory (/dev/shm) is left for a batch ({reason(error)})"
        ways = "give it more, as with docker run --shm-size=8g, or use fewer workers (0: none) or smaller batches"
        raise DataError(f"data.num_workers: {full}; {ways}") from None


class EpochSampler(DistributedSampler):
    """(epoch, index) pairs: this rank's share of a shuffled epoch. Of each joint batch it takes the block of `batch`
    images that is its own, so that all ranks together, in their order, see the batches of one process."""

    def __init__(self, size: int, seed: int, world_size: int = 1, rank: int = 0, batch: int = 1):
        everything = range(size)  # torch reads only its length
        super().__init__(everything, world_size, rank, seed=derive_seed(seed))  # type: ignore[arg-type]
        self.size, self.batch, self.num_samples = size, batch, size // (world_size * batch) * batch
        self.skip = 0  # samples of the next pass that were seen before a resume

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # the seed is derived: with the epoch added, neighbouring seeds share no epoch
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        blocks = order[: self.num_samples * self.num_replicas].view(-1, self.num_replicas, self.batch)
        indexes, self.skip = blocks[:, self.rank].flatten()[self.skip :].tolist(), 0
        return ((self.epoch, index) for index in indexes)


def finish_first(_: int) -> None:
    """Keeps a worker for `GRACE` seconds after a SIGTERM, which clusters send to all: the run makes its step first."""

    def end_later(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(GRACE)

    signal.signal(signal.SIGTERM, end_later)


class ViewLoader(DataLoader):
    """Batches of a `ViewDataset` for `device`, made by worker processes; Lightning saves and restores its state. One
    that makes them elsewhere overrides `_batches`, one pass over `batch_sampler`, and may have `threads`."""

    dataset: ViewDataset
    sampler: Any
    batch_sampler: Any
    batch_size: int
    _progress = (0, 0)  # epoch, and how many of its batches were handed out, before a resume too
    _resume: tuple[int, int] | None = None  # the progress of the run that is resumed

    def __init__(self, dataset: ViewDataset, device: torch.device, skipped: Skipped, threads: int = 1, **options: Any):
        self.device, self.skipped, self.threads = device, skipped, threads
        # a DataLoader draws a seed for its workers; from this generator, it leaves the global one alone
        own = {"collate_fn": tuple, "generator": torch.Generator().manual_seed(dataset.seed)}
        super().__init__(dataset, **{**own, **options})

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # nothing is prefetched before the first `next`
        # A generator: on a resume Lightning calls iter() before it sets the sampler's epoch, and workers that start
        # at once would start on the wrong one.
        epoch = getattr(self.sampler, "epoch", 0)  # Trainer(overfit_batches=...) puts in its own sampler
        start = self._resume[1] if self._resume and self._resume[0] == epoch else 0
        self._resume = None
        self.sampler.skip = start * self.batch_size
        for count, batch in enumerate(self._batches(), start + 1):
            self._progress = epoch, count
            yield batch

    def _batches(self) -> Iterator[Batch]:
        new = self._iterator is None
        batches: Any = super().__iter__()
        if new and self.num_workers:
            # before their queues: a garbage collection would wait 5 s for each worker, the program's end for GRACE
            finalize(self, batches._shutdown_workers)
        for batch, unreadable in batches:
            self.skipped.add(unreadable)
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._progress[0], "batches": self._progress[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = state["epoch"], state["batches"]


class ResidentLoader(ViewLoader):
    """Format `tensor`: the whole set lies on `device`, loaded once, where the calling process makes the batches.
    Raises `DataError` if they differ in size or do not fit into the free memory, or if one cannot be read."""

    def __init__(self, dataset: ViewDataset, device: torch.device, **options: Any):
        super().__init__(dataset, device, **options)
        residents = _RESIDENT.setdefault(dataset.images.images, {})
        if device not in residents:
            residents[device] = _load(dataset.images, device, self.skipped)
        self.pixels, self.source = residents[device]
        self.targets = torch.from_numpy(dataset.images.targets).to(device)
        # how many small batches are rendered at once
        elements = max(t.size**2 for t in dataset.transforms) * self.pixels.shape[1]
        self.together = max(1, (CHUNK if device.type == "cpu" else GPU_CHUNK) // (self.batch_size * elements))

    @torch.no_grad()
    def _batches(self) -> Iterator[Batch]:
        batches = iter(self.batch_sampler)
        while keys := list(islice(batches, self.together)):
            indexes, numbers = self.dataset.draw(list(chain(*keys)))
            rows = torch.from_numpy(self.source[indexes]).to(self.device, non_blocking=True)
            images = self.pixels.index_select(0, rows)  # on CPUs, pixels[rows] takes 40 times as long
            transforms = self.dataset.transforms_of(keys[0])
            views = [t.batch(images, u) for t, u in zip(transforms, numbers, strict=True)]
            parts = (tensor.split(self.batch_size) for tensor in (rows, self.targets[rows], *views))
            for indexes, targets, *views in zip(*parts, strict=True):
                yield indexes, views, targets


def _load(images: ImageSet, device: torch.device, skipped: Skipped) -> tuple[Tensor, np.ndarray]:
    """The images on `device`, uint8 [N, C, H, W], and for each index that of the image used for it."""
    source, pixels = np.arange(len(images)), torch.empty(0)
    if isinstance(images.images, ArrayImages):
        _check_memory(images.images.pixels.nbytes, device)
        return images.images.to(device), source
    for index in range(len(images)):
        unreadable: Unreadable = []
        source[index], image = read(images.images.__getitem__, index, len(images), unreadable)
        skipped.add(unreadable)
        if index == 0:
            _check_memory(len(images) * image.numel(), device)
            pixels = torch.empty((len(images), *image.shape), dtype=torch.uint8)
        if image.shape != pixels.shape[1:]:
            first, other = (f"{shape[-1]} x {shape[-2]} px" for shape in (pixels.shape, image.shape))
            sizes = f"there are {first} (image 0) and {other} (image {index})"
            raise DataError(f"data.format: 'tensor' needs images of one size, but {sizes}; use image_folder")
        pixels[index] = image
    return pixels.to(device), source


def kept_by_itself(images: ArrayImages | FileImages, device: torch.device) -> int:
    """Bytes of a set of small files of one size, if they may be kept on `device` without being asked for, else 0."""
    if isinstance(images, ArrayImages) or "tensor" not in images.formats or not (size := images.small_size):
        return 0
    needed = len(images) * images.channels * size[0] * size[1]
    return needed if needed <= min(LIMIT, SHARE * free_memory(device)) else 0


def _check_memory(needed: int, device: torch.device) -> None:
    if needed > SHARE * (free := free_memory(device)):
        part = f"{needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free on {device.type}"
        raise DataError(f"data.format: 'tensor' would take {part}; use image_folder")


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; on a CPU, that machine and control group leave; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    with suppress(OSError, IndexError):
        free = 1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0])
    with suppress(OSError, ValueError, IndexError):  # no control group, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = (group / "memory.stat").read_text().partition("\ninactive_file ")[2].split()[0]
        free = min(free, limit - used + int(cache))  # which is given up if need be
    return free
