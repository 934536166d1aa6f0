"""The cosine loss on its two scales: -cos (SimSiam, ProjectorEMA) and 2 - 2 cos (BYOL, residual momentum)."""

import torch.nn.functional as F
from torch import Tensor


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos(p, z), averaged over the batch (ProjectorEMA, D of Alg. 1 and Eq. 5; SimSiam, Eq. 1).

    p, z: [B, D], not normalised. z carries no gradient. In [-1, 1].
    """
    return -F.cosine_similarity(p, z.detach(), dim=-1).mean()


def cosine_distance(p: Tensor, z: Tensor) -> Tensor:
    """2 - 2 cos(p, z) = ||p/|p| - z/|z|||^2, averaged over the batch (residual momentum, Eq. 5; BYOL, Eq. 2).

    p, z: [B, D], not normalised. z carries no gradient. In [0, 4]; its gradient is twice `negative_cosine`'s.
    """
    return 2 + 2 * negative_cosine(p, z)
