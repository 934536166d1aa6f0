"""Format `tensor`: the whole set lies on the training device, and its views are rendered there in batches."""

import os
from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from solo_ext.data.images import ArrayImages, ImageSet
from solo_ext.data.loader import Batch, BatchLoader, Skipped, read, split_keys
from solo_ext.data.render import CHUNK, GPU_CHUNK
from solo_ext.data.views import uniforms
from solo_ext.errors import DataError

SHARE = 0.8  # of the free memory that a set may take


class Resident(NamedTuple):
    """A set on its device: uint8 [N, C, H, W], and for each index the one whose image stands in its place."""

    pixels: Tensor
    source: np.ndarray


_RESIDENT: WeakKeyDictionary = WeakKeyDictionary()  # images -> device -> Resident; the loaders of a run share it


def resident(images: ImageSet, device: torch.device, skipped: Skipped) -> Resident:
    """The set's images on `device`, read once in this process.

    Raises:
        DataError: they are not of one size, or do not fit into the free memory; an image that cannot be read.
    """
    devices = _RESIDENT.setdefault(images.images, {})
    if device not in devices:
        devices[device] = _load(images, device, skipped)
    return devices[device]


def _load(images: ImageSet, device: torch.device, skipped: Skipped) -> Resident:
    count = len(images)
    if isinstance(images.images, ArrayImages):
        _check_memory(images.images.pixels.nbytes, device)
        return Resident(images.images.to(device), np.arange(count))
    source, first = np.arange(count), None
    for index in range(count):
        unreadable: list[tuple[int, str]] = []
        source[index], image = read(images.images, index, unreadable)
        skipped.add(unreadable)
        if first is None:
            _check_memory(count * image.numel(), device)
            first, pixels = index, torch.empty((count, *image.shape), dtype=torch.uint8)
        if image.shape != pixels.shape[1:]:
            raise DataError(
                f"data.format: 'tensor' needs images of one size, but there are {_size(pixels[0])} (image {first}) "
                f"and {_size(image)} (image {index}); use image_folder"
            )
        pixels[index] = image
    return Resident(pixels.to(device), source)


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


class ResidentLoader(BatchLoader):
    """Batches of views, made on `device` by the calling process.

    Args:
        *shared: those of `BatchLoader`; the images are put on `device`, if they are not there yet.
        device: where the batches are used.
        skipped: what to do about images that cannot be read.
    """

    def __init__(self, *shared, device: torch.device, skipped: Skipped):
        super().__init__(*shared)
        self.resident = resident(self.images, device, skipped)
        self.targets = torch.from_numpy(self.images.targets).to(device)
        # small batches that are rendered at once
        elements = max(t.size**2 for t in self.transforms) * self.resident.pixels.shape[1]
        self.together = max(1, (CHUNK if device.type == "cpu" else GPU_CHUNK) // (self.batch_size * elements))

    @torch.no_grad()
    def _batches(self) -> Iterator[Batch]:
        pixels, source = self.resident
        batches = iter(self.batch_sampler)
        while keys := list(islice(batches, self.together)):
            epochs, indexes = split_keys(list(chain(*keys)))
            numbers = uniforms(self.seed, epochs, indexes, len(self.transforms)).swapaxes(0, 1)
            rows = torch.from_numpy(source[indexes]).to(pixels.device, non_blocking=True)
            images = pixels[rows]
            views = [t.batch(images, u) for t, u in zip(self.transforms, numbers, strict=True)]
            parts = (tensor.split(self.batch_size) for tensor in (rows, self.targets[rows], *views))
            for indexes, targets, *views in zip(*parts, strict=True):
                yield indexes, views, targets
