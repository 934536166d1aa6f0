"""What a method consists of: parameters, the teacher's copies, forward passes through the backbone."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from solo_ext.methods.module import LightningMethod
from solo_ext.networks.stages import Stage


def anatomy(method: LightningMethod) -> dict[str, Any]:
    """What the built `method` consists of, and how often a training step runs its backbone.

    Returns:
        student_parameters, teacher_parameters: of backbone and heads, without the probes; of the teacher's copies.
        teacher_tensors, teacher_tau: {stage: names of its parameters in the state_dict}, {stage: tau in words}.
        teacher_layers: weight layers with an EMA copy, counted as in ProjectorEMA, Sec. 5 and Table 4; see `_layers`.
        parameters_millions: of student's and teacher's backbone: ProjectorEMA, Table 4, "Params (MB)".
        backbone_stages, teacher_backbone_stages: names of all stages, and of those that the teacher copies.
        student_forwards, teacher_forwards: passes through the backbone per view; part of it counts as its share.
        forwards_per_view: the sum: ProjectorEMA, Table 4, "#Fwd".
    """
    teacher = method.teacher
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    copies = {stage: stage.parameters(teacher.pair(stage)[0]) for stage in teacher.stages}
    row = [stage for stage in teacher.row if stage.part == "backbone"]
    copied = [stage for stage in row if stage in copies]
    student = [parameter for name in method.parts for parameter in method.part(name).parameters()]
    views = method.large_crops + (method.cfg.data.num_small_crops or 0)
    passes = method.passes(views, method.intra.active(0))
    student_forwards = len(passes.student) / views
    teacher_forwards = len(passes.teacher) / views * len(copied) / len(row)
    backbones = [*method.backbone.parameters(), *(parameter for stage in copied for parameter in copies[stage])]
    return {
        "student_parameters": _count(student),
        "teacher_parameters": sum(map(_count, copies.values())),
        "teacher_tensors": {stage.name: [names[id(tensor)] for tensor in copies[stage]] for stage in copies},
        "teacher_tau": {stage: str(tau) for stage, tau in teacher.taus.items()},
        "teacher_layers": _layers(method, row),
        "parameters_millions": _count(backbones) / 1e6,
        "backbone_stages": [stage.name for stage in row],
        "teacher_backbone_stages": [stage.name for stage in copied],
        "student_forwards": student_forwards,
        "teacher_forwards": teacher_forwards,
        "forwards_per_view": student_forwards + teacher_forwards,
    }


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _layers(method: LightningMethod, row: Sequence[Stage]) -> int:
    """Convolutions and linear layers with an EMA copy; tau 0 does not count. `row`: the backbone's stages.

    The paper's 53 and 21 are 50 + 3 and 18 + 3: the number in a ResNet's name, which leaves out the convolutions of the
    shortcuts and counts the classification layer, removed here; and 3 layers of DINO's head, without its prototypes.
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
