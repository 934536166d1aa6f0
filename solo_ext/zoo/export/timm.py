"""A `.safetensors` for `timm.create_model`."""

from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import nn
from torchvision.models.resnet import ResNet

from solo_ext.networks.vit import MoCoViT
from solo_ext.runs.encoder import FETCHING
from solo_ext.zoo.export import Product, Source, torchvision
from solo_ext.zoo.export.torchvision import call, give_stem, kwargs_of, replaced

VITS = {f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
# what decides about the initial weights only
IGNORED = FETCHING | {"weight_init"}


def supports(backbone: nn.Module) -> str | None:
    """Why no model of timm holds `backbone`; None: one does."""
    if not isinstance(backbone, ResNet):
        return None  # ViTs and timm/<name> are timm's own
    if backbone.dilation != 1:
        return "its ResNets are dilated in another way (backbone.kwargs.replace_stride_with_dilation)"
    return torchvision.supports(backbone)


def architecture(source: Source) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the `timm.create_model` call that builds the network, with num_classes."""
    config, backbone = source.config["backbone"], source.backbone
    name = config["name"]
    if isinstance(backbone, ResNet):
        widths = {"cardinality": backbone.groups, "base_width": backbone.base_width}
        plain = {"cardinality": 1, "base_width": 64}
        return name, {"num_classes": 0, **{key: value for key, value in widths.items() if value != plain[key]}}
    kwargs = {"num_classes": 0, **kwargs_of(config, IGNORED)}
    if isinstance(backbone, MoCoViT):
        kwargs.pop("stop_grad_conv1", None)
    if name in VITS:
        kwargs["num_heads"] = backbone.get_submodule("blocks.0.attn").num_heads
    return VITS.get(name, name.removeprefix("timm/")), kwargs


def export(source: Source) -> Product:
    """One file; it loads strictly into the network without classifier."""
    name, kwargs = architecture(source)
    file = f"{source.name}.safetensors"
    build = call("timm.create_model", name, **kwargs)
    model = timm.create_model(name, **kwargs)
    stem = give_stem(model, source.backbone)
    classifying = timm.create_model(name, **{key: value for key, value in kwargs.items() if key != "num_classes"})

    def network(folder: Path) -> nn.Module:
        model.load_state_dict(safetensors.torch.load_file(folder / file))
        return model.eval()

    return Product(
        {file: safetensors.torch.save(source.tensors, {"format": "pt"})},
        network,
        build + " with another stem" * bool(stem),
        have=source.tensors,
        want=list(classifying.state_dict()),
        load=(f"model = {build}", *stem, f'model.load_state_dict(safetensors.torch.load_file("{file}"))'),
        record={"model": name, "kwargs": kwargs, "replaced": list(replaced(source.backbone))},
    )
