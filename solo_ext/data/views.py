"""What is drawn for a view: plain numbers, a function of (seed, epoch, sample, place of the view, place of the number),
so that nothing has to be restored on a resume, and neither workers, shards nor the format change what is drawn."""

from itertools import permutations
from typing import NamedTuple

import numpy as np

from solo_ext.data.augmentations import AugmentationConfig, RandomResizedCropConfig

CROP_ATTEMPTS = 10
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
BLUR_RADIUS = (0.1, 2.0)  # standard deviation of the Gaussian, in pixels, whatever the crop size
DRAWS = 14 + 2 * CROP_ATTEMPTS  # uniform numbers that one view takes
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_ORDERS = np.array(list(permutations(range(4))))

_GAMMA, _MIX1, _MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Views(NamedTuple):
    """What was drawn for B views, except their boxes, in the order of application; arrays of length B."""

    order: np.ndarray  # row of JITTER_ORDERS; -1: no colour jitter
    factors: np.ndarray  # [B, 4]: brightness, contrast, saturation; hue as a share of the colour circle
    gray: np.ndarray  # bool
    blur: np.ndarray  # standard deviation in pixels; 0: none
    solarize: np.ndarray  # bool
    equalize: np.ndarray  # bool
    flip: np.ndarray  # bool


def uniforms(seed: int, epochs: np.ndarray, indexes: np.ndarray, views: int) -> np.ndarray:
    """Numbers of U[0, 1) for `views` views of B samples, float64 [B, views, DRAWS]: each is a hash of its place
    (SplitMix64's finaliser, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        key = _mix(np.array(seed, np.int64).astype(np.uint64) + _GAMMA)
        key = _mix(key + np.asarray(epochs, np.int64).astype(np.uint64) * _GAMMA)
        key = _mix(key + np.asarray(indexes, np.int64).astype(np.uint64) * _GAMMA)
        places = np.arange(1, views * DRAWS + 1, dtype=np.uint64) * _GAMMA
        bits = _mix(key[:, None] + places)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(len(key), views, DRAWS)


def draw_views(aug: AugmentationConfig, u: np.ndarray) -> Views:
    """Turns numbers of U[0, 1), [B, DRAWS], into views; each decision has its own, and no probability moves another."""
    _, _, jitter, order, *factors, gray, blur, radius, solarize, equalize, flip = u[:, :14].T
    config = aug.color_jitter
    ranges = [(max(0.0, 1 - s), 1 + s) for s in (config.brightness, config.contrast, config.saturation)]
    ranges.append((-config.hue, config.hue))
    return Views(
        order=np.where(jitter < config.prob, (order * len(JITTER_ORDERS)).astype(np.int64), -1),
        # torchvision's ColorJitter.get_params; an operation of strength 0 gets the factor that changes nothing
        factors=np.stack([_between(*bounds, v) for bounds, v in zip(ranges, factors, strict=True)], axis=1),
        gray=gray < aug.grayscale.prob,
        blur=np.where(blur < aug.gaussian_blur.prob, _between(*BLUR_RADIUS, radius), 0.0),
        solarize=solarize < aug.solarization.prob,
        equalize=equalize < aug.equalization.prob,
        flip=flip < aug.horizontal_flip.prob,
    )


def draw_boxes(rrc: RandomResizedCropConfig, widths: np.ndarray, heights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Crops of B images from numbers of U[0, 1), [B, DRAWS]: int64 [B, 4], left, top, width, height in pixels. As by
    torchvision's RandomResizedCrop: up to ten tries, else the largest centred box of an allowed ratio."""
    widths, heights = (np.asarray(n, np.int64) for n in (widths, heights))
    area = _between(rrc.crop_min_scale, rrc.crop_max_scale, u[:, 14::2])
    low, high = np.log(CROP_RATIO)
    ratio = np.exp(_between(low, high, u[:, 15::2]))
    side = np.sqrt(widths * heights)[:, None]
    w, h = np.rint(side * np.sqrt(area * ratio)), np.rint(side * np.sqrt(area / ratio))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    rows, first = np.arange(len(u)), fits.argmax(axis=1)
    w, h = w[rows, first].astype(np.int64), h[rows, first].astype(np.int64)
    x, y = (u[:, 0] * (widths - w + 1)).astype(np.int64), (u[:, 1] * (heights - h + 1)).astype(np.int64)
    centred = ~fits.any(axis=1)
    if centred.any():
        w = np.where(centred, np.minimum(widths, np.rint(heights * CROP_RATIO[1]).astype(np.int64)), w)
        h = np.where(centred, np.minimum(heights, np.rint(widths / CROP_RATIO[0]).astype(np.int64)), h)
        x, y = np.where(centred, (widths - w) // 2, x), np.where(centred, (heights - h) // 2, y)
    return np.stack([x, y, w, h], axis=1)


def _between(low: float, high: float, u: np.ndarray) -> np.ndarray:
    return low + (high - low) * u


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))
