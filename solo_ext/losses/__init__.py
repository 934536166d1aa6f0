"""Losses as pure functions of tensors; every one returns a scalar and averages over the batch."""

from solo_ext.losses.contrastive import info_nce, nt_xent
from solo_ext.losses.dino import Center, dino
from solo_ext.losses.distances import cosine_distance, negative_cosine, soft_cross_entropy, softmax_mse
from solo_ext.losses.distributed import gather, gather_no_grad
from solo_ext.losses.queue import enqueue, queue_nce, relational
from solo_ext.losses.terms import mean, total

__all__ = [
    "Center",
    "cosine_distance",
    "dino",
    "enqueue",
    "gather",
    "gather_no_grad",
    "info_nce",
    "mean",
    "negative_cosine",
    "nt_xent",
    "queue_nce",
    "relational",
    "soft_cross_entropy",
    "softmax_mse",
    "total",
]
