"""From images to batches `(indexes, [view_1, ..., view_n], targets)`, reproducibly.

A view is a pure function of (seed, epoch, index, place of the view): the sampler hands out (epoch, index)
pairs, and the views of a pair are drawn under its own seed. So neither the number of workers nor the place
where a run was resumed changes an image, and torch's global generator is left alone.
"""

import zlib
from collections.abc import Iterator, Sequence
from struct import pack

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from solo_ext.data.augmentations import DRAWS, Transform
from solo_ext.data.images import ImageSet

Batch = tuple[Tensor, list[Tensor], Tensor]


def derive_seed(*numbers: int) -> int:
    """32 bits out of integers. With all but one number fixed, no two values below 2^32 give the same seed."""
    return zlib.crc32(pack(f"<{len(numbers)}q", *numbers))


class ViewDataset(Dataset):
    """One view per transform of each image. A key is an (epoch, index) pair, or an index (then epoch 0)."""

    def __init__(self, images: ImageSet, transforms: Sequence[Transform], seed: int):
        self.images, self.transforms, self.seed = images, list(transforms), seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> Batch:
        """A whole batch at once: (int64 [B], [float32 [B, 3, H, W] per view], int64 [B])."""
        keys = [key if isinstance(key, tuple) else (0, key) for key in keys]
        generator = torch.Generator()
        rows = [self._render(epoch, index, generator) for epoch, index in keys]
        columns = zip(*rows, strict=True)
        indexes = torch.tensor([index for _, index in keys])
        views = [t.normalise(column) for t, column in zip(self.transforms, columns, strict=True)]
        return indexes, views, torch.from_numpy(self.images.targets[indexes.numpy()])

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[int, list[Tensor], int]:
        indexes, views, targets = self.__getitems__([key])
        return indexes.item(), [view[0] for view in views], targets.item()

    def _render(self, epoch: int, index: int, generator: torch.Generator) -> list:
        generator.manual_seed(derive_seed(self.seed, epoch, index))
        uniforms = torch.rand(len(self.transforms), DRAWS, generator=generator, dtype=torch.float64)
        image = self.images.images[index]
        return [t.render(image, u) for t, u in zip(self.transforms, uniforms.tolist(), strict=True)]


class EpochSampler(DistributedSampler):
    """(epoch, index) pairs: this rank's share of a shuffled epoch, cut to the same length for all ranks."""

    def __init__(self, size: int, seed: int, world_size: int = 1, rank: int = 0):
        # torch adds the epoch to the seed: derived, neighbouring seeds share no epoch
        super().__init__(range(size), world_size, rank, seed=derive_seed(seed), drop_last=True)
        self.skip = 0  # samples of the next pass that were seen before a resume

    def __iter__(self) -> Iterator[tuple[int, int]]:
        indexes, self.skip = list(super().__iter__())[self.skip :], 0
        return ((self.epoch, index) for index in indexes)


class EpochLoader(DataLoader):
    """A training loader that resumes in the middle of an epoch (Lightning saves and restores its state)."""

    _progress = (0, 0)  # epoch, batches of it that were handed out, also before a resume
    _resume: tuple[int, int] | None = None  # the progress of the run that is continued

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that nothing is read before the first batch is asked for: on a resume Lightning
        # makes the iterator before it sets the sampler's epoch, and workers would start on the wrong one.
        epoch = getattr(self.sampler, "epoch", 0)  # Trainer(overfit_batches=...) puts in its own sampler
        start = self._resume[1] if self._resume and self._resume[0] == epoch else 0
        self._resume = None
        self.sampler.skip = start * self.batch_size
        for count, batch in enumerate(super().__iter__(), start + 1):
            self._progress = epoch, count
            yield batch

    def state_dict(self) -> dict[str, int]:
        return dict(zip(("epoch", "batches"), self._progress, strict=True))

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = state["epoch"], state["batches"]


def identity(batch: Batch) -> Batch:
    """Collate function of `ViewDataset`, whose batches are complete."""
    return batch
