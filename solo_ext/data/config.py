"""Configuration of data and augmentations: solo-learn's keys, checked.

What an entry of `augmentations` leaves out is off, but for the random resized crop, which is on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from solo_ext.data.datasets import DATASETS
from solo_ext.schema import Bounds, Config, Count, Length, NonNegative, OneOf, Positive, Share

# auto: the fastest that works for the images and the device, see `formats`
Format = Literal["auto", "image_folder", "h5", "tensor", "dali"]
FORMATS = get_args(Format)

Mean = Annotated[list[float], Length(3)]  # per channel, of pixels in [0, 1]
Std = Annotated[list[Positive], Length(3)]

PARTS_WITH_PROB = (
    "color_jitter",
    "grayscale",
    "gaussian_blur",
    "solarization",
    "equalization",
    "horizontal_flip",
)


@dataclass
class RandomResizedCropConfig(Config):
    enabled: bool = True  # false: resize the shorter side to crop_size
    crop_min_scale: Annotated[float, Bounds(0, 1, above=True)] = 0.08  # share of the image's area
    crop_max_scale: Annotated[float, Bounds(0, 1, above=True)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.crop_max_scale
        self.require(self.crop_min_scale <= most, "crop_min_scale", f"at most crop_max_scale, {most:g}")


@dataclass
class ColorJitterConfig(Config):
    prob: Share = 0.0
    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: Annotated[float, Bounds(0, 0.5)] = 0.0  # share of the colour circle


@dataclass
class ProbConfig(Config):
    prob: Share = 0.0


@dataclass
class AugmentationConfig(Config, section="augmentations"):
    """One entry of `augmentations`: how `num_crops` views of an image are made."""

    rrc: RandomResizedCropConfig = field(default_factory=RandomResizedCropConfig)
    color_jitter: ColorJitterConfig = field(default_factory=ColorJitterConfig)
    grayscale: ProbConfig = field(default_factory=ProbConfig)
    gaussian_blur: ProbConfig = field(default_factory=ProbConfig)
    solarization: ProbConfig = field(default_factory=ProbConfig)
    equalization: ProbConfig = field(default_factory=ProbConfig)
    horizontal_flip: ProbConfig = field(default_factory=ProbConfig)
    crop_size: Count = 224  # pixels
    num_crops: Count = 1
    mean: Mean | None = None  # null: the dataset's own
    std: Std | None = None


@dataclass
class ClassificationAugmentationConfig(Config, section="data.augmentations"):
    """`data.augmentations` of a linear evaluation; what is null follows from the dataset."""

    crop_size: Count | None = None
    mean: Mean | None = None
    std: Std | None = None


@dataclass
class DataConfig(Config, section="data"):
    """`data`: which images, from where."""

    dataset: Annotated[str, OneOf(DATASETS)]
    train_path: str | None = None
    val_path: str | None = None
    format: Format = "auto"
    num_workers: Annotated[int, Bounds(0)] = 4  # processes of image_folder and h5, threads of dali; tensor has none
    no_labels: bool = False
    fraction: float = -1.0  # of the training set, stratified by class; -1: all of it
    download: bool = True
    corrupt: Literal["error", "skip"] = "error"  # an unreadable image: error, or skip (the next one takes its place)
    corrupt_limit: Share = 0.01  # of the images may be skipped
    augmentations: ClassificationAugmentationConfig | None = None  # linear evaluation only
    num_classes: int | None = None  # derived
    num_large_crops: int | None = None  # derived
    num_small_crops: int | None = None  # derived

    def __post_init__(self) -> None:
        super().__post_init__()
        share = 0 < self.fraction < 1
        self.require(share or self.fraction == -1, "fraction", "between 0 and 1, or -1 for the whole set")


def count_crops(augmentations: Iterable[Any]) -> tuple[int, int]:
    """Number of large and of small views; large is what has the first entry's `crop_size`."""
    crops = [(a.crop_size, a.num_crops) for a in augmentations]
    large = sum(n for size, n in crops if size == crops[0][0])
    return large, sum(n for _, n in crops) - large
