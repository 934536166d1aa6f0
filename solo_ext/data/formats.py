"""`data.format`: which pipeline reads and renders the images."""

import logging
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

import torch

from solo_ext.data.datasets import DataConfig
from solo_ext.data.h5 import H5Images
from solo_ext.data.images import ArrayImages, FileImages, ImageSet
from solo_ext.data.loader import EpochLoader, Resumable, Skipped, ViewDataset
from solo_ext.data.resident import ResidentLoader
from solo_ext.data.transforms import Transform
from solo_ext.errors import ConfigError

log = logging.getLogger("solo_ext")

# what each kind of images can be read by; the first is what auto takes, dali only for a GPU
CAN = {
    ArrayImages: ("tensor", "image_folder"),
    FileImages: ("dali", "image_folder", "tensor"),
    H5Images: ("dali", "h5", "tensor"),
}
WHAT = {ArrayImages: "images in memory", FileImages: "image files", H5Images: "an HDF5 file"}


def pick_format(data: DataConfig, images: ArrayImages | FileImages | H5Images, device: torch.device) -> str:
    """The format that `data.format` means for these images on this device.

    Raises:
        ConfigError: it cannot read them, or needs a package that is not installed.
    """
    can = CAN[type(images)]
    if data.format == "auto":
        fast = [name for name in can if name != "dali" or (device.type == "cuda" and _has_dali())]
        return fast[0]
    if data.format not in can:
        raise ConfigError(
            f"data.format: '{data.format}' does not read {WHAT[type(images)]}, which '{data.dataset}' has here "
            f"(one of {', '.join(can)}, auto)"
        )
    if data.format == "dali" and not _has_dali():
        raise ConfigError(
            "data.format: 'dali' needs NVIDIA DALI; pip install 'solo-ext[dali]' (CUDA 12) or 'solo-ext[dali-cuda13]', "
            "or use image_folder"
        )
    return data.format


def make_loader(
    data: DataConfig,
    images: ImageSet,
    transforms: Sequence[Transform],
    seed: int,
    sampler: Iterable,
    batch_size: int,
    drop_last: bool,
    device: torch.device,
) -> Resumable:
    """Batches `(indexes, [view per transform], targets)` in the order of `sampler`, by the format that `data` means."""
    name = pick_format(data, images.images, device)
    skipped = Skipped(len(images), data.corrupt, data.corrupt_limit)
    shared = images, transforms, seed, sampler, batch_size, drop_last
    if name == "tensor":
        return ResidentLoader(*shared, device=device, skipped=skipped)
    if name == "dali":
        from solo_ext.data.dali import DaliLoader

        return DaliLoader(*shared, device=device, threads=max(1, data.num_workers), skipped=skipped)
    return EpochLoader(
        ViewDataset(images, transforms, seed),
        skipped=skipped,
        sampler=sampler,
        batch_size=batch_size,
        drop_last=drop_last,
        num_workers=data.num_workers,
        persistent_workers=data.num_workers > 0,
        pin_memory=device.type == "cuda",
        # a loader draws a seed for its workers; from here, it leaves the global generator alone
        generator=torch.Generator().manual_seed(seed),
    )


def _has_dali() -> bool:
    return find_spec("nvidia.dali") is not None if find_spec("nvidia") else False
