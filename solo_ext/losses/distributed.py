"""Batches joined over the ranks of torch.distributed; without it all functions return their argument."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if _distributed() else 0


@torch.no_grad()
def gather_no_grad(x: Tensor) -> Tensor:
    """[B, ...] on each of W ranks -> [W B, ...] in rank order, without gradient. B is the same on all."""
    return _all_gather(x) if _distributed() else x.detach()


def gather_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`gather_no_grad` of tensors of one shape, in one call."""
    return [*gather_no_grad(torch.stack([*tensors], 1)).unbind(1)] if _distributed() else [x.detach() for x in tensors]


def gather(x: Tensor) -> Tensor:
    """[B, ...] on each of W ranks -> [W B, ...] in rank order, B the same on all; gradients of all ranks' losses are
    summed. DistributedDataParallel averages them, so that the mean of the ranks' losses is differentiated."""
    return _Gather.apply(x) if _distributed() else x


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over ranks of a tensor of the same shape on each; without torch.distributed, `x`."""
    if not _distributed():
        return x
    dist.all_reduce(x)
    return x / dist.get_world_size()


@torch.no_grad()
def max_over_ranks(x: Tensor) -> Tensor:
    """The largest over ranks of each entry of a tensor of the same shape on each; without torch.distributed, `x`."""
    if _distributed():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_gather(x: Tensor) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
