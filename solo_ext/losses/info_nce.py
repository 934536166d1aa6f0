"""The contrastive loss of MoCo v3."""

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.losses.distributed import gather_no_grad, rank


def info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of telling each query's key among the keys of all ranks (residual momentum, Eq. 2).

    query, key: [B, D], normalised here; row i of both is the same image, all other rows are negatives. key
    carries no gradient. MoCo v3's factor 2 * temperature is not included. In nats.
    """
    query = F.normalize(query, dim=1)
    keys = gather_no_grad(F.normalize(key, dim=1))
    logits = query @ keys.T / temperature
    labels = torch.arange(len(query), device=query.device) + len(query) * rank()
    return F.cross_entropy(logits, labels)
