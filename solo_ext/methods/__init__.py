"""The registry: every method by the name that its YAML gives."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from torch import nn

from solo_ext.methods.base import Method
from solo_ext.methods.byol import BYOL
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
from solo_ext.networks.backbones import BACKBONES, MOCOV3_BACKBONES, build_backbone, is_mocov3

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

__all__ = ["METHODS", "Method", "register"]


def register() -> list[str]:
    """Puts the methods that solo-learn lacks into `solo.methods.METHODS`, and the backbones into its `BaseMethod`;
    solo-learn must be importable.

    Returns:
        The names of the methods added.
    """
    from solo.methods import METHODS as registry
    from solo.methods.base import BaseMethod

    added = [name for name in METHODS if name not in registry]
    registry.update({name: METHODS[name] for name in added})
    backbones = BaseMethod._BACKBONES
    for name in [*BACKBONES, *(f"timm/{model}" for model in timm.list_models())]:
        backbones.setdefault(name, partial(_backbone, name))
    for name in MOCOV3_BACKBONES if added else ():
        backbones[name] = partial(_vit, backbones[name])
    return added


def _backbone(name: str, method: str | None = None, **kwargs: Any) -> nn.Module:
    """`build_backbone`, as solo-learn calls its constructors."""
    return build_backbone(name, kwargs, method=method)


def _vit(solo_learns: Callable[..., nn.Module], method: str | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """solo-learn's ViT, with MoCo v3's own for all methods of that family: its heads are others at the same shapes."""
    return solo_learns("mocov3" if is_mocov3(method) else method, *args, **kwargs)
