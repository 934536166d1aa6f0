"""From images to batches `(indexes, [view_1, ..., view_n], targets)`, reproducibly.

A view is a pure function of (seed, epoch, index, place of the view): the sampler hands out (epoch, index) pairs,
and `views.uniforms` the numbers of a pair. So neither the number of workers nor the place where a run was resumed
changes an image, and torch's global generator is left alone.
"""

import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from struct import pack
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler

from solo_ext.data.images import ImageSet
from solo_ext.data.transforms import Transform
from solo_ext.data.views import uniforms
from solo_ext.errors import DataError

log = logging.getLogger("solo_ext")

Batch = tuple[Tensor, list[Tensor], Tensor]
Key = tuple[int, int] | int  # (epoch, index), or an index of epoch 0
T_co = TypeVar("T_co", covariant=True)


class Images(Protocol[T_co]):
    """What `read` reads: image i by `images[i]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> T_co: ...


def derive_seed(*numbers: int) -> int:
    """32 bits out of integers. With all but one number fixed, no two values below 2^32 give the same seed."""
    return zlib.crc32(pack(f"<{len(numbers)}q", *numbers))


def split_keys(keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and indexes of a batch, int64 [B]."""
    pairs = np.array([key if isinstance(key, tuple) else (0, key) for key in keys], dtype=np.int64)
    return pairs[:, 0], pairs[:, 1]


class Skipped:
    """The images that could not be read, by `data.corrupt` and `data.corrupt_limit`."""

    def __init__(self, size: int, policy: str = "error", limit: float = 0.01):
        self.policy, self.size, self.limit = policy, size, limit
        self.seen: set[int] = set()

    def add(self, unreadable: Iterable[tuple[int, str]]) -> None:
        """Counts and reports (index, message) of images that are new.

        Raises:
            DataError: the first of them, if the policy is `error`; or that there are more than the limit allows.
        """
        for index, message in unreadable:
            if self.policy == "error":
                raise DataError(message)
            if index in self.seen:
                continue
            self.seen.add(index)
            if len(self.seen) > max(1, int(self.limit * self.size)):
                raise DataError(
                    f"data.corrupt_limit: {len(self.seen)} of {self.size} images cannot be read, more than "
                    f"{self.limit:g} of them; the last: {message}"
                )
            # as an error, which every process of a run reports
            log.error("skipped image %d: %s", len(self.seen), message)


class ViewDataset(Dataset):
    """One view per transform of each image; an unreadable image's place is taken by the next readable one."""

    def __init__(self, images: ImageSet, transforms: Sequence[Transform], seed: int):
        self.images, self.transforms, self.seed = images, list(transforms), seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Batch, list[tuple[int, str]]]:
        """A whole batch at once, and (index, message) of each image that could not be read.

        The batch is (int64 [B], [float32 [B, 3, H, W] per view], int64 [B]).
        """
        epochs, indexes = split_keys(keys)
        unreadable: list[tuple[int, str]] = []
        numbers = uniforms(self.seed, epochs, indexes, len(self.transforms))
        crops: list[list[Tensor]] = [[] for _ in self.transforms]
        for row, index in enumerate(indexes.tolist()):
            indexes[row], image = read(self.images.images, index, unreadable)
            for transform, view, u in zip(self.transforms, crops, numbers[row], strict=True):
                view.append(transform.crop(image, u))
        rows = zip(self.transforms, crops, numbers.swapaxes(0, 1), strict=True)
        views = [transform.finish(torch.stack(view), u) for transform, view, u in rows]
        return (torch.from_numpy(indexes), views, torch.from_numpy(self.images.targets[indexes])), unreadable


def read(images: Images[T_co], index: int, unreadable: list[tuple[int, str]]) -> tuple[int, T_co]:
    """The image `index`, or the first readable one after it; (index, message) of the others go to `unreadable`."""
    for i in range(index, index + len(images)):
        try:
            return i % len(images), images[i % len(images)]
        except DataError as error:
            unreadable.append((i % len(images), str(error)))
    raise DataError(f"none of {len(images)} images can be read; the last: {unreadable[-1][1]}")


class EpochSampler(DistributedSampler):
    """(epoch, index) pairs: this rank's share of a shuffled epoch, cut to the same length for all ranks."""

    def __init__(self, size: int, seed: int, world_size: int = 1, rank: int = 0):
        # torch adds the epoch to the seed: derived, neighbouring seeds share no epoch
        everything = range(size)  # whose length is all that torch reads
        super().__init__(everything, world_size, rank, seed=derive_seed(seed), drop_last=True)  # type: ignore[arg-type]
        self.skip = 0  # samples of the next pass that were seen before a resume

    def __iter__(self) -> Iterator[tuple[int, int]]:
        indexes, self.skip = list(super().__iter__())[self.skip :], 0
        return ((self.epoch, index) for index in indexes)


class Resumable:
    """A loader that resumes in the middle of an epoch (Lightning saves and restores its state).

    A subclass has `sampler` and `batch_size`, and gives one pass of batches from `_batches()`.
    """

    sampler: Any
    batch_size: Any
    _progress = (0, 0)  # epoch, batches of it that were handed out, also before a resume
    _resume: tuple[int, int] | None = None  # the progress of the resumed run

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that nothing is read before the first `next`: on a resume Lightning makes the iterator
        # before it sets the sampler's epoch, and workers would start on the wrong one.
        epoch = getattr(self.sampler, "epoch", 0)  # Trainer(overfit_batches=...) puts in its own sampler
        start = self._resume[1] if self._resume and self._resume[0] == epoch else 0
        self._resume = None
        self.sampler.skip = start * self.batch_size
        for count, batch in enumerate(self._batches(), start + 1):
            self._progress = epoch, count
            yield batch

    def _batches(self) -> Iterator[Batch]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        return dict(zip(("epoch", "batches"), self._progress, strict=True))

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = state["epoch"], state["batches"]


class BatchLoader(Resumable):
    """A loader that renders whole batches itself, without a DataLoader.

    Args:
        images: what is read.
        transforms: one per view.
        seed: of the run.
        sampler: gives (epoch, index) pairs, or indexes.
        batch_size: on this device.
        drop_last: leave out the last batch if it is not full.
    """

    def __init__(
        self,
        images: ImageSet,
        transforms: Sequence[Transform],
        seed: int,
        sampler: Sampler,
        batch_size: int,
        drop_last: bool,
    ):
        self.images, self.transforms, self.seed = images, list(transforms), seed
        self.sampler, self.batch_size = sampler, batch_size
        self.batch_sampler = BatchSampler(sampler, batch_size, drop_last)

    def __len__(self) -> int:
        return len(self.batch_sampler)


class EpochLoader(Resumable, DataLoader):  # type: ignore[misc]  # an iterator of batches, as both have it
    """A `ViewDataset` read by workers. `skipped`: what to do about images that cannot be read."""

    def __init__(self, dataset: ViewDataset, *, skipped: Skipped | None = None, **options: Any):
        super().__init__(dataset, collate_fn=identity, **options)
        self.skipped = skipped or Skipped(len(dataset))

    def _batches(self) -> Iterator[Batch]:
        for batch, unreadable in DataLoader.__iter__(self):
            self.skipped.add(unreadable)
            yield batch


def identity(batch: Any) -> Any:
    """Collate function of complete batches."""
    return batch
