"""The accuracy that every probe and evaluation reports."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def accuracy_at_k(logits: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)) -> list[Tensor]:
    """For each of `ks`, the percentage of targets among the k largest logits, a scalar tensor; 0 without any label.

    logits: [B, classes]. targets: [B], class indices; -1 = no label, not counted. A k above the number of classes
    counts as that number.
    """
    ranked = logits.topk(min(max(ks), logits.size(1)), dim=1).indices
    hits = ranked == targets[:, None]  # -1 is no index
    labelled = (targets != -1).sum().clamp(min=1)
    return [100.0 * hits[:, :k].any(dim=1).sum() / labelled for k in ks]
