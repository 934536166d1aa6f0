"""Every data format gives the views of solo-learn's chain of Pillow and torchvision: three comparisons.

* drawn: the parameters of each operation, as all formats draw them, against torchvision's own generators (KS).
* rendered: each format's views against Pillow's by the same numbers (`reference`), operation by operation.
* whole chain: each format's views against torchvision's random chain by other numbers (mean image; KS of features).

Images are rendered through the formats' own loaders.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, get_args

import numpy as np
import torch
from scipy.stats import ks_2samp, norm
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchvision import transforms as T

from solo_ext.data.augmentations import AugmentationConfig, ColorJitterConfig, ProbConfig, RandomResizedCropConfig
from solo_ext.data.datasets import Format
from solo_ext.data.transforms import Transform
from solo_ext.data.views import BLUR_RADIUS, CROP_RATIO, JITTER_ORDERS, draw_boxes, draw_views, uniforms
from solo_ext.errors import ConfigError
from solo_ext.schema import OneOf, fit

from .cases import LEVELS, Case, all_cases, loadable
from .decoded import decoded
from .page import Certificate, Check
from .reference import random_chain, reference

DRAWS = 32  # views per operation and format; 16 times as many of the whole chain
PARAMETERS = 4000  # drawn per parameter
ALPHA = 1e-3  # chance that a certificate without a fault fails one of its tests of distributions
GRID = 4  # mean images are compared by the means of GRID x GRID cells, per channel
JITTER = ("brightness", "contrast", "saturation", "hue")

NAMES = {
    "grayscale": "grayscale",
    "gaussian_blur": "blur",
    "solarization": "solarize",
    "equalization": "equalize",
    "horizontal_flip": "flip",
}
FEATURES = ("brightness", "contrast", "saturation", "sharpness", "left - right")
# Largest mean absolute difference and bias of views of photographs, in levels of 255. Pillow rounds down in each blend
# (0.5 on average), rounds in each of six passes of a blur, and has 8 bits for hue; equalization enlarges all that.
BOUNDS = {
    "crop": (0.1, 0.05),
    "resize": (0.1, 0.05),
    "brightness": (0.7, 0.6),
    "contrast": (0.7, 0.6),
    "saturation": (0.7, 0.6),
    "hue": (0.9, 0.3),
    "jitter": (2.0, 1.8),
    "grayscale": (0.4, 0.1),
    "blur": (0.7, 0.3),
    "solarize": (0.1, 0.05),
    "equalize": (0.25, 0.1),
    "flip": (0.1, 0.05),
    "all": (3.0, 1.8),
}
# DALI's resampling is not quite Pillow's. A pixel more of the brightest shade can change the whole steps between the
# shades of an equalized image by a quarter, at 32 x 32 px.
DALI = {name: (difference + 0.25, bias) for name, (difference, bias) in BOUNDS.items()} | {"equalize": (4.0, 1.5)}


def certify(
    augmentations: Sequence[AugmentationConfig] | None = None,
    images: str | None = None,
    formats: Sequence[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
    device: str = "cpu",
) -> Certificate:
    """Compares the views of all data formats with those of solo-learn's chain.

    Args:
        augmentations: whose; by default all operations at 224, 32 and 28 pixels.
        images: a folder, list of files or HDF5 file with images; by default scikit-learn's two photographs, cut up, and
            bundled Fashion-MNIST images. The bounds are meant for photographs.
        formats: that have to be certified; by default all that work here.
        draws: views per operation and format.
        seed: of the formats' views, and of torchvision's.
        device: where `tensor` and `dali` make their views. The bounds were measured on CPUs.

    Raises:
        SoloExtError: images that cannot be read, or a format of `formats` that does not work here.
    """
    for name in formats:
        fit(Annotated[str, OneOf(get_args(Format)[1:])], name, "--formats")
    device = _device(device)
    checks: list[Check] = []
    left_out: list[str] = []
    known: set[str] = set()
    with TemporaryDirectory() as folder:
        for case in all_cases(augmentations, images, Path(folder)):
            names = loadable(case, formats, device, left_out)
            if not names:
                continue
            checks += _drawn(case, seed, known)
            checks += _rendered(case, names, draws, seed, device)
            checks += _chained(case, names, 16 * draws, seed, device)
        if images is None:
            checks += decoded(formats, Path(folder), seed, device)
    tests = sum(check.measure == "p" for check in checks)
    checks = [replace(check, bound=ALPHA / tests) if check.measure == "p" else check for check in checks]
    settings = {"draws": draws, "chain": 16 * draws, "parameters": PARAMETERS, "alpha": ALPHA, "tests": tests}
    settings |= {"seed": seed, "device": str(device), "packages": ", ".join(_versions())}
    return Certificate(tuple(checks), settings, tuple(dict.fromkeys(left_out)))


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # the latter of a torch that was built without CUDA
        raise ConfigError(f"--device: there is no device '{name}' here; use cpu") from None


# --- drawn -----------------------------------------------------------------------------------------------


def _drawn(case: Case, seed: int, known: set[str]) -> list[Check]:
    """Of all parameters but those that are `known` from another case."""
    u = uniforms(seed, np.zeros(PARAMETERS, np.int64), np.arange(PARAMETERS), 1)[:, 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = _parameters(case.aug, u)
        if case.aug.rrc.enabled:
            sizes = case.sizes()
            for size in dict.fromkeys((sizes[0], sizes[-1])):
                pairs |= _boxes(case.aug, u, *size)
    checks = []
    for name, (ours, theirs) in pairs.items():
        if (key := f"{name} {replace(case.aug, crop_size=1)}") not in known:
            test = ks_2samp(ours, theirs, method="asymp")
            p, distance = float(test.pvalue), float(test.statistic)
            checks.append(Check(case.name, "drawn", "all formats", name, "p", p, effect=distance))
            known.add(key)
    return checks


def _boxes(aug: AugmentationConfig, u: np.ndarray, width: int, height: int) -> dict[str, tuple]:
    """Of each quantity, ours and torchvision's."""
    ours = draw_boxes(aug.rrc, np.full(len(u), width), np.full(len(u), height), u).T
    scale, image = (aug.rrc.crop_min_scale, aug.rrc.crop_max_scale), torch.empty(1, height, width)
    drawn = [T.RandomResizedCrop.get_params(image, scale, CROP_RATIO) for _ in u]
    theirs = np.array(drawn).T[[1, 0, 3, 2]]
    quantities = {"left": lambda b: b[0], "top": lambda b: b[1], "area": lambda b: b[2] * b[3]}
    quantities["width / height"] = lambda b: b[2] / b[3]
    return {f"crop's {name}, {width} x {height} px": (q(ours), q(theirs)) for name, q in quantities.items()}


def _parameters(aug: AugmentationConfig, u: np.ndarray) -> dict[str, tuple]:
    """Of each decision, factor and radius, ours and what torchvision's classes and solo-learn's blur draw."""
    views, jitter = draw_views(aug, u), aug.color_jitter
    parts = [name for name, part in vars(aug).items() if hasattr(part, "prob")]
    drawn = zip(parts, (views.order >= 0, *views[2:]), strict=True)
    pairs = {}
    for part, ours in drawn:
        if prob := getattr(aug, part).prob:
            pairs[f"{part}: whether"] = ours > 0, _decisions(part, prob, len(u))
    on = views.order >= 0
    theirs = T.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    ranges = theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue
    orders, *factors = zip(*(theirs.get_params(*ranges) for _ in range(on.sum())), strict=True) if on.any() else [()]
    for place, (name, values) in enumerate(zip(JITTER, factors, strict=False)):
        if getattr(jitter, name):
            pairs[f"{name}: factor"] = views.factors[on, place], values
    if on.any():
        digits = 4 ** np.arange(4)
        pairs["color_jitter: order"] = JITTER_ORDERS[views.order[on]] @ digits, torch.stack(orders).numpy() @ digits
    if blurred := int((views.blur > 0).sum()):
        pairs["gaussian_blur: radius"] = views.blur[views.blur > 0], torch.empty(blurred).uniform_(*BLUR_RADIUS).numpy()
    return pairs


def _decisions(part: str, prob: float, count: int) -> list[bool]:
    image = torch.tensor([[[0, 9]], [[99, 0]], [[5, 8]]], dtype=torch.uint8)
    if part == "grayscale":
        decide = T.RandomGrayscale(prob)
    elif part == "horizontal_flip":
        decide = T.RandomHorizontalFlip(prob)
    else:
        decide = T.RandomApply([torch.zeros_like], prob)
    return [not torch.equal(decide(image), image) for _ in range(count)]


# --- rendered --------------------------------------------------------------------------------------------


def _rendered(case: Case, formats: Sequence[str], draws: int, seed: int, device: torch.device) -> list[Check]:
    operations = _operations(case.aug, case.sizes())
    transforms = [Transform.random(aug, *LEVELS) for aug in operations.values()]
    loaders = [case.loader(name, list(operations.values()), seed, device) for name in formats]
    found = defaultdict(list)
    for epoch in range(math.ceil(draws / len(case.images))):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for batches in zip(*loaders, strict=True):
            indexes = batches[0][0].cpu()
            assert all(torch.equal(batch[0].cpu(), indexes) for batch in batches)
            numbers = uniforms(seed, np.full(len(indexes), epoch), indexes.numpy(), len(operations))
            pictures = [case.picture(i) for i in indexes.tolist()]
            for place, (operation, transform) in enumerate(zip(operations, transforms, strict=True)):
                rows = zip(pictures, numbers[:, place], strict=True)
                expected = torch.stack([reference(transform, picture, u) for picture, u in rows])
                for name, (_, views, _) in zip(formats, batches, strict=True):
                    off = views[place].cpu() - expected
                    found[name, operation] += zip(_per_view(off.abs()), _per_view(off), strict=True)
    checks = []
    for (name, operation), values in found.items():
        bounds = _bounds(name, operation)
        for measure, value, bound in zip(("difference", "bias"), np.mean(values, axis=0), bounds, strict=True):
            checks.append(Check(case.name, "rendered", name, operation, measure, float(value), bound))
    return checks


def _per_view(off: Tensor) -> list[float]:
    return off.mean((1, 2, 3)).tolist()


def _bounds(format: str, operation: str) -> tuple[float | None, float | None]:
    return (DALI if format == "dali" else BOUNDS).get(operation, (None, None))


def _operations(aug: AugmentationConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, AugmentationConfig]:
    """Each operation of `aug` alone and always, after the crop; then all as configured."""
    alone = AugmentationConfig(rrc=aug.rrc, crop_size=aug.crop_size)
    found = {}
    if len(sizes) == 1:
        found["decode"] = replace(alone, rrc=RandomResizedCropConfig(enabled=False), crop_size=min(sizes[0]))
    found["crop" if aug.rrc.enabled else "resize"] = alone
    strengths = {name: getattr(aug.color_jitter, name) for name in JITTER if getattr(aug.color_jitter, name)}
    if aug.color_jitter.prob:
        parts = {name: {name: strength} for name, strength in strengths.items()} | {"jitter": strengths}
        found |= {n: replace(alone, color_jitter=ColorJitterConfig(1.0, **part)) for n, part in parts.items() if part}
    for part, name in NAMES.items():
        if getattr(aug, part).prob:
            found[name] = replace(alone, **{part: ProbConfig(1.0)})
    return found | {"all": aug}


# --- the whole chain -------------------------------------------------------------------------------------


def _chained(case: Case, formats: Sequence[str], draws: int, seed: int, device: torch.device) -> list[Check]:
    at_once = 4  # views of an image that is decoded once
    epochs = range(math.ceil(draws / at_once / len(case.images)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        levels = [T.PILToTensor(), lambda pixels: pixels.expand(3, -1, -1).float()]
        chain = T.Compose([*random_chain(case.aug), *levels])
        pictures = [case.picture(i) for i in range(len(case.images))]
        theirs = [_features(torch.stack([chain(p) for p in pictures])) for _ in range(at_once) for _ in epochs]
    means, features = map(torch.cat, zip(*theirs, strict=True))
    checks = []
    for name in formats:
        loader, found = case.loader(name, [case.aug] * at_once, seed, device), []
        for epoch in epochs:
            loader.sampler.set_epoch(epoch)
            found += [_features(view.cpu()) for _, views, _ in loader for view in views]
        our_means, our_features = map(torch.cat, zip(*found, strict=True))
        off = (our_means.mean(0) - means.mean(0)).abs()
        error = ((our_means.var(0) + means.var(0)) / len(means)).sqrt().clamp(min=1e-6)
        z = ((off - _bounds(name, "all")[1]).clamp(min=0) / error).max().item()
        p = min(1.0, float(2 * norm.sf(z) * off.numel()))
        checks.append(Check(case.name, "chain", name, "mean image", "p", p, effect=off.max().item()))
        for feature, ours, expected in zip(FEATURES, our_features.T.numpy(), features.T.numpy(), strict=True):
            test = ks_2samp(ours, expected, method="asymp")
            checks.append(
                Check(case.name, "chain", name, feature, "p", float(test.pvalue), effect=float(test.statistic))
            )
    return checks


def _features(views: Tensor) -> tuple[Tensor, Tensor]:
    """Of B views in levels: the means of their cells, [B, 3 * GRID**2], and their `FEATURES`, [B, 5]."""
    left, right = views.chunk(2, dim=3)
    numbers = (
        views.mean((1, 2, 3)),
        views.std((1, 2, 3)),
        (views.amax(1) - views.amin(1)).mean((1, 2)),
        views.diff(dim=3).abs().mean((1, 2, 3)),
        left.mean((1, 2, 3)) - right.mean((1, 2, 3)),
    )
    return adaptive_avg_pool2d(views, GRID).flatten(1), torch.stack(numbers, dim=1)


def _versions() -> Iterator[str]:
    for name in ("torch", "torchvision", "pillow", "numpy", "h5py", "nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        with suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"
