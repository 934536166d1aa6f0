"""Format `tensor`: the whole set lies on the training device, and its views are rendered there in batches."""

import os
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from solo_ext.data.images import ArrayImages, ImageSet
from solo_ext.data.loader import Batch, Skipped, Unreadable, ViewDataset, ViewLoader, read
from solo_ext.data.render import CHUNK, GPU_CHUNK
from solo_ext.errors import DataError

SHARE = 0.8  # of the free memory that a set may take


_RESIDENT: WeakKeyDictionary = WeakKeyDictionary()  # images -> device -> what `_load` gives; a run's loaders share it


def _load(images: ImageSet, device: torch.device, skipped: Skipped) -> tuple[Tensor, np.ndarray]:
    """The images on `device`, uint8 [N, C, H, W], and for each index the one whose image stands in its place."""
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
            raise DataError(
                f"data.format: 'tensor' needs images of one size, but there are {_size(pixels[0])} (image 0) "
                f"and {_size(image)} (image {index}); use image_folder"
            )
        pixels[index] = image
    return pixels.to(device), source


def _size(image: Tensor) -> str:
    return f"{image.shape[2]} x {image.shape[1]} px"


def _check_memory(needed: int, device: torch.device) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > SHARE * free:
        raise DataError(
            f"data.format: 'tensor' would take {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free on "
            f"{device.type}; use image_folder"
        )


class ResidentLoader(ViewLoader):
    """Batches made on `device` by the calling process, which loads the images there once.

    Raises `DataError` if they differ in size or do not fit into the free memory, or if one cannot be read.
    """

    def __init__(self, dataset: ViewDataset, device: torch.device, **options: Any):
        super().__init__(dataset, **options)
        loaded = _RESIDENT.setdefault(dataset.images.images, {})
        if device not in loaded:
            loaded[device] = _load(dataset.images, device, self.skipped)
        self.device, (self.pixels, self.source) = device, loaded[device]
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
            images = self.pixels[rows]
            views = [t.batch(images, u) for t, u in zip(self.dataset.transforms, numbers, strict=True)]
            parts = (tensor.split(self.batch_size) for tensor in (rows, self.targets[rows], *views))
            for indexes, targets, *views in zip(*parts, strict=True):
                yield indexes, views, targets
