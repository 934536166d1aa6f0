"""A `.pth` of tensors that detectron2's detectors start from, torchvision's ResNets under its names, and its settings.

detectron2's DetectionCheckpointer loads it as it loads the `.pkl` of other converters: `matching_heuristics` matches
names by their ends, so that `res5` finds its place in the backbone (FPN) and in the box head (C4) alike.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34, resnet50, resnet101, resnet152

from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.zoo.export import Product, Source, render, saved

DTYPES = ("float32",)
RESNETS = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101, 152: resnet152}


def depth_of(backbone: nn.Module) -> int | None:
    """18, 34, 50, 101 or 152: the MODEL.RESNETS.DEPTH whose layers are those of `backbone`; None: there is none."""

    def layout(network: nn.Module) -> dict[str, str]:  # all that determines its output before the mean
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
        return {path: repr(module) for path, module in network.named_modules() if isinstance(module, kinds)}

    with torch.device("meta"):
        return next((depth for depth, build in RESNETS.items() if layout(build()) == layout(backbone)), None)


def supports(backbone: nn.Module) -> str | None:
    if depth_of(backbone):
        return None
    stem = getattr(backbone, "conv1", None)
    if isinstance(stem, nn.Conv2d) and stem.kernel_size == (3, 3):
        theirs = "detectron2's a 7x7 one with max-pooling (backbone.stem: imagenet)"
        return f"the stem is a 3x3 convolution (backbone.stem: small), {theirs}"
    resnets = ", ".join(f"resnet{depth}" for depth in RESNETS)
    return f"detectron2's backbones are torchvision's {resnets}, unchanged; this {type(backbone).__name__} differs"


def rename(key: str) -> str | None:
    """detectron2's name of a tensor of torchvision's ResNet, as in its tools/convert-torchvision-to-d2.py.

    None for what has no place there: the classifier (`fc`, also BN1 of ProjectorEMA) and `num_batches_tracked`.
    """
    if key.startswith("fc.") or key.endswith(".num_batches_tracked"):
        return None
    key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
    key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
    return key if key.startswith("res") else f"stem.{key}"


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` that `rename` knows, under their new names."""
    return {name: tensor for key, tensor in state.items() if (name := rename(key))}


def network(weights: Mapping[str, Tensor], depth: int) -> Callable[[Tensor], Tensor]:
    """Normalised RGB images [B, 3, H, W] -> the map of res5, [B, 512 or 2048, H / 32, W / 32], of converted `weights`.

    detectron2's graph, with STRIDE_IN_1X1 False and eps 1e-5 in all BatchNorms, is torchvision's under other names.
    """
    model = RESNETS[depth]()
    originals = {rename(key): key for key in model.state_dict()}
    model.load_state_dict({originals[name]: x for name, x in weights.items()}, strict=False)
    return partial(feature_map, model.eval())


def feature_map(backbone: nn.Module, x: Tensor) -> Tensor:
    """The output of the backbone's own `layer4`: what `network` must equal in eval mode."""
    maps: list[Tensor] = []
    with backbone.get_submodule("layer4").register_forward_hook(lambda _module, _inputs, output: maps.append(output)):
        backbone(x)
    return maps[0]


def export(source: Source, folder: Path) -> Product:
    """The weights, and the settings that name them by their full path. The proof compares maps, before the mean."""
    depth = depth_of(source.backbone)
    assert depth, "supports() lets no other through"
    weights, file, yaml = convert(source.tensors), f"{source.name}.pth", f"{source.name}.yaml"
    content = {"model": weights, "__author__": "solo_ext", "matching_heuristics": True}
    (folder / file).write_bytes(saved(content))
    pixels = [[round(255 * x, 4) for x in values.tolist()] for values in (source.transform.mean, source.transform.std)]
    # detectron2 looks for a relative path where it starts
    path = json.dumps(str(source.out.absolute() / file), ensure_ascii=False)
    settings = render("detectron2.yaml.j2", weights=path, mean=pixels[0], std=pixels[1], depth=depth)
    (folder / yaml).write_text(settings, encoding="utf-8")
    return Product(
        network(load_checkpoint(folder / file)["model"], depth),
        f"detectron2's ResNet-{depth}",
        have=weights,
        want=convert(RESNETS[depth]().state_dict()),
        load=(
            f'config.merge_from_file("{yaml}")  # after the detector\'s own',
            "DetectionCheckpointer(build_model(config)).load(config.MODEL.WEIGHTS)",
        ),
        reference=feature_map,
        record={"dropped": [key for key in source.tensors if rename(key) is None]},
    )
