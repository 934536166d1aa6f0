"""The registry: every method by the name that its YAML gives."""

from solo_ext.methods.base import Method
from solo_ext.methods.byol import BYOL
from solo_ext.methods.mocov3 import MoCoV3
from solo_ext.methods.projector_ema import ProjectorEMABYOL
from solo_ext.methods.residual import ResBYOL, ResMoCoV3

METHODS: dict[str, type[Method]] = {
    "byol": BYOL,
    "mocov3": MoCoV3,
    "projector_ema_byol": ProjectorEMABYOL,
    "res_byol": ResBYOL,
    "res_mocov3": ResMoCoV3,
    "res_moco": ResMoCoV3,
}

__all__ = ["METHODS", "Method", "register"]


def register() -> list[str]:
    """Puts the methods that solo-learn lacks into `solo.methods.METHODS`; solo-learn must be importable.

    Returns:
        The names added.
    """
    from solo.methods import METHODS as registry

    added = [name for name in METHODS if name not in registry]
    registry.update({name: METHODS[name] for name in added})
    return added
