"""The network as a row of named stages: conv1, block1-4, projector.fc1, ..., predictor.fc2 (ProjectorEMA, Fig. 4)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import attrgetter

from torch import Tensor, nn

from solo_ext.networks.heads import DINOHead

POOLING = ("avgpool", "fc", "norm", "forward_head")


@dataclass(frozen=True)
class Stage:
    """One step of the network, run on the student's modules or on the teacher's copies alike."""

    name: str  # what users call it, e.g. `block4` or `projector.fc2`
    part: str  # of the network: `backbone`, `projector` or `predictor`
    attribute: str  # the name of that part's module on the network; solo-learn calls DINO's projector `head`
    steps: tuple[str, ...]  # paths, inside the part, of the modules or methods that it runs; empty: all of the part
    output: str  # path, on the network, of the module whose output is this stage's output
    owns: tuple[str, ...] = ()  # paths, inside the part, of the modules, parameters and buffers that belong to it
    flatten: str | None = None  # the step before which the spatial dimensions are flattened

    def __call__(self, part: nn.Module, x: Tensor) -> Tensor:
        """Runs on `part`, the student's module or the teacher's copy of it."""
        if not self.steps:
            return part(x)
        for step in self.steps:
            x = attrgetter(step)(part)(x.flatten(1) if step == self.flatten else x)
        return x

    @property
    def places(self) -> str:
        """The path, inside the part, of the module whose output is this stage's last map, before a pooling."""
        return [step for step in self.steps if step not in POOLING][-1]

    def holds(self, path: str) -> bool:
        """Whether the module, parameter or buffer at `path` inside the part belongs to this stage."""
        return not self.owns or any(path == own or path.startswith(f"{own}.") for own in self.owns)

    def parameters(self, part: nn.Module) -> list[nn.Parameter]:
        """This stage's parameters in `part`, in an order that the student and its copies share, as of its buffers."""
        return [tensor for path, tensor in part.named_parameters() if self.holds(path)]

    def buffers(self, part: nn.Module) -> list[Tensor]:
        return [tensor for path, tensor in part.named_buffers() if self.holds(path)]


@contextmanager
def kept_outputs(network: nn.Module, stages: Iterable[Stage], prefix: str = "") -> Iterator[dict[str, Tensor]]:
    """The outputs of `stages` while the body runs, by name; `network` holds their parts as `<prefix><part>`."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, inputs, output: kept.update({name: output})

    with ExitStack() as hooks:
        for stage in stages:
            module = network.get_submodule(prefix + stage.output)
            hooks.enter_context(module.register_forward_hook(keep(stage.name)))
        yield kept


def stage_row(parts: Mapping[str, nn.Module], attributes: Mapping[str, str] | None = None) -> list[Stage]:
    """All stages of a network, in the order of the forward pass, which is that of `parts`: name -> module.
    attributes: part -> the name of its module on the network, where that is not the part's own name."""
    row: list[Stage] = []
    for part, module in parts.items():
        attribute = (attributes or {}).get(part, part)
        families = FAMILIES if part == "backbone" else [partial(_head, part)]
        known = (family(attribute, module) for family in families)
        row += next(filter(None, known), [Stage(part, part, attribute, (), attribute)])
    return row


def backbone_stages(attribute: str, steps: Mapping[str, Sequence[str]], part: str = "backbone") -> list[Stage]:
    """Stages that run modules one after the other, together as the `forward` of a family of backbones. attribute: the
    name of the backbone on the network. steps: stage -> paths, inside the backbone, of the modules that it runs."""
    *_, last = steps
    outputs = {name: attribute if name == last else f"{attribute}.{paths[-1]}" for name, paths in steps.items()}
    return [Stage(name, part, attribute, (*steps[name],), outputs[name], (*steps[name],)) for name in steps]


def _resnet(attribute: str, backbone: nn.Module) -> list[Stage]:
    """conv1 and block1-4 of torchvision's ResNets."""
    from torchvision.models.resnet import ResNet

    if not isinstance(backbone, ResNet):
        return []
    blocks = {f"block{i}": (f"layer{i}",) for i in (1, 2, 3)}
    steps = {"conv1": ("conv1", "bn1", "relu", "maxpool"), **blocks, "block4": ("layer4", "avgpool", "fc")}
    return [replace(stage, flatten="fc") for stage in backbone_stages(attribute, steps)]


def _vit(attribute: str, backbone: nn.Module) -> list[Stage]:
    """conv1 (patches, tokens, positions) and quarters of the depth, for every timm ViT that runs as the plain one."""
    from timm.models.vision_transformer import VisionTransformer

    methods = ("forward", "forward_features")
    plain = all(getattr(type(backbone), name, None) is getattr(VisionTransformer, name) for name in methods)
    if not (isinstance(backbone, VisionTransformer) and plain and len(backbone.blocks) >= 4):
        return []
    stem = ("patch_embed", "_pos_embed", "patch_drop", "norm_pre")
    tensors = [name for name, _ in (*backbone.named_parameters(recurse=False), *backbone.named_buffers(recurse=False))]
    bounds = [len(backbone.blocks) * i // 4 for i in range(5)]
    quarters = [tuple(f"blocks.{k}" for k in range(*pair)) for pair in pairwise(bounds)]
    steps = {"conv1": stem, **{f"block{i}": blocks for i, blocks in enumerate(quarters, start=1)}}
    steps["block4"] += ("norm", "forward_head")
    first, *middle, last = backbone_stages(attribute, steps)
    first = replace(first, owns=(*stem, "pos_drop", *tensors))
    # the end: final norm, pooling and what follows it
    end = [name for name, _ in backbone.named_children() if not first.holds(name) and name != "blocks"]
    return [first, *middle, replace(last, owns=(*quarters[-1], *end))]


# each gives the stages of the backbones that it knows, and none of others; `backbone_stages` helps to write one
FAMILIES: list[Callable[[str, nn.Module], list[Stage]]] = [_resnet, _vit]


def _head(part: str, attribute: str, head: nn.Module) -> list[Stage]:
    """One stage per linear layer, with the normalisation and activation that follow it; then DINO's prototypes."""
    if isinstance(head, DINOHead):
        layers = [*((f"mlp.{name}", module) for name, module in head.mlp.named_children()), ("normalize", None)]
    elif isinstance(head, nn.Sequential):
        layers = list(head.named_children())
    else:
        return []
    groups: list[list[str]] = []
    for path, module in layers:
        if isinstance(module, nn.Linear) or not groups:
            groups.append([])
        groups[-1].append(path)
    steps = {f"{part}.fc{i}": group for i, group in enumerate(groups, start=1)}
    if isinstance(head, DINOHead):
        steps[f"{part}.prototypes"] = ["last_layer"]
    return backbone_stages(attribute, steps, part)
