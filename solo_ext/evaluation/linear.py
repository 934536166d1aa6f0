"""Offline linear evaluation (and fine-tuning) of an encoder, and a quick version on cached features."""

import copy
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solo_ext.errors import ConfigError, DataError, NonFiniteError
from solo_ext.evaluation.features import labelled
from solo_ext.evaluation.finetune import LinearOptions, backbone_groups
from solo_ext.optim import OptimizerConfig, SchedulerConfig, build_optimizer, build_scheduler, run_length


class LinearModel(pl.LightningModule):
    """A new linear classifier on a frozen encoder, in solo-learn's protocol and with its keys.

    The frozen backbone, [B, 3, H, W] -> [B, D] with `num_features` = D, has no gradients and stays in eval mode. Logs
    train_loss, train_acc1 and train_acc5 (not under mixup), val_loss, val_acc1, val_acc5; accuracies in percent. With
    `lr_grid`, there is one classifier for each rate, from the same weights, and `/lr=<rate>` at the end of each name.
    Deviation from solo-learn: `label_smoothing` works without mixup too. `ConfigError` for a value that cannot work.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        optimizer: OptimizerConfig,
        scheduler: SchedulerConfig,
        options: LinearOptions | None = None,
        channels_last: bool = True,
    ):
        super().__init__()
        self.options, self.channels_last = options or LinearOptions(), channels_last
        self.optimizer_cfg, self.scheduler_cfg = optimizer, scheduler
        if optimizer.layer_decay > 0 and not (self.options.finetune and hasattr(backbone, "group_matcher")):
            raise ConfigError("optimizer.layer_decay needs finetune=true and a backbone whose layers timm knows")

        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, num_classes)  # type: ignore[arg-type]  # a number
        self.names = [name for name, _ in self.options.heads(optimizer)]
        self.others = nn.ModuleList(copy.deepcopy(self.classifier) for _ in self.options.lr_grid[1:])
        self.mixing = self.options.mixing(optimizer.batch_size, num_classes)
        if not self.options.finetune:  # else, what the backbone has fixed stays so
            self.backbone.requires_grad_(False)
        self.train()  # Lightning keeps the modes that it finds

    def train(self, mode: bool = True) -> "LinearModel":
        super().train(mode)
        if not self.options.finetune:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] to feats [B, D] and logits [B, classes]."""
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        with torch.set_grad_enabled(self.options.finetune and torch.is_grad_enabled()):
            feats = self.backbone(x)
        return {"feats": feats, "logits": classify(self.classifier, feats)}

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """The loss on `(indexes, [view], targets)`, or solo-learn's `(images, targets)`."""
        x, targets = image_and_target(batch)
        if self.mixing is None:
            return self._step("train", x, targets, self.options.label_smoothing)
        x, soft_targets = self.mixing(x.clone(), targets)  # in place
        loss = F.cross_entropy(self(x)["logits"], soft_targets)
        self._log("train", len(x), loss=loss)
        return loss

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        self._step("val", *image_and_target(batch))

    def _step(self, split: str, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        out, total = self(x), torch.zeros((), device=x.device)
        labelled = (targets != -1).sum()
        # the mean over a validation is one over labels; training does not wait for the device
        weight = float(labelled) if split == "val" else len(x)
        for name, head in zip(self.names, (self.classifier, *self.others), strict=True):
            logits = out["logits"] if head is self.classifier else classify(head, out["feats"])
            loss = F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
            loss = loss / labelled.clamp(min=1)  # a batch without labels has no loss, rather than 0 / 0
            acc1, acc5 = accuracy_at_k(logits, targets)
            self._log(split, weight, name, loss=loss, acc1=acc1, acc5=acc5)
            total = total + loss
        return total

    def _log(self, split: str, weight: Any, head: str = "", **metrics: Tensor) -> None:
        """`weight` of the batch; a float over processes, where Lightning rounds the mean of whole numbers down."""
        logs, val = {f"{split}_{name}{head}": value for name, value in metrics.items()}, split == "val"
        self.log_dict(logs, prog_bar=val, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)

    def configure_optimizers(self) -> Any:
        lr = self.optimizer_cfg.rates()[0]
        groups = backbone_groups(self.backbone, self.optimizer_cfg, lr) if self.options.finetune else []
        heads = zip((self.classifier, *self.others), self.options.heads(self.optimizer_cfg), strict=True)
        for i, (head, (_, cfg)) in enumerate(heads):
            groups.append({"name": f"classifier{i or ''}", "params": list(head.parameters()), "lr": cfg.rates()[0]})
        optimizer = build_optimizer(groups, self.optimizer_cfg, lr)
        scheduler = build_scheduler(optimizer, self.scheduler_cfg, *run_length(self.trainer))
        return {"optimizer": optimizer, **({"lr_scheduler": scheduler} if scheduler else {})}


def classify(classifier: nn.Linear, features: Tensor) -> Tensor:
    """The logits [B, classes] of features [B, D] in the precision of the classifier's weights, also under autocast: in
    bfloat16, classes tie."""
    with torch.autocast(features.device.type, enabled=False):
        return classifier(features.to(classifier.weight.dtype))


def image_and_target(batch: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The images and labels of `(indexes, [view], labels)`, or of solo-learn's `(images, labels)`."""
    *_, x, targets = batch
    return (x if isinstance(x, Tensor) else x[0]), targets


def fit_cached_linear(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    *,
    optimizer: OptimizerConfig,
    scheduler: SchedulerConfig,
    epochs: int,
    seed: int = 0,
) -> dict[str, float]:
    """The head of `LinearModel`, trained in seconds on features that were extracted once.

    A quick look, not the protocol of the tables: the head never sees an augmented image. It also starts at zero and
    sees features of mean 0 and variance 1 (over the training set), so that one lr suits any encoder.

    Features are [N, D] and [M, D], on one device; images without label (-1) are left out. `seed`: of their order.
    Returns acc1, acc5, train_acc1 (percent), val_loss, train_loss, after the last epoch. `DataError` without a labelled
    image, or if a feature is not finite.
    """
    train_x, train_y = labelled(train_x.float(), train_y, "linear evaluation", "train")
    val_x, val_y = labelled(val_x.float(), val_y, "linear evaluation", "validation")
    if not (train_x.isfinite().all() and val_x.isfinite().all()):
        raise DataError("the features for a linear evaluation are not finite")
    std, mean = torch.std_mean(train_x, dim=0, correction=0)
    train_x, val_x = ((x - mean) / std.clamp(min=1e-6) for x in (train_x, val_x))

    classes = int(max(train_y.max(), val_y.max())) + 1
    head = nn.utils.skip_init(nn.Linear, train_x.size(1), classes, device=train_x.device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    batch = min(optimizer.batch_size, len(train_x))
    steps = len(train_x) // batch
    groups = [{"name": "classifier", "params": list(head.parameters())}]
    descent = build_optimizer(groups, optimizer, optimizer.rates()[0])
    schedule = build_scheduler(descent, scheduler, steps * epochs, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(train_x), generator=generator)[: steps * batch].to(train_x.device)
        for x, y in zip(train_x[order].split(batch), train_y[order].split(batch), strict=True):
            descent.zero_grad()
            F.cross_entropy(head(x), y).backward()
            descent.step()
            if schedule and schedule["interval"] == "step":
                schedule["scheduler"].step()
        if schedule and schedule["interval"] == "epoch":
            schedule["scheduler"].step()

    with torch.no_grad():
        train_logits, val_logits = head(train_x), head(val_x)
    if not train_logits.isfinite().all():
        raise NonFiniteError("the linear classifier became NaN or infinite: a lower optimizer.lr may help")
    scores = dict(zip(("acc1", "acc5"), accuracy_at_k(val_logits, val_y), strict=True))
    scores["train_acc1"] = accuracy_at_k(train_logits, train_y, (1,))[0]
    scores["val_loss"] = F.cross_entropy(val_logits, val_y)
    scores["train_loss"] = F.cross_entropy(train_logits, train_y)
    return {name: score.item() for name, score in scores.items()}


@torch.no_grad()
def accuracy_at_k(logits: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)) -> list[Tensor]:
    """For each of `ks`, the percentage of targets [B] among the k largest logits [B, classes], a scalar tensor; images
    without label (-1) are left out, and a k above the number of classes counts as that number."""
    ranked = logits.topk(min(max(ks), logits.size(1)), dim=1).indices
    hits = ranked == targets[:, None]  # -1 is no index
    labelled = (targets != -1).sum().clamp(min=1)
    return [100.0 * hits[:, :k].any(dim=1).sum() / labelled for k in ks]
