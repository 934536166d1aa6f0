"""Files of several kinds, read through each format, against the values that were written into them."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from solo_ext.data.augmentations import AugmentationConfig, RandomResizedCropConfig
from solo_ext.data.datasets import Format
from solo_ext.data.images import read_folder

from .cases import Case, loadable
from .page import Check

SIDE = 32
WHOLE = AugmentationConfig(rrc=RandomResizedCropConfig(enabled=False), crop_size=SIDE)
# ending -> the largest value, its type, and how far off a level may be
KINDS = {
    "8-bit gray .png": (255, np.uint8, 0.01),
    "16-bit gray .png": (65535, np.uint16, 0.51),
    "16-bit gray .tif": (65535, np.uint16, 0.51),
    "float gray .tif": (1, np.float32, 0.51),
    "8-bit colour .png": (255, np.uint8, 0.01),
    "alpha .png": (255, np.uint8, 0.01),
}


def decoded(formats: Sequence[str], folder: Path, seed: int, device: torch.device) -> list[Check]:
    checks = []
    for i, (kind, (white, dtype, bound)) in enumerate(KINDS.items()):
        channels = {"8-bit colour": (3,), "alpha": (4,)}.get(kind.rpartition(" ")[0], ())
        levels = np.random.default_rng(seed).random((SIDE, SIDE, *channels)) * 255
        written = (levels / 255 * white).astype(dtype)
        place = folder / f"decoded{i}"
        place.mkdir()
        Image.fromarray(written).save(place / f"0{kind.rpartition(' ')[2]}")
        expected = written.astype(np.float64) * (255 / white)
        expected = expected[..., :3] if channels else expected[..., None]
        case = Case("files of several kinds", WHOLE, read_folder(place, "--images"))
        for name in loadable(case, [name for name in formats if name in get_args(Format)], device, []):
            [(_, [view], _)] = case.loader(name, [WHOLE], seed, device)
            off = np.abs(view[0].cpu().permute(1, 2, 0).numpy() - expected).max()
            checks.append(Check(case.name, "decoded", name, kind, "difference", float(off), bound))
    return checks
