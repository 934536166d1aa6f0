"""The data of a run as Lightning data modules; what a user can get wrong surfaces in `check()`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from solo_ext.data.augmentations import (
    Transform,
    build_eval_transform,
    build_linear_train_transform,
    build_view_transform,
)
from solo_ext.data.config import AugmentationConfig, DataConfig, check_augmentations
from solo_ext.data.datasets import DatasetInfo, dataset_info, load_dataset
from solo_ext.data.images import ArrayImages, ImageSet
from solo_ext.data.loader import EpochLoader, EpochSampler, ViewDataset, identity
from solo_ext.errors import ConfigError, DataError
from solo_ext.schema import section

DEFAULT_CROP = 224  # of sets whose images have no common size


class ImageData(pl.LightningDataModule):
    """What pre-training and classification share. `batch_size` is per device."""

    train_split: str
    augment = True  # whether training images are augmented, shuffled, and dropped where they fill no batch

    def __init__(self, data: DataConfig, batch_size: int, seed: int):
        super().__init__()
        self.data = section(DataConfig, data, "data")
        self.batch_size, self.seed = batch_size, seed

    @cached_property
    def train_set(self) -> ImageSet:
        return load_dataset(self.data, self.train_split)

    @cached_property
    def val_set(self) -> ImageSet | None:
        """None where there is nothing to validate on: no labels, or an image folder without `val_path`."""
        if not self.num_classes or (self.train_set.classes and self.data.val_path is None):
            return None
        images = load_dataset(self.data, "test")
        return _same_classes(images, self.train_set, self.data) if self.train_set.classes else images

    @cached_property
    def info(self) -> DatasetInfo:
        info = dataset_info(self.data)
        if self.train_set.targets.max(initial=-1) < 0:
            return replace(info, num_classes=0)
        return info

    @property
    def num_classes(self) -> int:
        """0: without labels."""
        return self.info.num_classes

    def check(self, world_size: int | None = None) -> None:
        """Raises `DataError` or `ConfigError` for all that would stop a run later on, and loads the sets.

        `world_size`: number of devices in all; by default that of the attached trainer, or 1.
        """
        world_size = world_size or self._shard()[0]
        size, share = len(self.train_set), len(self.train_set) // world_size
        if self.augment and self.batch_size > share:
            devices = f"each of {world_size} devices" if world_size > 1 else "1 device"
            raise ConfigError(
                f"optimizer.batch_size: {self.batch_size} images on {devices} are more than the {size} "
                f"training images of '{self.data.dataset}' allow; use at most {share}"
            )
        _ = self.val_set

    def prepare_data(self) -> None:
        self.check()

    def setup(self, stage: str | None = None) -> None:
        self.check()

    def val_dataloader(self) -> DataLoader | list:
        """One un-augmented view, in order; an empty list where there is no `val_set`."""
        return [] if self.val_set is None else self._in_order(self.val_set)

    def eval_transform(self) -> Transform:
        raise NotImplementedError

    def _shuffled(self, transforms: Sequence[Transform]) -> EpochLoader:
        dataset = ViewDataset(self.train_set, transforms, self.seed)
        sampler = EpochSampler(len(dataset), self.seed, *self._shard())
        return EpochLoader(dataset, sampler=sampler, drop_last=True, **self._options(self.data.num_workers))

    def _in_order(self, images: ImageSet) -> DataLoader:
        # images in memory take less time to prepare than to send from a worker
        workers = 0 if isinstance(images.images, ArrayImages) else self.data.num_workers
        return DataLoader(ViewDataset(images, [self.eval_transform()], self.seed), **self._options(workers))

    def _options(self, workers: int) -> dict:
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": identity,
            # a loader draws a seed for its workers; from here, it leaves the global generator alone
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _shard(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


class PretrainData(ImageData):
    """Augmented views for pre-training, un-augmented images for the probes.

    Each entry of `augmentations` gives its `num_crops` views, in order. Raises `ConfigError` for
    augmentations that cannot work; for the images see `check`.
    """

    train_split = "pretrain"

    def __init__(self, data: DataConfig, augmentations: Sequence[AugmentationConfig], batch_size: int, seed: int):
        super().__init__(data, batch_size, seed)
        check_augmentations(augmentations)
        self.augmentations = [section(AugmentationConfig, a) for a in augmentations]

    def train_dataloader(self) -> EpochLoader:
        """All views, shuffled, without the last incomplete batch; this rank's share of them."""
        info = dataset_info(self.data)
        return self._shuffled(
            [
                build_view_transform(aug, aug.mean or info.mean, aug.std or info.std)
                for aug in self.augmentations
                for _ in range(aug.num_crops)
            ]
        )

    def bank_dataloader(self) -> DataLoader:
        """The labelled training images, un-augmented and in order: the bank of a kNN probe. Not sharded."""
        return self._in_order(self.train_set.labelled())

    def eval_transform(self) -> Transform:
        first = self.augmentations[0]
        return build_eval_transform(self.info, first.crop_size, first.mean, first.std)


class ClassificationData(ImageData):
    """Labelled images for linear evaluation and kNN.

    `augment` true: training images are cropped, flipped and shuffled, the last incomplete batch is dropped.
    `augment` false: they come un-augmented, all and in order, so that features can be extracted once.
    `crop_size` None: `data.augmentations.crop_size`, or the size of the set's images, or 224.
    """

    train_split = "train"

    def __init__(self, data: DataConfig, crop_size: int | None, batch_size: int, seed: int, augment: bool = True):
        super().__init__(data, batch_size, seed)
        options = self.data.augmentations
        self.crop_size = (
            crop_size or (options and options.crop_size) or dataset_info(self.data).image_size or DEFAULT_CROP
        )
        self.normalisation = (options.mean, options.std) if options else (None, None)
        self.augment = augment

    def check(self, world_size: int | None = None) -> None:
        super().check(world_size)
        if not self.num_classes:
            raise DataError(
                f"data.dataset: '{self.data.dataset}' has no labels here (data.train_path "
                f"'{self.data.train_path}'), but a classifier needs them"
            )
        if self.val_set is None:
            raise DataError("data.val_path: missing, but a classifier is tested on the images there")

    def train_dataloader(self) -> DataLoader:
        if not self.augment:
            return self._in_order(self.train_set)
        return self._shuffled([build_linear_train_transform(self.info, self.crop_size, *self.normalisation)])

    def eval_transform(self) -> Transform:
        return build_eval_transform(self.info, self.crop_size, *self.normalisation)


def _same_classes(images: ImageSet, train: ImageSet, data: DataConfig) -> ImageSet:
    """The validation images with the training set's class numbers: a folder may lack some of its classes."""
    unknown = sorted(set(images.classes) - set(train.classes))
    if unknown or not images.classes:
        what = f"class folder '{unknown[0]}'" if unknown else "no class folders"
        raise DataError(f"data.val_path: '{data.val_path}' has {what}, unlike data.train_path '{data.train_path}'")
    numbers = torch.tensor([train.classes.index(name) for name in images.classes]).numpy()
    return replace(images, targets=numbers[images.targets], classes=train.classes)
