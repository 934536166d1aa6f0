"""The one MLP builder behind every projector and predictor, and DINO's head on top of it."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RELU = partial(nn.ReLU, inplace=True)


def mlp(
    dims: Sequence[int],
    *,
    bias: bool | Sequence[bool] = True,
    norm: bool = True,
    last_norm: bool | str = False,
    activation: Callable[[], nn.Module] = RELU,
) -> nn.Sequential:
    """Linear layers [B, dims[0]] -> ... -> [B, dims[-1]], between them BatchNorm (if `norm`) and an activation.
    bias: of all linear layers, or of each. last_norm: end with a BatchNorm without affine parameters, as SimCLR,
    SimSiam and MoCo v3 do; `affine`: with them (BN2 of ProjectorEMA, Table D.9). The keys are solo-learn's."""
    biases = [bias] * (len(dims) - 1) if isinstance(bias, bool) else bias
    layers: list[nn.Module] = []
    for depth, (width_in, width_out) in enumerate(pairwise(dims), start=1):
        layers.append(nn.Linear(width_in, width_out, bias=biases[depth - 1]))
        if depth < len(dims) - 1:
            layers += [nn.BatchNorm1d(width_out)] if norm else []
            layers.append(activation())
        elif last_norm:
            layers.append(nn.BatchNorm1d(width_out, affine=last_norm == "affine"))
    return nn.Sequential(*layers)


class Normalize(nn.Module):
    """x [B, D] -> x / ||x||, row by row; 16 bits become float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class WeightNormLinear(nn.Module):
    """A linear layer [B, D] -> [B, K] without bias whose rows are g * v / ||v|| (Salimans & Kingma, 2016), with the
    keys of the deprecated `torch.nn.utils.weight_norm`: `weight_g` [K, 1], here 1 at first, and `weight_v` [K, D]."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(width_out, 1))
        self.weight_v = nn.Parameter(nn.Linear(width_in, width_out, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """DINO's projector and prototypes: a three-layer MLP, an L2 normalisation, K weight-normed prototypes.

    Features [B, features] become scores [B, prototypes]. norm: BatchNorm after the hidden layers. norm_last_layer: keep
    the prototypes at norm 1. Source: Caron et al., 2021, Appendix C; keys and initialisation are solo-learn's.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        norm: bool = False,
        norm_last_layer: bool = True,
    ):
        super().__init__()
        self.mlp = mlp([features, hidden, hidden, bottleneck], norm=norm, activation=nn.GELU)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.normalize = Normalize()
        self.last_layer = WeightNormLinear(bottleneck, prototypes)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.normalize(self.mlp(x)))
