"""Losses against a queue of earlier keys, and the queue: MoCo v2 (Chen et al., 2020), ReSSL (Zheng et al., 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.losses.distributed import gather_no_grad


def queue_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of telling each query's key from the keys in the queue (MoCo, Eq. 1).

    query, key: [B, D], normalised here; row i of both is the same image. queue: [D, K], normalised. key and queue carry
    no gradient. In nats.
    """
    query, key = F.normalize(query, dim=-1), F.normalize(key.detach(), dim=-1)
    logits = torch.cat([(query * key).sum(-1, keepdim=True), query @ queue], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def relational(query: Tensor, key: Tensor, queue: Tensor, temperature_q: float, temperature_k: float) -> Tensor:
    """-sum P(key) log P(query), P = softmax of the similarities to the queue (ReSSL, Eq. 4 to 6).

    query, key: [B, D], normalised here. queue: [K, D], normalised. key and queue carry no gradient. In nats, averaged
    over the batch.
    """
    query, key = F.normalize(query, dim=-1), F.normalize(key.detach(), dim=-1)
    target = (key @ queue.T / temperature_k).softmax(-1)
    return F.cross_entropy(query @ queue.T / temperature_q, target)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor, dim: int) -> None:
    """Puts the keys of all ranks in the place of the oldest.

    queue: K keys along `dim`, changed in place. pointer: [1], the place of the oldest key, moved on. keys: [B, D], or
    [V, B, D] for V queues in one tensor, normalised here; B may be any number: the queue is a ring.
    """
    keys = F.normalize(keys.detach().to(queue.dtype), dim=-1)
    keys = gather_no_grad(keys.movedim(-2, 0))[-queue.shape[dim] :]  # [W B, ..., D]
    place = (pointer + torch.arange(len(keys), device=keys.device)) % queue.shape[dim]
    # [K, D] for one queue, [V, D, K] for several
    queue.index_copy_(dim, place, keys.movedim(0, -1) if dim else keys)
    pointer.copy_((pointer + len(keys)) % queue.shape[dim])
