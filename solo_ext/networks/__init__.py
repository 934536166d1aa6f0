"""Backbones, heads, and the ordered row of named stages that they form."""

from solo_ext.networks.backbones import BACKBONES, BackboneConfig, build_backbone
from solo_ext.networks.heads import DINOHead, mlp
from solo_ext.networks.stages import FAMILIES, backbone_stages

__all__ = ["BACKBONES", "FAMILIES", "BackboneConfig", "DINOHead", "backbone_stages", "build_backbone", "mlp"]
