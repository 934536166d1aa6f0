"""What a method consists of: parameters, the teacher's copies, forward passes through the backbone."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from solo_ext.methods.module import LightningMethod
from solo_ext.networks.stages import Stage


def anatomy(method: LightningMethod) -> dict[str, Any]:
    """What the built `method` consists of, and how often a training step runs its backbone.

    Parameters are counted without the probes. Backbone passes are per view, and a part of the backbone counts as its
    share of the stages. ProjectorEMA's Table 4 prints `teacher_layers` (see `_layers`), `parameters_millions` (the
    backbones of student and teacher) as "Params (MB)" and `forwards_per_view` as "#Fwd".
    """
    teacher = method.teacher
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    copies = {stage: stage.parameters(teacher.pair(stage)[0]) for stage in teacher.stages}
    row = [stage for stage in teacher.row if stage.part == "backbone"]
    copied = [stage for stage in row if stage in copies]
    student = chain(*(method.part(name).parameters() for name in method.parts))
    views = method.large_crops + (method.cfg.data.num_small_crops or 0)
    passes = method.passes(views, method.intra.active(0))
    student_forwards = len(passes.student) / views
    teacher_forwards = len(passes.teacher) / views * len(copied) / len(row)
    backbones = chain(method.backbone.parameters(), *(copies[stage] for stage in copied))
    return {
        "student_parameters": sum(map(Tensor.numel, student)),
        "teacher_parameters": sum(map(Tensor.numel, chain(*copies.values()))),
        "teacher_tensors": {stage.name: [names[id(tensor)] for tensor in copies[stage]] for stage in copies},
        "teacher_tau": {stage: str(tau) for stage, tau in teacher.taus.items()},
        "teacher_layers": _layers(method, row),
        "parameters_millions": sum(map(Tensor.numel, backbones)) / 1e6,
        "backbone_stages": [stage.name for stage in row],
        "teacher_backbone_stages": [stage.name for stage in copied],
        "student_forwards": student_forwards,
        "teacher_forwards": teacher_forwards,
        "forwards_per_view": student_forwards + teacher_forwards,
    }


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
