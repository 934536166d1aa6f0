"""The data of a run as Lightning data modules, which refuse what a user can get wrong, and the formats that read it."""

import multiprocessing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from solo_ext.data.augmentations import AugmentationConfig, ClassificationAugmentationConfig
from solo_ext.data.datasets import DATASETS, DataConfig, DatasetInfo, PerChannel, dataset_info, load_dataset
from solo_ext.data.decode import jpeg_decoder
from solo_ext.data.images import SOME, ArrayImages, FileImages, ImageSet
from solo_ext.data.loader import (
    EpochSampler,
    ResidentLoader,
    Skipped,
    ViewDataset,
    ViewLoader,
    finish_first,
    kept_by_itself,
)
from solo_ext.data.transforms import Transform, build_eval_transform
from solo_ext.errors import ConfigError, DataError, reason
from solo_ext.files import cores, log
from solo_ext.schema import build, fit, show

DEFAULT_CROP = 224  # of sets whose images have no common size


def pick_format(data: DataConfig, images: ArrayImages | FileImages, device: torch.device) -> str:
    """What `data.format` means for these images on this device; a `ConfigError` if that cannot read them."""
    if data.format == "auto":
        if kept_by_itself(images, device):
            return "tensor"
        dali = device.type == "cuda" and images.channels == 3
        return next(name for name in images.formats if name != "dali" or (dali and not _without_dali()))
    if data.format not in images.formats:
        here = f"which '{data.dataset}' has here (one of {', '.join(images.formats)}, auto)"
        raise ConfigError(f"data.format: '{data.format}' does not read {images.kind}, {here}")
    if data.format == "dali" and images.channels != 3:
        raise ConfigError(
            f"data.format: 'dali' reads RGB, not data.channels={images.channels}; use {images.formats[1]}"
        )
    if data.format == "dali" and (why := _without_dali()):
        raise ConfigError(f"data.format: 'dali' needs NVIDIA DALI, which {why}, or use image_folder")
    return data.format


def make_loader(data: DataConfig, views: ViewDataset, device: torch.device, **batching: Any) -> ViewLoader:
    """Batches `(indexes, [view per transform], targets)` in the format of `data`; `batching` as of a DataLoader."""
    name = pick_format(data, views.images.images, device)
    if isinstance(views.images.images, FileImages):
        jpeg_decoder()  # imported once, and not in each worker
    batching["skipped"] = Skipped(len(views), data.corrupt, data.corrupt_limit)
    if name == "tensor":
        return ResidentLoader(views, device, **batching)
    workers = min(data.num_workers, cores())
    if name == "dali":
        from solo_ext.data.dali import DaliLoader

        return DaliLoader(views, device, threads=max(1, workers), **batching)
    if workers and multiprocessing.get_start_method() == "forkserver":  # Python 3.14's: they share what it has imported
        multiprocessing.set_forkserver_preload(["__main__", ViewLoader.__module__, "torchvision.io"])
    batching |= {"num_workers": workers, "persistent_workers": workers > 0, "worker_init_fn": finish_first}
    return ViewLoader(views, device, pin_memory=device.type == "cuda", **batching)


def statistics(images: ArrayImages | FileImages, skip: bool) -> tuple[PerChannel, PerChannel]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]; images count alike. skip: those that cannot be
    read are left out, if others can."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i in range(len(images)):
        with suppress(*[DataError] * skip):
            found.append(torch.var_mean(images[i].flatten(1) / 255, 1, correction=0))
    if not found:
        images[0]  # raises what is wrong with it
    variances, means = (torch.stack(x) for x in zip(*found, strict=True))
    deviation = (variances.mean(0) + means.var(0, correction=0)).sqrt().clamp(min=1 / 255)  # of a constant channel
    mean, std = (tuple(round(x, 4) for x in values.tolist()) for values in (means.mean(0), deviation))
    return mean, std


@cache
def _without_dali() -> str:
    """Why NVIDIA DALI cannot be used; empty if it can."""
    cuda13 = (torch.version.cuda or "").startswith("13")
    fitting = f"pip install 'solo-ext[{'dali-cuda13' if cuda13 else 'dali'}]'"  # of the CUDA that torch has
    if not (find_spec("nvidia") and find_spec("nvidia.dali")):
        return f"is not installed; {fitting}"
    try:
        import_module("nvidia.dali.plugin.pytorch")
        return ""
    except Exception as error:  # a library that it needs, or another CUDA
        log.warning("NVIDIA DALI is installed, but cannot be used here: %s", reason(error))
        return f"cannot be used here ({reason(error)}); {fitting}"


class ImageData(pl.LightningDataModule):
    """What pre-training and classification share. `batch_size` is per device."""

    train_split: str
    eval_view: tuple[int, Sequence[float] | None, Sequence[float] | None]  # crop size, mean, std of whole images
    device = torch.device("cpu")  # where the batches will be used: an attached trainer's
    augment = True  # whether training images are augmented, shuffled, and dropped where they fill no batch

    def __init__(self, data: DataConfig, batch_size: int, seed: int):
        super().__init__()
        self.data = build(DataConfig, data, "data")
        self.batch_size, self.seed = batch_size, seed

    @cached_property
    def train_set(self) -> ImageSet:
        return load_dataset(self.data, self.train_split)

    @cached_property
    def val_set(self) -> ImageSet | None:
        """None where there is nothing to validate on: no labels, or an image folder without `val_path`."""
        if not self.num_classes or (self.train_set.classes and not (self.data.val_path or self.data.val_fraction)):
            return None
        images, classes = load_dataset(self.data, "test"), self.train_set.classes
        if not classes:
            return images
        # the folder may lack some of the training set's classes, but takes over their numbers
        unknown = sorted({*images.classes} - {*classes})
        if unknown or not images.classes:
            what = f"class '{unknown[0]}'" if unknown else "no class folders"
            there = f"'{self.data.val_path}' has {what}, unlike data.train_path '{self.data.train_path}'"
            raise DataError(f"data.val_path: {there}")
        numbers = np.array([*(classes.index(name) for name in images.classes), -1])  # and of -1, no label
        return replace(images, targets=numbers[images.targets], classes=classes)

    @cached_property
    def info(self) -> DatasetInfo:
        info = dataset_info(self.data)
        return info if self.train_set.targets.max(initial=-1) >= 0 else replace(info, num_classes=0)

    def _facts(self, views: Mapping[str, Any]) -> DatasetInfo:
        """What is known of the dataset. A mean and std for its channels, which neither it nor the `views` (key -> what
        has them) may have, are those of `SOME` training images. ConfigError for a view's that are of other channels."""
        info = dataset_info(self.data)
        for key, view in views.items():
            for name in ("mean", "std"):
                if (own := getattr(view, name)) is not None and len(own) != info.channels:
                    there = f"the images have {info.channels} channels (data.channels)"
                    raise ConfigError(f"{key}.{name}: {len(own)} numbers, {show(own)}, but {there}")
        known = DATASETS[self.data.dataset].channels == info.channels
        if known or all(view.mean and view.std for view in views.values()):
            return info
        sample = self.train_set.evenly(min(SOME, len(self.train_set)))
        mean, std = statistics(sample.images, self.data.corrupt == "skip")
        return replace(info, mean=mean, std=std)

    @property
    def num_classes(self) -> int:
        """0: without labels."""
        return self.info.num_classes or 0

    @property
    def format(self) -> str:
        """What `data.format` means for the training images on this device."""
        return pick_format(self.data, self.train_set.images, self.device)

    def check(self, world_size: int | None = None) -> None:
        """Loads the images and refuses what would stop a run on `world_size` devices (default: the trainer's, or 1)."""
        _ = self.format
        self.check_shares(world_size or self._shard()[0])
        if self.val_set is None and self.data.val_path and not self.trainer:  # once
            log.warning(
                "data.val_path and knn_eval: unused, since the training images have no labels; afterwards, solo-ext "
                "knn --run RUN data.train_path=A data.val_path=B evaluates the encoder on labelled sets"
            )

    def check_shares(self, world_size: int) -> None:
        """Refuses a number of devices, or a batch on each, that the training images cannot fill."""
        size, share = len(self.train_set), len(self.train_set) // world_size
        there = f"are more than the {size} training images of '{self.data.dataset}'"
        if not share:
            raise ConfigError(f"devices: {world_size} devices {there}; use at most {size}")
        if self.augment and self.batch_size > share:
            devices = f"each of {world_size} devices" if world_size > 1 else "1 device"
            images = f"{self.batch_size} images on {devices}"
            raise ConfigError(f"optimizer.batch_size: {images} {there} allow; optimizer.batch_size={share} fits")

    def record(self, device: torch.device) -> dict[str, Any]:
        """What a run on `device` is trained and tested on, and how it is read."""
        name = pick_format(self.data, self.train_set.images, device)
        return {"dataset": self.data.dataset, "format": name, **self._records}

    @cached_property
    def _records(self) -> dict[str, Any]:  # which looks at every file, and reads some
        sets = {"train": self.train_set, "val": self.val_set}
        return {split: images and images.record() | images.content() for split, images in sets.items()}

    def setup(self, stage: str | None = None) -> None:
        self.check()
        if self.trainer:
            self.device = self.trainer.strategy.root_device
        if self.data.format == "auto":
            size = kept_by_itself(self.train_set.images, self.device)
            memory = f", all images in memory ({size / 1e6:.3g} MB)" if size else ""
            log.info("data.format: auto takes %s%s", self.format, memory)

    def val_dataloader(self) -> ViewLoader | list:
        """One un-augmented view, in order, this rank's share; an empty list where there is no `val_set`."""
        return [] if self.val_set is None else self._in_order(self.val_set, *self._shard())

    def _shuffled(self, views: Sequence[Transform]) -> ViewLoader:
        """This rank's share of the training images, without the last incomplete batch."""
        sampler = EpochSampler(len(self.train_set), self.seed, *self._shard(), self.batch_size)
        return self._loader(self.train_set, views, sampler=sampler, drop_last=True)

    def _in_order(self, images: ImageSet, world_size: int = 1, rank: int = 0) -> ViewLoader:
        """This rank's share; what makes all shares alike, as their processes need them, has no label to be counted."""
        if missing := -len(images) % world_size:
            images = images.padded(missing)
        rows: Any = range(len(images))
        sampler: DistributedSampler = DistributedSampler(rows, world_size, rank, shuffle=False)
        return self._loader(images, [build_eval_transform(self.info, *self.eval_view)], sampler=sampler)

    def _loader(self, images: ImageSet, views: Sequence[Transform], **batching: Any) -> ViewLoader:
        dataset = ViewDataset(images, views, self.seed)
        return make_loader(self.data, dataset, self.device, batch_size=self.batch_size, **batching)

    def _shard(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


class PretrainData(ImageData):
    """Augmented views for pre-training, `num_crops` per entry of `augmentations`; un-augmented images for probes."""

    train_split = "pretrain"

    def __init__(self, data: DataConfig, augmentations: Sequence[AugmentationConfig], batch_size: int, seed: int):
        super().__init__(data, batch_size, seed)
        self.augmentations: list[AugmentationConfig] = fit(list[AugmentationConfig], augmentations, "augmentations")
        if not self.augmentations:
            raise ConfigError("augmentations: empty, but at least one view is needed")
        views = {f"augmentations.{i}": aug for i, aug in enumerate(self.augmentations)}
        self.facts = info = self._facts(views)
        first = self.augmentations[0]
        self.eval_view = first.crop_size, *info.evaluated(first.mean, first.std)
        for i, aug in enumerate(self.augmentations):
            for name in ("mean", "std"):
                own, other = (list(getattr(view, name) or getattr(info, name)) for view in (aug, first))
                if own != other:
                    raise ConfigError(
                        f"augmentations.{i}.{name} is {own}{'' if getattr(aug, name) else ', by default'}, but "
                        f"augmentations.0 has {other}; views of one image are normalised alike"
                    )
            if (side := info.image_size) and aug.crop_size > side:
                there = f"the images of '{self.data.dataset}' have {side}; use at most {side}"
                raise ConfigError(f"augmentations.{i}.crop_size: {aug.crop_size} px, but {there}")
        jitters = [(aug.color_jitter, aug.grayscale.prob) for aug in self.augmentations]
        if info.channels != 3 and any(gray or (c.prob and (c.saturation or c.hue)) for c, gray in jitters):
            only = "saturation, hue and grayscale are of RGB images, and left out"
            log.warning("augmentations: %s for those of %d channels (data.channels)", only, info.channels)

    def train_dataloader(self) -> ViewLoader:
        return self._shuffled(self._views())

    def view_dataloader(self) -> ViewLoader:
        """The views of all training images, in order."""
        return self._loader(self.train_set, self._views())

    def _views(self) -> list[Transform]:
        info, views = self.facts, [aug for aug in self.augmentations for _ in range(aug.num_crops)]
        return [Transform.random(aug, aug.mean or info.mean, aug.std or info.std) for aug in views]

    def probe_dataloaders(self) -> tuple[ViewLoader, ViewLoader]:
        """This rank's shares of the labelled training images and of the validation images, un-augmented, in order, for
        a kNN probe; the second are of one size on all ranks."""
        assert self.val_set is not None
        bank, (world_size, rank) = self.train_set.labelled(), self._shard()
        if world_size > 1:
            bank = bank.subset(np.arange(rank, len(bank), world_size))
        return self._in_order(bank), self._in_order(self.val_set, world_size, rank)


class ClassificationData(ImageData):
    """Labelled images for linear evaluation and kNN. With `augment`, training images are cropped, flipped and shuffled;
    without, they come un-augmented, all and in order."""

    train_split = "train"

    def __init__(self, data: DataConfig, batch_size: int, seed: int, augment: bool = True):
        super().__init__(data, batch_size, seed)
        options = self.data.augmentations or ClassificationAugmentationConfig()
        info = self._facts({"data.augmentations": options})
        crop_size = options.crop_size or info.image_size or DEFAULT_CROP
        self.eval_view = crop_size, *info.evaluated(options.mean, options.std)
        self.augment = augment

    def check(self, world_size: int | None = None) -> None:
        if not self.num_classes:
            here = f"'{self.data.dataset}' has no labels here (data.train_path '{self.data.train_path}')"
            instead = "name labelled images by data.train_path and data.val_path"
            raise DataError(f"data.dataset: {here}, but a classifier needs them; {instead}")
        super().check(world_size)
        if self.val_set is None:
            raise DataError("data.val_path: missing, but a classifier is tested on the images there")

    def train_dataloader(self) -> ViewLoader:
        if not self.augment:
            return self._in_order(self.train_set)
        return self._shuffled([build_eval_transform(self.info, *self.eval_view, augment=True)])


class GivenLoaders(pl.LightningDataModule):
    """DataLoaders of the user's own. Batches to train on are `(indexes, [view, ...], targets)` or, as lightly's
    transforms make them, `([view, ...], targets, ...)`, views [B, C, H, W]; those to validate on may be `(images,
    targets)`, too. DataError for others."""

    def __init__(self, train: DataLoader, val: DataLoader | None) -> None:
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self) -> DataLoader:
        return self.train

    def val_dataloader(self) -> Any:
        return self.val or []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        first, *rest = batch if isinstance(batch, list | tuple) else [batch]
        if isinstance(first, list | tuple):
            none = torch.full((len(first[0]),), -1)
            return none, first, rest[0] if rest else none
        if self.trainer.training and not (rest and isinstance(rest[0], list | tuple)):  # type: ignore[union-attr]
            shapes = ", ".join(
                str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in (first, *rest)
            )
            raise DataError(
                f"data: the DataLoader's batches are ({shapes}), not ([view, ...], targets) or (indexes, [view, ...], "
                "targets)"
            )
        return batch
