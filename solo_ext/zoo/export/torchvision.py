"""A `.pth` for torchvision's ResNets."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torchvision.models
from torch import nn
from torchvision.models.resnet import ResNet

from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.encoder import FETCHING
from solo_ext.zoo.export import Product, Source, saved

# backbone.kwargs about pretrained weights, the classifier, initial values and gradients, not about features
IGNORED = FETCHING | {"progress", "num_classes", "weight_init", "stop_grad_conv1"}


def supports(backbone: nn.Module) -> str | None:
    if type(backbone) is not ResNet:
        return "its ResNets are resnet18, resnet34 and resnet50"
    if not isinstance(backbone.fc, nn.Identity):
        return "its ResNets do not end in a BatchNorm (backbone.last_norm)"
    return None


def kwargs_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """backbone.kwargs of the configuration `backbone`, without those that do not shape the network."""
    return {key: value for key, value in (config.get("kwargs") or {}).items() if key not in IGNORED}


def call(function: str, *args: Any, **kwargs: Any) -> str:
    """The call as a line of Python."""
    return f"{function}({', '.join([*map(repr, args), *(f'{key}={value!r}' for key, value in kwargs.items())])})"


def replacements(backbone: nn.Module) -> tuple[str, ...]:
    """The modules to replace in an ImageNet ResNet so that it has `backbone`'s stem."""
    if not isinstance(backbone, ResNet):
        return ()
    if isinstance(backbone.maxpool, nn.Identity):
        return "conv1", "maxpool"
    return ("conv1",) if backbone.conv1.in_channels != 3 else ()


def give_stem(model: nn.Module, backbone: nn.Module) -> list[str]:
    """Gives `model` the stem of `backbone`; returns the lines of code that do so."""
    for name in replacements(backbone):
        setattr(model, name, deepcopy(backbone.get_submodule(name)))
    return [f"model.{name} = torch.nn.{backbone.get_submodule(name)}" for name in replacements(backbone)]


def export(source: Source, folder: Path) -> Product:
    """One file, for `load_state_dict(..., strict=False)`: the classifier is missing."""
    config, file = source.config["backbone"], f"{source.name}.pth"
    name, kwargs = config["name"], kwargs_of(config)
    (folder / file).write_bytes(saved(source.tensors))
    model, build = getattr(torchvision.models, name)(**kwargs), call(f"torchvision.models.{name}", **kwargs)
    stem, want = give_stem(model, source.backbone), list(model.state_dict())
    model.load_state_dict(load_checkpoint(folder / file), strict=False)
    model.fc = nn.Identity()
    return Product(
        model.eval(),
        build + " with another stem" * bool(stem),
        have=source.tensors,
        want=want,
        load=(
            f"model = {build}",
            *stem,
            f'model.load_state_dict(torch.load("{file}", weights_only=True), strict=False)',
            "model.fc = torch.nn.Identity()  # for features, or leave the new classifier",
        ),
        record={"replaced": list(replacements(source.backbone))},
    )
