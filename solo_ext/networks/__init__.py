"""Backbones, heads, and the ordered row of named stages that they form."""

from solo_ext.networks.backbones import BACKBONES, MOCO_VITS, BackboneConfig, build_backbone, is_resnet
from solo_ext.networks.heads import DINOHead, mlp
from solo_ext.networks.stages import FAMILIES, Stage, backbone_stages, kept_outputs, stage_row

__all__ = [
    "BACKBONES",
    "FAMILIES",
    "MOCO_VITS",
    "BackboneConfig",
    "DINOHead",
    "Stage",
    "backbone_stages",
    "build_backbone",
    "is_resnet",
    "kept_outputs",
    "mlp",
    "stage_row",
]
