"""Accuracy, for every probe and evaluation."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def accuracy_at_k(logits: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)) -> list[Tensor]:
    """Per k, the percentage of targets among the k largest logits.

    Args:
        logits: [B, classes].
        targets: [B], class indices; -1 = no label, not counted.
        ks: a k above the number of classes counts as that number.

    Returns:
        One scalar tensor per k, on the device of the logits; 0 where no target has a label.
    """
    ranked = logits.topk(min(max(ks), logits.size(1)), dim=1).indices
    hits = ranked == targets[:, None]  # -1 is no index
    labelled = (targets != -1).sum().clamp(min=1)
    return [100.0 * hits[:, :k].any(dim=1).sum() / labelled for k in ks]
