"""Our methods and backbones in solo-learn's registry."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import timm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from solo_ext.methods import METHODS
from solo_ext.methods.module import LightningMethod
from solo_ext.networks.backbones import BACKBONES, MOCO_VITS, BackboneConfig, build_backbone


def register() -> list[str]:
    """Adds the methods that solo-learn lacks to `solo.methods.METHODS`, and the backbones to its `BaseMethod`.

    solo-learn must be importable. Returns the names of the added methods.
    """
    from solo.methods import METHODS as registry
    from solo.methods.base import BaseMethod

    added = [name for name in METHODS if name not in registry]
    registry.update({name: _registered(METHODS[name]) for name in added})  # type: ignore[arg-type]  # classes can be hashed
    backbones = BaseMethod._BACKBONES
    for name in [*BACKBONES, *(f"timm/{model}" for model in timm.list_models())]:
        backbones.setdefault(name, partial(_backbone, name))
    for name in MOCO_VITS if added else ():
        backbones[name] = partial(_vit, backbones[name])
    return added


@cache
def _registered(method: type[LightningMethod]) -> type[LightningMethod]:
    """`method` as solo-learn's script takes it, which reads `performance` from the configuration that it passed."""

    def __init__(self: LightningMethod, cfg: DictConfig) -> None:
        if "performance" not in cfg:
            OmegaConf.update(cfg, "performance", {"disable_channel_last": False}, force_add=True)
        method.__init__(self, cfg)

    return type(method.__name__, (method,), {"__init__": __init__, "__module__": method.__module__})


def _own(method: str | None) -> Any:
    return METHODS.declared[method].backbones if method and method in METHODS else None


def _backbone(name: str, method: str | None = None, **kwargs: Any) -> nn.Module:
    """`build_backbone`, as solo-learn calls its constructors."""
    return build_backbone(BackboneConfig(name, kwargs), own=_own(method))


def _vit(solo_learns: Callable[..., nn.Module], method: str | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """solo-learn's ViT, with MoCo v3's own for all methods that have them: its heads are others at the same shapes."""
    return solo_learns("mocov3" if _own(method) is MOCO_VITS else method, *args, **kwargs)
