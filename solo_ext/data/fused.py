"""Colours and blur of `render` for RGB images on a GPU: four Triton kernels, where PyTorch launches hundreds."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from solo_ext.data.views import CONTRAST, JITTER_ORDERS

BLOCK = 1024  # pixels


@triton.jit
def _luma(red, green, blue):
    return red * 0.299 + green * 0.587 + blue * 0.114


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _turned(hue, middle, slope, height, chroma, value):
    return tl.minimum(tl.maximum(tl.abs(hue - middle) * slope + height, -1.0), 0.0) * chroma + value


@triton.jit
def _jitter(red, green, blue, row, places, mean):
    """The first `places` operations of a row of the table: brightness, contrast, saturation (0 to 2) and hue (3)."""
    for place in range(places):
        operation = tl.load(row + place).to(tl.int32)
        factor = tl.load(row + 4 + operation)
        if operation == 3:
            if factor != 0:
                value = tl.maximum(red, tl.maximum(green, blue))
                chroma = value - tl.minimum(red, tl.minimum(green, blue))
                per = 1 / (6 * tl.maximum(chroma, 1e-6))
                if_green, if_blue = (blue - red) * per + 1 / 3, (red - green) * per + 2 / 3
                hue = tl.where(value == red, (green - blue) * per, tl.where(value == green, if_green, if_blue)) + factor
                hue -= tl.floor(hue)
                red = _turned(hue, 1 / 2, 6.0, -2.0, chroma, value)
                green = _turned(hue, 1 / 3, -6.0, 1.0, chroma, value)
                blue = _turned(hue, 2 / 3, -6.0, 1.0, chroma, value)
        elif factor != 1:
            other = tl.where(operation == 0, 0.0, tl.where(operation == 1, mean, _luma(red, green, blue)))
            other *= 1 - factor
            red, green, blue = _clip(red * factor + other), _clip(green * factor + other), _clip(blue * factor + other)
    return red, green, blue


@triton.jit
def _grays(images, table, sums, pixels, BLOCK: tl.constexpr):
    """Sums of the gray, [B, BLOCK], that contrast sees, if a row's place 8 says how many operations precede it."""
    image, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    row, images = table + 10 * image, images + image.to(tl.int64) * 3 * pixels
    places = tl.load(row + 8).to(tl.int32)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, pixels, BLOCK):
        at, inside = images + start + lanes, start + lanes < pixels
        red, green = tl.load(at, inside, 0.0), tl.load(at + pixels, inside, 0.0)
        red, green, blue = _jitter(red, green, tl.load(at + 2 * pixels, inside, 0.0), row, places, 0.0)
        total += tl.where(inside, _luma(red, green, blue), 0.0)
    tl.store(sums + image * BLOCK + lanes, total)


@triton.jit
def _colours(images, table, means, pixels, BLOCK: tl.constexpr):
    """All operations, and gray where a row's place 9 says so; in place."""
    image, lanes = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, at, inside = table + 10 * image, images + image.to(tl.int64) * 3 * pixels + lanes, lanes < pixels
    red, green = tl.load(at, inside, 0.0), tl.load(at + pixels, inside, 0.0)
    blue = tl.load(at + 2 * pixels, inside, 0.0)
    red, green, blue = _jitter(red, green, blue, row, 4, tl.load(means + image))
    if tl.load(row + 9) != 0:
        red = _luma(red, green, blue)
        green, blue = red, red
    tl.store(at, red, inside)
    tl.store(at + pixels, green, inside)
    tl.store(at + 2 * pixels, blue, inside)


@triton.jit
def _filter(source, target, taps, radius, size, pixels, step, BLOCK: tl.constexpr):
    """One axis, whose neighbours are `step` elements apart and `size` in number, of planes of `pixels`, 3 an image."""
    plane, lanes = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, place = lanes < pixels, (lanes // step) % size
    at, taps = source + plane.to(tl.int64) * pixels + lanes, taps + plane // 3 * (radius + 1)
    total = tl.load(at, inside, 0.0) * tl.load(taps)
    for i in range(1, radius + 1):
        before, after = tl.minimum(place, i), tl.minimum(size - 1 - place, i)
        both = tl.load(at - before * step, inside, 0.0) + tl.load(at + after * step, inside, 0.0)
        total += both * tl.load(taps + i)
    tl.store(target + plane.to(tl.int64) * pixels + lanes, total, inside)


def colours(x: Tensor, order: np.ndarray, factors: np.ndarray, gray: np.ndarray) -> Tensor:
    """Jitter and gray of `Views`, of float32 [B, 3, H, W] from 0 to 255, contiguous; in place."""
    orders, jitters = JITTER_ORDERS[order], (order >= 0)[:, None]
    before = np.where(jitters[:, 0], (orders == CONTRAST).argmax(1), 0)
    rows = np.column_stack([orders, np.where(jitters, factors, [1, 1, 1, 0]), before, gray])
    table = torch.from_numpy(rows.astype(np.float32)).to(x.device, non_blocking=True)
    pixels, sums = x[0, 0].numel(), x.new_empty(len(x), BLOCK)
    with torch.cuda.device_of(x):
        _grays[len(x),](x, table, sums, pixels, BLOCK)
        _colours[len(x), triton.cdiv(pixels, BLOCK)](x, table, sums.sum(1).div_(pixels), pixels, BLOCK)
    return x


def blur(x: Tensor, taps: Tensor) -> Tensor:
    """Both axes of float32 [B, 3, H, W] filtered as by `render`, with kernels from the middle on: [B, radius + 1]."""
    taps = taps.contiguous()
    for size, step in ((x.shape[3], 1), (x.shape[2], x.shape[3])):
        source, x, pixels = x, torch.empty_like(x), x[0, 0].numel()
        grid = 3 * len(x), triton.cdiv(pixels, BLOCK)
        with torch.cuda.device_of(x):
            _filter[grid](source, x, taps, taps.shape[1] - 1, size, pixels, step, BLOCK)
    return x
