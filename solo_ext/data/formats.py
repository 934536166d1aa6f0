"""`data.format`: which pipeline reads and renders the images."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from solo_ext.data.datasets import DataConfig
from solo_ext.data.images import ArrayImages, FileImages, ImageSet
from solo_ext.data.loader import ResidentLoader, Skipped, ViewDataset, ViewLoader
from solo_ext.data.transforms import Transform
from solo_ext.errors import ConfigError


def pick_format(data: DataConfig, images: ArrayImages | FileImages, device: torch.device) -> str:
    """What `data.format` means for these images on this device.

    Raises `ConfigError` if that cannot read them, or needs a package that is not installed.
    """
    if data.format == "auto":
        return next(name for name in images.formats if name != "dali" or (device.type == "cuda" and _has_dali()))
    if data.format not in images.formats:
        raise ConfigError(
            f"data.format: '{data.format}' does not read {images.kind}, which '{data.dataset}' has here "
            f"(one of {', '.join(images.formats)}, auto)"
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
) -> ViewLoader:
    """Batches `(indexes, [view per transform], targets)` in the order of `sampler`, in the format that `data` names."""
    name, views = pick_format(data, images.images, device), ViewDataset(images, transforms, seed)
    skipped = Skipped(len(images), data.corrupt, data.corrupt_limit)
    shared: dict[str, Any] = {"skipped": skipped, "sampler": sampler, "batch_size": batch_size, "drop_last": drop_last}
    if name == "tensor":
        return ResidentLoader(views, device, **shared)
    if name == "dali":
        from solo_ext.data.dali import DaliLoader

        return DaliLoader(views, device, max(1, data.num_workers), **shared)
    shared |= {"num_workers": data.num_workers, "persistent_workers": data.num_workers > 0}
    return ViewLoader(views, pin_memory=device.type == "cuda", **shared)


def _has_dali() -> bool:
    return find_spec("nvidia.dali") is not None if find_spec("nvidia") else False
