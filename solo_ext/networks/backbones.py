"""Backbones: torchvision's ResNets, a small one for CPUs, ViTs, and any timm model as `timm/<name>`. torchvision and
timm are imported when a network is built."""

import copy
import hashlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from solo_ext.errors import ConfigError, SoloExtError, naming
from solo_ext.schema import Config
from solo_ext.text import nearest

# padding 2, not 1: solo-learn's CIFAR stem, kept for comparability
SMALL_STEM = {"kernel_size": 3, "stride": 1, "padding": 2}


@dataclass
class BackboneConfig(Config, section="backbone"):
    """The YAML's `backbone`.

    stem: `small` (3x3 convolution, no max-pool) for images of about 32 px, `imagenet`, or `auto`: by the dataset. It
        may stand in kwargs, too, since solo-learn's scripts hand on nothing else.
    last_norm: end a ResNet with a BatchNorm on its pooled features (ProjectorEMA's BN1, Table C.8).
    """

    name: str = "???"  # resnet18, resnet50, vit_small, ... (README), or `timm/<name>`
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the constructor
    stem: Literal["auto", "small", "imagenet"] = "auto"
    last_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if "stem" in self.kwargs:
            self.stem = self.kwargs.pop("stem")
            super().__post_init__()
        if self.name.startswith("timm/"):
            import timm

            model = self.name.removeprefix("timm/")
            if not timm.is_model(model):
                raise ConfigError(f"backbone.name: timm has no model '{model}'{nearest(model, timm.list_models())}")
        elif self.name not in BACKBONES:
            valid = f"(valid: {', '.join(BACKBONES)}, or timm/<name>)"
            raise ConfigError(f"backbone.name: unknown backbone '{self.name}'{nearest(self.name, BACKBONES)} {valid}")


def _new(constructor: str, **kwargs: Any) -> nn.Module:
    """Calls `<module>:<constructor>`, which is imported only now."""
    return pkgutil.resolve_name(constructor)(**kwargs)


# name -> width, depth
VITS = {"vit_tiny": (192, 12), "vit_small": (384, 12), "vit_base": (768, 12), "vit_large": (1024, 24)}


def _vit(constructor: str, name: str, heads: int) -> partial[nn.Module]:
    width, depth = VITS[name]
    return partial(_new, constructor, num_classes=0, embed_dim=width, depth=depth, num_heads=heads)


# name -> constructor of one of torchvision's ResNets, or of a module [B, C, H, W] -> [B, num_features]
BACKBONES: dict[str, partial[nn.Module]] = {
    **{name: partial(_new, f"torchvision.models:{name}") for name in ("resnet18", "resnet34", "resnet50")},
    # four basic blocks of 16, 32, 64 and 128 channels: 176 k parameters, for CPUs
    "resnet10_w16": partial(_new, "solo_ext.networks.slim_resnet:SlimResNet", layers=[1, 1, 1, 1], width=16),
    # patches of 16 px, images of 224 px, unless `patch_size` and `img_size` say otherwise
    **{name: _vit("timm.models.vision_transformer:VisionTransformer", name, VITS[name][0] // 64) for name in VITS},
}
# MoCo v3's own ViTs, with solo-learn's number of heads, replace timm's in the methods that declare them
MOCO_VITS: dict[str, partial[nn.Module]] = {
    name: _vit("solo_ext.networks.vit:MoCoViT", name, 16 if name == "vit_large" else 12) for name in VITS
}


def give_backbone(module: nn.Module, channels: int = 3) -> str:
    """Makes copies of `module` [B, channels, H, W] -> [B, features], with its weights, a backbone of this process;
    returns its name, which is that of modules of the same structure. ConfigError if it takes or gives something else.
    """
    name, network, images = type(module).__name__, copy.deepcopy(module).eval(), torch.zeros(2, channels, 224, 224)
    with torch.no_grad(), naming(f"backbone: a {name} takes no images {list(images.shape)}", Exception):
        shape = network(images).shape  # whatever a user's module raises, or returns
    if len(shape) != 2:
        raise ConfigError(f"backbone: a {name} gives {list(shape)}, but features of a backbone are [B, features]")
    structure = f"{network} {[tuple(x.shape) for x in network.state_dict().values()]}"
    name += f"-{hashlib.sha256(structure.encode()).hexdigest()[:8]}"
    network.num_features = shape[1]  # type: ignore[assignment]
    BACKBONES[name] = partial(copy.deepcopy, network)
    return name


def is_resnet(backbone: nn.Module) -> bool:
    """Whether it is a ResNet of torchvision's or timm's."""
    from torchvision.models.resnet import ResNet

    if isinstance(backbone, ResNet):
        return True
    from timm.models import resnet, resnetv2  # takes a second

    return isinstance(backbone, resnet.ResNet | resnetv2.ResNetV2)


def of_channels(channels: int) -> str:
    """For messages; RGB goes without saying."""
    return "" if channels == 3 else f" of {channels} channels (data.channels)"


@torch.no_grad()
def check_sizes(backbone: nn.Module, name: str, sizes: Iterable[int], built: bool = False, channels: int = 3) -> None:
    """Raises ConfigError if the backbone cannot take square images of one of `sizes` in pixels (too small for it, or
    not a ViT's own) or so many channels, or gives something else than features [B, num_features]. built: its weights
    are given, too."""
    training = backbone.training
    backbone.eval()
    own = getattr(getattr(backbone, "patch_embed", None), "img_size", None)  # of a ViT for one size
    made = [inspect.signature(cls.__init__) for cls in type(backbone).__mro__]  # type: ignore[misc]  # only read
    arguments = {name for signature in made for name in signature.parameters}
    sizes = list(dict.fromkeys(sizes))
    key = "img_size" if len(sizes) == 1 else "dynamic_img_size"
    for size in sizes:
        problem = f"backbone.name: {name} cannot take crops of {size} px{of_channels(channels)}"
        if own and built:
            problem += f" (data.augmentations.crop_size={own[0]} suits it)"
        elif key in arguments and not built:
            value = size if len(sizes) == 1 else "true"
            problem += f" (backbone.kwargs.{key}={value} makes one that can, if its patches and windows divide them)"
        with naming(problem, SoloExtError, RuntimeError, ValueError, AssertionError):
            shape = list(backbone(torch.zeros(1, channels, size, size)).shape)
        if shape != (expected := [1, backbone.num_features]):
            why = f"an image gives {shape}, but features of a backbone are {expected}"
            raise ConfigError(f"backbone.kwargs: {why}; leave out num_classes, global_pool and the like")
    backbone.train(training)


def build_backbone(
    cfg: BackboneConfig,
    small_images: bool = False,
    own: Mapping[str, Callable[..., nn.Module]] | None = None,
    channels: int = 3,
) -> nn.Module:
    """A randomly initialised backbone [B, channels, H, W] -> [B, `num_features`], without its classification layer.

    small_images: what the stem `auto` is for. own: constructors that go before `BACKBONES`, such as `MOCO_VITS`.
    channels: of the images; a network that somebody has added takes what it takes.
    Raises ConfigError for arguments that the constructor refuses, or `last_norm` without a ResNet.
    """
    from torchvision.models.resnet import ResNet

    timm_model = partial(_new, "timm:create_model", model_name=cfg.name.removeprefix("timm/"), num_classes=0)
    constructor = (own or {}).get(cfg.name) or BACKBONES.get(cfg.name, timm_model)
    errors = SoloExtError, AssertionError, TypeError, ValueError, RuntimeError
    fetched = f"backbone.kwargs: the initial weights of '{cfg.name}' are not here and cannot be fetched"
    with naming(fetched), naming(f"backbone.kwargs {cfg.kwargs} do not fit '{cfg.name}'", *errors):
        timms = channels != 3 and (cfg.name in VITS or cfg.name.startswith("timm/"))
        backbone: Any = constructor(**{**({"in_chans": channels} if timms else {}), **cfg.kwargs})
    if not isinstance(backbone, ResNet):
        if cfg.last_norm:
            resnets = ", ".join(key for key in BACKBONES if key.startswith("resnet"))
            raise ConfigError(f"backbone.last_norm is for {resnets}, not '{cfg.name}'; set it to false")
        if cfg.name.startswith("timm/"):  # some have a layer between pooling and classifier, of another width
            backbone.num_features = backbone.head_hidden_size
        return backbone
    backbone.num_features = backbone.inplanes
    backbone.fc = nn.BatchNorm1d(backbone.num_features) if cfg.last_norm else nn.Identity()
    first = backbone.conv1
    if cfg.stem == "small" or (cfg.stem == "auto" and small_images):
        # initialised as PyTorch does by default, like solo-learn's
        stem = getattr(backbone, "small_stem", SMALL_STEM)
        backbone.conv1 = nn.Conv2d(channels, first.out_channels, bias=False, **stem)
        backbone.maxpool = nn.Identity()
    elif channels != 3 and getattr(constructor, "func", None) is _new:  # a user's own has its own first layer
        backbone.conv1 = nn.Conv2d(
            channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
        )
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    return backbone
