"""MoCo v3 (Chen et al., 2021)."""

from dataclasses import dataclass

from torch import Tensor

from solo_ext.losses import gather_each, info_nce, total
from solo_ext.methods.base import Method, cross_views
from solo_ext.networks import mlp
from solo_ext.networks.backbones import MOCO_VITS, is_resnet
from solo_ext.schema import Count, Temperature


class MoCoV3(Method, name="mocov3"):
    """Contrast the student's query with the teacher's keys of the other view (residual momentum, Eq. 2 and 3)."""

    @dataclass
    class Kwargs(Method.Kwargs):
        proj_hidden_dim: Count = 4096
        proj_output_dim: Count = 256
        pred_hidden_dim: Count = 4096
        temperature: Temperature = 0.2

    loss_name, loss_title = "train_contrastive_loss", "contrastive"
    backbones = MOCO_VITS

    def build_heads(self, features: int) -> None:
        k = self.kwargs
        # solo-learn's rule: two projector layers and a bare predictor for ResNets, the original's heads otherwise
        resnet = is_resnet(self.backbone)
        hidden = [k.proj_hidden_dim] if resnet else [k.proj_hidden_dim] * 2
        self.projector = mlp([features, *hidden, k.proj_output_dim], bias=False, last_norm=True)
        self.predictor = mlp(
            [k.proj_output_dim, k.pred_hidden_dim, k.proj_output_dim], bias=False, last_norm=not resnet
        )

    def loss(self, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
        """`solo`: the sum over directions times 2 * temperature; `paper`: the mean (residual momentum, Eq. 3)."""
        temperature = self.kwargs.temperature
        losses = [info_nce(q, keys, temperature) for q, keys in cross_views(queries, gather_each(targets))]
        return total(losses) * (2 * temperature if self.kwargs.loss_scale == "solo" else 1 / len(losses))
