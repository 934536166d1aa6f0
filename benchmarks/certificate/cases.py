"""The images of a certificate, and how they are augmented."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from solo_ext.data.augmentations import AugmentationConfig, ColorJitterConfig, ProbConfig
from solo_ext.data.datasets import DataConfig, Format, load_dataset, read_images
from solo_ext.data.images import ArrayImages, FileImages, ImageSet, read_folder
from solo_ext.data.loader import EpochSampler, ViewDataset
from solo_ext.data.modules import make_loader
from solo_ext.data.transforms import Transform
from solo_ext.errors import SoloExtError

IMAGES = 64  # at most, of a set that the user names
SMALL = 96  # largest views that are made of images of their own size, as in CIFAR and STL-10
BATCH = 8
LEVELS = (0.0,) * 3, (1 / 255,) * 3  # leave values from 0 to 255
EVERYTHING = AugmentationConfig(
    color_jitter=ColorJitterConfig(0.8, 0.4, 0.4, 0.2, 0.1),
    **dict.fromkeys(("grayscale", "solarization", "equalization"), ProbConfig(0.2)),
    **dict.fromkeys(("gaussian_blur", "horizontal_flip"), ProbConfig(0.5)),
)


@dataclass(frozen=True)
class Case:
    """Images and how they are augmented. `images` are files in one folder, or in memory."""

    name: str
    aug: AugmentationConfig
    images: ImageSet

    def loader(self, format: str, augmentations: Sequence[AugmentationConfig], seed: int, device: torch.device):
        """A pass over all images in the order of an epoch; the views have values from 0 to 255."""
        data = DataConfig("custom", format=format, num_workers=0)
        views = ViewDataset(self._as(format), [Transform.random(aug, *LEVELS) for aug in augmentations], seed)
        return make_loader(data, views, device, sampler=EpochSampler(len(views), seed), batch_size=BATCH)

    def _as(self, format: str) -> ImageSet:
        if format != "h5" or isinstance(self.images.images, ArrayImages):
            return self.images
        file = self.images.images.root.with_suffix(".h5")
        if not file.exists():
            from solo_ext.data.h5 import write_h5

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


def all_cases(augmentations: Sequence[AugmentationConfig] | None, images: str | None, folder: Path) -> Iterator[Case]:
    given = [replace(aug, num_crops=1, mean=None, std=None) for aug in augmentations or ()]
    for i, aug in enumerate(given or [replace(EVERYTHING, crop_size=size) for size in (224, 32)]):
        if aug in given[:i]:
            continue
        side = aug.crop_size if aug.crop_size <= SMALL else None
        path = folder / ("images" if images else f"photographs{side or ''}")
        if not path.exists():
            path.mkdir()
            _copy(images, path) if images else _photographs(path, side)
        case = Case("", aug, read_folder(path, "--images"))
        sizes = case.sizes()
        size = "{} x {} px".format(*sizes[0]) if len(sizes) == 1 else "several sizes"
        what = "images" if images else "photographs"
        prefix = f"augmentations.{i}, " if given else ""
        yield replace(case, name=f"{prefix}{len(case.images)} {what} of {size}, views of {aug.crop_size} px")
    if not given and not images:
        mini = load_dataset(DataConfig("fashion_mnist_mini"), "train")
        mini = mini.subset(np.arange(0, len(mini), len(mini) // 32))
        yield Case("Fashion-MNIST (gray), views of 28 px", replace(EVERYTHING, crop_size=28), mini)


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


def loadable(case: Case, formats: Sequence[str], device: torch.device, left_out: list[str]) -> list[str]:
    """The formats that work here; those of `formats` have to, others are `left_out`."""
    possible = case.images.images.formats + ("h5",) * isinstance(case.images.images, FileImages)
    names = []
    for name in [name for name in get_args(Format) if name in possible and (not formats or name in formats)]:
        try:
            case.loader(name, [case.aug], 0, device)
            names.append(name)
        except SoloExtError as error:
            if formats:
                raise
            left_out.append(f"{name} ({case.name}): {error}")
    return names
