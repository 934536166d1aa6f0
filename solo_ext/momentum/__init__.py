"""The teacher: which stages it copies, how they follow the student, and the term that pulls the student back."""

from solo_ext.momentum.intra import IntraMomentum
from solo_ext.momentum.scope import MomentumConfig
from solo_ext.momentum.tau import Tau
from solo_ext.momentum.teacher import Teacher

__all__ = ["IntraMomentum", "MomentumConfig", "Tau", "Teacher"]
