"""A `.pth` for torchvision's ResNets."""

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn
from torchvision.models.resnet import ResNet

from solo_ext.networks.backbones import SMALL_STEM
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.encoder import FETCHING
from solo_ext.zoo.export import Product, Source

IGNORED = FETCHING | {"progress", "num_classes"}  # pretrained weights and the classifier: backbone.kwargs may name them


def supports(backbone: nn.Module) -> str | None:
    """Why no ResNet of torchvision holds `backbone`; None: one does."""
    if type(backbone) is not ResNet:
        return "its ResNets are resnet18, resnet34 and resnet50"
    if not isinstance(backbone.fc, nn.Identity):
        return "its ResNets do not end in a BatchNorm (backbone.last_norm)"
    return None


def kwargs_of(config: Mapping[str, Any], ignored: Collection[str] = IGNORED) -> dict[str, Any]:
    """backbone.kwargs of the configuration `backbone`, without those that do not shape the network."""
    return {key: value for key, value in (config.get("kwargs") or {}).items() if key not in ignored}


def call(function: str, *args: Any, **kwargs: Any) -> str:
    """The call as a line of Python."""
    return f"{function}({', '.join([*map(repr, args), *(f'{key}={value!r}' for key, value in kwargs.items())])})"


def replaced(backbone: nn.Module) -> Mapping[str, tuple[type[nn.Module], tuple, dict[str, Any]]]:
    """Module -> (class, arguments) for what has to be replaced in an ImageNet ResNet to give it `backbone`'s stem."""
    if not isinstance(backbone, ResNet) or not isinstance(backbone.maxpool, nn.Identity):
        return {}
    conv = (nn.Conv2d, (3, backbone.conv1.out_channels), {**SMALL_STEM, "bias": False})
    return {"conv1": conv, "maxpool": (nn.Identity, (), {})}


def give_stem(model: nn.Module, backbone: nn.Module) -> tuple[str, ...]:
    """Replaces what `replaced` says in `model`; returns the lines of code that do so."""
    lines = []
    for name, (cls, args, kwargs) in replaced(backbone).items():
        setattr(model, name, cls(*args, **kwargs))
        lines.append(f"model.{name} = {call(f'torch.nn.{cls.__name__}', *args, **kwargs)}")
    return tuple(lines)


def export(source: Source) -> Product:
    """One file, for `load_state_dict(..., strict=False)`: the classifier is missing."""
    config, file = source.config["backbone"], f"{source.name}.pth"
    name, kwargs = config["name"], kwargs_of(config)
    content = io.BytesIO()
    torch.save(source.tensors, content)
    model = getattr(torchvision.models, name)(**kwargs)
    stem = give_stem(model, source.backbone)

    def network(folder: Path) -> nn.Module:
        model.load_state_dict(load_checkpoint(folder / file), strict=False)
        model.fc = nn.Identity()
        return model.eval()

    return Product(
        {file: content.getvalue()},
        network,
        call(f"torchvision.models.{name}", **kwargs) + " with another stem" * bool(stem),
        have=source.tensors,
        want=list(model.state_dict()),
        load=(
            f"model = {call(f'torchvision.models.{name}', **kwargs)}",
            *stem,
            f'model.load_state_dict(torch.load("{file}", weights_only=True), strict=False)',
            "model.fc = torch.nn.Identity()  # for features, or leave the new classifier",
        ),
        record={"replaced": list(replaced(source.backbone))},
    )
