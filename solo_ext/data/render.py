"""Drawn views rendered on tensors, in batches with per-sample parameters, on any device.

Values are floats from 0 to 255 between the operations. Each operation gives what Pillow's, as torchvision and
solo-learn use it, gives before it rounds to 8 bits (`reference`).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2.functional import center_crop, equalize

from solo_ext.data.views import BLUR_RADIUS, CONTRAST, HUE, JITTER_ORDERS, SATURATION, Views

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's gray
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}  # half-widths of Pillow's resampling filters, in source pixels
MARGIN = math.ceil(BLUR_RADIUS[1])  # reach of the boxes that a blur is made of, in pixels
CHUNK = 2**18  # elements of a view batch rendered at once on a CPU, for each thread: they stay in the cache


def resize(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[B, C, H, W] to [B, C, *size], values from 0 to 255; `mode`: bicubic or bilinear, antialiased."""
    if images.shape[2:] == size:
        return images
    if images.device.type != "cpu":  # torch resamples 8 bits on CPUs only
        images = images.to(torch.float32)
    return interpolate(images, size, mode=mode, antialias=True).clamp_(0, 255)


def resize_center(images: Tensor, shorter: int, size: int, mode: str) -> Tensor:
    """Images whose shorter side becomes `shorter`, and of these the central square: [B, C, size, size].

    torchvision's Resize and CenterCrop; solo-learn only resizes for pre-training, so that images that are not square
    make no batch there.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    images = resize(images, (int(shorter * height / short), int(shorter * width / short)), mode)
    return center_crop(images, [size, size])


def crop_resize(image: Tensor, box: tuple[int, int, int, int], size: int, mode: str) -> Tensor:
    """Cuts `box` (left, top, width, height) out of an image, uint8 [C, H, W], and resizes it: uint8 [C, size, size].

    Pixels outside the box have no influence.
    """
    left, top, width, height = box
    return resize(image[None, :, top : top + height, left : left + width], (size, size), mode)[0]


def crop_resize_batch(images: Tensor, boxes: Tensor, size: int, mode: str) -> Tensor:
    """`crop_resize` for images of one size, uint8 [B, C, H, W], with a box each, [B, 4]: float [B, C, size, size].

    Resampling is linear and separable: two matrix products per image. Each is rounded to 8 bits, as by Pillow:
    equalization depends on it.
    """
    count, channels, height, width = images.shape
    left, top, w, h = boxes.to(torch.float32).unbind(1)
    across, down = _resampling(left, w, width, size, mode), _resampling(top, h, height, size, mode)
    x = torch.bmm(images.to(torch.float32).reshape(count, channels * height, width), across).round_().clamp_(0, 255)
    x = x.view(count, channels, height, size).transpose(2, 3).reshape(count, channels * size, height)
    x = torch.bmm(x, down).view(count, channels, size, size).transpose(2, 3)
    return x.contiguous().round_().clamp_(0, 255)


def finish(crops: Tensor, views: Views, mean: Tensor, std: Tensor) -> Tensor:
    """What follows the crop: colour, blur, flip, normalisation.

    Args:
        crops: uint8 or float, 0 to 255, [B, C, S, S]; C is 1 for gray images.
        views: of these B images.
        mean, std: [3], of values in [0, 1].

    Returns:
        float32 [B, 3, S, S].
    """
    out = torch.empty((len(crops), 3, *crops.shape[2:]), device=crops.device)
    step = len(crops)
    if crops.device.type == "cpu":
        step = max(1, CHUNK * torch.get_num_threads() // crops[0].numel())
    for start in range(0, len(crops), step):
        rows = slice(start, start + step)
        x = _augment(crops[rows].to(torch.float32), Views(*(array[rows] for array in views)))
        normalise(x, mean, std, out[rows])
    return out


def normalise(crops: Tensor, mean: Tensor, std: Tensor, out: Tensor | None = None) -> Tensor:
    """[B, C, S, S], values from 0 to 255, to float32 [B, 3, S, S]; gray images get three equal channels."""
    mean, std = (n.to(crops.device)[:, None, None] for n in (mean, std))
    return torch.mul(crops, 1 / (255 * std), out=out).sub_(mean / std)


def _augment(x: Tensor, views: Views) -> Tensor:
    x = _jitter(x, views.order, views.factors)
    if x.shape[1] == 3:
        x = _on(x, views.gray, lambda x: _luma(x)[:, None].expand_as(x))
    if views.blur.any():
        x = _on(x, views.blur > 0, _blur, _blur_taps(views.blur))
    x = _on(x, views.solarize, lambda x: torch.minimum(x, 255 - x))
    x = _on(x, views.equalize, lambda x: equalize(x.round().to(torch.uint8)).to(x.dtype))
    return _on(x, views.flip, lambda x: x.flip(3))


def _on(x: Tensor, chosen: np.ndarray, function: Callable[..., Tensor], *arguments: np.ndarray) -> Tensor:
    """`x`, of which the chosen rows become `function(x, *arguments)` of themselves, with their rows of `arguments`."""
    if not chosen.any():
        return x
    arguments = [_tensor(argument[chosen], x) for argument in arguments]
    if chosen.all():
        return function(x, *arguments)
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(x.device, non_blocking=True)
    return x.index_copy(0, rows, function(x[rows], *arguments))


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(like.device, non_blocking=True)


def _jitter(x: Tensor, order: np.ndarray, factors: np.ndarray) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order.

    The first three blend an image with black, its mean gray, or its gray: at each place of the order they are one
    pass over the batch.
    """
    color = x.shape[1] == 3
    operations = np.where(order[:, None] >= 0, JITTER_ORDERS[order], -1)
    for operation in operations.T:
        one = [operation == name for name in range(4)]
        keep = np.select(one[:HUE], factors.T[:HUE], 1.0)
        if not color:
            keep[one[SATURATION]] = 1.0
        if (keep != 1).any():
            x = _blend(x, keep, one[CONTRAST] & (keep != 1), one[SATURATION] & (keep != 1))
        if color:
            x = _on(x, one[HUE] & (factors[:, HUE] != 0), _hue, factors[:, HUE])
    return x


def _blend(x: Tensor, keep: np.ndarray, contrast: np.ndarray, saturation: np.ndarray) -> Tensor:
    """keep * x + (1 - keep) * other; the other is the image's mean gray, its gray, or else black. Clipped."""
    blended = x * _tensor(keep, x)[:, None, None, None]
    if contrast.any() or saturation.any():
        gray = _luma(x)
    if contrast.any():
        blended += (gray.mean((1, 2)) * _tensor((1 - keep) * contrast, x))[:, None, None, None]
    if saturation.any():
        blended += (gray * _tensor((1 - keep) * saturation, x)[:, None, None])[:, None]
    return blended.clamp_(0, 255)


def _luma(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H, W]."""
    if x.shape[1] == 1:
        return x[:, 0]
    red, green, blue = x.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` [B] of the colour circle; value and chroma of HSV stay."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    per = chroma.clamp(min=1e-6).reciprocal_()
    # 0 where a channel is the largest, else 1; lerp chooses by it, at a third of the time of torch.where
    not_red, not_green = (value - red).sign_(), (value - green).sign_()
    if_red = (green - blue).mul_(per)
    if_green = (blue - red).mul_(per).add_(2)
    if_blue = (red - green).mul_(per).add_(4)
    sextant = torch.lerp(if_red, torch.lerp(if_green, if_blue, not_green), not_red)
    sextant.add_(6 * shift[:, None, None])
    sextant.sub_(torch.floor(sextant / 6).mul_(6))
    # each channel is a trapezoid over the circle, from value - chroma to value
    shares = sextant.sub(3).abs_().sub_(1), 2 - sextant.sub(2).abs_(), 2 - sextant.sub(4).abs_()
    return torch.stack([share.clamp_(0, 1).sub_(1).mul_(chroma).add_(value) for share in shares], dim=1)


def _blur(x: Tensor, taps: Tensor) -> Tensor:
    """Both axes filtered with the symmetric kernels `taps` [B, radius + 1]; edge pixels go on outside."""
    radius, taps = taps.shape[1] - 1, taps.T[:, :, None, None, None]
    for dim, margins in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size, padded = x.shape[dim], pad(x, margins, mode="replicate")
        x = padded.narrow(dim, radius, size) * taps[0]
        for i in range(1, radius + 1):
            x += (padded.narrow(dim, radius - i, size) + padded.narrow(dim, radius + i, size)).mul_(taps[i])
    return x


def _blur_taps(sigma: np.ndarray) -> np.ndarray:
    """Pillow's Gaussians of standard deviation `sigma` [B], from the middle on: [B, radius + 1].

    Three boxes of variance sigma^2 / 3, whose outermost pixels count in part. A sampled Gaussian blurs less
    where sigma is small: at 0.3, a tenth of that variance.
    """
    variance = np.square(sigma)
    whole = np.floor((np.sqrt(4 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - variance) / (2 * variance - 6 * (whole + 1) ** 2)
    reach = whole + part
    distances = np.abs(np.arange(-MARGIN, MARGIN + 1))[:, None]
    boxes = taps = np.clip(reach + 1 - distances, 0, 1) / (2 * reach + 1)
    for _ in range(2):
        narrow, taps = taps, np.zeros((len(taps) + 2 * MARGIN, len(sigma)))
        for start, box in enumerate(boxes):
            taps[start : start + len(narrow)] += box * narrow
    taps = taps[3 * MARGIN :]
    taps[taps < 1e-4] = 0  # of a sum of 1
    taps /= 2 * taps.sum(axis=0) - taps[0]
    return taps[taps.any(axis=1)].T


def _resampling(start: Tensor, length: Tensor, source: int, size: int, mode: str) -> Tensor:
    """Pillow's weights for one axis of crops [start, start + length) of `source` pixels: [B, source, size]."""
    step = (length / size)[:, None, None]
    spread = step.clamp(min=1)
    pixels = torch.arange(source, device=start.device)[None, :, None] + 0.5
    centers = start[:, None, None] + (torch.arange(size, device=start.device) + 0.5) * step
    weights = _filter((pixels - centers) / spread, mode)
    begin = start[:, None, None]
    weights = torch.where((pixels > begin) & (pixels < begin + length[:, None, None]), weights, 0)
    return weights / weights.sum(1, keepdim=True)


def _filter(x: Tensor, mode: str) -> Tensor:
    x = x.abs().clamp_(max=SUPPORT[mode])
    if mode == "bilinear":
        return 1 - x
    # Keys' cubic with a = -1/2, written so that it is 0 from 2 on
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
