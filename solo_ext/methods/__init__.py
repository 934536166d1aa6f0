"""Frameworks and their variants; each file of this folder that defines some is found by being here."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import nn

from solo_ext.methods.base import Method, new_backbone
from solo_ext.methods.config import MethodConfig
from solo_ext.methods.registry import METHODS
from solo_ext.networks import BackboneConfig
from solo_ext.schema import build

__all__ = ["METHODS", "Method", "MethodConfig", "backbone_of"]

for _file in pkgutil.iter_modules(__path__):
    if _file.name != "module":  # which imports Lightning
        importlib.import_module(f"{__name__}.{_file.name}")


def backbone_of(cfg: Any) -> nn.Module:
    """The randomly initialised backbone of a run's configuration, typed or as its args.json has it.

    cfg: with `backbone` and `data`, and `method` or `pretrain_method`, which may have constructors of its own.
    """
    values = cfg if isinstance(cfg, Mapping) else vars(cfg)
    backbone, data = values["backbone"], values.get("data") or {}
    if isinstance(backbone, Mapping):  # of any origin
        declared = {field.name for field in dataclasses.fields(BackboneConfig)}
        backbone = build(BackboneConfig, {k: v for k, v in backbone.items() if k in declared}, "backbone")
    method = METHODS.declared.get(str(values.get("method") or values.get("pretrain_method")).lower())
    dataset = data.get("dataset") if isinstance(data, Mapping) else data.dataset
    return new_backbone(backbone, dataset, method.backbones if method else None)
