"""The registry: every method by the name that its YAML gives."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from solo_ext.methods.base import Method, new_backbone
from solo_ext.methods.byol import BYOL
from solo_ext.methods.config import MethodConfig
from solo_ext.methods.dino import DINO
from solo_ext.methods.mocov2plus import MoCoV2Plus
from solo_ext.methods.mocov3 import MoCoV3
from solo_ext.methods.projector_ema import (
    ProjectorEMABYOL,
    ProjectorEMADINO,
    ProjectorEMAMoCoV2Plus,
    ProjectorEMAMoCoV3,
    ProjectorEMAReSSL,
    ProjectorEMASimCLR,
    ProjectorEMASimSiam,
)
from solo_ext.methods.residual import (
    ResBYOL,
    ResDINO,
    ResMoCoV2Plus,
    ResMoCoV3,
    ResReSSL,
    ResSimCLR,
    ResSimSiam,
)
from solo_ext.methods.ressl import ReSSL
from solo_ext.methods.simclr import SimCLR
from solo_ext.methods.simsiam import SimSiam
from solo_ext.networks import BackboneConfig
from solo_ext.schema import build

METHODS: dict[str, type[Method]] = {
    "byol": BYOL,
    "dino": DINO,
    "mocov2plus": MoCoV2Plus,
    "mocov3": MoCoV3,
    "ressl": ReSSL,
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "projector_ema_byol": ProjectorEMABYOL,
    "projector_ema_dino": ProjectorEMADINO,
    "projector_ema_mocov2plus": ProjectorEMAMoCoV2Plus,
    "projector_ema_mocov3": ProjectorEMAMoCoV3,
    "projector_ema_ressl": ProjectorEMAReSSL,
    "projector_ema_simclr": ProjectorEMASimCLR,
    "projector_ema_simsiam": ProjectorEMASimSiam,
    "res_byol": ResBYOL,
    "res_dino": ResDINO,
    "res_mocov2plus": ResMoCoV2Plus,
    "res_mocov3": ResMoCoV3,
    "res_moco": ResMoCoV3,
    "res_ressl": ResReSSL,
    "res_simclr": ResSimCLR,
    "res_simsiam": ResSimSiam,
}

__all__ = ["METHODS", "Method", "MethodConfig", "backbone_of"]


def backbone_of(cfg: Any) -> nn.Module:
    """The randomly initialised backbone of a run's configuration, typed or as its args.json has it.

    cfg: with `backbone` and `data`, and `method` or `pretrain_method`, which may have constructors of its own.
    """
    values = cfg if isinstance(cfg, Mapping) else vars(cfg)
    backbone, data = values["backbone"], values.get("data") or {}
    if isinstance(backbone, Mapping):  # of any origin
        declared = {field.name for field in dataclasses.fields(BackboneConfig)}
        backbone = build(BackboneConfig, {k: v for k, v in backbone.items() if k in declared}, "backbone")
    name = str(values.get("method") or values.get("pretrain_method")).lower()
    dataset = data.get("dataset") if isinstance(data, Mapping) else data.dataset
    return new_backbone(backbone, dataset, METHODS[name].backbones if name in METHODS else None)
