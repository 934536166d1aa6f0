"""A drawn view as solo-learn renders it, by Pillow through torchvision: slow, the yardstick for the others."""

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as F

from solo_ext.data.transforms import ViewTransform
from solo_ext.data.views import HUE, JITTER_ORDERS, draw_boxes, draw_views

_RESAMPLE = {"bicubic": F.InterpolationMode.BICUBIC, "bilinear": F.InterpolationMode.BILINEAR}
_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def render(transform: ViewTransform, image: Image.Image, u: np.ndarray) -> Image.Image:
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


def reference(transform: ViewTransform, image: Image.Image, u: np.ndarray) -> Tensor:
    """`transform(image, u)` by Pillow: float32 [3, size, size]."""
    pixels = F.to_tensor(render(transform, image, u))
    return F.normalize(pixels.expand(3, -1, -1), transform.mean.tolist(), transform.std.tolist())
