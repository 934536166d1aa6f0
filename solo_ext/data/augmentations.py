"""Augmentations with solo-learn's order and distributions, and the transforms of evaluation.

A view is drawn (`draw_view`: plain numbers out of uniform random numbers) and then rendered
(`render_view`: Pillow, no randomness). A transform takes its uniform numbers as an argument, so that whoever
calls it decides what they depend on; without them they come from torch's global generator.
"""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from solo_ext.data.config import AugmentationConfig, ProbConfig, RandomResizedCropConfig

if TYPE_CHECKING:
    from solo_ext.data.datasets import DatasetInfo

CROP_ATTEMPTS = 10
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
BLUR_RADIUS = (0.1, 2.0)  # of Pillow's Gaussian, in pixels, whatever the crop size
DRAWS = 14 + 2 * CROP_ATTEMPTS  # uniform numbers that one view takes
JITTER_ORDERS = list(permutations(range(4)))  # of brightness, contrast, saturation, hue


class View(NamedTuple):
    """What was drawn for one view, in the order of application."""

    box: tuple[int, int, int, int] | None  # left, top, right, bottom; None: no crop, resize only
    jitter: tuple[tuple[int, float], ...]  # (index of the operation, factor)
    gray: bool
    blur: float  # radius; 0: none
    solarize: bool
    equalize: bool
    flip: bool


def draw_view(aug: AugmentationConfig, width: int, height: int, uniforms: Sequence[float]) -> View:
    """Turns `DRAWS` numbers of U[0, 1) into the view of a `width` x `height` image.

    Every decision has a number of its own, so that changing one probability moves no other decision.
    """
    left, top, jitter, order, *factors, gray, blur, radius, solarize, equalize, flip = uniforms[:14]
    return View(
        box=_draw_box(aug.rrc, width, height, left, top, uniforms[14:]) if aug.rrc.enabled else None,
        jitter=_draw_jitter(aug.color_jitter, order, factors) if jitter < aug.color_jitter.prob else (),
        gray=gray < aug.grayscale.prob,
        blur=_between(*BLUR_RADIUS, radius) if blur < aug.gaussian_blur.prob else 0.0,
        solarize=solarize < aug.solarization.prob,
        equalize=equalize < aug.equalization.prob,
        flip=flip < aug.horizontal_flip.prob,
    )


def render_view(image: Image.Image, view: View, crop_size: int, resample=Image.Resampling.BICUBIC):
    """Applies a drawn view to an RGB or gray image; gives a `crop_size` x `crop_size` image of its mode."""
    if view.box is not None:
        # cropped first: Pillow's resize(box=...) would let pixels outside the box bleed in
        image = image.crop(view.box).resize((crop_size, crop_size), resample)
    else:
        image = _resize_shorter_side(image, crop_size)
    for operation, factor in view.jitter:
        image = JITTER[operation](image, factor)
    if view.gray:
        image = image.convert("L").convert(image.mode)
    if view.blur:
        image = image.filter(ImageFilter.GaussianBlur(view.blur))
    if view.solarize:
        image = ImageOps.solarize(image, 128)
    if view.equalize:
        image = ImageOps.equalize(image)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


class Transform:
    """Image to normalised float tensor; `render` does all but the last step."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def render(self, image: Image.Image, uniforms: Sequence[float]) -> Image.Image:
        raise NotImplementedError

    def normalise(self, images: Sequence[Image.Image]) -> Tensor:
        """Equally sized images as one tensor [B, 3, H, W]; gray ones get three equal channels.

        Equal to ToTensor and Normalize of each, at a tenth of their cost for small images.
        """
        width, height = images[0].size
        buffer = bytearray().join(image.tobytes() for image in images)
        pixels = torch.frombuffer(buffer, dtype=torch.uint8).view(len(images), height, width, -1)
        pixels = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub(self.mean).div_(self.std)

    def __call__(self, image: Image.Image, uniforms: Sequence[float] | None = None) -> Tensor:
        """[3, H, W]; `uniforms` are `DRAWS` numbers of U[0, 1), by default from torch's global generator."""
        if uniforms is None:
            uniforms = torch.rand(DRAWS, dtype=torch.float64).tolist()
        return self.normalise([self.render(image, uniforms)])[0]


class ViewTransform(Transform):
    """One random view of an image, as `aug` says."""

    def __init__(self, aug: AugmentationConfig, mean, std, resample=Image.Resampling.BICUBIC):
        super().__init__(mean, std)
        self.aug, self.resample = aug, resample

    def render(self, image: Image.Image, uniforms: Sequence[float]) -> Image.Image:
        view = draw_view(self.aug, *image.size, uniforms)
        return render_view(image, view, self.aug.crop_size, self.resample)


class EvalTransform(Transform):
    """The whole image, as `crop` prepares it."""

    def __init__(self, crop, mean, std):
        super().__init__(mean, std)
        self.crop = crop

    def render(self, image: Image.Image, uniforms: Sequence[float] = ()) -> Image.Image:
        return self.crop(image)


def build_view_transform(aug: AugmentationConfig, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """PIL image -> float tensor [3, crop_size, crop_size]: a random view for pre-training."""
    return ViewTransform(aug, mean, std)


def build_linear_train_transform(
    info: "DatasetInfo",
    crop_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Transform:
    """Random resized crop (bilinear, 8 to 100% of the area) and flip, for a linear classifier's training."""
    aug = AugmentationConfig(
        rrc=RandomResizedCropConfig(True, 0.08, 1.0), horizontal_flip=ProbConfig(0.5), crop_size=crop_size
    )
    return ViewTransform(aug, *_eval_normalisation(info, mean, std), Image.Resampling.BILINEAR)


def build_eval_transform(
    info: "DatasetInfo",
    crop_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Transform:
    """PIL image -> float tensor [3, crop_size, crop_size], without randomness.

    Sets of one image size are only resized, and only if that size is another than `crop_size`; of others the
    shorter side becomes 256/224 of `crop_size` (bilinear) and the centre is cropped.
    """
    bilinear = v2.InterpolationMode.BILINEAR
    if info.image_size == crop_size:
        crop = v2.Identity()
    elif info.image_size is not None:
        crop = v2.Resize((crop_size, crop_size), bilinear)
    else:
        crop = v2.Compose([v2.Resize(round(crop_size * 256 / 224), bilinear), v2.CenterCrop(crop_size)])
    return EvalTransform(crop, *_eval_normalisation(info, mean, std))


def _eval_normalisation(info: "DatasetInfo", mean, std) -> tuple[Sequence[float], Sequence[float]]:
    return mean or info.eval_mean or info.mean, std or info.eval_std or info.std


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def _draw_box(rrc: RandomResizedCropConfig, width, height, left, top, attempts) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params: area uniform, aspect ratio log-uniform, up to ten tries."""
    low, high = (math.log(r) for r in CROP_RATIO)
    for u_area, u_ratio in zip(attempts[::2], attempts[1::2], strict=True):
        area = width * height * _between(rrc.crop_min_scale, rrc.crop_max_scale, u_area)
        ratio = math.exp(_between(low, high, u_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    # no try fitted: the largest centred box whose ratio is allowed
    w, h = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _draw_jitter(config, order: float, factors: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """torchvision's ColorJitter.get_params: the operations in random order, those of strength 0 left out."""
    strengths = config.brightness, config.contrast, config.saturation, config.hue
    drawn = [_between(max(0.0, 1 - s), 1 + s, u) for s, u in zip(strengths, factors, strict=True)]
    drawn[3] = _between(-config.hue, config.hue, factors[3])
    return tuple((i, drawn[i]) for i in JITTER_ORDERS[int(order * len(JITTER_ORDERS))] if strengths[i])


def _resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """solo-learn only resizes, so that images that are not square make no batch; we crop the centre, too."""
    image = v2.functional.resize(image, [size], v2.InterpolationMode.BICUBIC)
    return v2.functional.center_crop(image, [size, size])


# What Pillow's ImageEnhance and torchvision's adjust_* give, without their detours: on small images these, and
# not the pixels, take the time (ImageEnhance.Contrast computes its mean in Python).


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(Image.new(image.mode, image.size), image, factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    gray = np.frombuffer((image if image.mode == "L" else image.convert("L")).tobytes(), np.uint8)
    mean = int(gray.sum() / gray.size + 0.5)
    return Image.blend(Image.new(image.mode, image.size, (mean,) * len(image.mode)), image, factor)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    return image if image.mode == "L" else Image.blend(image.convert("L").convert("RGB"), image, factor)


JITTER = (_brightness, _contrast, _saturation, v2.functional.adjust_hue)
