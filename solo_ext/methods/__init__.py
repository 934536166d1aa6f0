"""The registry: every method by the name that its YAML gives."""

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

__all__ = ["METHODS", "Method"]
