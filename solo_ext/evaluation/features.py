"""The features of the images of a dataset, and their labels."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from solo_ext.errors import DataError, SoloExtError


def labelled(features: Tensor, labels: Tensor, purpose: str, name: str) -> tuple[Tensor, Tensor]:
    """Those of the images that have a label (not -1). Raises `DataError` if none in the set `name` has one."""
    has_label = labels != -1
    if not has_label.any():
        raise DataError(f"{purpose} needs labels, but the {name} set has no labelled image")
    return features[has_label], labels[has_label]


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    loader: Iterable,
    device: torch.device | str = "cpu",
    precision: str | int = "32",
    channels_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features [N, D], float32, and labels [N] of all images of `loader`, in its order, on the CPU.

    `backbone`, on `device`, turns images [B, 3, H, W] into features [B, D]; it runs in eval mode. Batches are
    `(indexes, [view], targets)`. Afterwards its modes and the CPU's random state are what they were. `precision` is one
    of Lightning's. Raises `DataError` if the loader is empty, and `SoloExtError` if a feature is NaN or infinite.
    """
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.preserve_format
    dtype = {"16": torch.float16, "bf16": torch.bfloat16}.get(str(precision).removesuffix("-mixed"))
    weights = next((x.dtype for x in backbone.parameters()), torch.float32)  # float64 in a training in 64-true
    features, labels = [], []
    modes = {part: part.training for part in backbone.modules()}
    backbone.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, dtype, enabled=dtype is not None):
            for _, (view, *_), targets in loader:
                out = backbone(view.to(device, weights, non_blocking=True, memory_format=layout))
                features.append(out.float().cpu())
                labels.append(targets.cpu())
    finally:
        for part, training in modes.items():
            part.training = training
    if not features:
        raise DataError("there are no images to extract features from")
    everything = torch.cat(features)
    if not everything.isfinite().all():
        raise SoloExtError("the encoder's features are not finite: its weights have diverged")
    return everything, torch.cat(labels)


def features_of_sets(
    backbone: nn.Module, loaders: Iterable[Iterable], device: torch.device, precision: str | int, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the bank, then of the queries, on the device, by `extract_features`."""
    sets: Any = (extract_features(backbone, loader, device, precision, channels_last) for loader in loaders)
    return tuple(part.to(device) for found in sets for part in found)
