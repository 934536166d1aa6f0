"""Backbones: torchvision's ResNets, a small one for CPUs, ViTs, and any timm model as `timm/<name>`."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50
from torchvision.models.resnet import BasicBlock, ResNet

from solo_ext.errors import ConfigError
from solo_ext.networks.vit import MoCoViT
from solo_ext.schema import check_choice
from solo_ext.text import nearest

STEMS = ("auto", "small", "imagenet")


@dataclass
class BackboneConfig:
    """The YAML's `backbone`.

    name: a key of `BACKBONES`, or `timm/<name>`.
    kwargs: further arguments of the constructor, e.g. `zero_init_residual`.
    stem: `small` (3x3 convolution, no max-pool) for images of about 32 px, `imagenet`, or `auto`: by the data set.
    last_norm: end a ResNet with a BatchNorm on its pooled features (paper A's BN1, Table C.8).
    """

    name: str = "???"
    kwargs: dict[str, Any] = field(default_factory=dict)
    stem: str = "auto"
    last_norm: bool = False

    def __post_init__(self):
        check_choice("backbone.stem", self.stem, STEMS)
        check_name(self.name)


# padding 2, not 1: solo-learn's CIFAR stem, kept for comparability
SMALL_STEM = {"kernel_size": 3, "stride": 1, "padding": 2}


class SlimResNet(ResNet):
    """torchvision's ResNet with its widths divided so that the first stage has `width` channels instead of 64."""

    small_stem: ClassVar[dict] = {"kernel_size": 3, "stride": 2, "padding": 1}  # a quarter of the pixels: for CPUs

    def __init__(self, layers: list[int], width: int, **kwargs):
        self.slim_width = width
        super().__init__(BasicBlock, layers, **kwargs)
        # The parent built its stem before the first stage could be slimmed.
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:
            self.inplanes = self.slim_width
        return super()._make_layer(block, planes * self.slim_width // 64, blocks, stride, dilate)


BACKBONES = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    # four basic blocks of 16, 32, 64 and 128 channels: 176 k parameters, for CPUs
    "resnet10_w16": partial(SlimResNet, [1, 1, 1, 1], 16),
    # patches of 16 px, images of 224 px, unless `patch_size` and `img_size` say otherwise
    "vit_tiny": partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3),
    "vit_small": partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6),
    "vit_base": partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),
    "vit_large": partial(VisionTransformer, embed_dim=1024, depth=24, num_heads=16),
}
# what methods of the MoCo v3 family have in their place; solo-learn's number of heads
MOCOV3_BACKBONES = {
    "vit_tiny": partial(MoCoViT, embed_dim=192, depth=12, num_heads=12),
    "vit_small": partial(MoCoViT, embed_dim=384, depth=12, num_heads=12),
    "vit_base": partial(MoCoViT, embed_dim=768, depth=12, num_heads=12),
    "vit_large": partial(MoCoViT, embed_dim=1024, depth=24, num_heads=16),
}


def is_mocov3(method: str | None) -> bool:
    """Whether the method's name is one of the MoCo v3 family."""
    return str(method).lower().endswith(("mocov3", "res_moco"))


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` is one of `BACKBONES` or a timm model."""
    if name in BACKBONES:
        return
    if name.startswith("timm/"):
        model = name.removeprefix("timm/")
        if not timm.is_model(model):
            raise ConfigError(f"backbone.name: timm has no model '{model}'{nearest(model, timm.list_models())}")
        return
    raise ConfigError(
        f"backbone.name: unknown backbone '{name}'{nearest(name, BACKBONES)} "
        f"(valid: {', '.join(BACKBONES)}, or timm/<name>)"
    )


def build_backbone(
    name: str,
    kwargs: dict[str, Any] | None = None,
    small_images: bool = False,
    method: str | None = None,
    last_norm: bool = False,
) -> nn.Module:
    """A randomly initialised backbone without its classification layer.

    Args:
        name: a key of `BACKBONES`, or `timm/<name>`.
        kwargs: further arguments of the constructor.
        small_images: give ResNets the CIFAR stem.
        method: the method it is for: those of the MoCo v3 family have their own ViTs.
        last_norm: end a ResNet with a BatchNorm on its pooled features.

    Returns:
        A module [B, 3, H, W] -> [B, num_features], with the attribute `num_features`.

    Raises:
        ConfigError: unknown name, arguments that the constructor refuses, or `last_norm` without a ResNet.
    """
    check_name(name)
    kwargs = dict(kwargs or {})
    constructors = BACKBONES
    if is_mocov3(method):
        constructors = BACKBONES | MOCOV3_BACKBONES
    try:
        if name.startswith("timm/"):
            backbone = timm.create_model(name.removeprefix("timm/"), **{"num_classes": 0, **kwargs})
        elif name.startswith("vit_"):
            backbone = constructors[name](**{"num_classes": 0, **kwargs})
        else:
            backbone = constructors[name](**kwargs)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"backbone.kwargs {kwargs} do not fit '{name}': {error}") from error
    if not isinstance(backbone, ResNet):
        if last_norm:
            resnets = ", ".join(key for key in BACKBONES if key.startswith("resnet"))
            raise ConfigError(f"backbone.last_norm is for {resnets}, not '{name}'; set it to false")
        return backbone
    backbone.num_features = backbone.inplanes
    backbone.fc = nn.BatchNorm1d(backbone.num_features) if last_norm else nn.Identity()
    if small_images:
        # initialised as PyTorch does by default, like solo-learn's
        stem = getattr(backbone, "small_stem", SMALL_STEM)
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, bias=False, **stem)
        backbone.maxpool = nn.Identity()
    return backbone
