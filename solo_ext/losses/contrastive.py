"""Contrastive losses within the batch: MoCo v3's (Chen et al., 2021) and SimCLR's (Chen et al., 2020)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.losses.distributed import gather, gather_no_grad, rank


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


def nt_xent(queries: Sequence[Tensor], temperature: float, targets: Sequence[Tensor] | None = None) -> Tensor:
    """-log of the share of an image's other views among all views of all images and ranks (SimCLR, Eq. 1).

    queries: per view, outputs [B, D], normalised here; row i of every view is the same image. targets: per view, a
    momentum target's outputs [B, D], which then give positives and negatives, without gradient, in place of the queries
    themselves. In nats, averaged over views; the key of a query's own view is neither positive nor negative.

    ProjectorEMA adds momentum to SimCLR (Table 1) without saying how; this keeps SimCLR's 2 (B - 1) negatives.
    """
    images = len(queries[0])
    q = F.normalize(torch.cat(list(queries)), dim=-1)
    k = gather(q) if targets is None else gather_no_grad(F.normalize(torch.cat(list(targets)), dim=-1))
    views = len(queries if targets is None else targets)
    logits = q @ k.T / temperature
    mine = torch.arange(len(q), device=q.device)
    theirs = torch.arange(len(k), device=q.device)  # rank by rank, view by view, image by image
    same_image = (mine % images + images * rank())[:, None] == theirs % images + theirs // (views * images) * images
    same_view = (mine // images)[:, None] == theirs // images % views
    logits = logits.masked_fill(same_image & same_view, -torch.inf)
    # log_softmax first: autocast gives it float32, but not logsumexp
    return -logits.log_softmax(1).masked_fill(~same_image, -torch.inf).logsumexp(1).mean()
