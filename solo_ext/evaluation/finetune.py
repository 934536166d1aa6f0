"""What is fine-tuned: solo-learn's options, mixup and cutmix, a learning rate per layer; a detector."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from torch import Tensor

from solo_ext.errors import ConfigError
from solo_ext.optim import OptimizerConfig
from solo_ext.schema import Bounds, Config, Count, NonNegative, Positive, Share


@dataclass
class LinearOptions(Config):
    """solo-learn's top-level keys of a linear evaluation."""

    finetune: bool = False  # train the backbone too
    label_smoothing: Share = 0.0
    mixup: NonNegative = 0.0  # alpha of timm's; 0 is off
    cutmix: NonNegative = 0.0
    # instead of optimizer.lr and weight_decay: one classifier for each pair, all in one pass over the frozen features
    lr_grid: list[Positive] = field(default_factory=list)
    weight_decay_grid: list[NonNegative] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = not (self.finetune or self.mixup or self.cutmix)
        for key in ("lr_grid", "weight_decay_grid"):
            grid = getattr(self, key)
            self.require(not grid or plain, key, "empty with finetune, mixup or cutmix")
            self.require(len({f"{x:g}" for x in grid}) == len(grid), key, "a list of different numbers")

    def heads(self, optimizer: OptimizerConfig) -> dict[str, OptimizerConfig]:
        """What ends the names of a classifier's metrics -> its optimizer: one, or one for each point of the grid."""
        found = {"": optimizer}
        if self.lr_grid:
            effective = optimizer.rates()[0]
            found = {
                f"/lr={lr:g}": replace(optimizer, lr=lr, effective_lr=effective * lr / optimizer.lr)
                for lr in self.lr_grid
            }
        if decays := self.weight_decay_grid:
            pairs = [(end, cfg, wd) for end, cfg in found.items() for wd in decays]
            found = {f"{end}/wd={wd:g}": replace(cfg, weight_decay=wd) for end, cfg, wd in pairs}
        return found

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


@dataclass
class DetectorConfig(Config, section="detector"):
    """The YAML's `detector`.

    head: c4, the ResNet's last stage on each region, as in MoCo's transfer (He et al., 2020, Appendix), or fpn.
    min_size: of the shorter side in pixels; training draws one, a test takes the last. max_size: of the longer side.
    anchors: their sizes in pixels; an fpn has one for each of its five maps.
    regions: drawn from each image to train its heads on.
    masks: also segments instances, where the annotation has outlines.
    precise_bn: training batches over which BatchNorm's statistics are averaged before each test; 0: moving averages.
    """

    head: Literal["c4", "fpn"] = "c4"
    min_size: list[Count] = field(default_factory=lambda: [*range(480, 801, 32)])
    max_size: Count = 1333
    anchors: list[Count] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    regions: Count = 512
    masks: bool = False
    precise_bn: Annotated[int, Bounds(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.min_size), "min_size", "a list of sizes")
        self.require(self.head == "c4" or len(self.anchors) == 5, "anchors", "five sizes for an fpn")
