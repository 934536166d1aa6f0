"""Losses are computed in float32, whatever the precision of the run, and averages not in 16 bits."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from solo_ext.errors import ConfigError

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def in_float32(loss: Loss) -> Loss:
    """`loss`, outside of autocast, of its tensors in float32 (or float64, if they are).

    Late in a training, 16 bits do not tell outputs apart: `2 - 2 cos` of vectors that differ by 5% is 0 in bfloat16.
    """

    @functools.wraps(loss)
    def wide(*args: Any, **kwargs: Any) -> Tensor:
        [first, *_] = args[0] if isinstance(args[0], list | tuple) else args
        with torch.autocast(first.device.type, enabled=False):
            return loss(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})

    return wide  # type: ignore[return-value]


def _wide(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [_wide(item) for item in x]
    return x.to(torch.promote_types(x.dtype, torch.float32)) if isinstance(x, Tensor) and x.is_floating_point() else x


def check_precision(precision: Any) -> None:
    """Raises ConfigError for one of Lightning's precisions in which a teacher's average stands still."""
    if precision in ("16-true", "bf16-true"):
        mixed = precision.replace("true", "mixed")
        raise ConfigError(f"precision: {precision} keeps averages in 16 bits, where they stop; use {mixed}")
