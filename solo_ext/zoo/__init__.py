"""Weights: where they come from, and how they go elsewhere. Importing it teaches timm `solo_ext_backbone`."""

from solo_ext.zoo.model import load_backbone

__all__ = ["load_backbone"]
