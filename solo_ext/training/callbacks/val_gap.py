"""The gap between student and teacher on the validation images over training (residual momentum, Fig. 2, 4, 6, 7)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.errors import ConfigError
from solo_ext.schema import Config, Count
from solo_ext.text import Metric
from solo_ext.training.callbacks import LightningModule, MonitorCallback, Trainer, our_method

NAMES = {"backbone": "val_gap_sim_feats", "projector": "val_gap_sim_z", "predictor": "val_gap_sim_q"}


@dataclass
class ValidationGapConfig(Config, section="val_gap"):
    enabled: bool = False
    every: Count = 1  # epochs; the last one counts as well
    per_class: bool = False  # beside the means over all images


class ValidationGap(MonitorCallback):
    """Logs `val_gap_sim_q`, `val_gap_sim_z` and `val_gap_sim_feats`: the mean cosine similarity of student and teacher
    on the validation images, un-augmented, each counted once, in eval mode; the paper's gap is 2 - 2 times this.

    A part of which the teacher owns no stage has none: with momentum on the projector only, the features are the
    student's own and no gap can open; q needs a teacher's predictor, which `gap.at=predictor` gives a baseline. With
    `per_class`, also each as `<name>/<class>`, and in percent `val_acc1/<class>` and `momentum_val_acc1/<class>`.
    """

    key = "val_gap"
    Config = ValidationGapConfig
    metrics = (
        Metric("val_gap_sim_q", "Predictor's outputs, validation", "val gap q", "{:.4f}", "gap", progress=True),
        Metric("val_gap_sim_z", "Projector's outputs, validation", "val gap z", "{:.4f}", "gap", progress=True),
        Metric("val_gap_sim_feats", "Backbone features, validation", form="{:.4f}", section="gap"),
        Metric("val_gap_sim_q/*", "Predictor's outputs, class *", form="{:.4f}", section="gap by class"),
        Metric("val_gap_sim_z/*", "Projector's outputs, class *", form="{:.4f}", section="gap by class"),
        Metric("val_gap_sim_feats/*", "Backbone features, class *", form="{:.4f}", section="gap by class"),
        Metric("val_acc1/*", "Online classifier, class * (%)", form="{:.2f}", section="accuracy by class"),
        Metric("momentum_val_acc1/*", "Teacher's online classifier, class * (%)", "", "{:.2f}", "accuracy by class"),
    )

    @classmethod
    def make(cls, section: ValidationGapConfig, cfg: Any, data: Any) -> "ValidationGap":
        if data is not None and data.val_set is None:
            need = "data.val_path or data.val_fraction" if data.num_classes else "labels"
            raise ConfigError(f"val_gap.enabled: there are no images to validate on, which takes {need}")
        return cls(section, None if data is None else len(data.val_set))

    def __init__(self, cfg: ValidationGapConfig, images: int | None = None):
        self.cfg, self.images = cfg, images  # without those that make all processes' shares alike

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        method = our_method(module, self.key)
        self.parts = [part for part, stages in method.teacher.parts.items() if stages]
        probes = {prefix: getattr(method, f"{prefix}classifier") for prefix in ("", "momentum_") if self.cfg.per_class}
        self.probes = {prefix: probe for prefix, probe in probes.items() if probe is not None}
        if self.cfg.per_class and not self.probes:
            raise ConfigError("val_gap.per_class must be false where the images have no labels")
        self.names = [*(NAMES[part] for part in self.parts), *(f"{prefix}val_acc1" for prefix in self.probes)]
        self.classes = self.probes[""].out_features if self.probes else 0

    def on_validation_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        self.due = not trainer.sanity_checking and (epoch % self.cfg.every == 0 or epoch == trainer.max_epochs)
        self.sums: list[Tensor] = []  # of a batch's images and their values: over all, and over each class

    def on_validation_batch_end(self, trainer: Trainer, module: Any, out: Any, batch: Any, *place: int) -> None:
        if not self.due:
            return
        from solo_ext.evaluation.linear import classify, image_and_target

        x, labels = image_and_target(batch)
        with trainer.precision_plugin.val_step_context():  # in which the student's outputs were made
            taught = module.teach(x, out, self.parts[-1]) if self.parts else {}
        values = [torch.ones(len(labels), device=labels.device)]
        values += [F.cosine_similarity(out[part].float(), taught[part].float(), dim=-1) for part in self.parts]
        for prefix, probe in self.probes.items():
            values.append(100.0 * (classify(probe, (taught if prefix else out)["backbone"]).argmax(1) == labels))
        counted = labels >= -1 if self.images is None else batch[0] < self.images
        groups = torch.cat([counted[None], labels == torch.arange(self.classes, device=labels.device)[:, None]])
        self.sums.append((torch.stack(values) * groups[:, None]).sum(-1))  # [1 + classes, 1 + metrics]

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.sums:
            return
        totals = trainer.strategy.reduce(torch.stack(self.sums).sum(0), reduce_op="sum").tolist()
        for end, (images, *sums) in zip(["", *(f"/{number}" for number in range(self.classes))], totals, strict=True):
            means = {name: total / images for name, total in zip(self.names, sums, strict=True) if images}
            # the accuracy over all is logged already; all processes know these values
            module.log_dict({f"{name}{end}": x for name, x in means.items() if end or name in NAMES.values()})
