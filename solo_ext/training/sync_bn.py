"""BatchNorm over the joint batch of all processes, on CPUs too: the YAML's `sync_batchnorm`."""

import timm.layers
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from solo_ext.losses.distributed import gather


class CPUSyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm`, which works on GPUs only, for CPUs; without a process group it is BatchNorm."""

    running_mean: Tensor  # where they are tracked
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # one class for 1d, 2d and 3d

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...], where B may differ between ranks; returns the same shape and type."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        dims, channels = [0, *range(2, x.dim())], x.size(1)
        wide = x.double()  # for the sums of all ranks
        count = wide.new_tensor([x.numel() // channels])
        sums = torch.cat([wide.sum(dims), wide.square().sum(dims), count])
        total, squares, count = gather(sums[None]).sum(0).split([channels, channels, 1])
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        if self.track_running_stats:
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), share)
            self.running_var.lerp_((variance.detach() * count / (count - 1)).to(self.running_var.dtype), share)
        kind, shape = torch.promote_types(x.dtype, torch.float32), [1, channels, *[1] * (x.dim() - 2)]
        scale = (variance + self.eps).rsqrt()
        y = (x - mean.to(kind).view(shape)) * scale.to(kind).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class CPUSyncBatchNormAct(CPUSyncBatchNorm):
    """The same of timm's BatchNorm with an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[operator]  # modules of timm's constructor


class SyncNorms(LayerSync):
    """Synchronises the BatchNorms of a network while it is trained. Only the class of a layer changes: Lightning's own
    plugin builds new layers, and drops the activation of timm's."""

    def __init__(self, on_gpu: bool):
        self.plain: type[nn.Module] = nn.SyncBatchNorm if on_gpu else CPUSyncBatchNorm
        self.with_act: type[nn.Module] = timm.layers.SyncBatchNormAct if on_gpu else CPUSyncBatchNormAct
        self.before: dict[nn.Module, type[nn.Module]] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        self.before = {layer: type(layer) for layer in model.modules() if isinstance(layer, _BatchNorm)}
        for layer in self.before:
            layer.__class__ = self.with_act if isinstance(layer, timm.layers.BatchNormAct2d) else self.plain
            layer.process_group = None  # type: ignore[assignment]  # all ranks; torch's constructor would set it
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for layer, kind in self.before.items():
            layer.__class__ = kind
        return model
