"""Images that a program hands over as a PyTorch Dataset, in place of files."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from solo_ext.data.datasets import CUSTOM, DATASETS, DataConfig
from solo_ext.data.decode import array_pixels, image_pixels
from solo_ext.data.images import FileImages, ImageSet
from solo_ext.errors import DataError
from solo_ext.files import log

GIVEN: dict[str, ImageSet] = {}  # by name
IMAGE, LABEL = ("image", "img"), ("label", "labels", "target")  # keys of samples that are mappings, as the Hub's are


class GivenImages(FileImages):
    """The images of the Dataset `root`, whose rows are the `paths`."""

    kind, formats = "a PyTorch Dataset", ("image_folder", "tensor")

    def path(self, i: int) -> str:
        return f"{type(self.root).__name__}[{int(self.paths[i])}]"

    def read(self, i: int) -> bytes:
        return self[i].numpy().tobytes()

    def sizes(self) -> None:
        return None

    small_size = None  # a Dataset may make its images anew each time

    def __getitem__(self, i: int) -> Tensor:
        with self.named(i):
            return self.pixels(_parts(self.root[int(self.paths[i])])[0])  # type: ignore[index]  # no path

    def pixels(self, image: Any) -> Tensor:
        if isinstance(image, Image.Image):
            return image_pixels(image, self.how, self.channels or 3)
        return array_pixels(torch.as_tensor(image), self.how, self.channels)


def _parts(sample: Any) -> tuple[Any, Any]:
    """The image and the label of a sample: -1 where it is None, and None where the sample has no place for one."""
    if isinstance(sample, Mapping):
        image, label = ([sample[key] for key in keys if key in sample] for keys in (IMAGE, LABEL))
        if not image:
            raise ValueError(f"a sample has the keys {', '.join(map(str, sample))}, but none of {', '.join(IMAGE)}")
        sample = (*image[:1], *label[:1])
    if not isinstance(sample, tuple | list):
        return sample, None
    image, *label = sample[:2]
    return image, (-1 if label[0] is None else label[0]) if label else None


def _column(dataset: Any) -> tuple[Any, Any]:
    """The labels of one of the Hub's Datasets, whose images are not read for them, and the names of its classes; none
    of another."""
    features = getattr(dataset, "features", None)
    key = next((key for key in LABEL if key in features), None) if isinstance(features, Mapping) else None
    return (dataset[key], getattr(features[key], "names", None)) if key else ((), None)  # type: ignore[index]


def read_given(dataset: Any, key: str) -> ImageSet:
    """A Dataset of images (of Pillow, or arrays as of `array_pixels`), of (image, label), or of {"image": ..., "label":
    ...}, as the Hub's are. Labels are its column, its attribute `targets` or `labels`, or every sample's; None and -1
    are none.

    Raises DataError for what has no length, no images or labels that are no class numbers.
    """
    kind = type(dataset).__name__
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"{key}: a {kind} is no Dataset with len() and [i]")
    if not (count := len(dataset)):
        raise DataError(f"{key}: the {kind} is empty")
    images, targets = GivenImages(dataset, np.arange(count).astype("S"), channels=0), np.empty(count, np.int64)

    def label_of(i: int) -> Any:
        with images.named(i):
            return _parts(dataset[i])[1]

    with images.named(0):
        image, first = _parts(sample := dataset[0])
        images.channels = len(images.pixels(image))
    column, classes = _column(dataset)
    known = column, *(getattr(dataset, name, ()) for name in ("targets", "labels"))
    labels: Any = next((own for own in known if len(own) == count), None)
    if first is None:
        if isinstance(sample, Mapping) and len(sample) > 1:
            log.warning(
                "%s: no labels, since a sample has %s, but none of %s", key, ", ".join(sample), ", ".join(LABEL)
            )
        labels = [None] * count
    elif labels is None:
        labels = chain([first], map(label_of, range(1, count)))
    for i, label in enumerate(labels):
        try:
            targets[i] = -1 if label is None else int(label)
        except (TypeError, ValueError):
            raise DataError(f"{key}: labels are class numbers, not {label!r}") from None
    if (least := targets.min()) < -1:
        raise DataError(f"{key}: labels are class numbers from 0, or -1 for none, not {least}")
    numbers = [*map(str, range(targets.max() + 1))]
    names = [*map(str, getattr(dataset, "classes", None) or classes or numbers)]
    return ImageSet(images, targets, tuple(names if len(names) >= len(numbers) else numbers))  # type: ignore[arg-type]


def give(train: Any, val: Any | None, like: str | None) -> dict[str, Any]:
    """Makes the Datasets `train` and `val` known to this process, normalised and with the stem of `like`; the keys that
    name them."""
    images, known = read_given(train, "data"), DATASETS.get(str(like), CUSTOM)
    name, val_name = _keep(images), None if val is None else _keep(read_given(val, "val_data"))
    side = known.image_size if {*images.images[0].shape[1:]} == {known.image_size} else None
    changes: dict[str, Any] = {"load": _load, "image_size": side, "num_classes": len(images.classes)}
    DATASETS[name] = replace(known, **changes, train_size=None, test_size=None, box_classes=0, recipes=None, hub=None)
    keys = {"data.dataset": name, "data.train_path": None, "data.val_path": val_name}
    return keys if images.images.channels == 3 else {**keys, "data.channels": images.images.channels}


def _keep(images: ImageSet) -> str:
    """Remembers the images under the name that it returns: the class of their Dataset, and what they are."""
    content = f"{images.fingerprint()} {images.content()['bytes']}".encode()
    name = f"{type(images.images.root).__name__}-{hashlib.sha256(content).hexdigest()[:8]}"  # type: ignore[union-attr]
    GIVEN[name] = images
    return name


def _load(data: DataConfig, split: str) -> ImageSet:
    if (images := GIVEN.get(str(data.val_path if split == "test" else data.dataset))) is None:
        raise DataError("val_data: missing, but a classifier is tested on these images")
    return images
