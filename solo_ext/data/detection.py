"""Photographs with boxes as batches for a detector, with the loader, resume and checks of all other data."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from solo_ext.data.boxes import BoxSet, outlines
from solo_ext.data.datasets import DataConfig, load_dataset
from solo_ext.data.images import ImageSet
from solo_ext.data.loader import Key, Unreadable, ViewLoader, derive_seed, read, share
from solo_ext.data.modules import ImageData, make_loader
from solo_ext.data.transforms import Transform
from solo_ext.errors import DataError

Boxes = tuple[Tensor, list[Tensor], list[dict[str, Tensor]]]


@dataclass
class DetectionSet(Dataset):
    """Whole images as they are, or mirrored by a fair coin for each epoch and image."""

    images: BoxSet
    seed: int
    mirror: bool
    masks: bool

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Boxes, Unreadable]:
        """(indexes [B], images uint8 [3, H, W], targets), and what could not be read.

        A target has boxes float32 [n, 4], labels [n], difficult and crowd bool [n], and with `masks` those, bool
        [n, H, W].
        """
        unreadable: Unreadable = []
        indexes, images, targets = [], [], []
        for key in keys:
            epoch, index = key if isinstance(key, tuple) else (0, key)
            index, image = read(self.images.images.__getitem__, index, len(self), unreadable)
            shown = self.images.objects[index]
            target = {
                name: torch.from_numpy(getattr(shown, name).copy())
                for name in ("boxes", "labels", "difficult", "crowd")
            }
            if self.masks:
                target["masks"] = self._masks(index, image)
            if self.mirror and derive_seed(self.seed, epoch, index) % 2:
                image = image.flip(-1)
                target["boxes"][:, [0, 2]] = image.shape[-1] - target["boxes"][:, [2, 0]]
                if self.masks:
                    target["masks"] = target["masks"].flip(-1)
            indexes.append(index)
            images.append(image.contiguous())
            targets.append(target)
        batch = torch.tensor(indexes), images, targets
        if get_worker_info():
            share([batch[0], *images, *(x for target in targets for x in target.values())])
        return batch, unreadable

    def _masks(self, index: int, image: Tensor) -> Tensor:
        shown, size = self.images.objects[index], (image.shape[-2], image.shape[-1])
        if len(shown.boxes) and not shown.masks:
            raise DataError(f"detector.masks: image {index} has boxes without an outline")
        return torch.from_numpy(outlines(shown, size)) if shown.masks else torch.zeros(0, *size, dtype=torch.bool)


class DetectionData(ImageData):
    """Training images mirrored and shuffled, test images as they are; both keep their size."""

    train_split = "train"

    def __init__(self, data: DataConfig, batch_size: int, seed: int, side: int, masks: bool = False):
        """side: the shorter one in pixels that the detector gives a test image."""
        super().__init__(data, batch_size, seed)
        self.masks = masks
        view = self.data.augmentations
        self.eval_view = side, view.mean if view else None, view.std if view else None

    @property
    def num_classes(self) -> int:
        return len(self.train_set.classes)

    @cached_property
    def val_set(self) -> BoxSet:  # type: ignore[override]  # there always is one
        test: Any = load_dataset(self.data, "test")
        return test.numbered(self.train_set.classes, "data.val_path")

    def check(self, world_size: int | None = None) -> None:
        if not isinstance(self.train_set, BoxSet):
            raise DataError(f"data.dataset: '{self.data.dataset}' has no boxes (one of voc, coco)")
        _ = self.val_set
        super().check(world_size)

    def train_dataloader(self) -> ViewLoader:
        return self._shuffled(())

    def _loader(self, images: ImageSet, views: Sequence[Transform], **batching: Any) -> ViewLoader:
        assert isinstance(images, BoxSet)
        dataset: Any = DetectionSet(images, self.seed, batching.get("drop_last", False), self.masks)
        return make_loader(self.data, dataset, self.device, batch_size=self.batch_size, **batching)
