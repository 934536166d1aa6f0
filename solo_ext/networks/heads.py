"""The one MLP builder behind every projector and predictor."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(dims: Sequence[int], *, bias: bool = True, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Linear layers through `dims`, with BatchNorm (if `norm`) and ReLU between them.

    Args:
        dims: input, hidden, ..., output widths.
        bias: whether the linear layers have one.
        last_norm: end with a BatchNorm without affine parameters, as SimCLR, SimSiam and MoCo v3 do.

    Returns:
        A `Sequential` [B, dims[0]] -> [B, dims[-1]] whose keys are solo-learn's.
    """
    layers: list[nn.Module] = []
    for depth, (width_in, width_out) in enumerate(pairwise(dims), start=1):
        layers.append(nn.Linear(width_in, width_out, bias=bias))
        if depth < len(dims) - 1:
            layers += [nn.BatchNorm1d(width_out)] if norm else []
            layers.append(nn.ReLU(inplace=True))
        elif last_norm:
            layers.append(nn.BatchNorm1d(width_out, affine=False))
    return nn.Sequential(*layers)
