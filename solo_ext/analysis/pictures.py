"""What encoders see in the same images, side by side: maps of features, Grad-CAM of a classifier, nearest neighbours.

Feature maps and Grad-CAM are those of residual momentum's Figures 9, 10 and 13 to 16.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solo_ext.analysis.features import features_of, own_data
from solo_ext.analysis.pages import picture_path, write_picture
from solo_ext.data.datasets import read_images
from solo_ext.data.images import FileImages, ImageSet
from solo_ext.errors import ConfigError, require
from solo_ext.networks.stages import stage_row
from solo_ext.runs.checkpoints import Checkpoint, open_checkpoint
from solo_ext.runs.encoder import eval_transform, load_encoder
from solo_ext.runs.run import LINEAR, Run

MAPS = 7  # as many feature maps as the figures have: those that differ most from place to place
NEAREST = 5
Row = tuple[str, list[np.ndarray]]  # its label, and pictures [H, W] (drawn in false colours) or [H, W, 3] in [0, 1]


class Seen(NamedTuple):
    """An encoder, the images as it gets them [N, C, S, S], and as a person sees them, [S, S, 3] in [0, 1]."""

    label: str
    source: Checkpoint
    backbone: nn.Module
    inputs: Tensor
    shown: list[np.ndarray]


def draw_pictures(
    sources: Sequence[tuple[str, Checkpoint]],
    images: str | None,
    kind: str,
    out: str | os.PathLike,
    teacher: bool = False,
    count: int = 8,
    bank: str | None = None,
) -> Path:
    """Draws the first `count` images at a path, or else of the first run's validation set, as each of the encoders sees
    them, into the PNG or PDF `out`.

    kind: `features`: of the first block, the `MAPS` with the largest standard deviation over the picture. `gradcam`: of
    the last block, for the class that the linear classifier of the run finds: that of its newest linear evaluation, or
    its online probe. `neighbours`: the `NEAREST` of the images at the path `bank`, by cosine of the features.

    Raises CheckpointError and DataError, as evaluations do; ConfigError for a run without classifier.
    """
    path = picture_path(out, "pictures")
    chosen = own_data(sources[0][1]).val_set if images is None else read_images(images, "IMAGES")
    assert chosen is not None
    chosen = chosen.subset(np.arange(min(count, len(chosen))))
    seen = [_seen(label, source, chosen, teacher) for label, source in sources]
    rows: list[Row] = [("", seen[0].shown)]
    for one in seen:
        if kind == "neighbours":
            rows += _neighbours(one, bank, teacher)
        else:
            rows += _gradcam(one) if kind == "gradcam" else _feature_maps(one)
    return write_picture(path, lambda: _figure(rows))


def _seen(label: str, source: Checkpoint, images: ImageSet, teacher: bool) -> Seen:
    backbone, config = load_encoder(source, teacher=teacher)
    transform = eval_transform(config)
    if isinstance(images.images, FileImages):
        images.images.channels = len(transform.mean)
    inputs = torch.stack([transform(images.images[i]) for i in range(len(images))])
    mean, std = (n.view(-1, 1, 1) for n in (transform.mean, transform.std))
    return Seen(label, source, backbone, inputs, [_shown(x) for x in (inputs * std + mean).clamp(0, 1)])


def _shown(image: Tensor) -> np.ndarray:
    """[C, H, W] as a person sees it, [H, W, 3]: the first three channels, or the first one as gray."""
    return (image[:3] if len(image) > 2 else image[:1].expand(3, -1, -1)).permute(1, 2, 0).numpy()


@torch.no_grad()
def _feature_maps(seen: Seen) -> list[Row]:
    kept: list[Tensor] = []
    hook = _stage(seen.backbone, "block1").register_forward_hook(lambda module, args, out: kept.append(out))
    seen.backbone(seen.inputs)
    hook.remove()
    maps = _as_maps(kept[0])
    order = maps.std((2, 3)).argsort(1, descending=True)[:, :MAPS]
    return [
        (seen.label if n == 0 else "", [maps[i, row[n]].numpy() for i, row in enumerate(order)])
        for n in range(order.shape[1])
    ]


def _gradcam(seen: Seen) -> list[Row]:
    require("pytorch_grad_cam", "gradcam", "pictures")
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image

    model = nn.Sequential(seen.backbone, _classifier(seen.source, seen.label)).eval()
    with GradCAM(model, [_stage(seen.backbone, "block4")], reshape_transform=_as_maps) as cam:
        heat = cam(seen.inputs, None)  # of the class with the largest logit
    pairs = zip(seen.shown, heat, strict=True)
    return [(seen.label, [show_cam_on_image(image, map_, use_rgb=True) / 255 for image, map_ in pairs])]


def _neighbours(seen: Seen, bank: str | None, teacher: bool) -> list[Row]:
    if bank is None:
        raise ConfigError("--bank: missing, the images that are searched for neighbours")
    features, images = features_of(seen.source, bank, teacher)
    with torch.no_grad():
        queries = F.normalize(seen.backbone(seen.inputs))
    near = (queries @ F.normalize(torch.from_numpy(features)).T).topk(min(NEAREST, len(images))).indices
    pictures = {i: _shown(images.images[i]) / 255 for i in near.unique().tolist()}
    return [(seen.label if n == 0 else "", [pictures[i] for i in column.tolist()]) for n, column in enumerate(near.T)]


def _stage(backbone: nn.Module, name: str) -> nn.Module:
    """The module whose output is the last map of a stage."""
    stage = next((stage for stage in stage_row({"backbone": backbone}, {}) if stage.name == name), None)
    if stage is None:
        raise ConfigError(f"backbone.name: {type(backbone).__name__} has no stage {name}, which the pictures are of")
    return backbone.get_submodule(stage.places)


def _as_maps(x: Tensor) -> Tensor:
    """[B, C, H, W], of a ViT's tokens [B, 1 + H W, C] too."""
    if x.ndim == 4:
        return x
    side = int((x.shape[1] - 1) ** 0.5)
    return x[:, x.shape[1] - side**2 :].mT.unflatten(2, (side, side))


def _classifier(source: Checkpoint, label: str) -> nn.Linear:
    """The linear classifier on a run's features."""
    run = Run(source.path.parent)
    folders = [Path(str(result["run"])) for result in reversed(run.evaluations[LINEAR]) if result.get("run")]
    states = (open_checkpoint(folder).state for folder in folders if any(folder.glob("*.ckpt")))
    state = next((state for state in states if "classifier.weight" in state), source.state)
    if "classifier.weight" not in state:
        raise ConfigError(f"gradcam needs a linear classifier, and {label} has none: solo-ext linear --run {run.dir}")
    weight, bias = state["classifier.weight"].float(), state["classifier.bias"].float()
    classifier = nn.Linear(weight.shape[1], weight.shape[0])
    classifier.load_state_dict({"weight": weight, "bias": bias})
    return classifier


def _figure(rows: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    wide = max(len(pictures) for _, pictures in rows)
    figure = Figure(figsize=(1.1 * wide + 0.4, 1.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), wide, squeeze=False)
    for line, (label, pictures) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label, fontsize=7)
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture, cmap="viridis", interpolation="nearest")
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
    return figure
