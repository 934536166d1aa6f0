"""The features of all images of a dataset."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from solo_ext.errors import DataError, SoloExtError


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    loader: Iterable,
    device: torch.device | str = "cpu",
    precision: str | int = "32",
    channels_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features [N, D], float32, and labels [N] of all images of `loader`, in its order, on the CPU.

    The backbone runs in eval mode. Afterwards its modes and the CPU's random state are what they were, so that an
    evaluation during training does not change the training.

    Args:
        backbone: [B, 3, H, W] -> [B, D], on `device`.
        loader: batches `(indexes, [view], targets)`, augmented or not.
        precision: one of Lightning's; the mixed ones run under autocast.
        channels_last: memory layout of the images.

    Raises `DataError` if the loader is empty, and `SoloExtError` if a feature is NaN or infinite.
    """
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.preserve_format
    dtype = {"16": torch.float16, "bf16": torch.bfloat16}.get(str(precision).removesuffix("-mixed"))
    features, labels = [], []
    modes = {part: part.training for part in backbone.modules()}
    backbone.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, dtype, enabled=dtype is not None):
            for _, (view, *_), targets in loader:
                out = backbone(view.to(device, non_blocking=True, memory_format=layout))
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
