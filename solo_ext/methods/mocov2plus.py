"""MoCo v2+ (Chen & He, 2021): MoCo v2 (Chen et al., 2020) with a symmetric loss. ProjectorEMA calls it MoCo v2."""

from dataclasses import dataclass

from torch import Tensor

from solo_ext.losses import mean, queue_nce
from solo_ext.methods.base import QueuedMethod, cross_views
from solo_ext.networks import mlp
from solo_ext.schema import Count, Temperature


class MoCoV2Plus(QueuedMethod, name="mocov2plus"):
    """Tell the teacher's key of the other view from a queue of earlier keys of that view."""

    @dataclass
    class Kwargs(QueuedMethod.Kwargs):
        proj_hidden_dim: Count = 2048
        proj_output_dim: Count = 256
        temperature: Temperature = 0.2

    loss_scale = None
    loss_name, loss_title = "train_nce_loss", "InfoNCE"

    def build_heads(self, features: int) -> None:
        k = self.kwargs
        self.projector = mlp([features, k.proj_hidden_dim, k.proj_output_dim], norm=False)
        self.build_queue(self.large_crops, k.proj_output_dim, k.queue_size)

    def loss(self, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The mean over pairs of different views; each target view has a queue of its own."""
        pairs = cross_views(queries, list(zip(targets, self.queue, strict=True)))
        return mean([queue_nce(q, k, queue, self.kwargs.temperature) for q, (k, queue) in pairs])
