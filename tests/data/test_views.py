"""What is drawn for a view, against scalar transcriptions, torchvision's generators and the distributions."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision import transforms as T

from solo_ext.data.augmentations import (
    AugmentationConfig,
    ColorJitterConfig,
    ProbConfig,
    RandomResizedCropConfig,
)
from solo_ext.data.views import CROP_ATTEMPTS, DRAWS, JITTER_ORDERS, draw_boxes, draw_views, uniforms

PARTS = ("color_jitter", "grayscale", "gaussian_blur", "solarization", "equalization", "horizontal_flip")
ALPHA = 1e-4  # of one test of a distribution; the numbers are fixed, so it passes always or never
STRONG = AugmentationConfig(
    color_jitter=ColorJitterConfig(0.8, 0.4, 0.3, 0.2, 0.1),
    grayscale=ProbConfig(0.25),
    gaussian_blur=ProbConfig(0.6),
    solarization=ProbConfig(0.2),
    equalization=ProbConfig(0.3),
    horizontal_flip=ProbConfig(0.5),
)
GOLDEN_NUMBERS = [0.9929579079032483, 0.856199741687415, 0.6814716524921128, 0.8531165549374462]
GOLDEN_BOXES = [[208, 55, 291, 278], [0, 5, 32, 26]]
GOLDEN_DECISIONS = [[20, 9, 2, 18], [0, 0, 0, 1], [0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 0]]
GOLDEN_BLUR = [1.8531914472070528, 1.293333807008484, 1.1119314419602957, 0.0]
GOLDEN_FACTORS = [1.1283845372890648, 0.7773881942422978, 0.9144911439159725, 0.029389134099547354]
FIELD = {  # of Views, that belongs to a part of the configuration
    "color_jitter": "order",
    "grayscale": "gray",
    "gaussian_blur": "blur",
    "solarization": "solarize",
    "equalization": "equalize",
    "horizontal_flip": "flip",
}


def numbers(count: int, seed: int = 0) -> np.ndarray:
    """[count, DRAWS]"""
    return np.random.default_rng(seed).random((count, DRAWS))


# --- uniform numbers -------------------------------------------------------------------------------------


class SplitMix64:
    """Steele, Lea, Flood 2014, with Python's integers."""

    GAMMA, ALL = 0x9E3779B97F4A7C15, 2**64 - 1

    def __init__(self, state: int):
        self.state = state & self.ALL

    def __next__(self) -> int:
        self.state = (self.state + self.GAMMA) & self.ALL
        return self.finalise(self.state)

    @classmethod
    def finalise(cls, z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & cls.ALL
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & cls.ALL
        return z ^ (z >> 31)


def test_the_transcription_gives_the_published_numbers():
    generator = SplitMix64(1234567)
    assert [next(generator) for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    "seed, epoch, index", [(0, 0, 0), (5, 0, 1), (5, 399, 1_281_166), (2**40 + 1, 7, 2**33), (-1, 1, 3)]
)
def test_numbers_are_splitmix64_started_at_a_hash_of_the_sample(seed, epoch, index):
    key = next(SplitMix64(seed))
    for number in (epoch, index):
        key = SplitMix64.finalise((key + number * SplitMix64.GAMMA) & SplitMix64.ALL)
    generator = SplitMix64(key)
    expected = [(next(generator) >> 11) / 2**53 for _ in range(3 * DRAWS)]
    assert uniforms(seed, [epoch], [index], 3).ravel().tolist() == expected


def test_nobodys_runs_change_silently():
    """These numbers may never change: they are everybody's augmentations."""
    u = uniforms(5, [0, 399], [0, 1_281_166], 2)
    assert u.shape == (2, 2, DRAWS) and u.dtype == np.float64
    assert [u[0, 0, 0], u[0, 1, 33], u[1, 0, 7], u[1, 1, 13]] == GOLDEN_NUMBERS
    assert draw_boxes(STRONG.rrc, [500, 32], [375, 32], u[:, 0]).tolist() == GOLDEN_BOXES
    views = draw_views(STRONG, uniforms(5, [3] * 4, range(4), 1)[:, 0])
    decisions = np.stack([views.order, views.gray, views.solarize, views.equalize, views.flip])
    assert decisions.tolist() == GOLDEN_DECISIONS
    np.testing.assert_allclose(views.blur, GOLDEN_BLUR, rtol=1e-12)
    np.testing.assert_allclose(views.factors[0], GOLDEN_FACTORS, rtol=1e-12)


def test_every_number_of_a_view_is_uniform():
    u = uniforms(1, np.repeat(np.arange(10), 1000), np.tile(np.arange(1000), 10), 2)
    assert u.min() >= 0 and u.max() < 1
    worst = min(kstest(place, "uniform").pvalue for place in u.reshape(10_000, -1).T)
    assert worst > 0.01 / (2 * DRAWS)


@pytest.mark.parametrize("axis", range(5), ids=["seed", "epoch", "index", "view", "place"])
def test_neighbours_are_independent(axis):
    epochs, indexes = np.repeat(np.arange(6), 40), np.tile(np.arange(40), 6)
    u = np.stack([uniforms(seed, epochs, indexes, 3).reshape(6, 40, 3, DRAWS) for seed in range(6)])
    u = np.moveaxis(u, axis, 0)
    one, other = u[:-1].ravel(), u[1:].ravel()
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(one.size)
    assert kstest((other - one) % 1, "uniform").pvalue > ALPHA  # the difference on the circle: any lattice shows
    assert kstest((other + one) % 1, "uniform").pvalue > ALPHA


def test_numbers_do_not_depend_on_the_batch_or_on_the_count_of_views():
    rng = np.random.default_rng(0)
    epochs, indexes = rng.integers(0, 400, 50), rng.integers(0, 10**6, 50)
    whole = uniforms(7, epochs, indexes, 4)
    order = rng.permutation(50)
    assert np.array_equal(uniforms(7, epochs[order], indexes[order], 4), whole[order])
    assert np.array_equal(uniforms(7, epochs, indexes, 2), whole[:, :2])
    for row in (0, 17, 49):
        assert np.array_equal(uniforms(7, epochs[row : row + 1], indexes[row : row + 1], 4)[0], whole[row])


def test_an_epoch_of_imagenet_repeats_no_number():
    size, step = 1_281_167, 2**16  # in parts, for the memory
    starts = range(0, size, step)
    parts = [np.arange(start, min(start + step, size)) for start in starts]
    drawn = np.concatenate([uniforms(5, np.full(len(part), 3), part, 1)[:, 0, :4].ravel() for part in parts])
    drawn.sort()
    assert len(drawn) == 4 * size and (np.diff(drawn) > 0).all()


def test_global_generators_are_neither_read_nor_moved():
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        u = uniforms(3, [0, 1], [5, 6], 2)
        drawn.append((u, draw_boxes(STRONG.rrc, [40, 50], [30, 20], u[:, 0]), *draw_views(STRONG, u[:, 1])))
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()
    assert all(map(np.array_equal, *drawn))


# --- boxes -----------------------------------------------------------------------------------------------


def box_of_one(rrc: RandomResizedCropConfig, width: int, height: int, u: list[float]) -> list[int]:
    """torchvision's get_params, one try after the other."""
    for attempt in range(CROP_ATTEMPTS):
        u_area, u_ratio = u[14 + 2 * attempt : 16 + 2 * attempt]
        area = width * height * (rrc.crop_min_scale + (rrc.crop_max_scale - rrc.crop_min_scale) * u_area)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u_ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[0] * (width - w + 1)), int(u[1] * (height - h + 1)), w, h]
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return [(width - w) // 2, (height - h) // 2, w, h]


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 0.9), (1.0, 1.0), (1e-4, 0.01)])
def test_boxes_are_those_of_the_loop(scale):
    rng, u, rrc = np.random.default_rng(1), numbers(3000), RandomResizedCropConfig(True, *scale)
    # all shapes from 1 px to 2000 px: with the extreme ratios no try fits
    widths, heights = (np.exp(rng.uniform(0, math.log(2000), 3000)).astype(int) for _ in range(2))
    boxes = draw_boxes(rrc, widths, heights, u)
    assert boxes.dtype == np.int64
    images = zip(widths.tolist(), heights.tolist(), u.tolist(), strict=True)
    assert boxes.tolist() == [box_of_one(rrc, *image) for image in images]
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (w > 0).all() and (h > 0).all()
    assert (left + w <= widths).all() and (top + h <= heights).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("width, height", [(1, 1), (1, 300), (3, 4), (500, 375), (4096, 4096)])
def test_boxes_stay_inside_at_the_ends_of_the_numbers(width, height, u):
    [[left, top, w, h]] = draw_boxes(STRONG.rrc, [width], [height], np.full((1, DRAWS), u))
    assert 0 <= left <= left + w <= width and 0 <= top <= top + h <= height and w > 0 and h > 0


@pytest.mark.parametrize(
    "width, height, scale",
    [
        (500, 375, (0.08, 1.0)),
        (32, 32, (0.2, 1.0)),
        (28, 90, (0.2, 0.9)),
        (300, 20, (0.2, 0.9)),
        (50, 40, (0.7, 1.0)),
        (7, 5, (0.08, 1.0)),
        (2000, 3, (0.08, 1.0)),
        (1, 40, (0.08, 1.0)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(width, height, scale):
    n = 3000
    ours = draw_boxes(RandomResizedCropConfig(True, *scale), np.full(n, width), np.full(n, height), numbers(n))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.empty(1, height, width)
        drawn = [T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]
    theirs = np.array(drawn)[:, [1, 0, 3, 2]]
    for quantity in (*range(4), lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0] + b[:, 2]):
        one, other = (quantity(b) if callable(quantity) else b[:, quantity] for b in (ours, theirs))
        assert ks_2samp(one, other).pvalue > ALPHA


# --- everything else -------------------------------------------------------------------------------------


def test_operations_come_as_often_as_configured_and_independently():
    n = 20_000
    views = draw_views(STRONG, numbers(n))
    drawn = np.array([views.order >= 0, views.gray, views.blur > 0, views.solarize, views.equalize, views.flip])
    p = np.array([getattr(STRONG, part).prob for part in PARTS])
    assert (np.abs(drawn.mean(1) - p) < 4 * np.sqrt(p * (1 - p) / n)).all()
    assert (np.abs(np.corrcoef(drawn) - np.eye(6)) < 4 / math.sqrt(n)).all()


def test_factors_and_radii_have_the_configured_ranges_and_are_independent():
    n = 10_000
    views = draw_views(replace(STRONG, gaussian_blur=ProbConfig(1.0)), numbers(n))
    ranges = (0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)
    drawn = np.column_stack([views.factors, views.blur])
    for values, (low, high) in zip(drawn.T, ranges, strict=True):
        assert kstest(values, "uniform", (low, high - low)).pvalue > ALPHA
    everything = np.column_stack([drawn, views.order, views.flip, views.solarize])
    assert (np.abs(np.corrcoef(everything.T) - np.eye(8)) < 4 / math.sqrt(n)).all()


def test_all_24_orders_come_equally_often():
    views = draw_views(replace(STRONG, color_jitter=ColorJitterConfig(1.0, 0.4, 0.4, 0.2, 0.1)), numbers(24_000))
    orders = Counter(map(tuple, JITTER_ORDERS[views.order]))
    assert len(orders) == 24 and chisquare(list(orders.values())).pvalue > ALPHA
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)


@pytest.mark.parametrize("strength, low", [(1.5, 0.0), (1.0, 0.0), (0.3, 0.7)])
def test_strengths_above_one_stop_at_zero(strength, low):
    jitter = ColorJitterConfig(1.0, strength, strength, strength, 0.5)
    factors = draw_views(replace(STRONG, color_jitter=jitter), numbers(5000)).factors
    for values in factors[:, :3].T:
        assert kstest(values, "uniform", (low, 1 + strength - low)).pvalue > ALPHA
    assert kstest(factors[:, 3], "uniform", (-0.5, 1)).pvalue > ALPHA


def test_a_strength_of_zero_changes_nothing():
    views = draw_views(replace(STRONG, color_jitter=ColorJitterConfig(1.0)), numbers(1000))
    assert (views.factors == [1, 1, 1, 0]).all()


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_probabilities_zero_and_one_are_never_and_always(prob, edge):
    jitter = ColorJitterConfig(prob, 0.4, 0.4, 0.2, 0.1)
    parts = dict.fromkeys(PARTS[1:], ProbConfig(prob))
    views = draw_views(AugmentationConfig(color_jitter=jitter, **parts), np.full((1, DRAWS), edge))
    drawn = views.order >= 0, views.gray, views.blur > 0, views.solarize, views.equalize, views.flip
    assert [bool(d[0]) for d in drawn] == [bool(prob)] * 6
    assert views.order[0] in range(-1, 24)


def test_a_config_that_says_nothing_only_crops():
    views = draw_views(AugmentationConfig(), numbers(200))
    assert (views.order == -1).all() and not any(d.any() for d in views[2:])


@pytest.mark.parametrize("part", PARTS)
def test_changing_one_probability_moves_no_other_decision(part):
    u = numbers(300)
    on, off = (
        draw_views(replace(STRONG, **{part: replace(getattr(STRONG, part), prob=prob)}), u) for prob in (1.0, 0.0)
    )
    for field in on._fields:
        same = np.array_equal(getattr(on, field), getattr(off, field))
        assert same is (field != FIELD[part]), field


PLACES = ["left", "top", "order", "order", *["factors"] * 4, "gray", "blur", "blur", "solarize", "equalize", "flip"]


@pytest.mark.parametrize("place", range(DRAWS))
def test_each_number_moves_one_thing(place):
    u = numbers(400)
    other = u.copy()
    other[:, place] = np.random.default_rng(9).random(400)
    changed = [name for name, a, b in zip(*_drawn(u), _drawn(other)[1], strict=True) if not np.array_equal(a, b)]
    assert set(changed) <= ({PLACES[place]} if place < 14 else {"left", "top", "width", "height"})
    assert changed if place < 18 else True  # later tries are seldom needed


def _drawn(u: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    views = draw_views(STRONG, u)
    boxes = draw_boxes(STRONG.rrc, np.full(len(u), 90), np.full(len(u), 60), u)
    return ["left", "top", "width", "height", *views._fields], [*boxes.T, *views]


def test_a_view_does_not_depend_on_its_batch():
    u = numbers(60)
    views, boxes = draw_views(STRONG, u), draw_boxes(STRONG.rrc, np.arange(60) + 9, np.full(60, 40), u)
    for row in range(60):
        one = slice(row, row + 1)
        assert all(map(np.array_equal, draw_views(STRONG, u[one]), [array[one] for array in views]))
        assert np.array_equal(draw_boxes(STRONG.rrc, [row + 9], [40], u[one]), boxes[one])
