"""A `.pth` that detectron2's detectors start from, torchvision's ResNets under its names, and the settings for it.

The file is a `.pth` of plain tensors, so that reading it executes nothing. detectron2's DetectionCheckpointer takes it
as it takes the `.pkl` of other converters: `matching_heuristics` matches the names by their ends, so that `res5` finds
its place in the backbone (FPN) and in the box head (C4) alike.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34, resnet50, resnet101, resnet152

from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.zoo.export import Product, Source, render

RESNETS = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101, 152: resnet152}
EPS = 1e-5  # of all of detectron2's BatchNorms, frozen or not

KEY = re.compile(
    r"(layer(?P<stage>[1-4])\.(?P<block>\d+)\.)?"
    r"((?P<kind>conv|bn)(?P<number>[1-3])|downsample\.(?P<part>[01]))\."
    r"(?P<tensor>weight|bias|running_mean|running_var)"
)


def _layout(backbone: nn.Module) -> dict[str, str]:
    """Module path -> what decides about its output, for convolutions, BatchNorms and pooling before the mean."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
    return {path: repr(module) for path, module in backbone.named_modules() if isinstance(module, kinds)}


@cache
def _layouts() -> dict[int, dict[str, str]]:
    with torch.device("meta"):
        return {depth: _layout(build()) for depth, build in RESNETS.items()}


def depth_of(backbone: nn.Module) -> int | None:
    """18, 34, 50, 101 or 152: the MODEL.RESNETS.DEPTH whose layers are those of `backbone`; None: there is none."""
    layout = _layout(backbone)
    return next((depth for depth, theirs in _layouts().items() if theirs == layout), None)


def supports(backbone: nn.Module) -> str | None:
    """Why detectron2's standard ResNets cannot hold `backbone`, as one clause; None: they can."""
    if depth_of(backbone):
        return None
    stem = getattr(backbone, "conv1", None)
    if isinstance(stem, nn.Conv2d) and stem.kernel_size == (3, 3):
        theirs = "detectron2's a 7x7 one with max-pooling (backbone.stem: imagenet)"
        return f"the stem is a 3x3 convolution (backbone.stem: small), {theirs}"
    resnets = ", ".join(f"resnet{depth}" for depth in RESNETS)
    return f"detectron2's backbones are torchvision's {resnets} as they stand; this {type(backbone).__name__} differs"


def rename(key: str) -> str | None:
    """detectron2's name of a tensor of torchvision's ResNet; None: it has no place there.

    That is the classifier (`fc`, also BN1 of ProjectorEMA) and BatchNorm's `num_batches_tracked`, which nothing reads.
    """
    if not (match := KEY.fullmatch(key)):
        return None
    place = f"res{int(match['stage']) + 1}.{match['block']}" if match["stage"] else "stem"
    layer = f"conv{match['number']}" if match["kind"] else "shortcut"
    norm = ".norm" if match["kind"] == "bn" or match["part"] == "1" else ""
    return f"{place}.{layer}{norm}.{match['tensor']}"


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` that `rename` knows, under their new names."""
    return {name: tensor for key, tensor in state.items() if (name := rename(key))}


def forward(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What detectron2's ResNet (STRIDE_IN_1X1 False, BatchNorm in eval mode) computes from converted `weights`.

    Args:
        x: normalised RGB images [B, 3, H, W].

    Returns:
        The map of res5, [B, 512 or 2048, H / 32, W / 32], rounded up.
    """

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, weight, bias = (
            weights[f"{name}.norm.{x}"] for x in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=EPS)

    x = F.max_pool2d(conv(x, "stem.conv1", stride=2).relu(), kernel_size=3, stride=2, padding=1)
    blocks = {(int(match[1]), int(match[2])) for name in weights if (match := re.match(r"res(\d)\.(\d+)\.", name))}
    for stage, block in sorted(blocks):
        path, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
        if f"{path}.conv3.weight" in weights:
            y = conv(conv(x, f"{path}.conv1").relu(), f"{path}.conv2", stride)
            y = conv(y.relu(), f"{path}.conv3")
        else:
            y = conv(conv(x, f"{path}.conv1", stride).relu(), f"{path}.conv2")
        shortcut = conv(x, f"{path}.shortcut", stride) if f"{path}.shortcut.weight" in weights else x
        x = (y + shortcut).relu()
    return x


def feature_map(backbone: nn.Module, x: Tensor) -> Tensor:
    """What `layer4` of the backbone itself gives, in the mode it is in: what `forward` must equal in eval mode."""
    maps: list[Tensor] = []
    with backbone.get_submodule("layer4").register_forward_hook(lambda _module, _inputs, output: maps.append(output)):
        backbone(x)
    return maps[0]


def settings(source: Source, depth: int, weights: Path) -> str:
    """The YAML that detectron2 needs for these weights; it looks for a relative path where it starts."""
    transform = source.transform
    mean, std = ([round(255 * x, 4) for x in values.tolist()] for values in (transform.mean, transform.std))
    path = json.dumps(str(weights), ensure_ascii=False)
    return render("detectron2.yaml.j2", weights=path, mean=mean, std=std, depth=depth)


def export(source: Source) -> Product:
    """The weights, and the `settings` that name them with their full path. The proof compares maps, before the mean."""
    depth = depth_of(source.backbone)
    assert depth, "supports() lets no other through"
    weights, file, yaml = convert(source.tensors), f"{source.name}.pth", f"{source.name}.yaml"
    content = io.BytesIO()
    torch.save({"model": weights, "__author__": "solo_ext", "matching_heuristics": True}, content)
    text = settings(source, depth, source.out.absolute() / file)
    with torch.device("meta"):
        want = convert(RESNETS[depth]().state_dict())

    def network(folder: Path) -> Callable[[Tensor], Tensor]:
        return partial(forward, load_checkpoint(folder / file)["model"])

    return Product(
        {file: content.getvalue(), yaml: text.encode()},
        network,
        f"detectron2's ResNet-{depth}",
        have=weights,
        want=want,
        load=(
            f'config.merge_from_file("{yaml}")  # after the detector\'s own',
            "DetectionCheckpointer(build_model(config)).load(config.MODEL.WEIGHTS)",
        ),
        reference=feature_map,
        record={"dropped": [key for key in source.tensors if rename(key) is None]},
    )
