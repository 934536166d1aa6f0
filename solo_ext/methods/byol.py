"""BYOL (Grill et al., 2020)."""

from dataclasses import dataclass

from torch import Tensor

from solo_ext.losses import cosine_distance, mean, negative_cosine, total
from solo_ext.methods.base import Method, cross_views
from solo_ext.networks import mlp
from solo_ext.schema import Count


class BYOL(Method, name="byol"):
    """Predict the teacher's projection of the other view (ProjectorEMA, Eq. 5)."""

    @dataclass
    class Kwargs(Method.Kwargs):
        """proj_last_norm: BatchNorm on both projectors' outputs (ProjectorEMA, BN2 of Table C.8)."""

        proj_hidden_dim: Count = 4096
        proj_output_dim: Count = 256
        pred_hidden_dim: Count = 4096
        proj_last_norm: bool = False

    loss_name, loss_title = "train_neg_cos_sim", "negative cosine"
    paper_distance = staticmethod(negative_cosine)  # ProjectorEMA, Eq. 5

    def build_heads(self, features: int) -> None:
        k = self.kwargs
        dims = [features, k.proj_hidden_dim, k.proj_output_dim]
        self.projector = mlp(dims, last_norm="affine" if k.proj_last_norm else False)
        self.predictor = mlp([k.proj_output_dim, k.pred_hidden_dim, k.proj_output_dim])

    def loss(self, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
        """`solo`: the sum over directions of 2 - 2 cos; `paper`: the mean of `paper_distance`."""
        pairs = cross_views(queries, targets)
        if self.kwargs.loss_scale == "solo":
            return total(cosine_distance(p, z) for p, z in pairs)
        return mean([self.paper_distance(p, z) for p, z in pairs])
