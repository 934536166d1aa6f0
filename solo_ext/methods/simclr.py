"""SimCLR (Chen et al., 2020)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from solo_ext.losses import gather_each, info_nce, mean, nt_xent
from solo_ext.methods.base import Method, cross_views
from solo_ext.networks import mlp
from solo_ext.schema import Count, Temperature


class SimCLR(Method, name="simclr"):
    """Tell an image's other view from all other images' views, both with gradient; no momentum of its own.

    With stages to average and `momentum.inter`, the teacher gives positives and negatives (ProjectorEMA, Table 1).
    """

    @dataclass
    class Kwargs(Method.Kwargs):
        """negatives: with a momentum target, those of `both` views, as SimCLR has them, or of the `opposite` view
        only, as MoCo v3 has them. ProjectorEMA does not say."""

        proj_hidden_dim: Count = 2048
        proj_output_dim: Count = 256
        temperature: Temperature = 0.2
        negatives: Literal["both", "opposite"] = "both"

    teacher_stages = "none"
    own_targets = True
    unused_kwargs = ("supervised",)
    idle_kwargs: ClassVar = {"negatives": ("momentum.stages", "none")}
    loss_scale = None
    loss_name, loss_title = "train_nce_loss", "InfoNCE"

    def build_heads(self, features: int) -> None:
        k = self.kwargs
        self.projector = mlp([features, k.proj_hidden_dim, k.proj_output_dim], norm=False)

    def loss(self, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
        """NT-Xent over all views; without a teacher the queries are each other's targets, with gradient."""
        if not targets:
            return nt_xent(queries, self.kwargs.temperature)
        if self.kwargs.negatives == "both":
            return nt_xent(queries, self.kwargs.temperature, targets)
        pairs = cross_views(queries, gather_each(targets))
        return mean([info_nce(q, keys, self.kwargs.temperature) for q, keys in pairs])
