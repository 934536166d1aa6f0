"""The features of all images of a dataset."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from solo_ext.errors import DataError, SoloExtError

AUTOCAST = {"16": torch.float16, "16-mixed": torch.float16, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode; afterwards each of its parts is back in the mode that it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    loader: Iterable,
    device: torch.device | str = "cpu",
    precision: str | int = "32",
    channels_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """The features of all images of `loader`, in its order.

    The backbone's mode and the CPU's random state stay as they are, so that an evaluation during training does not
    change the training.

    Args:
        backbone: [B, 3, H, W] -> [B, D], on `device`.
        loader: batches `(indexes, [view], targets)`; whether the images are augmented is up to the loader.
        precision: one of Lightning's; the mixed ones run under autocast.
        channels_last: memory layout of the images.

    Returns:
        Features [N, D], float32, and labels [N], both on the CPU.

    Raises:
        DataError: the loader is empty.
        SoloExtError: a feature is NaN or infinite.
    """
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.preserve_format
    dtype = AUTOCAST.get(str(precision))
    features, labels = [], []
    with (
        eval_mode(backbone),
        torch.random.fork_rng(devices=[]),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        for _, (view, *_), targets in loader:
            out = backbone(view.to(device, non_blocking=True, memory_format=layout))
            features.append(out.float().cpu())
            labels.append(targets.cpu())
    if not features:
        raise DataError("there are no images to extract features from")
    joined = torch.cat(features)
    if not joined.isfinite().all():
        raise SoloExtError("the encoder's features are not finite: its weights have diverged")
    return joined, torch.cat(labels)
