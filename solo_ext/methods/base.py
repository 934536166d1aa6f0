"""The one LightningModule: a framework's heads and loss, a teacher, an intra-momentum term, and online probes."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from solo_ext.data.datasets import DATASETS
from solo_ext.errors import ConfigError
from solo_ext.evaluation.metrics import accuracy_at_k
from solo_ext.momentum import GapConfig, IntraMomentum, MomentumConfig, Teacher, similarity, weight_distance
from solo_ext.networks import BackboneConfig, build_backbone, stage_row
from solo_ext.optim import OptimizerConfig, SchedulerConfig, build_optimizer, build_scheduler
from solo_ext.schema import check_choice, check_integer, check_number, section

LOSS_SCALES = ("solo", "paper")
OUTPUT = {"backbone": "feats", "projector": "z", "predictor": "q"}  # part of the network -> name of its output


class Method(pl.LightningModule):
    """A self-supervised method = framework x teacher stages x intra-momentum.

    A framework subclasses it with `Kwargs`, `build_heads` and `loss`; a variant of a framework declares other defaults:

        class ProjectorEMABYOL(BYOL):
            teacher_stages = "projector"

    The configuration is solo-learn's, plus `momentum.stages` and its companions, `intra` and `gap`. `optimizer.lr` is
    taken as it stands (solo-learn scales it before it builds the method) and multiplied by the accumulated batches,
    unless `optimizer.effective_lr`, which is the final value, is given beside it.
    """

    @dataclasses.dataclass
    class Kwargs:
        """The framework's `method_kwargs`; `loss_scale` says whose printed or coded form of the loss it is."""

        loss_scale: str = "solo"

        def __post_init__(self):
            check_choice("method_kwargs.loss_scale", self.loss_scale, LOSS_SCALES)
            for name, value in dataclasses.asdict(self).items():
                if name.endswith(("_dim", "_size", "_prototypes")):
                    check_integer(f"method_kwargs.{name}", value, low=1)
                elif name.endswith("_epochs"):
                    check_integer(f"method_kwargs.{name}", value, low=0)
                elif "temperature" in name:
                    check_number(f"method_kwargs.{name}", value, low=1e-6)

    teacher_stages: ClassVar[Any] = "full"
    intra: IntraMomentum = IntraMomentum()
    loss_scale: ClassVar[str] = "solo"
    loss_name: ClassVar[str] = "train_ssl_loss"
    # which views (by their place) the loss takes from the student and from the target branch; None: all there are
    query_views: ClassVar[Sequence[int] | None] = None
    target_views: ClassVar[Sequence[int] | None] = None
    # names of parts that solo-learn's checkpoints call otherwise; heads whose learning rate is not scheduled
    attributes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    static_lr: ClassVar[Sequence[str]] = ()
    unused_kwargs: ClassVar[Sequence[str]] = ()  # what solo-learn's YAMLs carry without using it

    def __init__(self, cfg: DictConfig):
        """Builds the networks.

        Args:
            cfg: the resolved configuration, ours or solo-learn's.

        Raises:
            ConfigError: a value that cannot work, e.g. a stage that the network lacks.
        """
        super().__init__()
        if "performance" not in cfg:  # solo-learn's script reads it off the configuration that it handed in
            OmegaConf.update(cfg, "performance", {"disable_channel_last": False}, force_add=True)
        self.cfg = cfg = OmegaConf.merge(self.defaults(), cfg)
        momentum = section(MomentumConfig, cfg.momentum, "momentum")
        if momentum.stages is None:
            momentum.stages = self.teacher_stages
        self.intra = section(IntraMomentum, cfg.intra, "intra")
        self.gap = section(GapConfig, cfg.get("gap"), "gap")
        self.kwargs = section(self.Kwargs, cfg.method_kwargs, "method_kwargs")
        self.optimizer_cfg = section(OptimizerConfig, cfg.optimizer, "optimizer")
        self.scheduler_cfg = section(SchedulerConfig, cfg.scheduler, "scheduler")
        self.accumulate = cfg.get("accumulate_grad_batches") or 1
        self.channels_last = not cfg.performance.disable_channel_last
        self.large_crops = OmegaConf.select(cfg, "data.num_large_crops", default=2)
        self.inter = momentum.inter

        self.backbone = backbone_of(cfg)
        classes = cfg.data.get("num_classes") or 0
        self.classifier = nn.Linear(self.backbone.num_features, classes) if classes else None
        self.build_heads(self.backbone.num_features)
        names = {name: self.attributes.get(name, name) for name in OUTPUT}
        self.parts = {name: attribute for name, attribute in names.items() if hasattr(self, attribute)}

        self.teacher = self._build_teacher(momentum)
        self.momentum_classifier = None
        if momentum.classifier:
            if not classes or not hasattr(self, "momentum_backbone"):
                raise ConfigError(
                    "momentum.classifier needs labels and a teacher with a backbone of its own; "
                    f"momentum.stages is {momentum.stages!r} and the data set has {classes} classes"
                )
            self.momentum_classifier = nn.Linear(self.backbone.num_features, classes)

    @classmethod
    def defaults(cls) -> DictConfig:
        """What this method declares where the configuration is silent: stages, intra term, loss scale."""
        return OmegaConf.create(
            {
                "momentum": {"stages": cls.teacher_stages},
                "intra": dataclasses.asdict(cls.intra),
                "method_kwargs": {"loss_scale": cls.loss_scale},
            }
        )

    # What a framework writes.

    def build_heads(self, features: int) -> None:
        """Sets `self.projector` and, if the framework has one, `self.predictor`, on `features`-wide inputs."""
        raise NotImplementedError

    def loss(self, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The framework's loss.

        Args:
            queries: per view of `query_views`, the output [B, D] of the student's last head, with gradient.
            targets: per large view of `target_views`, the target branch's projector output [B, D], without gradient.

        Returns:
            A scalar.
        """
        raise NotImplementedError

    # The network and its teacher.

    def _build_teacher(self, momentum: MomentumConfig) -> Teacher:
        ends = {"projector", "predictor"} & self.parts.keys()
        self.intra_at = self.intra.target if self.intra.target in ends else "projector"
        wanted = {self.intra_at} if self.intra.weight > 0 else set()
        wanted |= {self.gap.at} & ends if self.gap.enabled else set()
        predictor = "predictor" in wanted  # a teacher has one only to be compared with
        self.gap_at = "predictor" if predictor and self.gap.at != "projector" else "projector"
        parts = {name: self.part(name) for name in self.parts if name != "predictor" or predictor}
        row = stage_row(parts, self.attributes)
        taus = momentum.taus(row)
        if self.intra.weight > 0 and not taus:
            raise ConfigError(
                "intra.weight > 0 needs a teacher that differs from the student; "
                f"set momentum.stages to full, backbone, projector or a stage, not {momentum.stages!r}"
            )
        return Teacher(self, row, taus, momentum.buffers)

    def part(self, name: str) -> nn.Module:
        """The student's `backbone`, `projector` or `predictor`."""
        return getattr(self, self.parts[name])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The student on one view.

        Args:
            x: images [B, 3, H, W].

        Returns:
            feats [B, F]; z [B, D], the projector's output; q [B, D], the last head's; logits [B, classes] of the online
            probe, whose gradient stops at the features, if there are labels.
        """
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        feats = self.backbone(x)
        z = self.part("projector")(feats)
        out = {"feats": feats, "z": z, "q": self.predictor(z) if "predictor" in self.parts else z}
        if self.classifier is not None:
            out["logits"] = self.classifier(feats.detach())
        return out

    def _see(self, x: Tensor, learn: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        """The student's outputs on one view, and what the teacher needs of the view.

        learn: whether a loss reaches the student on this view; else only the probe has a gradient.
        """
        with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
            out = self(x)
        if not learn and self.classifier is not None:
            out["logits"] = self.classifier(out["feats"])
        return out, self.teacher.entry(x)

    def _teach(self, out: dict[str, Tensor], entry: Tensor, upto: str) -> dict[str, Tensor]:
        """The teacher's outputs on the view that gave `out` and `entry`, under the student's names."""
        if self.channels_last and entry.dim() == 4:
            entry = entry.to(memory_format=torch.channels_last)
        taught = self.teacher(entry, {part: out.get(name) for part, name in OUTPUT.items()}, upto)
        return {OUTPUT[part]: value for part, value in taught.items()}

    # Training.

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """One step on `(indexes, [view [B, 3, H, W], ...], targets [B])`, target -1 = no label.

        Returns:
            The scalar loss: the framework's, plus the weighted intra-momentum term, plus the probes' cross-entropy.
        """
        _, views, targets = batch
        views = [views] if isinstance(views, Tensor) else views
        pull = self.intra.active(self.global_step)
        measure = self.gap.enabled and self.teacher.stages and self.global_step % self.gap.every == 0
        learning, seen, asked, taught = self._views(len(views), pull, measure)

        students, entries = {}, dict(enumerate(views))
        for i in seen:
            students[i], entries[i] = self._see(views[i], learn=i in learning)
        places = {self.intra_at} if pull else set()
        places |= {self.gap_at} if measure else set()
        upto = "predictor" if "predictor" in places else "projector"
        teachers = {i: self._teach(students.get(i, {}), entries[i], upto) for i in taught}

        queries = [students[i]["q"] for i in learning if self.query_views is None or i in self.query_views]
        keys = [teachers[i]["z"] if self.inter else students[i]["z"].detach() for i in asked]
        loss = self.loss(queries, keys)
        metrics = {self.loss_name: loss}
        if pull:
            term = self.intra([students[i]["q"] for i in taught], [t[OUTPUT[self.intra_at]] for t in teachers.values()])
            metrics["train_intra_loss"] = term
            loss = loss + self.intra.weight * term
        probed = [students[i] for i in self._probed(len(views))]
        loss = loss + self._probe(self.classifier, [out.get("logits") for out in probed], targets, "train_", metrics)
        if self.momentum_classifier is not None:
            logits = [self.momentum_classifier(out["feats"]) for out in teachers.values()]
            loss = loss + self._probe(self.momentum_classifier, logits, targets, "train_momentum_", metrics)
        with torch.no_grad():  # 1 / sqrt(D) for spread-out outputs, 0 when collapsed
            outputs = torch.stack([out["z"].float() for i, out in students.items() if i < self.large_crops])
            metrics["train_z_std"] = F.normalize(outputs, dim=-1).std(1).mean()
        if measure:
            both = [i for i in taught if i in students]
            self._log_gap([students[i] for i in both], [teachers[i] for i in both])
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(targets))
        self.log_dict(metrics, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(targets))
        return loss

    def _views(self, views: int, pull: bool, measure: bool) -> tuple[Sequence[int], ...]:
        """Who runs which of the views: where the student learns, where it is run, where the loss asks for a target,
        and where the teacher is run. Nothing is run on a view whose output nothing uses."""
        large = range(min(self.large_crops, views))
        asked = large if self.target_views is None else self.target_views
        learning = set(range(views) if self.query_views is None else self.query_views)
        learning |= set(large) if pull else set()
        seen = learning | set(self._probed(views))
        taught = set(asked) if self.inter else set()
        taught |= set(large) if pull or self.momentum_classifier is not None else set()
        if not self.inter:
            seen |= set(asked)
        if len(self.teacher.stages) < len(self.teacher.row):  # it goes on from the student's activation
            seen |= taught
        if measure and not taught & seen:
            taught |= seen & set(large)
        return sorted(learning), sorted(seen), asked, sorted(taught)

    def _probed(self, views: int) -> Sequence[int]:
        """The views on which the online probe is trained."""
        return range(min(self.large_crops, views) if self.classifier is not None else 0)

    def _probe(self, probe, logits: list[Tensor], targets: Tensor, prefix: str, metrics: dict) -> Tensor | float:
        """Cross-entropy of a linear probe, averaged over views; adds its loss and accuracies to `metrics`."""
        if probe is None:
            return 0.0
        labelled = (targets != -1).sum().clamp(min=1)  # a batch without labels has no loss, rather than 0 / 0
        losses = [F.cross_entropy(x, targets, ignore_index=-1, reduction="sum") / labelled for x in logits]
        accuracies = [accuracy_at_k(x, targets, (1, 5)) for x in logits]
        metrics[f"{prefix}class_loss"] = sum(losses) / len(losses)
        metrics[f"{prefix}acc1"] = sum(a for a, _ in accuracies) / len(accuracies)
        metrics[f"{prefix}acc5"] = sum(a for _, a in accuracies) / len(accuracies)
        return metrics[f"{prefix}class_loss"]

    def _log_gap(self, students: Sequence[dict], teachers: Sequence[dict]) -> None:
        name = OUTPUT[self.gap_at]
        gap = {
            "gap_sim": similarity([s[name] for s in students], [t[name] for t in teachers]),
            "gap_sim_feats": similarity([s["feats"] for s in students], [t["feats"] for t in teachers]),
        }
        self.log_dict(gap, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(students[0]["z"]))

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """The optimizer's step and, once for each, the teacher's update: before any callback can save a checkpoint."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.teacher.update(self.global_step, self._total_steps)

    def on_train_epoch_end(self) -> None:
        tau = self.teacher.tau(max(self.global_step - 1, 0), self._total_steps)  # of the last update
        if tau is not None:
            self.log("tau", tau)
        if self.gap.enabled:
            self.log_dict({f"weight_distance/{k}": v for k, v in weight_distance(self.teacher).items()})

    # Validation.

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Accuracy of the online probes on `(indexes, [view], targets)`, or solo-learn's `(images, targets)`."""
        *_, x, targets = batch
        out, entry = self._see(x if isinstance(x, Tensor) else x[0])
        metrics: dict[str, Tensor] = {}
        self._probe(self.classifier, [out.get("logits")], targets, "val_", metrics)
        if self.momentum_classifier is not None:
            logits = self.momentum_classifier(self._teach(out, entry, "backbone")["feats"])
            self._probe(self.momentum_classifier, [logits], targets, "momentum_val_", metrics)
        renamed = {name.replace("val_class_loss", "val_loss"): value for name, value in metrics.items()}
        self.log_dict(renamed, sync_dist=True, batch_size=len(targets))

    # Optimization.

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Parameter groups in solo-learn's order, so that optimizer states are exchangeable."""
        probe = {"lr": self._lr("classifier_lr"), "weight_decay": 0}
        groups = [{"name": "backbone", "params": list(self.backbone.parameters())}]
        for name in ("classifier", "momentum_classifier"):
            if getattr(self, name) is not None:
                groups.append({"name": name, "params": list(getattr(self, name).parameters()), **probe})
        for name, attribute in self.parts.items():
            if name != "backbone":
                static = {"static_lr": True} if name in self.static_lr else {}
                groups.append({"name": attribute, "params": list(self.part(name).parameters()), **static})
        return groups

    def _lr(self, key: str) -> float:
        effective = getattr(self.optimizer_cfg, f"effective_{key}")
        return effective if effective is not None else getattr(self.optimizer_cfg, key) * self.accumulate

    def configure_optimizers(self):
        optimizer = build_optimizer(self.learnable_params, self.optimizer_cfg, self._lr("lr"))
        scheduler = build_scheduler(
            optimizer, self.scheduler_cfg, self._total_steps, self.trainer.max_epochs, self.accumulate
        )
        return {"optimizer": optimizer, **({"lr_scheduler": scheduler} if scheduler else {})}

    @property
    def _total_steps(self) -> float:
        """Optimizer steps in the whole run."""
        return self.trainer.estimated_stepping_batches


def cross_views(queries: Sequence[Tensor], targets: Sequence[Any]) -> list[tuple[Tensor, Any]]:
    """All (query, target) pairs of different views; for two views, both directions. A target is what its view has."""
    return [(q, k) for j, k in enumerate(targets) for i, q in enumerate(queries) if i != j]


def backbone_of(cfg: Mapping[str, Any]) -> nn.Module:
    """The randomly initialised backbone that a configuration names, with the stem that its data set asks for."""
    asked = section(BackboneConfig, cfg["backbone"], "backbone")
    small = asked.stem == "small"
    if asked.stem == "auto":
        dataset = DATASETS.get((cfg.get("data") or {}).get("dataset"))
        small = dataset is not None and dataset.small_images
    method = cfg.get("method") or cfg.get("pretrain_method")
    return build_backbone(asked.name, asked.kwargs, small, method, asked.last_norm)
