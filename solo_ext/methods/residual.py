"""Residual momentum (Res-): arXiv 2211.09861. Also pulls the student to the teacher on the same view (Sec. 3.3, 3.4).

The paper has MoCo v3, BYOL, ReSSL and SimSiam (Tables 1 to 5 and 16); the other frameworks go beyond it. Those without
a predictor compare the projectors' outputs.
"""

from solo_ext.losses import cosine_distance
from solo_ext.methods.base import DECLARED
from solo_ext.methods.byol import BYOL
from solo_ext.methods.dino import DINO
from solo_ext.methods.mocov2plus import MoCoV2Plus
from solo_ext.methods.mocov3 import MoCoV3
from solo_ext.methods.ressl import ReSSL
from solo_ext.methods.simclr import SimCLR
from solo_ext.methods.simsiam import SimSiam
from solo_ext.momentum import IntraMomentum


class ResMoCoV3(MoCoV3, name="res_mocov3"):
    """Res-MoCo (Eq. 9)."""

    intra = IntraMomentum(weight=1.0)
    loss_scale = "paper"


DECLARED["res_moco"] = ResMoCoV3


class ResBYOL(BYOL, name="res_byol"):
    """Res-BYOL (Table 2); BYOL's loss on the scale of Eq. 3 and 5."""

    intra = IntraMomentum(weight=1.0)
    loss_scale = "paper"
    paper_distance = staticmethod(cosine_distance)


class ResReSSL(ReSSL, name="res_ressl"):
    """ReSSL with intra-momentum on both views (Table 16)."""

    intra = IntraMomentum(weight=1.0)


class ResSimSiam(SimSiam, name="res_simsiam"):
    """SimSiam with inter- and intra-momentum (Table 16); `momentum.inter: false` leaves the latter alone."""

    teacher_stages = "full"
    intra = IntraMomentum(weight=1.0)


class ResDINO(DINO, name="res_dino"):
    """DINO with intra-momentum between prototype scores."""

    intra = IntraMomentum(weight=1.0)


class ResMoCoV2Plus(MoCoV2Plus, name="res_mocov2plus"):
    """MoCo v2+ with intra-momentum."""

    intra = IntraMomentum(weight=1.0)


class ResSimCLR(SimCLR, name="res_simclr"):
    """SimCLR with inter- and intra-momentum; `momentum.inter: false` leaves the latter alone."""

    teacher_stages = "full"
    intra = IntraMomentum(weight=1.0)
