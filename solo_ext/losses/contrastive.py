"""Losses that tell an image from others: those of the batch, or of earlier batches, kept in a queue.

MoCo v3 (Chen et al., 2021), SimCLR (Chen et al., 2020), MoCo v2 (Chen et al., 2020), ReSSL (Zheng et al., 2021).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.losses.distributed import gather, gather_no_grad, rank
from solo_ext.losses.precision import in_float32


@in_float32
def info_nce(query: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of telling each query's key among the keys of all ranks (residual momentum, Eq. 2).

    query: [B, D], keys: [W B, D] of W ranks (`gather_each`), normalised here; row i of a rank's block is the image of
    its query i, all other rows are negatives. keys carry no gradient. MoCo v3's factor 2 * temperature is not included.
    In nats.
    """
    query, keys = F.normalize(query, dim=1), F.normalize(keys.detach(), dim=1)
    logits = query @ keys.T / temperature
    labels = torch.arange(len(query), device=query.device) + len(query) * rank()
    return F.cross_entropy(logits, labels)


@in_float32
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


@in_float32
def queue_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of telling each query's key from the keys in the queue (MoCo, Eq. 1).

    query, key: [B, D], normalised here; row i of both is the same image. queue: [D, K], normalised. key and queue carry
    no gradient. In nats.
    """
    query, key = F.normalize(query, dim=-1), F.normalize(key.detach(), dim=-1)
    logits = torch.cat([(query * key).sum(-1, keepdim=True), query @ queue], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


@in_float32
def relational(query: Tensor, key: Tensor, queue: Tensor, temperature_q: float, temperature_k: float) -> Tensor:
    """-sum P(key) log P(query), P = softmax of the similarities to the queue (ReSSL, Eq. 4 to 6).

    query, key: [B, D], normalised here. queue: [K, D], normalised. key and queue carry no gradient. In nats, averaged
    over the batch.
    """
    query, key = F.normalize(query, dim=-1), F.normalize(key.detach(), dim=-1)
    target = (key @ queue.T / temperature_k).softmax(-1)
    return F.cross_entropy(query @ queue.T / temperature_q, target)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Overwrites the oldest keys with those of all ranks.

    queue: [K, D], or V queues [V, D, K], which should be views of [V, K, D], where a key is in one place; changed in
    place, as a ring. pointer: [1], the place of the oldest key, moved on. keys: [B, D], or [V, B, D], normalised here;
    B may be any number.
    """
    rows = (queue if queue.dim() == 2 else queue.mT).movedim(-2, 0)  # [K, ..., D]
    keys = F.normalize(keys.detach().to(queue.dtype), dim=-1)
    keys = gather_no_grad(keys.movedim(-2, 0))[-len(rows) :]  # [W B, ..., D]
    place = (pointer + torch.arange(len(keys), device=keys.device)) % len(rows)
    rows.index_copy_(0, place, keys)
    pointer.copy_((pointer + len(keys)) % len(rows))
