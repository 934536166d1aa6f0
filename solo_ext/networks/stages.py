"""The network as a row of named stages: conv1, block1-4, projector.fc1, ..., predictor.fc2 (paper A, Fig. 4)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models.resnet import ResNet


@dataclass(frozen=True)
class Stage:
    """One step of the network, run on the student's modules or on the teacher's copies alike.

    Attributes:
        name: what users call it, e.g. `block4` or `projector.fc2`.
        part: the top-level module that it belongs to: `backbone`, `projector` or `predictor`.
        children: paths of its modules inside the part, in order; empty: the part is one stage.
        output: path, in the network, of the module whose output is this stage's output.
        flatten: the child before which the spatial dimensions are flattened.
    """

    name: str
    part: str
    children: tuple[str, ...]
    output: str
    flatten: str | None = None

    def modules(self, part: nn.Module) -> list[nn.Module]:
        """This stage's modules inside `part` (the student's, or the teacher's copy)."""
        return [part.get_submodule(child) for child in self.children] if self.children else [part]

    def __call__(self, part: nn.Module, x: Tensor) -> Tensor:
        for child, module in zip(self.children or (None,), self.modules(part), strict=True):
            x = module(x.flatten(1) if child is not None and child == self.flatten else x)
        return x


def backbone_stages(backbone: nn.Module) -> list[Stage]:
    """conv1 and block1-4 for ResNets; other backbones are one stage."""
    if not isinstance(backbone, ResNet):
        return [Stage("backbone", "backbone", (), "backbone")]
    return [
        Stage("conv1", "backbone", ("conv1", "bn1", "relu", "maxpool"), "backbone.maxpool"),
        *(Stage(f"block{i}", "backbone", (f"layer{i}",), f"backbone.layer{i}") for i in (1, 2, 3)),
        Stage("block4", "backbone", ("layer4", "avgpool", "fc"), "backbone", flatten="fc"),
    ]


def head_stages(part: str, head: nn.Module) -> list[Stage]:
    """One stage per linear layer of a `Sequential` head, with the normalisation and activation that follow it."""
    if not isinstance(head, nn.Sequential):
        return [Stage(part, part, (), part)]
    layers: list[list[str]] = []
    for name, module in head.named_children():
        if isinstance(module, nn.Linear) or not layers:
            layers.append([])
        layers[-1].append(name)
    return [
        Stage(f"{part}.fc{i}", part, tuple(children), part if i == len(layers) else f"{part}.{children[-1]}")
        for i, children in enumerate(layers, start=1)
    ]


def stage_row(parts: Mapping[str, nn.Module]) -> list[Stage]:
    """All stages of `parts` (name -> module, in the order of the forward pass), finest names first to last."""
    return [
        stage
        for name, part in parts.items()
        for stage in (backbone_stages(part) if name == "backbone" else head_stages(name, part))
    ]
