"""SimSiam (Chen & He, 2021)."""

from dataclasses import dataclass

from torch import Tensor

from solo_ext.losses import mean, negative_cosine
from solo_ext.methods.base import Method, cross_views
from solo_ext.networks import mlp
from solo_ext.schema import Count


class SimSiam(Method, name="simsiam"):
    """Predict the student's projection of the other view, with stop-gradient; no teacher (ProjectorEMA, Table 1)."""

    @dataclass
    class Kwargs(Method.Kwargs):
        proj_hidden_dim: Count = 2048
        proj_output_dim: Count = 2048
        pred_hidden_dim: Count = 512

    teacher_stages = "none"
    loss_scale = None
    loss_name, loss_title = "train_neg_cos_sim", "negative cosine"
    unused_kwargs = ("temperature",)
    static_lr = ("predictor",)

    def build_heads(self, features: int) -> None:
        k = self.kwargs
        dims = [features, k.proj_hidden_dim, k.proj_hidden_dim, k.proj_output_dim]
        self.projector = mlp(dims, bias=(False, False, True), last_norm=True)
        self.projector[-2].bias.requires_grad = False  # a norm follows
        self.predictor = mlp([k.proj_output_dim, k.pred_hidden_dim, k.proj_output_dim], bias=(False, True))

    def loss(self, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The mean over pairs of different views (SimSiam, Eq. 2)."""
        return mean([negative_cosine(p, z) for p, z in cross_views(queries, targets)])
