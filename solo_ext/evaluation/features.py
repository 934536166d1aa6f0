"""The features of the images of a dataset, and their labels."""

from collections.abc import Iterable
from contextlib import ExitStack
from io import BytesIO
from mmap import mmap
from tempfile import TemporaryFile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from solo_ext.errors import DataError, SoloExtError, naming

Kept = Literal["float32", "float16", "file"]  # file: float32, mapped from a temporary file


def labelled(labels: Tensor, purpose: str, name: str) -> Tensor:
    """Which images have a label (not -1), int64 [n]. Raises `DataError` if none in the set `name` has one."""
    rows = (labels != -1).nonzero()[:, 0]
    if not len(rows):
        raise DataError(f"{purpose} needs labels, but the {name} set has no labelled image")
    return rows


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    loader: Iterable,
    device: torch.device | str = "cpu",
    precision: str | int = "32",
    channels_last: bool = True,
    kept: Kept = "float32",
) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] of all images of `loader`, in its order, on the CPU, `kept` without a second copy.

    `backbone`, on `device`, turns images [B, 3, H, W] into features [B, D]; it runs in eval mode. Batches are
    `(indexes, [view], targets)`. Afterwards its modes and the CPU's random state are what they were. `precision` is one
    of Lightning's. Raises `DataError` if the loader is empty or the file cannot be written, and `SoloExtError` if a
    feature is NaN or infinite.
    """
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.preserve_format
    dtype = {"16": torch.float16, "bf16": torch.bfloat16}.get(str(precision).removesuffix("-mixed"))
    weights = next((x.dtype for x in backbone.parameters()), torch.float32)  # float64 in a training in 64-true
    kind = torch.float16 if kept == "float16" else torch.float32
    labels, shape = [], torch.Size()
    modes = {part: part.training for part in backbone.modules()}
    backbone.eval()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast(device.type, dtype, enabled=dtype is not None),
            ExitStack() as stack,
        ):
            # both grow in place
            file: Any = stack.enter_context(TemporaryFile(buffering=0)) if kept == "file" else BytesIO()
            for _, (view, *_), targets in loader:
                out = backbone(view.to(device, weights, non_blocking=True, memory_format=layout))
                out, shape = out.to(kind).cpu().contiguous(), out.shape[1:]
                if not out.isfinite().all():
                    raise SoloExtError("the encoder's features are not finite: its weights have diverged")
                with naming("the features cannot be written to a temporary file (TMPDIR)", error=DataError):
                    rest = memoryview(out.numpy()).cast("B")
                    while rest:
                        rest = rest[file.write(rest) :]
                labels.append(targets.cpu())
            if not labels:
                raise DataError("there are no images to extract features from")
            buffer = mmap(file.fileno(), 0) if kept == "file" else file.getbuffer()
    finally:
        for part, training in modes.items():
            part.training = training
    return torch.frombuffer(buffer, dtype=kind).unflatten(0, (-1, *shape)), torch.cat(labels)


def features_of_sets(
    backbone: nn.Module, loaders: Iterable[Iterable], device: torch.device, precision: str | int, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the bank, then of the queries, on the device, by `extract_features`."""
    sets: Any = (extract_features(backbone, loader, device, precision, channels_last) for loader in loaders)
    return tuple(part.to(device) for found in sets for part in found)
