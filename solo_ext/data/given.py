"""Images that a program hands over as a PyTorch Dataset, in place of files."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from solo_ext.data.datasets import CUSTOM, DATASETS
from solo_ext.data.decode import array_pixels, image_pixels
from solo_ext.data.images import FileImages, ImageSet
from solo_ext.errors import DataError

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

    def __getitem__(self, i: int) -> Tensor:
        with self.named(i):
            image, _ = _parts(self.root[int(self.paths[i])])  # type: ignore[index]  # no path
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


def read_given(dataset: Any, key: str) -> ImageSet:
    """A Dataset of images (of Pillow, or arrays as of `array_pixels`), of (image, label), or of {"image": ..., "label":
    ...}. Labels are its attribute `targets` or `labels`, else every sample is read; None and -1 are none.

    Raises DataError for what has no length, no images or labels that are no class numbers.
    """
    kind = type(dataset).__name__
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"{key}: a {kind} is no Dataset with len() and [i]")
    if not (count := len(dataset)):
        raise DataError(f"{key}: the {kind} is empty")
    images = GivenImages(dataset, np.arange(count).astype("S"), channels=0)
    images.channels = len(images[0])  # or DataError
    _, label = _parts(dataset[0])
    own = next((own for name in ("targets", "labels") if len(own := getattr(dataset, name, ())) == count), None)
    labels: Any = [None] * count if label is None else own
    try:
        if labels is None:
            labels = [label := _parts(dataset[i])[1] for i in range(count)]
        targets = np.array([-1 if label is None else int(label) for label in labels], np.int64)
    except (TypeError, ValueError):
        raise DataError(f"{key}: labels are class numbers, not {label!r}") from None
    if (least := targets.min()) < -1:
        raise DataError(f"{key}: labels are class numbers from 0, or -1 for none, not {least}")
    numbers = [*map(str, range(targets.max() + 1))]
    names = [*map(str, getattr(dataset, "classes", None) or numbers)]
    return ImageSet(images, targets, tuple(names if len(names) >= len(numbers) else numbers))  # type: ignore[arg-type]


def give(train: Any, val: Any | None, like: str | None) -> dict[str, Any]:
    """Makes the Datasets `train` and `val` a dataset of this process, normalised and with the stem of `like`, and
    returns the keys that name it."""
    sets = {"train": read_given(train, "data"), "test": None if val is None else read_given(val, "val_data")}
    images, known, name = sets["train"], DATASETS.get(str(like), CUSTOM), type(train).__name__
    assert images is not None

    def load(data: Any, split: str) -> ImageSet:
        if (found := sets["test" if split == "test" else "train"]) is None:
            raise DataError("val_data: missing, but a classifier is tested on these images")
        return found

    side = known.image_size if {*images.images[0].shape[1:]} == {known.image_size} else None
    changes: dict[str, Any] = {"load": load, "image_size": side, "num_classes": len(images.classes)}
    DATASETS[name] = replace(known, **changes, train_size=None, box_classes=0, recipes=None, hub=None)
    keys = {"data.dataset": name, "data.train_path": None}
    keys |= {"data.val_path": None if val is None else type(val).__name__}
    return keys if images.images.channels == 3 else {**keys, "data.channels": images.images.channels}
