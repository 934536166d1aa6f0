"""What a method consists of: parameters, what its teacher copies, and passes through the backbone per view."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from solo_ext.methods import Method
from solo_ext.networks import Stage

SMALL_CROP = 32  # pixels, where no augmentations say how large the views are


def anatomy(method: Method) -> dict[str, Any]:
    """What the built `method` consists of, and how often it runs its backbone; measured on a synthetic step.

    Neither `method` nor the global random state is changed.

    Returns:
        student_parameters: of backbone and heads, without the probes.
        teacher_parameters: of the teacher's copies.
        teacher_tensors: {stage: names of its parameters in the method's state_dict}; stages in order.
        teacher_tau: {stage: {"base", "final", "schedule"}}; 0, constant: a copy of the student ("sharing").
        teacher_layers: weight layers with an EMA copy, counted as paper A does (Sec. 5, Table 4); see `_layers`.
        parameters_millions: of all backbones, student's and teacher's: paper A, Table 4, "Params (MB)".
        backbone_stages, teacher_backbone_stages: their names; those of which the teacher has copies.
        student_forwards, teacher_forwards: passes through the backbone per view, as the share of its stages that ran.
        forwards_per_view: their sum: paper A, Table 4, "#Fwd".
    """
    teacher = method.teacher
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    owned = {stage: stage.parameters(teacher.pair(stage)[0]) for stage in teacher.stages}
    row = [stage for stage in teacher.row if stage.part == "backbone"]
    student = [parameter for name in method.parts for parameter in method.part(name).parameters()]
    backbones = [*method.backbone.parameters(), *(p for stage in row for p in owned.get(stage, ()))]
    student_passes, teacher_passes = _backbone_passes(method, row)
    return {
        "student_parameters": _count(student),
        "teacher_parameters": _count(parameter for parameters in owned.values() for parameter in parameters),
        "teacher_tensors": {stage.name: [names[id(tensor)] for tensor in owned[stage]] for stage in owned},
        "teacher_tau": {stage: asdict(tau) for stage, tau in teacher.taus.items()},
        "teacher_layers": _layers(method, row),
        "parameters_millions": _count(backbones) / 1e6,
        "backbone_stages": [stage.name for stage in row],
        "teacher_backbone_stages": [stage.name for stage in row if stage in owned],
        "student_forwards": student_passes,
        "teacher_forwards": teacher_passes,
        "forwards_per_view": student_passes + teacher_passes,
    }


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _layers(method: Method, row: Sequence[Stage]) -> int:
    """Convolutions and linear layers with an EMA copy.

    The paper's 53 and 21 are 50 + 3 and 18 + 3: a ResNet's own number, which leaves out the convolutions of its
    shortcuts and counts the classification layer, here removed; and the 3 layers of DINO's head, whose prototypes
    (weight-normed, no `nn.Linear`) it leaves out. Copies with tau 0 do not count.

    row: the backbone's stages.
    """
    teacher = method.teacher
    averaged = [stage for stage in teacher.stages if not teacher.taus[stage.name].always(0)]
    layers = [
        path
        for stage in averaged
        for path, layer in teacher.pair(stage)[0].named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and stage.holds(path) and "downsample" not in path
    ]
    return len(layers) + (isinstance(method.backbone, ResNet) and all(stage in averaged for stage in row))


def _backbone_passes(method: Method, row: Sequence[Stage]) -> tuple[float, float]:
    """(student's, teacher's) backbone passes per view in one training step, as shares of the stages in `row`."""
    step = copy.deepcopy(method).train()
    step.monitors = []  # the gap is measured now and then, not in every step
    images = Counter()

    def count(who: str, stage: Stage, part: nn.Module) -> None:
        first = attrgetter(stage.steps[0])(part) if stage.steps else part
        first.register_forward_pre_hook(lambda _, inputs: images.update({who: len(inputs[0])}))

    for stage in row:
        count("student", stage, step.backbone)
        if stage in step.teacher.stages:
            count("teacher", stage, step.teacher.pair(stage)[0])
    batch = synthetic_batch(step.cfg, 2, next(step.parameters()).device)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # Lightning's, that nobody hears what the step logs
        step.training_step(batch, 0)
    whole = len(row) * sum(map(len, batch[1]))
    return images["student"] / whole, images["teacher"] / whole


def crop_sizes(cfg: Any) -> list[int]:
    """The side of each view in pixels."""
    augmentations = getattr(cfg, "augmentations", None)
    if not augmentations:
        return [SMALL_CROP] * (cfg.data.num_large_crops or 2)
    return [view.crop_size for view in augmentations for _ in range(view.num_crops)]


def synthetic_batch(cfg: Any, images: int, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
    """A batch of random images as `cfg` has them: (indexes [B], views [B, 3, H, W], targets [B])."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(images, 3, side, side, generator=generator).to(device) for side in crop_sizes(cfg)]
    classes = cfg.data.num_classes or 0
    targets = torch.randint(classes, (images,), generator=generator) if classes else torch.full((images,), -1)
    return torch.arange(images, device=device), views, targets.to(device)
