"""A drawn view as solo-learn renders it, by Pillow through torchvision: slow, the yardstick for the others."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as F

from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.data.transforms import Transform
from solo_ext.data.views import BLUR_RADIUS, HUE, JITTER_ORDERS, draw_boxes, draw_views

_RESAMPLE = {"bicubic": F.InterpolationMode.BICUBIC, "bilinear": F.InterpolationMode.BILINEAR}
_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def render(transform: Transform, image: Image.Image, u: np.ndarray) -> Image.Image:
    """The view of `image`, RGB or gray, that `transform` makes by `u`, before it is normalised."""
    aug, size = transform.aug, [transform.size, transform.size]
    view = type(views := draw_views(aug, u[None]))(*(array[0] for array in views))
    if aug.rrc.enabled:
        [(left, top, width, height)] = draw_boxes(aug.rrc, [image.width], [image.height], u[None]).tolist()
        image = F.resized_crop(image, top, left, height, width, size, _RESAMPLE[transform.mode])
    else:
        image = F.center_crop(F.resize(image, transform.size, _RESAMPLE[transform.mode]), size)
    for operation in JITTER_ORDERS[view.order] if view.order >= 0 else ():
        if view.factors[operation] != (operation != HUE):  # Pillow's way to HSV and back loses bits
            image = _JITTER[operation](image, view.factors[operation])
    if view.gray:
        image = F.to_grayscale(image, len(image.getbands()))
    if view.blur:
        image = image.filter(ImageFilter.GaussianBlur(float(view.blur)))
    if view.solarize:
        image = ImageOps.solarize(image, 128)
    if view.equalize:
        image = ImageOps.equalize(image)
    return F.hflip(image) if view.flip else image


def reference(transform: Transform, image: Image.Image, u: np.ndarray) -> Tensor:
    """`transform(image, u)` by Pillow: float32 [3, size, size]."""
    pixels = F.to_tensor(render(transform, image, u))
    return F.normalize(pixels.expand(3, -1, -1), transform.mean.tolist(), transform.std.tolist())


def random_chain(aug: AugmentationConfig) -> list[Callable]:
    """solo-learn's operations in its order, Pillow image to Pillow image, with random numbers of torchvision's own."""
    cubic, jitter = F.InterpolationMode.BICUBIC, aug.color_jitter
    crop = [T.Resize(aug.crop_size, cubic), T.CenterCrop(aug.crop_size)]
    if aug.rrc.enabled:
        scale = aug.rrc.crop_min_scale, aug.rrc.crop_max_scale
        crop = [T.RandomResizedCrop(aug.crop_size, scale, interpolation=cubic)]
    strengths = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    return [
        *crop,
        T.RandomApply([T.ColorJitter(*strengths)], jitter.prob),
        T.RandomGrayscale(aug.grayscale.prob),
        T.RandomApply([_random_blur], aug.gaussian_blur.prob),
        T.RandomApply([ImageOps.solarize], aug.solarization.prob),
        T.RandomApply([ImageOps.equalize], aug.equalization.prob),
        T.RandomHorizontalFlip(aug.horizontal_flip.prob),
    ]


def _random_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(*BLUR_RADIUS).item()))
