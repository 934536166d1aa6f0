"""A `.safetensors` for `timm.create_model`."""

from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import nn
from torchvision.models.resnet import ResNet

from solo_ext.runs.checkpoints import save_tensors
from solo_ext.zoo.export import Product, Source, torchvision
from solo_ext.zoo.export.torchvision import call, give_stem, kwargs_of, replacements

VITS = {f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}


def supports(backbone: nn.Module) -> str | None:
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
        widths = {"cardinality": (backbone.groups, 1), "base_width": (backbone.base_width, 64)}
        return name, {"num_classes": 0, **{key: width for key, (width, default) in widths.items() if width != default}}
    kwargs = {"num_classes": 0, **({"in_chans": source.channels} if source.channels != 3 else {}), **kwargs_of(config)}
    if name in VITS:
        kwargs["num_heads"] = backbone.get_submodule("blocks.0.attn").num_heads
    return VITS.get(name, name.removeprefix("timm/")), kwargs


def export(source: Source, folder: Path) -> Product:
    """One file; it loads strictly into the network without classifier."""
    name, kwargs = architecture(source)
    file, build = f"{source.name}.safetensors", call("timm.create_model", name, **kwargs)
    (folder / file).write_bytes(save_tensors(source.tensors))
    model = timm.create_model(name, **kwargs)
    stem = give_stem(model, source.backbone)
    model.load_state_dict(safetensors.torch.load_file(folder / file))
    kwargs_of_classifier = {key: value for key, value in kwargs.items() if key != "num_classes"}
    return Product(
        model.eval(),
        build + " with another stem" * bool(stem),
        have=source.tensors,
        want=list(timm.create_model(name, **kwargs_of_classifier).state_dict()),
        load=(f"model = {build}", *stem, f'model.load_state_dict(safetensors.torch.load_file("{file}"))'),
        record={"model": name, "kwargs": kwargs, "replaced": list(replacements(source.backbone))},
    )
