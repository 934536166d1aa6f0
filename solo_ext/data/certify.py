"""Parity certificate: every data format gives the views of solo-learn's chain of Pillow and torchvision.

Three comparisons, each through the formats' own loaders where images are rendered:

* drawn: the parameters of each operation, as all formats draw them, against torchvision's own generators (KS).
* rendered: each format's views against Pillow's by the same numbers (`reference`), operation by operation.
* whole chain: each format's views against torchvision's random chain by other numbers (mean image; KS of features).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import ks_2samp, norm
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchvision import transforms as T

from solo_ext.data.config import (
    FORMATS,
    PARTS_WITH_PROB,
    AugmentationConfig,
    ColorJitterConfig,
    DataConfig,
    ProbConfig,
    RandomResizedCropConfig,
)
from solo_ext.data.datasets import load_dataset, read_images
from solo_ext.data.formats import CAN, make_loader
from solo_ext.data.h5 import write_h5
from solo_ext.data.images import ArrayImages, FileImages, ImageSet, read_folder
from solo_ext.data.loader import EpochSampler
from solo_ext.data.reference import random_chain, reference
from solo_ext.data.transforms import build_view_transform
from solo_ext.data.views import BLUR_RADIUS, CROP_RATIO, JITTER_ORDERS, draw_boxes, draw_views, uniforms
from solo_ext.errors import ConfigError, SoloExtError
from solo_ext.schema import check_choice

DRAWS = 32  # views per operation and format; 16 times as many of the whole chain
IMAGES = 64  # at most, of a set that the user names
PARAMETERS = 4000  # drawn per parameter
ALPHA = 1e-3  # chance that a certificate without a fault fails one of its tests of distributions
GRID = 4  # mean images are compared by the means of GRID x GRID cells, per channel
SMALL = 96  # largest views that are made of images of their own size, as in CIFAR and STL-10
BATCH = 8
LEVELS = (0.0,) * 3, (1 / 255,) * 3  # leave values from 0 to 255
JITTER = ("brightness", "contrast", "saturation", "hue")

NAMES = {
    "grayscale": "grayscale",
    "gaussian_blur": "blur",
    "solarization": "solarize",
    "equalization": "equalize",
    "horizontal_flip": "flip",
}
FEATURES = ("brightness", "contrast", "saturation", "sharpness", "left - right")
EVERYTHING = AugmentationConfig(
    color_jitter=ColorJitterConfig(0.8, 0.4, 0.4, 0.2, 0.1),
    **dict.fromkeys(("grayscale", "solarization", "equalization"), ProbConfig(0.2)),
    **dict.fromkeys(("gaussian_blur", "horizontal_flip"), ProbConfig(0.5)),
)

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


@dataclass(frozen=True)
class Check:
    """One value and its bound.

    images: what was rendered. part: drawn, rendered or chain. format: `all formats` where they share it.
    measure: `difference` and `bias` in levels of 255, at most `bound` (None: reported only); or `p`, at least `bound`.
    effect: for p, the KS distance, or the largest difference of mean images in levels.
    """

    images: str
    part: str
    format: str
    operation: str
    measure: str
    value: float
    bound: float | None = None
    effect: float | None = None

    @property
    def ok(self) -> bool:
        if self.bound is None:
            return True
        return self.value >= self.bound if self.measure == "p" else abs(self.value) <= self.bound


@dataclass(frozen=True)
class Certificate:
    """checks: all that was compared. settings: what it was made with. left_out: formats and why."""

    checks: tuple[Check, ...]
    settings: dict[str, Any]
    left_out: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        checks = [{**asdict(check), "ok": check.ok} for check in self.checks]
        return {"ok": self.ok, "settings": self.settings, "left_out": self.left_out, "checks": checks}

    def __str__(self) -> str:
        """Markdown."""
        parts = [_HEAD]
        for images in dict.fromkeys(check.images for check in self.checks):
            parts.append(f"## {images[0].upper()}{images[1:]}")
            for (part, measure), (title, cell) in _TABLES.items():
                found = [c for c in self.checks if (c.images, c.part, c.measure) == (images, part, measure)]
                if found:
                    parts.append(f"{title}:\n\n{_table(found, cell)}")
        parts += [f"Left out: {reason}" for reason in self.left_out]
        bounded = [check for check in self.checks if check.bound is not None]
        good = sum(check.ok for check in bounded)
        parts.append(_SETTINGS.format_map(self.settings))
        verdict = "Certified" if self.ok else "FAILED"
        parts.append(f"{verdict}: {good} of {len(bounded)} values are inside their bounds.")
        return "\n\n".join(parts)


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
        check_choice("--formats", name, FORMATS[1:])
    device = _device(device)
    checks: list[Check] = []
    left_out: list[str] = []
    known: set[str] = set()
    with TemporaryDirectory() as folder:
        for case in _cases(augmentations, images, Path(folder)):
            names = _loadable(case, formats, device, left_out)
            if not names:
                continue
            checks += _drawn(case, seed, known)
            checks += _rendered(case, names, draws, seed, device)
            checks += _chained(case, names, 16 * draws, seed, device)
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


@dataclass(frozen=True)
class _Case:
    """Images and how they are augmented. `images` are files in one folder, or in memory."""

    name: str
    aug: AugmentationConfig
    images: ImageSet

    def loader(self, format: str, augmentations: Sequence[AugmentationConfig], seed: int, device: torch.device):
        """A pass over all images in the order of an epoch; the views have values from 0 to 255."""
        data = DataConfig("custom", format=format, num_workers=0)
        transforms = [build_view_transform(aug, *LEVELS) for aug in augmentations]
        sampler = EpochSampler(len(self.images), seed)
        return make_loader(data, self._as(format), transforms, seed, sampler, BATCH, False, device)

    def _as(self, format: str) -> ImageSet:
        if format != "h5" or isinstance(self.images.images, ArrayImages):
            return self.images
        file = self.images.images.root.with_suffix(".h5")
        if not file.exists():
            write_h5(file.with_suffix(""), file)
        return read_images(file, "h5")

    def picture(self, i: int) -> Image.Image:
        """As Pillow reads it."""
        source = self.images.images
        if isinstance(source, ArrayImages):
            return Image.fromarray(source.pixels[i])
        with source.named(i), Image.open(source.path(i)) as image:
            return image.convert("RGB")

    def sizes(self) -> list[tuple[int, int]]:
        """Widths and heights that occur."""
        return sorted({self.picture(i).size for i in range(len(self.images))})


def _cases(augmentations: Sequence[AugmentationConfig] | None, images: str | None, folder: Path) -> Iterator[_Case]:
    given = [replace(aug, num_crops=1, mean=None, std=None) for aug in augmentations or ()]
    for i, aug in enumerate(given or [replace(EVERYTHING, crop_size=size) for size in (224, 32)]):
        if aug in given[:i]:
            continue
        side = aug.crop_size if aug.crop_size <= SMALL else None
        path = folder / ("images" if images else f"photographs{side or ''}")
        if not path.exists():
            path.mkdir()
            _copy(images, path) if images else _photographs(path, side)
        case = _Case("", aug, read_folder(path, "--images"))
        sizes = case.sizes()
        size = "{} x {} px".format(*sizes[0]) if len(sizes) == 1 else "several sizes"
        what = "images" if images else "photographs"
        prefix = f"augmentations[{i}], " if given else ""
        yield replace(case, name=f"{prefix}{len(case.images)} {what} of {size}, views of {aug.crop_size} px")
    if not given and not images:
        mini = load_dataset(DataConfig("fashion_mnist_mini"), "train")
        mini = mini.subset(np.arange(0, len(mini), len(mini) // 32))
        yield _Case("Fashion-MNIST (gray), views of 28 px", replace(EVERYTHING, crop_size=28), mini)


def _photographs(folder: Path, side: int | None) -> None:
    """Four parts of each of scikit-learn's two photographs: JPEG, or PNG that is shrunk to `side` x `side` px."""
    for photo, pixels in enumerate(load_sample_images().images):
        for part in range(4):
            if side:
                square = Image.fromarray(pixels).crop((71 * part, 0, 71 * part + 427, 427))
                square.resize((side, side)).save(folder / f"{photo}-{part}.png")
            else:
                left, top = 140 * (part % 2), 52 * (part // 2)
                part_of = Image.fromarray(pixels).crop((left, top, left + 500, top + 375))
                part_of.save(folder / f"{photo}-{part}.jpg", quality=90)


def _copy(source: str, folder: Path) -> None:
    """Up to `IMAGES` images, evenly from all."""
    images = read_images(source, "--images", labels=False)
    for row in np.unique(np.linspace(0, len(images) - 1, IMAGES).astype(int)).tolist():
        suffix = Path(images.images.path(row)).suffix
        (folder / f"{row:08d}{suffix}").write_bytes(images.images.read(row))


def _loadable(case: _Case, formats: Sequence[str], device: torch.device, left_out: list[str]) -> list[str]:
    """The formats that work here; those of `formats` have to, others are `left_out`."""
    possible = CAN[type(case.images.images)] + ("h5",) * isinstance(case.images.images, FileImages)
    names = []
    for name in [name for name in FORMATS if name in possible and (not formats or name in formats)]:
        try:
            case.loader(name, [case.aug], 0, device)
            names.append(name)
        except SoloExtError as error:
            if formats:
                raise
            left_out.append(f"{name} ({case.name}): {error}")
    return names


# --- drawn -----------------------------------------------------------------------------------------------


def _drawn(case: _Case, seed: int, known: set[str]) -> list[Check]:
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
    drawn = zip(PARTS_WITH_PROB, (views.order >= 0, *views[2:]), strict=True)
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


def _rendered(case: _Case, formats: Sequence[str], draws: int, seed: int, device: torch.device) -> list[Check]:
    operations = _operations(case.aug, case.sizes())
    transforms = [build_view_transform(aug, *LEVELS) for aug in operations.values()]
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


def _chained(case: _Case, formats: Sequence[str], draws: int, seed: int, device: torch.device) -> list[Check]:
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


# --- the page --------------------------------------------------------------------------------------------


def _levels(check: Check) -> str:
    bound = "" if check.bound is None else f" ({check.bound:g})"
    return f"{check.value:{'+' if check.measure == 'bias' else ''}.2f}{bound}{'' if check.ok else ' FAILED'}"


def _test(check: Check) -> str:
    return f"{check.effect:.3f}, p {check.value:.2g}{'' if check.ok else ' FAILED'}"


_HEAD = """\
# Data certificate

Every data format gives the views of solo-learn's chain of Pillow and torchvision. Differences are in levels of 255.
Sizes of differences and biases have a bound each, in brackets; p values have one for all."""
_SETTINGS = """\
{draws} views per operation and format, {chain} of the whole chain, {parameters} draws of each parameter, seed {seed},
on {device}. No p may be below {alpha:g} / {tests}, for {tests} tests. {packages}."""
_TABLES = {
    ("drawn", "p"): ("Parameters as drawn, against torchvision's: KS distance, p", _test),
    ("rendered", "difference"): (
        "Views against Pillow's by the same numbers: mean absolute difference (bound)",
        _levels,
    ),
    ("rendered", "bias"): ("Mean signed difference (bound of its size)", _levels),
    ("chain", "p"): (
        "Whole chain against torchvision's by other numbers: levels (mean image) or KS distance, p",
        _test,
    ),
}


def _table(checks: Iterable[Check], cell: Callable[[Check], str]) -> str:
    cells = {(check.operation, check.format): cell(check) for check in checks}
    columns, operations = (list(dict.fromkeys(key[i] for key in cells)) for i in (1, 0))
    rows = [["", *columns], *([name, *(cells.get((name, c), "-") for c in columns)] for name in operations)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def _versions() -> Iterator[str]:
    for name in ("torch", "torchvision", "pillow", "numpy", "h5py", "nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        with suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"
