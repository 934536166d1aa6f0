"""Configuration of data and augmentations: solo-learn's keys, checked.

What an entry of `augmentations` leaves out is off, but for the random resized crop, which is on.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

from solo_ext.data.datasets import DATASETS
from solo_ext.errors import ConfigError
from solo_ext.schema import check_choice
from solo_ext.text import nearest

# auto: the fastest that works for the images and the device, see `formats`
FORMATS = ("auto", "image_folder", "h5", "tensor", "dali")
CORRUPT = ("error", "skip")

PARTS_WITH_PROB = (
    "color_jitter",
    "grayscale",
    "gaussian_blur",
    "solarization",
    "equalization",
    "horizontal_flip",
)


@dataclass
class RandomResizedCropConfig:
    enabled: bool = True  # false: resize the shorter side to crop_size
    crop_min_scale: float = 0.08  # share of the image's area
    crop_max_scale: float = 1.0


@dataclass
class ColorJitterConfig:
    prob: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # share of the colour circle, at most 0.5


@dataclass
class ProbConfig:
    prob: float = 0.0


@dataclass
class AugmentationConfig:
    """One entry of `augmentations`: how `num_crops` views of an image are made."""

    rrc: RandomResizedCropConfig = field(default_factory=RandomResizedCropConfig)
    color_jitter: ColorJitterConfig = field(default_factory=ColorJitterConfig)
    grayscale: ProbConfig = field(default_factory=ProbConfig)
    gaussian_blur: ProbConfig = field(default_factory=ProbConfig)
    solarization: ProbConfig = field(default_factory=ProbConfig)
    equalization: ProbConfig = field(default_factory=ProbConfig)
    horizontal_flip: ProbConfig = field(default_factory=ProbConfig)
    crop_size: int = 224  # pixels
    num_crops: int = 1
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null: the data set's own
    std: list[float] | None = None

    def __post_init__(self):
        _check_augmentation(self, "augmentations")


@dataclass
class ClassificationAugmentationConfig:
    """`data.augmentations` of a linear evaluation; what is null follows from the data set."""

    crop_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass
class DataConfig:
    """`data`: which images, from where. Raises `ConfigError` for a value that cannot work."""

    dataset: str = MISSING
    train_path: str | None = None
    val_path: str | None = None
    format: str = "auto"
    num_workers: int = 4  # processes of image_folder and h5, threads of dali; tensor has none
    no_labels: bool = False
    fraction: float = -1.0  # of the training set, stratified by class; -1: all of it
    download: bool = True
    corrupt: str = "error"  # an image that cannot be read: error, or skip (the next one takes its place)
    corrupt_limit: float = 0.01  # share of the images that may be skipped
    augmentations: ClassificationAugmentationConfig | None = None  # linear evaluation only
    num_classes: int | None = None  # derived
    num_large_crops: int | None = None  # derived
    num_small_crops: int | None = None  # derived

    def __post_init__(self):
        if self.dataset not in DATASETS:
            what = "missing" if self.dataset == MISSING else f"there is no data set '{self.dataset}'"
            raise ConfigError(f"data.dataset: {what} (known: {', '.join(DATASETS)}){nearest(self.dataset, DATASETS)}")
        check_choice("data.format", self.format, FORMATS)
        check_choice("data.corrupt", self.corrupt, CORRUPT)
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        _require(
            self.fraction == -1 or 0 < self.fraction < 1,
            "data.fraction",
            self.fraction,
            "between 0 and 1, or -1 for the whole set",
        )
        _require(0 <= self.corrupt_limit <= 1, "data.corrupt_limit", self.corrupt_limit, "a share, 0 to 1")
        if self.augmentations is not None:
            _check_normalisation(self.augmentations, "data.augmentations")


def check_augmentations(augmentations: Sequence[Any]) -> None:
    """Raises `ConfigError` with the full key of the first value that cannot work.

    Takes `AugmentationConfig` objects and nodes of an OmegaConf config alike.
    """
    if not augmentations:
        raise ConfigError("augmentations: empty, but at least one view is needed")
    for i, node in enumerate(augmentations):
        known = isinstance(node, AugmentationConfig)
        _check_augmentation(node if known else OmegaConf.merge(AugmentationConfig, node), f"augmentations[{i}]")


def count_crops(augmentations: Iterable[Any]) -> tuple[int, int]:
    """Number of large and of small views; large is what has the first entry's `crop_size`."""
    crops = [(a.crop_size, a.num_crops) for a in augmentations]
    large = sum(n for size, n in crops if size == crops[0][0])
    return large, sum(n for _, n in crops) - large


def _check_augmentation(aug: Any, key: str) -> None:
    for part in PARTS_WITH_PROB:
        prob = getattr(aug, part).prob
        _require(0 <= prob <= 1, f"{key}.{part}.prob", prob, "a probability, 0 to 1")
    for name in ("brightness", "contrast", "saturation"):
        factor = getattr(aug.color_jitter, name)
        _require(factor >= 0 and math.isfinite(factor), f"{key}.color_jitter.{name}", factor, "finite, 0 or more")
    _require(0 <= aug.color_jitter.hue <= 0.5, f"{key}.color_jitter.hue", aug.color_jitter.hue, "0 to 0.5")
    low, high = aug.rrc.crop_min_scale, aug.rrc.crop_max_scale
    _require(0 < high <= 1, f"{key}.rrc.crop_max_scale", high, "more than 0 and at most 1")
    _require(0 < low <= high, f"{key}.rrc.crop_min_scale", low, f"more than 0 and at most {high}")
    _require(aug.num_crops >= 1, f"{key}.num_crops", aug.num_crops, "1 or more")
    _check_normalisation(aug, key)


def _check_normalisation(aug: Any, key: str) -> None:
    _require(aug.crop_size is None or aug.crop_size >= 1, f"{key}.crop_size", aug.crop_size, "1 or more")
    for name, minimum in (("mean", -math.inf), ("std", 0.0)):
        values = getattr(aug, name)
        good = values is None or (len(values) == 3 and all(minimum < v < math.inf for v in values))
        positive = " positive" if name == "std" else ""
        _require(good, f"{key}.{name}", values, f"three{positive} numbers, one per channel")


def _require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: must be {expected}, but is {value}")
