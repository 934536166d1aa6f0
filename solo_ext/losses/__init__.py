"""Losses as pure functions of tensors; every one returns a scalar and averages over the batch."""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add

from torch import Tensor

from solo_ext.losses.contrastive import enqueue, info_nce, nt_xent, queue_nce, relational
from solo_ext.losses.dino import Center, dino
from solo_ext.losses.distances import (
    cosine_distance,
    negative_cosine,
    printed_cross_entropy,
    soft_cross_entropy,
    softmax_mse,
)
from solo_ext.losses.distributed import gather_each

__all__ = [
    "Center",
    "cosine_distance",
    "dino",
    "enqueue",
    "gather_each",
    "info_nce",
    "mean",
    "negative_cosine",
    "nt_xent",
    "printed_cross_entropy",
    "queue_nce",
    "relational",
    "soft_cross_entropy",
    "softmax_mse",
    "total",
]


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of scalars, at least one."""
    return reduce(add, terms)


def mean(terms: Sequence[Tensor]) -> Tensor:
    """The mean of scalars, at least one."""
    return total(terms) / len(terms)
