"""Views rendered on tensors, against Pillow's chain, torchvision's float functions and scalar formulas.

Differences are in levels of 255.
"""

import colorsys
import math
import random
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from certificate.reference import reference
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as V2

from solo_ext.data import render
from solo_ext.data.augmentations import AugmentationConfig, ColorJitterConfig, ProbConfig, RandomResizedCropConfig
from solo_ext.data.datasets import DATASETS
from solo_ext.data.transforms import Transform, build_eval_transform
from solo_ext.data.views import DRAWS, JITTER_ORDERS, Views, draw_boxes, draw_views

F = T.functional
ALWAYS, WHOLE = ProbConfig(1.0), RandomResizedCropConfig(enabled=False)
LEVELS = (0.0, 0.0, 0.0), (1 / 255,) * 3  # mean and std that leave values from 0 to 255
JITTER = ColorJitterConfig(1.0, 0.4, 0.4, 0.4, 0.2)
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MODES = list(RESAMPLING)


def photo(number: int, size: int = 96) -> Image.Image:
    """A square of one of scikit-learn's two photographs, China and a flower."""
    return Image.fromarray(load_sample_images().images[number]).crop((250, 120, 250 + size, 120 + size))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pixels(image: Image.Image) -> Tensor:
    """uint8 [C, H, W]"""
    return V2.pil_to_tensor(image)


def numbers(count: int, seed: int = 0) -> np.ndarray:
    """[count, DRAWS]"""
    return np.random.default_rng(seed).random((count, DRAWS))


def crops(count: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth random images: float [count, channels, size, size], 0 to 255, all values and the ends among them."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic") * 340 - 40).clamp(0, 255)


def nothing(count: int) -> Views:
    """Views to which nothing is done."""
    off, never = np.zeros(count, bool), np.full(count, -1)
    return Views(never, np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)), off, np.zeros(count), off, off, off)


def finish(x: Tensor, **drawn) -> Tensor:
    """`render.finish` in levels, with these fields of `Views`."""
    views = nothing(len(x))._replace(**{name: np.asarray(value) for name, value in drawn.items()})
    return render.finish(x, views, *map(torch.tensor, LEVELS))


def jitter(x: Tensor, order: tuple[int, ...], factors) -> Tensor:
    row = [tuple(o) for o in JITTER_ORDERS].index(order)
    return finish(x, order=[row] * len(x), factors=factors)


EVERYTHING = AugmentationConfig(
    color_jitter=ColorJitterConfig(0.8, 0.4, 0.4, 0.2, 0.1),
    grayscale=ProbConfig(0.2),
    gaussian_blur=ProbConfig(0.5),
    solarization=ProbConfig(0.2),
    equalization=ProbConfig(0.2),
    horizontal_flip=ProbConfig(0.5),
    crop_size=32,
)
IMAGES = {
    "china": photo(0),
    "flower": photo(1),
    "noise": noise(96, 96),
    "gray photo": photo(0).convert("L"),
    "gray noise": noise(96, 96).convert("L"),
}

# --- against Pillow --------------------------------------------------------------------------------------

# Operation: its configuration, and bounds on the largest difference from Pillow's and on the mean over 20 views.
# Pillow rounds down after every blend (0.5 on average) and rounds the gray of contrast and saturation; keeps hue,
# saturation and value in 8 bits; blurs by six passes of boxes that it rounds each, and goes on outside each with the
# blurred edge (inside, all is below 3).
PILLOW = {
    "nothing": ({}, 0, 0),
    "brightness": ({"color_jitter": ColorJitterConfig(1.0, 0.4)}, 1, 0.6),
    "contrast": ({"color_jitter": ColorJitterConfig(1.0, 0.0, 0.4)}, 1.25, 0.6),
    "saturation": ({"color_jitter": ColorJitterConfig(1.0, 0.0, 0.0, 0.4)}, 1.25, 0.6),
    "hue": ({"color_jitter": ColorJitterConfig(1.0, 0.0, 0.0, 0.0, 0.2)}, 18, 1.5),
    "jitter": ({"color_jitter": JITTER}, 26, 2.5),
    "gray": ({"grayscale": ALWAYS}, 0.51, 0.26),
    "blur": ({"gaussian_blur": ALWAYS}, 26, 0.65),
    "solarize": ({"solarization": ALWAYS}, 0, 0),
    "equalize": ({"equalization": ALWAYS}, 0, 0),
    "flip": ({"horizontal_flip": ALWAYS}, 0, 0),
}


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("operation", PILLOW)
def test_operations_are_pillows(operation, image):
    parts, most, mean = PILLOW[operation]
    transform = Transform.random(AugmentationConfig(rrc=WHOLE, crop_size=96, **parts), *LEVELS)
    views = [(transform(IMAGES[image], u), reference(transform, IMAGES[image], u)) for u in numbers(20)]
    off = torch.stack([(ours - theirs).abs() for ours, theirs in views])
    assert off.max() <= most + 1e-4 and off.mean() <= mean + 1e-4
    if operation == "blur":
        assert off[..., 6:-6, 6:-6].max() < 3


@pytest.mark.parametrize("image", IMAGES)
def test_the_whole_chain_is_pillows(image):
    aug = AugmentationConfig(
        color_jitter=replace(JITTER, prob=0.8),
        grayscale=ProbConfig(0.2),
        gaussian_blur=ProbConfig(0.5),
        solarization=ProbConfig(0.3),
        horizontal_flip=ProbConfig(0.5),
        crop_size=64,
    )
    transform = Transform.random(aug, *LEVELS)
    off = [(transform(IMAGES[image], u) - reference(transform, IMAGES[image], u)).abs().mean() for u in numbers(60)]
    assert max(off) < 5 and torch.stack(off).mean() < 2


def test_equalize_in_the_chain_is_pillows():
    """It spreads what comes before it, rounding included; so it is compared on what the others leave exact."""
    aug = AugmentationConfig(
        solarization=ProbConfig(0.5),
        equalization=ProbConfig(0.7),
        horizontal_flip=ProbConfig(0.5),
        rrc=WHOLE,
        crop_size=96,
    )
    transform = Transform.random(aug, *LEVELS)
    for u in numbers(30):
        for image in IMAGES.values():
            torch.testing.assert_close(transform(image, u), reference(transform, image, u), rtol=0, atol=1e-4)


def test_gray_images_equal_rgb_images_of_equal_channels():
    aug = AugmentationConfig(
        color_jitter=JITTER,
        grayscale=ProbConfig(0.5),
        gaussian_blur=ProbConfig(0.5),
        solarization=ProbConfig(0.3),
        horizontal_flip=ProbConfig(0.5),
        crop_size=48,
    )
    transform = Transform.random(aug, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    for u in numbers(40):
        gray, rgb = transform(IMAGES["gray photo"], u), transform(IMAGES["gray photo"].convert("RGB"), u)
        assert gray.shape == rgb.shape == (3, 48, 48)
        torch.testing.assert_close(gray, rgb, rtol=0, atol=1e-5)


# --- against torchvision's float functions and scalar formulas -------------------------------------------


def unit(function):
    """A function of images in [0, 1] as one of levels."""
    return lambda x, *arguments: function(x / 255, *arguments) * 255


def gray_of(x: Tensor) -> Tensor:
    return torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), x)[:, None].expand_as(x)


# torchvision's gray has 0.2989 of red where Pillow has 0.299: 0.026 levels
ADJUST = [
    (unit(V2.adjust_brightness), (0.0, 0.3, 1.0, 1.7), 1e-3),
    (unit(V2.adjust_contrast), (0.0, 0.3, 1.0, 1.7), 0.03),
    (unit(V2.adjust_saturation), (0.0, 0.3, 1.0, 1.7), 0.03),
    (unit(V2.adjust_hue), (-0.5, -0.2, 0.01, 0.1, 0.5), 1e-3),
]


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_jitter_is_torchvisions(operation):
    function, values, bound = ADJUST[operation]
    x = crops(6, 24)
    order = (operation, *(i for i in range(4) if i != operation))
    for value in values:
        factors = np.tile([1.0, 1.0, 1.0, 0.0], (6, 1))
        factors[:, operation] = value
        torch.testing.assert_close(jitter(x, order, factors), function(x, value), rtol=0, atol=bound)


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_every_order_of_the_jitter(order):
    x, factors = crops(3, 24), np.random.default_rng(0).uniform(0.5, 1.5, (3, 4))
    factors[:, 3] = -0.2, 0.1, 0.3
    expected = []
    for row in range(3):
        one = x[row : row + 1]
        for operation in order:
            one = ADJUST[operation][0](one, factors[row, operation])
        expected.append(one)
    torch.testing.assert_close(jitter(x, order, factors), torch.cat(expected), rtol=0, atol=0.15)


def test_images_of_a_batch_have_their_own_orders_and_factors():
    x, rng = crops(24, 16), np.random.default_rng(0)
    factors = rng.uniform(0.6, 1.4, (24, 4)) - [0, 0, 0, 1]
    together = finish(x, order=np.arange(24), factors=factors)
    for row, order in enumerate(permutations(range(4))):
        torch.testing.assert_close(together[row], jitter(x[row : row + 1], order, factors[row : row + 1])[0])


def test_contrast_blends_with_the_mean_of_the_gray():
    x = crops(4, 16)
    expected = (0.5 * x + 0.5 * gray_of(x).mean((1, 2, 3), keepdim=True)).clamp(0, 255)
    factors = np.tile([1.0, 0.5, 1.0, 0.0], (4, 1))
    torch.testing.assert_close(jitter(x, (0, 1, 2, 3), factors), expected, rtol=0, atol=1e-3)


def test_gray_and_saturation_zero_are_the_luma():
    x = crops(4, 16)
    torch.testing.assert_close(finish(x, gray=[True] * 4), gray_of(x), rtol=0, atol=1e-3)
    factors = np.tile([1.0, 1.0, 0.0, 0.0], (4, 1))
    torch.testing.assert_close(jitter(x, (0, 1, 2, 3), factors), gray_of(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shift", [-0.5, -0.3, -1e-3, 0.1, 1 / 3, 0.5])
def test_hue_is_colorsys(shift):
    rng = np.random.default_rng(0)
    corners = np.array(list(np.ndindex(2, 2, 2))) * 255.0  # black, white, primaries
    ties = rng.choice([0.0, 100.0, 200.0], (30, 3))
    colors = np.concatenate([corners, ties, np.full((1, 3), 77.0), rng.uniform(0, 255, (61, 3))])
    expected = []
    for color in colors / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        expected.append(colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value))
    x = torch.tensor(colors.T, dtype=torch.float32).view(1, 3, 10, 10)
    ours = jitter(x, (3, 0, 1, 2), [[1.0, 1.0, 1.0, shift]]).view(3, 100)
    np.testing.assert_allclose(ours.T.numpy(), np.array(expected) * 255, atol=2e-3)


def boxes_blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """[H, W] by three extended boxes per axis (Gwosdek et al. 2011), whose variances add up to sigma^2."""
    whole = 0
    while ((2 * whole + 3) ** 2 - 1) / 12 <= sigma**2 / 3:
        whole += 1
    # the part of the outermost pixels by bisection: a box's variance is the mean square of its distances
    low, high = 0.0, 1.0
    for _ in range(60):
        part = (low + high) / 2
        variance = 2 * (sum(d * d for d in range(whole + 1)) + part * (whole + 1) ** 2) / (2 * (whole + part) + 1)
        low, high = (part, high) if variance < sigma**2 / 3 else (low, part)
    box = np.array([part, *[1.0] * (2 * whole + 1), part]) / (2 * (whole + part) + 1)
    margin = 3 * (whole + 1)
    padded = np.pad(image, margin, mode="edge")
    for axis in (0, 1) * 3:
        padded = np.apply_along_axis(np.convolve, axis, padded, box, mode="valid")
    return padded


@pytest.mark.parametrize("size", [2, 5, 24])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.75, 1.4, math.sqrt(2), 1.45, 2.0])
def test_blur_is_three_boxes(sigma, size):
    x = crops(2, size)
    ours = finish(x, blur=[sigma, 0.0])
    expected = np.stack([boxes_blurred(channel, sigma) for channel in x[0].double().numpy()])
    np.testing.assert_allclose(ours[0].numpy(), expected, atol=0.05)
    assert torch.allclose(ours[1], x[1])


def test_solarize_and_flip():
    x = torch.arange(256.0).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    solarized = torch.where(x < 128, x, 255 - x)
    torch.testing.assert_close(finish(x, solarize=[True, False])[0], solarized[0])
    torch.testing.assert_close(finish(x, flip=[False, True]), torch.stack([x[0], x[1].flip(2)]))


def test_equalize_spreads_the_rounded_values():
    image = IMAGES["flower"]
    x = pixels(image)[None].float() + torch.empty(1, 3, 96, 96).uniform_(-0.4, 0.4)
    expected = pixels(Image.fromarray(np.asarray(F.equalize(image))))
    torch.testing.assert_close(finish(x, equalize=[True])[0], expected.float(), rtol=0, atol=1e-4)


def test_operations_follow_each_other_as_solo_learns():
    """Jitter, gray, blur, solarize, equalize, flip; any two that do not commute, swapped, give something else."""
    x, one = crops(1, 32), np.ones(1, bool)
    factors, order = np.array([[1.3, 1.0, 1.0, 0.2]]), np.zeros(1, int)  # too bright: clipped before it is gray
    drawn = {"gray": one, "blur": np.array([1.5]), "solarize": one, "equalize": one, "flip": one}
    together = finish(x, order=order, factors=factors, **drawn)
    step = finish(x, order=order, factors=factors)
    for name, value in drawn.items():
        step = finish(step, **{name: value})
    assert (together - step).abs().mean() < 0.02  # equalize sees the rounding of normalise
    for early, late in (("gray", "solarize"), ("blur", "solarize"), ("blur", "equalize"), ("solarize", "equalize")):
        swapped = finish(finish(x, **{late: drawn[late]}), **{early: drawn[early]})
        assert (swapped - finish(x, **{early: drawn[early], late: drawn[late]})).abs().mean() > 0.5
    late_jitter = finish(finish(x, gray=one), order=order, factors=factors)
    assert (late_jitter - finish(x, order=order, factors=factors, gray=one)).abs().mean() > 0.5


# --- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 17, 32])
def test_a_batch_is_rendered_as_one_by_one(size, channels):
    u = numbers(40)
    views = draw_views(EVERYTHING, u)
    x = crops(40, size, channels)
    together = render.finish(x, views, *map(torch.tensor, LEVELS))
    assert together.shape == (40, 3, size, size) and together.dtype == torch.float32 and together.is_contiguous()
    for row in range(40):
        one = Views(*(array[row : row + 1] for array in views))
        assert torch.equal(render.finish(x[row : row + 1], one, *map(torch.tensor, LEVELS))[0], together[row])


@pytest.mark.parametrize("chunk", [1, 3 * 32 * 32 * 7, 2**40])
def test_parts_of_a_batch_change_nothing(monkeypatch, chunk):
    u, x = numbers(40), crops(40, 32)
    transform = Transform.random(replace(EVERYTHING, crop_size=32), *LEVELS)
    expected = transform.finish(x, u)
    monkeypatch.setattr(render, "CHUNK", chunk)
    assert torch.equal(transform.finish(x, u), expected)


@pytest.mark.parametrize("field", ["gray", "blur", "solarize", "equalize", "flip"])
def test_an_operation_on_all_images_of_a_batch(field):
    """Followed by others on some of them."""
    some = np.array([True, False, True])
    drawn = dict.fromkeys(("gray", "solarize", "equalize", "flip"), some) | {"blur": 1.5 * some}
    drawn[field] = np.ones(3) * 1.5 if field == "blur" else np.ones(3, bool)
    x = crops(3, 16)
    rows = [finish(x[i : i + 1], **{name: value[i : i + 1] for name, value in drawn.items()}) for i in range(3)]
    assert torch.equal(finish(x, **drawn), torch.cat(rows))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_are_left_as_they_were(dtype):
    x = crops(20, 16).round().to(dtype)
    before = x.clone()
    Transform.random(EVERYTHING, *LEVELS).finish(x, numbers(20))
    assert torch.equal(x, before)


def test_normalisation_is_per_channel():
    x, mean, std = crops(3, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    ours = render.normalise(x, torch.tensor(mean), torch.tensor(std))
    torch.testing.assert_close(ours, F.normalize(x / 255, mean, std), rtol=0, atol=1e-5)
    gray = render.normalise(x[:, :1], torch.tensor(mean), torch.tensor(std))
    torch.testing.assert_close(gray, F.normalize((x[:, :1] / 255).expand(-1, 3, -1, -1), mean, std), rtol=0, atol=1e-5)


# --- crops -----------------------------------------------------------------------------------------------

BOXES = {  # left, top, width, height, of a 200 x 150 image; to 64 px
    "down": (10, 5, 180, 140),
    "up": (50, 60, 23, 31),
    "across down, up": (3, 7, 190, 20),
    "across up, down": (77, 1, 20, 140),
    "as it is": (100, 50, 64, 64),
    "one pixel": (199, 149, 1, 1),
    "a row": (0, 149, 200, 1),
    "all": (0, 0, 200, 150),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("image", [noise(200, 150), photo(0, 200).crop((0, 0, 200, 150)), noise(200, 150).convert("L")])
def test_crops_are_pillows(image, box, mode):
    """Pillow's two passes, across and then down; which one its own `resize` begins with depends on its version."""
    left, top, width, height = BOXES[box]
    part, how = image.crop((left, top, left + width, top + height)), RESAMPLING[mode]
    expected = pixels(part.resize((64, height), how).resize((64, 64), how)).float()
    one = render.crop_resize(pixels(image), BOXES[box], 64, mode)
    batch = render.crop_resize_batch(pixels(image)[None], torch.tensor([BOXES[box]]), 64, mode)
    assert one.dtype == torch.uint8
    for off in ((one - expected).abs(), (batch[0] - expected).abs()):
        assert off.max() <= 1 and off.mean() < 0.03


@pytest.mark.parametrize("mode", MODES)
def test_crops_of_a_batch_are_those_of_its_images(mode):
    boxes = draw_boxes(RandomResizedCropConfig(), np.full(30, 40), np.full(30, 28), numbers(30))
    images = torch.randint(0, 256, (30, 3, 28, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = render.crop_resize_batch(images, torch.from_numpy(boxes), 32, mode)
    one_by_one = [render.crop_resize(image, box, 32, mode) for image, box in zip(images, boxes.tolist(), strict=True)]
    off = (batch - torch.stack(one_by_one)).abs()
    assert off.max() <= 2 and off.mean() < 0.05


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("box", BOXES)
def test_pixels_outside_the_box_have_no_influence(box, mode):
    left, top, width, height = BOXES[box]
    one, other = (pixels(noise(200, 150, seed)) for seed in (0, 1))
    inside = slice(top, top + height), slice(left, left + width)
    other[:, inside[0], inside[1]] = one[:, inside[0], inside[1]]
    for crop in (
        lambda image: render.crop_resize(image, BOXES[box], 32, mode),
        lambda image: render.crop_resize_batch(image[None], torch.tensor([BOXES[box]]), 32, mode),
    ):
        assert torch.equal(crop(one), crop(other))


def test_a_crop_of_the_views_own_size_is_exact():
    image = pixels(noise(50, 40))
    boxes = torch.tensor([[7, 3, 32, 32]])
    expected = image[:, 3:35, 7:39]
    assert torch.equal(render.crop_resize(image, (7, 3, 32, 32), 32, "bicubic"), expected)
    torch.testing.assert_close(render.crop_resize_batch(image[None], boxes, 32, "bicubic")[0], expected.float())


def test_one_image_and_a_batch_are_the_same_views():
    transform = Transform.random(replace(EVERYTHING, crop_size=28, equalization=ProbConfig()), *LEVELS)
    images = torch.stack([pixels(photo(i % 2, 40)) for i in range(30)])
    u = numbers(30)
    batch = transform.finish(transform.crop_batch(images, u), u)
    off = torch.stack([transform(image, row) for image, row in zip(images, u, strict=True)]) - batch
    assert off.abs().max() < 5 and off.abs().mean() < 0.01  # some pixels of the crop are rounded otherwise


# --- transforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", [(32, 32), (40, 24), (24, 41), (19, 90)])
def test_without_a_random_crop_the_image_is_resized(width, height):
    transform = Transform.random(AugmentationConfig(rrc=WHOLE, crop_size=20), *LEVELS)
    expected = T.Compose([T.Resize(20, T.InterpolationMode.BICUBIC), T.CenterCrop(20), T.PILToTensor()])
    image, [u] = photo(0, 128).crop((0, 0, width, height)), numbers(1)
    off = transform(image, u) - expected(image)
    assert off.abs().max() <= 2 and off.abs().mean() < 0.1
    torch.testing.assert_close(
        transform.finish(transform.crop_batch(pixels(image)[None], u[None]), u[None])[0], transform(image, u)
    )


def test_default_uniforms_come_from_torchs_global_generator():
    transform = Transform.random(replace(EVERYTHING, crop_size=20), (0.5,) * 3, (0.5,) * 3)
    with torch.random.fork_rng(devices=[]):
        views = []
        for _ in range(2):
            torch.manual_seed(3)
            random.seed()
            views.append(transform(noise(30, 30)))
    assert torch.equal(*views)


@pytest.mark.parametrize(
    "name, crop_size, size, expected",
    [
        ("cifar10", 32, (32, 32), T.Compose([])),
        ("cifar10", 24, (32, 32), T.Resize((24, 24))),
        ("fashion_mnist_mini", 32, (28, 28), T.Resize((32, 32))),
        ("stl10", 96, (96, 96), T.Compose([])),
        ("imagenet", 224, (300, 500), T.Compose([T.Resize(256), T.CenterCrop(224)])),
        ("imagenet", 224, (501, 333), T.Compose([T.Resize(256), T.CenterCrop(224)])),
        ("imagenet", 224, (256, 256), T.CenterCrop(224)),
        ("custom", 112, (90, 70), T.Compose([T.Resize(128), T.CenterCrop(112)])),
        ("custom", 97, (131, 257), T.Compose([T.Resize(111), T.CenterCrop(97)])),
        ("custom", 33, (37, 700), T.Compose([T.Resize(38), T.CenterCrop(33)])),
    ],
)
def test_evaluation_sees_what_solo_learn_shows_it(name, crop_size, size, expected):
    info = DATASETS[name]
    chain = T.Compose([expected, T.ToTensor(), T.Normalize(info.eval_mean or info.mean, info.eval_std or info.std)])
    image = noise(*size)
    transform = build_eval_transform(info, crop_size)
    off = (transform(image) - chain(image)) * transform.std[:, None, None] * 255
    assert transform(image).shape == (3, crop_size, crop_size)
    assert off.abs().max() <= 2.01 and off.abs().mean() < 0.2  # Pillow's and torch's rounding
    gray = image.convert("L")
    off = (transform(gray) - chain(gray.convert("RGB"))) * transform.std[:, None, None] * 255
    assert off.abs().max() <= 2.01


def test_linear_training_crops_and_flips():
    transform = build_eval_transform(DATASETS["cifar10"], 32, augment=True)
    aug = transform.aug
    assert (aug.rrc.crop_min_scale, aug.rrc.crop_max_scale, aug.horizontal_flip.prob) == (0.08, 1.0, 0.5)
    assert (transform.mode, transform.mean.tolist()) == ("bilinear", pytest.approx([0.4914, 0.4822, 0.4465]))
    views = draw_views(aug, numbers(200))
    assert (views.order == -1).all() and not any(drawn.any() for drawn in views[2:-1]) and 70 < views.flip.sum() < 130
    for u in numbers(20):
        off = (transform(photo(0, 40), u) - reference(transform, photo(0, 40), u)) * transform.std[:, None, None] * 255
        assert off.abs().max() <= 1.01
