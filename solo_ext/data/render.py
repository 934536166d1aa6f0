"""Drawn views rendered on tensors, in batches with per-sample parameters, on any device.

Each operation is Pillow's, of floats from 0 to 255 before they are rounded (`benchmarks/certificate/reference.py`).
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2.functional import center_crop, equalize

from solo_ext.data.views import BLUR_RADIUS, BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, SATURATION, Views
from solo_ext.errors import reason
from solo_ext.files import log

# of red, green and blue over the circle of hues: middle, slope and height, in parts of the chroma below the value
TRAPEZOIDS = np.array([[1 / 2, 1 / 3, 2 / 3], [6, -6, -6], [-2, 1, 1]])
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's gray
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}  # half-widths of Pillow's resampling filters, in source pixels
MARGIN = math.ceil(BLUR_RADIUS[1])  # reach of the boxes that a blur is made of, in pixels
# elements of a view that are rendered at once: what a CPU's cache holds, per thread, what keeps a GPU busy, and what
# takes little of its memory, since kernels make few copies
CHUNK, GPU_CHUNK, KERNEL_CHUNK = 2**19, 2**22, 2**26


def resize(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[B, C, H, W] to [B, C, *size], values from 0 to 255; `mode`: bicubic or bilinear, antialiased."""
    if images.shape[2:] == size:
        return images
    if images.device.type != "cpu":  # torch resamples 8 bits on CPUs only
        images = images.to(torch.float32)
    return interpolate(images, size, mode=mode, antialias=True).clamp_(0, 255)


def resize_center(images: Tensor, shorter: int, size: int, mode: str) -> Tensor:
    """torchvision's Resize of the shorter side to `shorter`, and CenterCrop: [B, C, size, size]."""
    height, width = images.shape[2:]
    short = min(height, width)
    images = resize(images, (int(shorter * height / short), int(shorter * width / short)), mode)
    return center_crop(images, [size, size])


def crop_resize(image: Tensor, box: tuple[int, int, int, int], size: int, mode: str) -> Tensor:
    """Resizes the `box` (left, top, width, height) of an image, uint8 [C, H, W], alone: uint8 [C, size, size]."""
    left, top, width, height = box
    return resize(image[None, :, top : top + height, left : left + width], (size, size), mode)[0]


def crop_resize_batch(images: Tensor, boxes: Tensor, size: int, mode: str) -> Tensor:
    """`crop_resize` for images of one size, uint8 [B, C, H, W], with a box each, [B, 4]: float [B, C, size, size]. Two
    matrix products per image, each rounded to 8 bits, as by Pillow: equalization depends on it."""
    count, channels, height, width = images.shape
    left, top, w, h = boxes.to(torch.float32).unbind(1)
    if width == height:
        across, down = _resampling(torch.cat([left, top]), torch.cat([w, h]), width, size, mode).chunk(2)
    else:
        across, down = _resampling(left, w, width, size, mode), _resampling(top, h, height, size, mode)
    x = torch.bmm(images.to(torch.float32).reshape(count, channels * height, width), across.mT)
    x = x.round_().clamp_(0, 255).view(count, channels, height, size)
    return torch.matmul(down[:, None], x).round_().clamp_(0, 255)


def parts(images: Tensor) -> Iterator[slice]:
    """Rows of [B, C, H, W] to render at once."""
    elements = KERNEL_CHUNK if kernels(images.device) else GPU_CHUNK
    if images.device.type == "cpu":
        elements = CHUNK * torch.get_num_threads()
    step = max(1, elements // math.prod(images.shape[1:]))
    return (slice(start, start + step) for start in range(0, len(images), step))


def finish(crops: Tensor, views: Views, mean: Tensor, std: Tensor, out: Tensor | None = None) -> Tensor:
    """What follows the crop: colour, blur, flip, normalisation, by the `views` of these B images. uint8 or float
    [B, C, S, S], 0 to 255, C 1 for gray images, to float32 [B, len(mean), S, S], in `out` if there is one."""
    if out is None:
        out = torch.empty((len(crops), len(mean), *crops.shape[2:]), device=crops.device)
    fused = kernels(crops.device) if crops.shape[1] == 3 else None
    for rows in parts(crops):
        x, part = crops[rows].to(torch.float32, copy=True), Views(*(array[rows] for array in views))
        if fused:
            x = fused.colours(x.contiguous(), part.order, part.factors, part.gray)
        else:
            x = _jitter(x, part.order, part.factors)
            if x.shape[1] == 3:
                x = _on(x, part.gray, lambda x: _luma(x).repeat(1, 3, 1, 1))
        if part.blur.any():
            x = _on(x, part.blur > 0, fused.blur if fused else _blur, _blur_taps(part.blur))
        x = _on(x, part.solarize, lambda x: torch.minimum(x, 255 - x))
        x = _on(x, part.equalize, lambda x: equalize(x.round().to(torch.uint8)).to(x.dtype))
        normalise(_on(x, part.flip, lambda x: x.flip(3)), mean, std, out[rows])
    return out


@cache
def kernels(device: torch.device) -> ModuleType | None:
    """`fused`, for a GPU; None, and a warning, where Triton, which PyTorch brings, does not work."""
    if device.type != "cuda":
        return None
    try:
        from solo_ext.data import fused

        one, x = np.ones(1), torch.zeros(1, 3, 2, 2, device=device)
        fused.blur(fused.colours(x, one.astype(int), np.ones((1, 4)), one), torch.ones(1, 2, device=device))
        return fused
    except Exception as error:  # there is none, or no compiler, which it needs
        log.warning("Triton does not work here (%s); PyTorch makes the colours, in more launches", reason(error))
        return None


def normalise(crops: Tensor, mean: Tensor, std: Tensor, out: Tensor | None = None) -> Tensor:
    """[B, C, S, S], values from 0 to 255, to float32 [B, C, S, S]; mean, std: [C] of values in [0, 1], [3] of gray."""
    mean, std = (n.to(crops.device, non_blocking=True)[:, None, None] for n in (mean, std))
    return torch.mul(crops, 1 / (255 * std), out=out).sub_(mean / std)


def _on(x: Tensor, mask: np.ndarray, function: Callable[..., Tensor], *arguments: np.ndarray) -> Tensor:
    """`x` with `function`, which also takes their rows of `arguments`, applied to the rows of `mask`; in place."""
    if not mask.any():
        return x
    theirs = [_tensor(argument[mask], x) for argument in arguments]
    if mask.all():
        return function(x, *theirs)
    if x.device.type == "cpu":  # where torch indexes element by element
        pixels = x.numpy()
        pixels[mask] = function(torch.from_numpy(pixels[mask]), *theirs).numpy()
        return x
    rows = torch.from_numpy(np.flatnonzero(mask)).to(x.device, non_blocking=True)
    return x.index_copy_(0, rows, function(x[rows], *theirs))


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(like.device, non_blocking=True)


def _jitter(x: Tensor, order: np.ndarray, factors: np.ndarray) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order; what changes nothing is left out."""
    color = x.shape[1] == 3  # others have no saturation and no hue
    for place in np.where(order >= 0, JITTER_ORDERS[order].T, -1):
        for operation in (BRIGHTNESS, CONTRAST, SATURATION) if color else (BRIGHTNESS, CONTRAST):
            factor = factors[:, operation]
            x = _on(x, (place == operation) & (factor != 1), partial(_blend, operation), factor, 1 - factor)
        if color:
            x = _on(x, (place == HUE) & (factors[:, HUE] != 0), _hue, factors[:, HUE])
    return x


def _blend(operation: int, x: Tensor, share: Tensor, rest: Tensor) -> Tensor:
    """share * x + rest * black (brightness), the image's mean gray (contrast) or its gray (saturation); in place."""
    share, rest = (factor.view(-1, 1, 1, 1) for factor in (share, rest))
    if operation == BRIGHTNESS:
        return x.mul_(share).clamp_(0, 255)
    gray = _luma(x)
    other = gray.mean((2, 3), keepdim=True) if operation == CONTRAST else gray
    return x.mul_(share).add_(other * rest).clamp_(0, 255)


def _luma(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, 1, H, W]; of other channels than RGB the mean."""
    if x.shape[1] != 3:
        return x if x.shape[1] == 1 else x.mean(1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` [B] of the colour circle; value and chroma of HSV stay. In place."""
    red, green, blue = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    per = chroma.clamp(min=1e-6).reciprocal_().mul_(1 / 6)
    # 0 where a channel is the largest, else 1; lerp chooses by it, at a third of the time of torch.where
    not_red, not_green = (value - red).sign_(), (value - green).sign_()
    if_red = (green - blue).mul_(per)
    if_green = (blue - red).mul_(per).add_(1 / 3)
    if_blue = (red - green).mul_(per).add_(2 / 3)
    hue = torch.lerp(if_red, torch.lerp(if_green, if_blue, not_green), not_red).add_(shift.view(-1, 1, 1, 1))
    hue.sub_(hue.floor())
    # each channel is a trapezoid over the circle, from value - chroma to value
    middle, slope, height = _tensor(TRAPEZOIDS, x).view(3, 3, 1, 1)
    torch.sub(hue, middle, out=x)
    return x.abs_().mul_(slope).add_(height).clamp_(-1, 0).mul_(chroma).add_(value)


def _blur(x: Tensor, taps: Tensor) -> Tensor:
    """Both axes filtered with the symmetric kernels `taps` [B, radius + 1]; edge pixels are repeated outside."""
    radius, taps = taps.shape[1] - 1, taps.T[:, :, None, None, None]
    for dim, margins in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size, padded = x.shape[dim], pad(x, margins, mode="replicate")
        x = padded.narrow(dim, radius, size) * taps[0]
        for i in range(1, radius + 1):
            x.addcmul_(padded.narrow(dim, radius - i, size) + padded.narrow(dim, radius + i, size), taps[i])
    return x


def _blur_taps(sigma: np.ndarray) -> np.ndarray:
    """Pillow's Gaussians of standard deviation `sigma` [B], from the middle on: [B, radius + 1]. Three boxes of
    variance sigma^2 / 3, whose outermost pixels count in part; a sampled Gaussian would blur less."""
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
    """Pillow's weights for one axis of crops [start, start + length) of `source` pixels: [B, size, source]."""
    start, step = start[:, None], (length / size)[:, None]
    spread = step.clamp(min=1)
    pixels = torch.arange(source, device=start.device) + 0.5
    centers = start + (torch.arange(size, device=start.device) + 0.5) * step
    outside = (pixels < start) | (pixels > start + length[:, None])
    pixels = (pixels / spread).masked_fill_(outside, torch.inf)
    distances = (pixels[:, None] - (centers / spread)[:, :, None]).abs_()
    weights = x = distances.clamp_(max=SUPPORT[mode]).neg_().add_(1)
    if mode == "bicubic":
        # Keys' cubic with a = -1/2, of x = 1 - distance: x (1 + x)^2, and where x > 0, x^2 (2 - 4 x) more
        weights = (x + 2).mul_(x).add_(1).mul_(x)
        inner = x.relu_()
        weights.addcmul_(inner.mul(-4).add_(2).mul_(inner), inner)
    return weights.div_(weights.sum(2, keepdim=True))
