"""DINO (Caron et al., 2021)."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from solo_ext.losses import Center, dino, mean
from solo_ext.methods.base import Method, cross_views
from solo_ext.networks import DINOHead
from solo_ext.schema import Bounds, Count, NonNegative, Temperature


class DINO(Method, name="dino"):
    """Match the teacher's centred and sharpened distribution over prototypes for the other view."""

    @dataclass
    class Kwargs(Method.Kwargs):
        """Of the head, its prototypes and the two temperatures.

        num_prototypes: number of outputs. use_bn_in_head: BatchNorm in the head. norm_last_layer: keep the prototypes
        at norm 1. clip_grad: largest L2 norm of the gradient of each tensor of the backbone; 0 is off.
        freeze_last_layer: epochs at the start in which the prototypes are frozen.
        student_temperature, teacher_temperature: of the softmaxes. warmup_teacher_temperature: where the teacher's
        begins. warmup_teacher_temperature_epochs: in which it goes linearly from there to teacher_temperature.
        """

        proj_hidden_dim: Count = 2048
        proj_output_dim: Count = 256
        num_prototypes: Count = 65536
        use_bn_in_head: bool = False
        norm_last_layer: bool = True
        clip_grad: NonNegative = 0.0
        freeze_last_layer: Annotated[int, Bounds(0)] = 1
        student_temperature: Temperature = 0.1
        teacher_temperature: Temperature = 0.07
        warmup_teacher_temperature: Temperature = 0.04
        warmup_teacher_temperature_epochs: Annotated[int, Bounds(0)] = 0

    idle_kwargs: ClassVar = {"warmup_teacher_temperature": ("method_kwargs.warmup_teacher_temperature_epochs", 0)}
    loss_scale = None
    loss_name, loss_title = "dino_loss", "DINO"
    attributes: ClassVar = {"projector": "head"}

    def build_heads(self, features: int) -> None:
        k = self.kwargs
        warmup, epochs = k.warmup_teacher_temperature_epochs, self.cfg.max_epochs or math.inf
        k.require(warmup <= epochs, "warmup_teacher_temperature_epochs", f"at most max_epochs, {epochs}")
        self.head = DINOHead(
            features, k.proj_hidden_dim, k.proj_output_dim, k.num_prototypes, k.use_bn_in_head, k.norm_last_layer
        )
        self.dino_loss_func = Center(k.num_prototypes)  # solo-learn's name for the centre's module

    @property
    def teacher_temperature(self) -> float:
        """Of this epoch: warmup_teacher_temperature in the first, teacher_temperature after the warm-up."""
        k, n = self.kwargs, self.kwargs.warmup_teacher_temperature_epochs
        if self.current_epoch >= n:
            return k.teacher_temperature
        done = self.current_epoch / max(n - 1, 1)
        return k.warmup_teacher_temperature + (k.teacher_temperature - k.warmup_teacher_temperature) * done

    def loss(self, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The mean over pairs of different views."""
        center = self.dino_loss_func.center
        temperatures = self.kwargs.student_temperature, self.teacher_temperature
        return mean([dino(q, k, center, *temperatures) for q, k in cross_views(queries, targets)])

    def remember(self, targets: list[Tensor]) -> None:
        self.dino_loss_func.update(torch.stack(targets))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the backbone's gradients; the prototypes have none in the first epochs. Here gradients are whole and,
        in mixed precision, without the loss's scale; solo-learn does it after each backward pass."""
        if self.kwargs.clip_grad:
            for p in self.backbone.parameters():
                if p.grad is not None:
                    torch.nn.utils.clip_grad_norm_(p, self.kwargs.clip_grad)
        if self.current_epoch < self.kwargs.freeze_last_layer:
            for p in self.head.last_layer.parameters():
                p.grad = None
