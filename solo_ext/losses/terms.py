"""Several terms as one."""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add

from torch import Tensor


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of scalars, at least one."""
    return reduce(add, terms)


def mean(terms: Sequence[Tensor]) -> Tensor:
    """The mean of scalars, at least one."""
    return total(terms) / len(terms)
