"""Projector-only momentum (ProjectorEMA): arXiv 2208.05744. The second backbone pass is saved (Sec. 2.2, Alg. 1).

The paper has BYOL, DINO, MoCo v2+ and ReSSL (Tables 3, 5 and 6); the other frameworks go beyond it.
"""

from solo_ext.methods.byol import BYOL
from solo_ext.methods.dino import DINO
from solo_ext.methods.mocov2plus import MoCoV2Plus
from solo_ext.methods.mocov3 import MoCoV3
from solo_ext.methods.ressl import ReSSL
from solo_ext.methods.simclr import SimCLR
from solo_ext.methods.simsiam import SimSiam


class ProjectorEMABYOL(BYOL, name="projector_ema_byol"):
    """BYOL with projector-only momentum (Alg. 1)."""

    teacher_stages = "projector"


class ProjectorEMADINO(DINO, name="projector_ema_dino"):
    """The whole head, prototypes included, is averaged (Tables 3 to 6)."""

    teacher_stages = "projector"


class ProjectorEMAMoCoV2Plus(MoCoV2Plus, name="projector_ema_mocov2plus"):
    """MoCo v2+ with projector-only momentum (Tables 3, 5 and 6)."""

    teacher_stages = "projector"


class ProjectorEMAReSSL(ReSSL, name="projector_ema_ressl"):
    """Tables 3, 5 and 6. The student's backbone runs the weak view for the teacher, without gradient."""

    teacher_stages = "projector"


class ProjectorEMAMoCoV3(MoCoV3, name="projector_ema_mocov3"):
    """MoCo v3 with projector-only momentum; not in the paper."""

    teacher_stages = "projector"


class ProjectorEMASimCLR(SimCLR, name="projector_ema_simclr"):
    """SimCLR with keys from the averaged projector; not in the paper."""

    teacher_stages = "projector"


class ProjectorEMASimSiam(SimSiam, name="projector_ema_simsiam"):
    """SimSiam with targets from the averaged projector; not in the paper."""

    teacher_stages = "projector"
