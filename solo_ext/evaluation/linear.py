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

CHUNK = 1024  # features that are looked at together


class LinearModel(pl.LightningModule):
    """A new linear classifier on a frozen encoder, in solo-learn's protocol and with its keys.

    The frozen backbone, [B, 3, H, W] -> [B, D] with `num_features` = D, has no gradients and stays in eval mode. Logs
    train_loss, train_acc1 and train_acc5 (not under mixup), val_loss, val_acc1, val_acc5; accuracies in percent. With
    a grid, there is one classifier for each of its points, from the same weights, and `/lr=<rate>` or `/wd=<weight
    decay>` or both end its names. Deviation from solo-learn: `label_smoothing` works without mixup too. `ConfigError`
    for a value that cannot work.
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
        self.names = [*self.options.heads(optimizer)]
        self.others = nn.ModuleList(copy.deepcopy(self.classifier) for _ in self.names[1:])
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
        feats = self.features(x)
        return {"feats": feats, "logits": classify(self.classifier, feats)}

    def features(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        with torch.set_grad_enabled(self.options.finetune and torch.is_grad_enabled()):
            return self.backbone(x)

    @property
    def heads(self) -> list[nn.Linear]:
        return [self.classifier, *self.others]  # type: ignore[list-item]

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
        logits, labelled = classify_all(self.heads, self.features(x)), (targets != -1).sum()
        # the mean over a validation is one over labels; training does not wait for the device
        weight = float(labelled) if split == "val" else len(x)
        # a batch without labels has no loss, rather than 0 / 0
        loss = losses(logits, targets, smoothing).sum(1) / labelled.clamp(min=1)
        for name, *values in zip(self.names, loss, *accuracy_at_k(logits, targets), strict=True):
            self._log(split, weight, name, **dict(zip(("loss", "acc1", "acc5"), values, strict=True)))
        return loss.sum()

    def _log(self, split: str, weight: Any, head: str = "", **metrics: Tensor) -> None:
        """`weight` of the batch; a float over processes, where Lightning rounds the mean of whole numbers down."""
        logs, val = {f"{split}_{name}{head}": value for name, value in metrics.items()}, split == "val"
        self.log_dict(logs, prog_bar=val, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)

    def configure_optimizers(self) -> Any:
        lr = self.optimizer_cfg.rates()[0]
        groups = backbone_groups(self.backbone, self.optimizer_cfg, lr) if self.options.finetune else []
        groups += head_groups(self.heads, [*self.options.heads(self.optimizer_cfg).values()])
        optimizer = build_optimizer(groups, self.optimizer_cfg, lr)
        scheduler = build_scheduler(optimizer, self.scheduler_cfg, *run_length(self.trainer))
        return {"optimizer": optimizer, **({"lr_scheduler": scheduler} if scheduler else {})}


def classify(classifier: nn.Linear, features: Tensor) -> Tensor:
    """The logits [B, classes] of features [B, D] in the precision of the classifier's weights, also under autocast: in
    bfloat16, classes tie."""
    with torch.autocast(features.device.type, enabled=False):
        return classifier(features.to(classifier.weight.dtype))


def classify_all(heads: Sequence[nn.Linear], features: Tensor) -> Tensor:
    """`classify` by G heads, [G, B, classes], in one product of matrices."""
    weight, bias = (torch.cat(x) for x in zip(*((head.weight, head.bias) for head in heads), strict=True))
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.to(weight.dtype), weight, bias).unflatten(1, (len(heads), -1)).movedim(1, 0)


def head_groups(heads: Sequence[nn.Linear], optimizers: Sequence[OptimizerConfig]) -> list[dict[str, Any]]:
    """A parameter group for each head, with the rate and weight decay of its optimizer."""
    names = ["classifier", *(f"classifier{i}" for i in range(1, len(heads)))]
    return [
        {"name": name, "params": list(head.parameters()), "lr": cfg.rates()[0], "weight_decay": cfg.weight_decay}
        for name, head, cfg in zip(names, heads, optimizers, strict=True)
    ]


def image_and_target(batch: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The images and labels of `(indexes, [view], labels)`, or of solo-learn's `(images, labels)`."""
    *_, x, targets = batch
    return (x if isinstance(x, Tensor) else x[0]), targets


@torch.no_grad()
def moments(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of `rows` of features [N, D], which are read twice. DataError if one is not
    finite."""
    parts = [part.to(x.device) for part in rows.split(CHUNK)]
    mean: Any = sum(x[part].sum(0, dtype=torch.float64) for part in parts) / len(rows)
    variance: Any = sum((x[part] - mean).square().sum(0) for part in parts) / len(rows)
    if not variance.isfinite().all():
        raise DataError("the features for a linear evaluation are not finite")
    return mean.float().to(rows.device), variance.sqrt().float().to(rows.device)


def fit_cached_linear(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    *,
    optimizers: Sequence[OptimizerConfig],
    scheduler: SchedulerConfig,
    epochs: int,
    seed: int = 0,
) -> list[dict[str, float]]:
    """The heads of `LinearModel`, trained in seconds on features that were extracted once: in one pass, one for each of
    `optimizers`, which differ in rate and weight decay only.

    A quick look, not the protocol of the tables: the heads never see an augmented image. They also start at zero and
    see features of mean 0 and variance 1 (over the training set), so that one lr suits any encoder.

    Features are [N, D] and [M, D], of any precision, and may stay on the CPU: batches of them go where the labels are.
    Images without label (-1) are left out. `seed`: of their order. Returns for each head what `LinearModel` logs, after
    the last epoch. `DataError` without a labelled image, or if a feature is not finite.
    """
    train, val = (labelled(y, "linear evaluation", name) for y, name in ((train_y, "train"), (val_y, "validation")))
    (mean, std), _ = moments(train_x, train), moments(val_x, val)

    def standardised(x: Tensor, rows: Tensor) -> Tensor:
        return (x[rows.to(x.device)].to(mean) - mean) / std.clamp(min=1e-6)

    classes = int(max(train_y.max(), val_y.max())) + 1
    heads = [nn.utils.skip_init(nn.Linear, len(mean), classes, device=mean.device) for _ in optimizers]
    for parameter in nn.ModuleList(heads).parameters():
        nn.init.zeros_(parameter)
    batch = min(optimizers[0].batch_size, len(train))
    steps = len(train) // batch
    descent = build_optimizer(head_groups(heads, optimizers), optimizers[0], optimizers[0].rates()[0])
    schedule = build_scheduler(descent, scheduler, steps * epochs, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(train), generator=generator)[: steps * batch].to(train.device)
        for rows in train[order].split(batch):
            descent.zero_grad()
            losses(classify_all(heads, standardised(train_x, rows)), train_y[rows]).mean(1).sum().backward()
            descent.step()
            if schedule and schedule["interval"] == "step":
                schedule["scheduler"].step()
        if schedule and schedule["interval"] == "epoch":
            schedule["scheduler"].step()

    found: list[dict[str, float]] = [{} for _ in heads]
    for split, x, y, labels in (("train_", train_x, train_y, train), ("val_", val_x, val_y, val)):
        sums: Any = 0.0
        with torch.no_grad():
            for rows in labels.split(CHUNK):
                logits = classify_all(heads, standardised(x, rows))
                if not logits.isfinite().all():
                    raise NonFiniteError("the linear classifier became NaN or infinite: a lower optimizer.lr may help")
                loss = losses(logits, y[rows]).sum(1, dtype=torch.float64)
                sums += torch.stack([loss, *hits_at_k(logits, y[rows])], 1)
        for scores, (loss, acc1, acc5) in zip(found, (sums / len(labels)).tolist(), strict=True):
            scores |= {f"{split}loss": loss, f"{split}acc1": 100 * acc1, f"{split}acc5": 100 * acc5}
    return found


def losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy [G, B] of logits [G, B, classes] of several heads; 0 for images without label (-1)."""
    every, flat = targets.repeat(len(logits)), logits.flatten(0, 1)
    loss = F.cross_entropy(flat, every, ignore_index=-1, label_smoothing=label_smoothing, reduction="none")
    return loss.unflatten(0, logits.shape[:2])


@torch.no_grad()
def hits_at_k(logits: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)) -> list[Tensor]:
    """For each of `ks`, how many of the targets [B] are among the k largest of logits [..., B, classes], [...]; -1 is
    never, and a k above the number of classes counts as that number."""
    hits = logits.topk(min(max(ks), logits.size(-1))).indices == targets[:, None]
    return [hits[..., :k].any(-1).sum(-1) for k in ks]


def accuracy_at_k(logits: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)) -> list[Tensor]:
    """`hits_at_k` in percent of the targets that are labels."""
    labelled = (targets != -1).sum().clamp(min=1)
    return [100.0 * hits / labelled for hits in hits_at_k(logits, targets, ks)]
