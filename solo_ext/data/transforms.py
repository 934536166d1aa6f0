"""What a loader does to an image: a random view, or all of it for evaluation."""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from solo_ext.data.augmentations import AugmentationConfig, ProbConfig
from solo_ext.data.datasets import DatasetInfo
from solo_ext.data.decode import image_pixels
from solo_ext.data.render import crop_resize, crop_resize_batch, finish, normalise, parts, resize, resize_center
from solo_ext.data.views import DRAWS, draw_boxes, draw_views

EVAL_CROP = 224 / 256  # of the shorter side

Values = Sequence[float]  # per channel, of pixels in [0, 1]


class Transform:
    """Images to normalised views, by numbers of U[0, 1): random ones, as `aug` says, or without it, the same each time.
    size: of a view, in pixels. mean, std: for each of its C channels; 3 for gray, too. mode: bicubic or bilinear.
    shorter: side to which the whole image is resized before its centre is cut out; None: a box of `boxes` is resized.
    """

    def __init__(
        self,
        size: int,
        shorter: int | None,
        mean: Values,
        std: Values,
        mode: str = "bilinear",
        aug: AugmentationConfig | None = None,
    ):
        self.size, self.shorter, self.mode, self.aug = size, shorter, mode, aug
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    @classmethod
    def random(cls, aug: AugmentationConfig, mean: Values, std: Values, mode: str = "bicubic") -> "Transform":
        return cls(aug.crop_size, None if aug.rrc.enabled else aug.crop_size, mean, std, mode, aug)

    def at(self, epoch: int) -> "Transform":
        """What it is in an epoch, counted from 0."""
        if self.aug is None or (size := self.aug.size_in(epoch)) == self.size:
            return self
        other = copy(self)
        other.size, other.shorter = size, self.shorter and size
        return other

    def crop(self, image: Tensor, u: np.ndarray) -> Tensor:
        """One image of any size, uint8 [C, H, W], by its `DRAWS` numbers: uint8 [C, size, size]."""
        if self.shorter is not None:
            return resize_center(image[None], self.shorter, self.size, self.mode)[0]
        height, width = image.shape[1:]
        [box] = self.boxes(np.array([width]), np.array([height]), u[None]).tolist()
        return crop_resize(image, box, self.size, self.mode)

    def crop_batch(self, images: Tensor, u: np.ndarray) -> Tensor:
        """Images of one size, uint8 [B, C, H, W], on any device: [B, C, size, size], values from 0 to 255."""
        if self.shorter is not None:
            return resize_center(images, self.shorter, self.size, self.mode)
        if self.aug is None:
            return resize(images, (self.size, self.size), self.mode)
        count, _, height, width = images.shape
        boxes = torch.from_numpy(self.boxes(np.full(count, width), np.full(count, height), u))
        return crop_resize_batch(images, boxes.to(images.device, non_blocking=True), self.size, self.mode)

    def boxes(self, widths: np.ndarray, heights: np.ndarray, u: np.ndarray) -> np.ndarray:
        """What is cut out of B images, by `u` [B, DRAWS]: int64 [B, 4], left, top, width, height in pixels."""
        if self.aug is not None:
            return draw_boxes(self.aug.rrc, widths, heights, u)
        return np.stack([np.zeros_like(widths), np.zeros_like(heights), widths, heights], axis=1)

    def finish(self, crops: Tensor, u: np.ndarray, out: Tensor | None = None) -> Tensor:
        """[B, C, size, size], values from 0 to 255, to float32 [B, C, size, size], in `out` if there is one."""
        if self.aug is None:
            return normalise(crops, self.mean, self.std, out)
        return finish(crops, draw_views(self.aug, u), self.mean, self.std, out)

    def batch(self, images: Tensor, u: np.ndarray) -> Tensor:
        """Images of one size, uint8 [B, C, H, W], on any device: float32 [B, C, size, size]."""
        out = torch.empty((len(images), len(self.mean), self.size, self.size), device=images.device)
        for rows in parts(images):
            self.finish(self.crop_batch(images[rows], u[rows]), u[rows], out[rows])
        return out

    def __call__(self, image: Image.Image | Tensor, u: np.ndarray | None = None) -> Tensor:
        """One image, Pillow's or uint8 [C, H, W]: float32 [C, size, size]. Default of `u`: torch's global generator."""
        if isinstance(image, Image.Image):
            channels = len(self.mean)
            image = image_pixels(image, channels=1 if image.mode == "L" and channels == 3 else channels)
        if u is None:
            u = np.zeros(DRAWS) if self.aug is None else torch.rand(DRAWS, dtype=torch.float64).numpy()
        return self.finish(self.crop(image, u)[None], u[None])[0]


def build_eval_transform(
    info: DatasetInfo, crop_size: int, mean: Values | None = None, std: Values | None = None, augment: bool = False
) -> Transform:
    """What an evaluation sees of an image, bilinear, float tensor [C, crop_size, crop_size]: all of it, resized, if the
    images of the dataset have one size; else the centre, after the shorter side became 256/224 of `crop_size`.
    `augment`, to train a linear classifier: a crop of 8 to 100% of the area, flipped at random."""
    mean, std = info.evaluated(mean, std)
    if augment:
        aug = AugmentationConfig(horizontal_flip=ProbConfig(0.5), crop_size=crop_size)
        return Transform.random(aug, mean, std, "bilinear")
    return Transform(crop_size, round(crop_size / EVAL_CROP) if info.image_size is None else None, mean, std)
