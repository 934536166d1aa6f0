"""Paper A: momentum on the projector only. The second backbone pass is saved (Sec. 2.2, Alg. 1)."""

from solo_ext.methods.byol import BYOL


class ProjectorEMABYOL(BYOL):
    """Paper A, Alg. 1."""

    teacher_stages = "projector"
