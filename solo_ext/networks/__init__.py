"""Backbones, heads, and the ordered row of named stages that they form."""

from solo_ext.networks.backbones import BACKBONES, BackboneConfig, build_backbone
from solo_ext.networks.heads import DINOHead, Normalize, WeightNormLinear, mlp
from solo_ext.networks.stages import Stage, stage_row

__all__ = [
    "BACKBONES",
    "BackboneConfig",
    "DINOHead",
    "Normalize",
    "Stage",
    "WeightNormLinear",
    "build_backbone",
    "mlp",
    "stage_row",
]
