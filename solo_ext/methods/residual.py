"""Variants of residual momentum whose framework's loss is on the scale that the paper prints."""

from solo_ext.losses import cosine_distance
from solo_ext.methods.base import DECLARED
from solo_ext.methods.byol import BYOL
from solo_ext.methods.mocov3 import MoCoV3
from solo_ext.methods.variants import Res


class ResMoCoV3(Res, MoCoV3, name="res_mocov3"):
    """Res-MoCo (Eq. 9)."""

    loss_scale = "paper"


DECLARED["res_moco"] = ResMoCoV3


class ResBYOL(Res, BYOL, name="res_byol"):
    """Res-BYOL (Table 2); BYOL's loss on the scale of Eq. 3 and 5."""

    loss_scale = "paper"
    paper_distance = staticmethod(cosine_distance)
