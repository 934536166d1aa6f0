"""ReSSL (Zheng et al., 2021)."""

from dataclasses import dataclass

from torch import Tensor

from solo_ext.errors import ConfigError
from solo_ext.losses import relational
from solo_ext.methods.base import QueuedMethod
from solo_ext.networks import mlp
from solo_ext.schema import Count, Temperature


class ReSSL(QueuedMethod, name="ressl"):
    """The student, on the strong first view, keeps the relations to earlier keys that the teacher sees on the weak one.

    The teacher runs on the weak view only, unless an intra-momentum term compares both on both views.
    """

    @dataclass
    class Kwargs(QueuedMethod.Kwargs):
        """weak_probe: train the online probe on the weak view too, as solo-learn does; without it, and with a whole
        teacher, the student does not run that view."""

        proj_hidden_dim: Count = 4096
        proj_output_dim: Count = 256
        temperature_q: Temperature = 0.1
        temperature_k: Temperature = 0.04
        weak_probe: bool = True

    loss_scale = None
    loss_name, loss_title = "train_ressl_loss", "ReSSL"
    unused_kwargs = ("base_tau_momentum", "final_tau_momentum", "momentum_classifier")
    query_views = (0,)
    target_views = (1,)

    def build_heads(self, features: int) -> None:
        large, small = self.large_crops, self.cfg.data.num_small_crops or 0
        if large != 2 or small:
            crops = f"{large} large and {small} small"
            raise ConfigError(f"augmentations: ReSSL takes a strong and a weak view, not {crops}")
        k = self.kwargs
        self.projector = mlp([features, k.proj_hidden_dim, k.proj_output_dim], norm=False)
        self.build_queue(k.queue_size, k.proj_output_dim)
        if not k.weak_probe:
            self.probe_views = self.query_views

    def loss(self, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
        """One direction: `queries` and `targets` hold one view each."""
        [query], [key] = queries, targets
        return relational(query, key, self.queue, self.kwargs.temperature_q, self.kwargs.temperature_k)
