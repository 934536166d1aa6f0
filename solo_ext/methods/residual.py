"""Paper B: residual momentum. The student is also pulled to the teacher on the same view (Sec. 3.3, 3.4)."""

from solo_ext.losses import cosine_distance
from solo_ext.methods.byol import BYOL
from solo_ext.methods.mocov3 import MoCoV3
from solo_ext.momentum import IntraMomentum


class ResMoCoV3(MoCoV3):
    """Res-MoCo: paper B, Eq. 9."""

    intra = IntraMomentum(weight=1.0)
    loss_scale = "paper"


class ResBYOL(BYOL):
    """Res-BYOL: paper B, Table 2; BYOL's loss on the scale of Eq. 3 and 5."""

    intra = IntraMomentum(weight=1.0)
    loss_scale = "paper"
    paper_distance = staticmethod(cosine_distance)
