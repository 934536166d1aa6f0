"""Transfer to object detection: torchvision's Faster R-CNN, or Mask R-CNN, on a pre-trained ResNet."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from solo_ext.errors import ConfigError, require
from solo_ext.evaluation.finetune import DetectorConfig
from solo_ext.optim import OptimizerConfig, SchedulerConfig, build_optimizer, build_scheduler, run_length

RATIOS = (0.5, 1.0, 2.0)  # of anchors
LAYERS = {f"layer{i}": str(i - 1) for i in range(1, 5)}  # of a ResNet -> the map that an FPN makes of its output


class C4(nn.Module):
    """A ResNet up to its third stage: images [B, 3, H, W] -> one map, 1/16 of their size with an ImageNet stem."""

    def __init__(self, resnet: ResNet):
        super().__init__()
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.body = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in names))
        self.out_channels = resnet.layer4[0].conv1.in_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Res5(nn.Sequential):
    """A ResNet's last stage with a BatchNorm after it, on regions [N, C, 14, 14] -> [N, D, 7, 7]."""

    def __init__(self, resnet: ResNet, features: int):
        super().__init__(OrderedDict(layer4=resnet.layer4, norm=nn.BatchNorm2d(features)))


def build_detector(
    backbone: nn.Module, classes: int, cfg: DetectorConfig, mean: Sequence[float], std: Sequence[float]
) -> FasterRCNN:
    """Faster R-CNN, with `masks` Mask R-CNN, whose backbone is this very ResNet; it takes images in [0, 1].

    As detectron2 builds it for MoCo's transfer: as many proposals, BatchNorm in every head. ConfigError for a network
    that is no ResNet of torchvision's form.
    """
    if not isinstance(backbone, ResNet) or not isinstance(backbone.fc, nn.Identity):
        kind = type(backbone).__name__
        raise ConfigError(f"backbone.name: a detector takes a ResNet as torchvision builds it, not {kind}")
    width: int = backbone.num_features  # type: ignore[assignment]  # nn.Module's attributes are modules
    common: dict[str, Any] = {
        "min_size": tuple(cfg.min_size),
        "max_size": cfg.max_size,
        "image_mean": list(mean),
        "image_std": list(std),
        "rpn_pre_nms_top_n_train": 12000,
        "rpn_pre_nms_top_n_test": 6000,
        "box_batch_size_per_image": cfg.regions,
    }
    if cfg.head == "c4":
        head = Res5(backbone, width)
        anchors, maps, size = [tuple(cfg.anchors)], ["0"], 14
        body: nn.Module = C4(backbone)
        common["box_head"] = nn.Sequential(head, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        mask_head, mask_width = head, width
    else:
        last = [getattr(backbone, name)[-1] for name in LAYERS]
        widths = [getattr(block, "bn3", block.bn2).num_features for block in last]
        body = BackboneWithFPN(backbone, LAYERS, widths, 256, LastLevelMaxPool(), nn.BatchNorm2d)
        anchors, maps, size = [(size,) for size in cfg.anchors], ["0", "1", "2", "3"], 7
        width, mask_width = 1024, 256
        common["box_head"] = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [width], nn.BatchNorm2d)
        mask_head = MaskRCNNHeads(256, (256,) * 4, 1, nn.BatchNorm2d)
    common |= {
        "rpn_anchor_generator": AnchorGenerator(tuple(anchors), (RATIOS,) * len(anchors)),
        "box_roi_pool": MultiScaleRoIAlign(maps, size, 0),
        "box_predictor": FastRCNNPredictor(width, classes + 1),
    }
    if not cfg.masks:
        return FasterRCNN(body, **common)
    pool = MultiScaleRoIAlign(maps, 14, 0)
    predictor = MaskRCNNPredictor(mask_width, 256, classes + 1)
    return MaskRCNN(body, mask_roi_pool=pool, mask_head=mask_head, mask_predictor=predictor, **common)


class DetectionModel(pl.LightningModule):
    """A detector in training, on batches `(indexes, [image uint8 [3, H, W]], [target])`.

    finetune: false: the ResNet stays as it is, statistics included, and the rest is trained.

    Logs train_loss and its parts, and after each validation val_ap, val_ap50 and val_ap75 in percent, by COCO's rules
    (pycocotools), of masks as val_mask_ap, ... Difficult objects and crowds do not count.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        optimizer: OptimizerConfig,
        scheduler: SchedulerConfig,
        cfg: DetectorConfig,
        mean: Sequence[float],
        std: Sequence[float],
        finetune: bool = True,
    ):
        if len(mean) != 3 or len(std) != 3:
            raise ConfigError("data.augmentations.mean and std must be lists of 3 numbers: a detector's images are RGB")
        require("pycocotools", "detect", "detect")
        from torchmetrics.detection import MeanAveragePrecision

        super().__init__()
        self.optimizer_cfg, self.scheduler_cfg, self.cfg = optimizer, scheduler, cfg
        self.fixed = [] if finetune else [*backbone.children()]
        for part in self.fixed:
            part.requires_grad_(False)
        self.detector = build_detector(backbone, classes, cfg, mean, std)
        kinds: Any = ("bbox", "segm") if cfg.masks else ("bbox",)
        # torchmetrics' own thresholds are rounded to float32, which moves AP by a hundredth
        thresholds: Any = {"iou_thresholds": np.linspace(0.5, 0.95, 10).tolist()}
        thresholds["rec_thresholds"] = np.linspace(0, 1, 101).tolist()
        self.score = MeanAveragePrecision(iou_type=kinds, backend="pycocotools", **thresholds)
        self.loss_parts: dict[str, Tensor] = {}
        self.train()

    def train(self, mode: bool = True) -> "DetectionModel":
        super().train(mode)
        for part in self.fixed:
            part.eval()
        return self

    def forward(self, images: Sequence[Tensor], targets: Any = None) -> Any:
        """Of images uint8 [3, H, W]: in training the losses, else boxes, labels, scores and perhaps masks of each."""
        return self.detector([image.float() / 255 for image in images], targets)

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        indexes, images, targets = batch
        self.loss_parts = self(images, [trained_on(target) for target in targets])
        loss = torch.stack([*self.loss_parts.values()]).sum()
        self.loss_parts = {name: value.detach() for name, value in self.loss_parts.items()}
        logs = {"train_loss": loss, **{f"train_{name}": value for name, value in self.loss_parts.items()}}
        self.log_dict(logs, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(indexes))
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """The end of the run is validated, wherever it is; Lightning would leave out an epoch that max_steps cuts."""
        trainer = self.trainer
        trainer.should_stop |= 0 <= trainer.max_steps <= trainer.global_step
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_validation_epoch_start(self) -> None:
        if self.cfg.precise_bn and not self.trainer.sanity_checking:
            self._average_statistics()

    @torch.no_grad()
    def _average_statistics(self) -> None:
        self.train()
        norms = [m for m in self.detector.modules() if isinstance(m, _BatchNorm) and m.training]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        loader: Any = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]  # Lightning's
        for _, images, targets in islice(loader, self.cfg.precise_bn):
            here = [{k: x.to(self.device) for k, x in trained_on(target).items()} for target in targets]
            self([image.to(self.device) for image in images], here)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.eval()

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        indexes, images, targets = batch
        count = len(self.trainer.datamodule.val_set)  # type: ignore[attr-defined]  # beyond it, copies for other processes
        found = self(images)
        for one in found if self.cfg.masks else ():
            one["masks"] = one["masks"][:, 0] > 0.5
        truths = [counted(target) for target in targets]
        for parts in (found, truths):
            for index, part in zip(indexes.tolist(), parts, strict=True):
                if index >= count:  # torchmetrics expects as many images of each process: an empty one
                    part |= {name: x[:0] for name, x in part.items()}
        self.score.update(found, truths)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log_dict(percentages(self.score.compute()))
        self.score.reset()

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.detector.parameters() if p.requires_grad]
        lr = self.optimizer_cfg.rates()[0]
        optimizer = build_optimizer([{"name": "detector", "params": weights}], self.optimizer_cfg, lr)
        scheduler = build_scheduler(optimizer, self.scheduler_cfg, *run_length(self.trainer))
        return {"optimizer": optimizer, **({"lr_scheduler": scheduler} if scheduler else {})}


def trained_on(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision takes it: without crowds."""
    return {name: x[~target["crowd"]] for name, x in target.items() if name in ("boxes", "labels", "masks")}


def counted(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchmetrics takes it: what does not count is a crowd."""
    kept = {name: x for name, x in target.items() if name in ("boxes", "labels", "masks")}
    return {**kept, "iscrowd": (target["crowd"] | target["difficult"]).int()}


def percentages(scores: dict[str, Tensor]) -> dict[str, float]:
    """val_ap, val_ap50, val_ap75 of torchmetrics' scores, in percent; 0 where nothing could be found."""
    kinds = {"bbox_": "val_", "segm_": "val_mask_"} if "segm_map" in scores else {"": "val_"}
    names = {f"{kind}map{at}": f"{ours}ap{at.strip('_')}" for kind, ours in kinds.items() for at in ("", "_50", "_75")}
    values = {ours: 100 * float(scores[theirs]) for theirs, ours in names.items()}
    return {name: max(value, 0.0) if math.isfinite(value) else 0.0 for name, value in values.items()}
