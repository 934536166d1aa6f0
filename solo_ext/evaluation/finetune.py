"""Fine-tuning as in solo-learn's linear evaluation: its options, mixup and cutmix, a learning rate per layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from solo_ext.errors import ConfigError
from solo_ext.optim import OptimizerConfig
from solo_ext.schema import Config, NonNegative, Share


@dataclass
class LinearOptions(Config):
    """solo-learn's top-level keys of a linear evaluation."""

    finetune: bool = False  # train the backbone too
    label_smoothing: Share = 0.0
    mixup: NonNegative = 0.0  # alpha of timm's; 0 is off
    cutmix: NonNegative = 0.0

    def mixing(self, batch_size: int, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """timm's (images, targets) -> (mixed images, soft targets), smoothed; None without mixup and cutmix."""
        if not (self.mixup or self.cutmix):
            return None
        if batch_size % 2:
            raise ConfigError(f"optimizer.batch_size must be even for mixup and cutmix, not {batch_size}")
        from timm.data.mixup import Mixup

        smoothing = self.label_smoothing
        return Mixup(mixup_alpha=self.mixup, cutmix_alpha=self.cutmix, label_smoothing=smoothing, num_classes=classes)


def backbone_groups(backbone: Any, cfg: OptimizerConfig, lr: float) -> list[dict[str, Any]]:
    """The parameter groups of a trained backbone: one, or with `layer_decay` one per layer, whose lr, unlike in
    solo-learn, the decay does change: lr is the classifier's, the last block has layer_decay times that (BEiT, MAE)."""
    if not cfg.layer_decay:
        return [{"name": "backbone", "params": list(backbone.parameters())}]
    from timm.models._manipulate import group_with_matcher
    from timm.optim import param_groups_layer_decay

    undecayed: set[str] = getattr(backbone, "no_weight_decay", set)()
    layers = param_groups_layer_decay(backbone, cfg.weight_decay, undecayed, layer_decay=cfg.layer_decay)
    names = [*(name for name, _ in backbone.named_parameters()), "classifier!"]
    order = group_with_matcher(((name, None) for name in names), backbone.group_matcher(coarse=False), reverse=True)
    last = order.pop("classifier!")  # timm's layer of the classifier, in which a backbone may have a norm of its own
    below = 1.0 if last in order.values() else cfg.layer_decay
    for i, layer in enumerate(layers):
        layer |= {"name": f"backbone.{i}", "lr": lr * below * layer.pop("lr_scale")}
    return layers
