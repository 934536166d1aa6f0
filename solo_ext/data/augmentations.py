"""The `augmentations` of a configuration, with solo-learn's keys; only the random resized crop is on by default."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from solo_ext.errors import ConfigError
from solo_ext.schema import Bounds, Config, Count, NonNegative, Positive, Share


@dataclass(frozen=True)
class PerChannel:
    """Numbers of pixels in [0, 1], one for each channel: how many that is, the data says."""

    def check(self, value: Sequence[float], key: str) -> None:
        if not all(0 <= number <= 1 for number in value):
            numbers = [round(number / 255, 4) for number in value]
            advice = f": {numbers} in place of {value}" if 1 < max(value) <= 255 else f", not {value}"
            raise ConfigError(f"{key} is of pixels from 0 to 1{advice}")


Mean = Annotated[list[float], PerChannel()]
Std = Annotated[list[Positive], PerChannel()]


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
    # smaller ones at first, at less cost: [[10, 16], [20, 24]] is 16 px in the first 10 epochs, then 24 up to 20 epochs
    progressive: list[list[Count]] | None = None
    num_crops: Count = 1
    mean: Mean | None = None  # null: the dataset's own
    std: Std | None = None

    when_given = frozenset({"progressive"})

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.progressive or []
        pairs = [pair for pair in steps if len(pair) == 2 and pair[1] <= self.crop_size]
        ends = [end for end, _ in pairs]
        well = len(pairs) == len(steps) and ends == sorted(set(ends))
        form = f"pairs of a number of epochs, each larger than the last, and a size of at most {self.crop_size} px"
        self.require(well, "progressive", form)

    def size_in(self, epoch: int) -> int:
        """The side of the views in an epoch, counted from 0, in pixels."""
        return next((size for end, size in self.progressive or () if epoch < end), self.crop_size)


@dataclass
class ClassificationAugmentationConfig(Config, section="data.augmentations"):
    """`data.augmentations` of a linear evaluation; what is null follows from the dataset."""

    crop_size: Count | None = None
    mean: Mean | None = None
    std: Std | None = None


def count_crops(augmentations: Iterable[Any]) -> tuple[int, int]:
    """Number of large and of small views; large is what has the first entry's `crop_size`."""
    crops = [(a.crop_size, a.num_crops) for a in augmentations]
    large = sum(n for size, n in crops if size == crops[0][0])
    return large, sum(n for _, n in crops) - large
