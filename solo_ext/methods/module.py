"""A method at work: the one LightningModule, with its networks, teacher, terms of the loss, and online probes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from solo_ext.errors import ConfigError, must_have
from solo_ext.evaluation.linear import accuracy_at_k, classify, image_and_target
from solo_ext.losses import mean, total
from solo_ext.losses.precision import check_precision
from solo_ext.methods.base import Method, MethodConfig, backbone_of
from solo_ext.methods.step import Gap, Monitor, Outputs, Passes, Spread, Step, Term
from solo_ext.momentum import Teacher
from solo_ext.networks.stages import kept_outputs, stage_row
from solo_ext.optim import build_optimizer, build_scheduler, run_length

PARTS = ("backbone", "projector", "predictor")


class LightningMethod(pl.LightningModule, Method):  # type: ignore[override]  # current_epoch is a property
    """A declared method, built from a configuration and trained: its networks, step, probes, optimizer and logging.

    Attributes:
        parts: `backbone`, `projector` and, if there is one, `predictor` -> the attribute that holds it.
        row: all stages of the student.
        teacher: the copies of some of them.
        terms: of the loss; a subclass may add some.
        monitors: read a step now and then; a callback may add some.
    """

    def __init__(self, cfg: MethodConfig | DictConfig | Mapping[str, Any]):
        """Builds the networks as `cfg` says: the resolved configuration, or solo-learn's; it is not changed.

        Raises:
            ConfigError: a value that cannot work, e.g. a stage that the network lacks.
        """
        pl.LightningModule.__init__(self)  # also where solo-learn's BaseMethod stands in between
        self.cfg = cfg = self.configuration(cfg)
        self.kwargs, self.intra = cfg.method_kwargs, cfg.intra
        self.accumulate = cfg.accumulate_grad_batches or 1
        self.channels_last = not cfg.performance.disable_channel_last
        self.large_crops = cfg.data.num_large_crops or 2

        self.backbone = backbone_of(cfg, type(self))
        features: int = self.backbone.num_features  # type: ignore[assignment]  # nn.Module's attributes are modules
        classes = cfg.data.num_classes or 0
        self.classifier = nn.Linear(features, classes) if classes else None
        self.build_heads(features)
        names = {part: self.attributes.get(part, part) for part in PARTS}
        self.parts = {part: attribute for part, attribute in names.items() if hasattr(self, attribute)}
        *_, self.last = self.parts  # the last one: its outputs are the queries
        self.row = stage_row({part: self.part(part) for part in self.parts}, self.attributes)

        self.teacher = self._build_teacher()
        self.momentum_classifier: nn.Linear | None = None
        if cfg.momentum.classifier:
            if not classes or not hasattr(self, "momentum_backbone"):
                why = f"(momentum.stages is {cfg.momentum.stages!r}, and the dataset has {classes} classes)"
                raise ConfigError(f"momentum.classifier needs labels and a teacher with a backbone of its own {why}")
            self.momentum_classifier = nn.Linear(features, classes)
        self.terms = [Term(self.loss_name, self.criterion)]
        if self.intra.weight > 0:
            self.terms.append(Term("train_intra_loss", self._intra_term, self.intra.weight, self.intra.active))
        if self.classifier is not None:
            self.terms.append(Term("train_class_loss", self._probe_term))
        if self.momentum_classifier is not None:
            self.terms.append(Term("train_momentum_class_loss", self._momentum_probe_term))
        self.monitors: list[Monitor] = [Spread(large_crops=self.large_crops)]
        if cfg.gap.enabled and self.teacher.stages:
            self.monitors.append(Gap(cfg.gap.every, self.gap_at))
        self._compared = [s for s in self.row if s.name == self.intra_at and self.intra.weight > 0]
        self._kept = [s for s in self.row if s == self.teacher.entry or s in self._compared]
        self._passes: dict[tuple[int, bool, tuple[str, ...]], Passes] = {}  # planned once for each case
        self.loss_parts: dict[str, Tensor] = {}  # of the batch
        self.measured: dict[int, dict[str, Tensor]] = {}  # step -> what is read of it, until it is logged
        self.measures = False  # whether somebody logs that: Lightning would join the ranks in every step
        self._fresh: list[Tensor] = []  # targets of the batch whose backward pass is still to come

    def _build_teacher(self) -> Teacher:
        momentum, gap = self.cfg.momentum, self.cfg.gap
        part_of = self._part_of = {s.name: s.part for s in self.row} | {part: part for part in self.parts}
        must_have(momentum.target, self.parts, f"momentum.target: {type(self).__name__} has no")
        # where the intra term compares; frameworks without a predictor compare the projectors' outputs
        self.intra_at = self.last if self.intra.target == "predictor" else self.intra.target
        must_have(self.intra_at, part_of, "intra.target: the network has no stage")
        taus = momentum.taus(self.row)
        if self.intra.weight > 0 and not taus:
            raise ConfigError(
                "intra.weight > 0 needs a teacher that differs from the student; "
                f"set momentum.stages to full, backbone, projector or a stage, not {momentum.stages!r}"
            )
        read: set[str] = {momentum.target}
        read |= {part_of[self.intra_at]} if self.intra.weight > 0 else set()
        read |= {gap.at} & self.parts.keys() if gap.enabled else set()
        read |= {part_of[name] for name in taus} if momentum.preset is None else set()
        # a teacher has a predictor only where something reads it
        row = [stage for stage in self.row if stage.part != "predictor" or "predictor" in read]
        self.gap_at = "predictor" if "predictor" in read and gap.at != "projector" else "projector"
        return Teacher(self, row, {s.name: taus[s.name] for s in row if s.name in taus}, momentum.buffers)

    def compile_networks(self, **options: Any) -> None:
        """Runs the parts of student and teacher through torch.compile, which takes `options`; not those whose inside
        the teacher or the intra term reads, and no copies of some stages of a part, which run one by one."""
        read = {stage.attribute for stage in self._kept if stage.output != stage.attribute}
        for name in self.parts.values():
            for part in (getattr(self, name), getattr(self, self.teacher.prefix + name, None)):
                if part is not None and name not in read:
                    part.forward = torch.compile(part.forward, dynamic=False, **options)  # by size

    def part(self, name: str) -> nn.Module:
        """The student's `backbone`, `projector` or `predictor`."""
        return getattr(self, self.parts[name])

    def student(self, x: Tensor) -> dict[str, Tensor]:
        """The student's outputs on the images x [B, 3, H, W]: of each part, [B, features] or [B, D], and of the stages
        that the teacher and the intra term read."""
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        outputs = {}
        with kept_outputs(self, self._kept) as stages:
            for part in self.parts:
                outputs[part] = x = self.part(part)(x)
        return outputs | stages

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The student's outputs on the images x [B, 3, H, W], under solo-learn's names: feats [B, F]; z [B, D] of the
        projector; q [B, D] of the last head; with labels, logits [B, classes] of the online probe, whose gradient stops
        at the features."""
        out = self.student(x)
        named = {"feats": out["backbone"], "z": out["projector"], "q": out[self.last]}
        if self.classifier is not None:
            named["logits"] = classify(self.classifier, named["feats"].detach())
        return named

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """The scalar loss on `(indexes, [view [B, 3, H, W], ...], labels [B])`, label -1 = none: the framework's, plus
        the weighted intra-momentum term, plus the probes' cross-entropy."""
        step = self.look(batch)
        terms = [term for term in self.terms if term.active(step.number)]
        values = {term.name: term.value(step) for term in terms}
        self.loss_parts = {name: value.detach() for name, value in values.items()}
        loss = total(term.weight * values[term.name] for term in terms)
        log = partial(self.log_dict, on_epoch=True, sync_dist=True, batch_size=len(step.labels))
        log({"train_loss": loss}, on_step=not self.measures)
        log({**values, **step.metrics}, on_step=False)
        if self.intra.every:
            log({"intra_on": loss.new_tensor(self.intra.active(step.number), dtype=torch.float32)}, on_step=False)
        trainer: Any = self.trainer if self.measures else None
        if trainer and (trainer.is_last_batch or (step.number + 1) % trainer.log_every_n_steps == 0):
            self.measured.setdefault(step.number, {})["train_loss"] = loss.detach()
        with torch.no_grad():
            for monitor in self.monitors:
                if monitor.due(step.number):
                    log(values := monitor(step), on_step=False)
                    if monitor.on_step:  # Lightning would log it at later steps, too
                        self.measured.setdefault(step.number, {}).update(values)
        return loss

    def look(self, batch: Sequence[Any]) -> Step:
        """The networks' outputs on the views of a batch: those that something reads."""
        indexes, views, labels = batch
        views = [views] if isinstance(views, Tensor) else views
        number = self.global_step
        read = tuple(monitor.at for monitor in self.monitors if monitor.at and monitor.due(number))
        case = len(views), self.intra.active(number), read
        if case not in self._passes:
            self._passes[case] = self.passes(*case)
        passes = self._passes[case]
        students: dict[int, Outputs] = {}
        for i in passes.student:
            with torch.set_grad_enabled(i in passes.learning and torch.is_grad_enabled()):
                students[i] = self.student(views[i])
        teachers = {i: self.teach(views[i], students.get(i, {}), passes.upto) for i in passes.teacher}
        return Step(number, indexes, views, labels, passes, students, teachers)

    def passes(self, views: int, pull: bool = False, read: Sequence[str] = ()) -> Passes:
        """Which network runs which of the `views` of a batch; an output that nothing uses is not computed.

        pull: whether the intra term is on: the student then learns on all large views. read: parts at which monitors
        read the teacher's outputs.
        """
        inter, target = self.cfg.momentum.inter, self.cfg.momentum.target
        large = range(min(self.large_crops, views))
        targets = large if self.target_views is None else self.target_views
        if self.own_targets and not (inter and self.teacher.stages):
            targets = ()
        probed = () if self.classifier is None else large if self.probe_views is None else self.probe_views
        learning = {*(range(views) if self.query_views is None else self.query_views), *(large if pull else ())}
        teacher = {*(targets if inter else ())}
        teacher |= {*large} if pull or self.momentum_classifier is not None else set()
        student = {*learning, *probed, *(() if inter else targets)}
        student |= set() if self.teacher.whole else teacher  # it continues from these
        if read and not teacher & student:
            teacher |= student & {*large}
        ends = ["projector", *read, *([target] if inter else []), *([self._part_of[self.intra_at]] if pull else [])]
        learns, runs, aims, teaches = (tuple(sorted(places)) for places in (learning, student, targets, teacher))
        return Passes(learns, runs, aims, teaches, max(ends, key=PARTS.index), tuple(probed))

    def teach(self, x: Tensor, student: Outputs, upto: str) -> Outputs:
        """The teacher's outputs on the view x [B, 3, H, W], up to the part `upto`. It continues from the `student`'s,
        which may be empty where it starts from the image."""
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        return self.teacher(x, student, upto, [stage.name for stage in self._compared])

    def criterion(self, step: Step) -> Tensor:
        """The framework's loss on a step; a framework that reads labels or indexes overrides it."""
        target = self.cfg.momentum.target
        branch = step.teachers if self.cfg.momentum.inter else step.students
        targets = [branch[i][target].detach() for i in step.passes.targets]
        query_views = step.passes.learning if self.query_views is None else self.query_views
        if self.training:
            self._fresh = targets
        return self.loss([step.students[i][self.last] for i in query_views], targets)

    def on_fit_start(self) -> None:
        """Refuses a precision of the Trainer, which may be the caller's own, in which the average stands still."""
        check_precision(self.trainer.precision)

    def on_after_backward(self) -> None:
        """The framework's memory moves once the backward pass has read it; an evaluation leaves it alone."""
        if self._fresh:
            self.remember(self._fresh)
            self._fresh = []

    def _intra_term(self, step: Step) -> Tensor:
        at = self.last if self.intra_at in self.parts else self.intra_at  # the student's last head, or the same stage
        students = [pooled(step.students[i][at]) for i in step.teachers]
        return self.intra(students, [pooled(out[self.intra_at]) for out in step.teachers.values()])

    def _probe_term(self, step: Step) -> Tensor:
        features = [step.students[i]["backbone"].detach() for i in step.passes.probed]
        return self._probe(self.classifier, features, step.labels, "train_", step.metrics)

    def _momentum_probe_term(self, step: Step) -> Tensor:
        features = [out["backbone"] for out in step.teachers.values()]
        return self._probe(self.momentum_classifier, features, step.labels, "train_momentum_", step.metrics)

    def _probe(
        self, probe: nn.Linear | None, features: list[Tensor], labels: Tensor, prefix: str, metrics: dict[str, Tensor]
    ) -> Tensor:
        """Cross-entropy of a linear probe, averaged over views; adds its accuracies to `metrics`."""
        assert probe is not None  # else it has no term
        labelled = (labels != -1).sum().clamp(min=1)  # a batch without labels has no loss, rather than 0 / 0
        logits = [classify(probe, x) for x in features]
        accuracies = zip(*(accuracy_at_k(x, labels, (1, 5)) for x in logits), strict=True)
        metrics[f"{prefix}acc1"], metrics[f"{prefix}acc5"] = map(mean, accuracies)
        return mean([F.cross_entropy(x, labels, ignore_index=-1, reduction="sum") / labelled for x in logits])

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """The optimizer's step and, once for each, the teacher's update: before any callback can save a checkpoint."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.teacher.update(self.global_step, self.trainer.estimated_stepping_batches)

    def on_train_epoch_end(self) -> None:
        last_update = max(self.global_step - 1, 0)
        if (tau := self.teacher.tau(last_update, self.trainer.estimated_stepping_batches)) is not None:
            self.log("tau", tau)
        if self.cfg.gap.enabled:
            self.log_dict({f"weight_distance/{k}": v for k, v in self.teacher.distance().items()})

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> Outputs:
        """Accuracy of the online probes on `(indexes, [view], labels)`, or solo-learn's `(images, labels)`; its
        result, for callbacks, is the student's outputs."""
        x, labels = image_and_target(batch)
        out = self.student(x)
        metrics: dict[str, Tensor] = {}
        if self.classifier is not None:
            metrics["val_loss"] = self._probe(self.classifier, [out["backbone"]], labels, "val_", metrics)
        if self.momentum_classifier is not None:
            features = [self.teach(x, out, "backbone")["backbone"]]
            loss = self._probe(self.momentum_classifier, features, labels, "momentum_val_", metrics)
            metrics["momentum_val_loss"] = loss
        # a float, since over processes Lightning rounds the mean of whole numbers down
        weight: Any = float((labels != -1).sum())
        self.log_dict(metrics, sync_dist=True, batch_size=weight)
        return out

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Parameter groups in solo-learn's order, so that optimizer states are exchangeable."""
        _, lr = self.cfg.optimizer.rates(self.accumulate)
        groups: list[dict[str, Any]] = [{"name": "backbone", "params": list(self.backbone.parameters())}]
        for name in ("classifier", "momentum_classifier"):
            if (probe := getattr(self, name)) is not None:
                groups.append({"name": name, "params": list(probe.parameters()), "lr": lr, "weight_decay": 0})
        for name, attribute in self.parts.items():
            if name != "backbone":
                static = {"static_lr": True} if name in self.static_lr else {}
                groups.append({"name": attribute, "params": list(self.part(name).parameters()), **static})
        return groups

    def configure_optimizers(self):
        cfg, accumulate = self.cfg, self.accumulate
        length = run_length(self.trainer)
        optimizer = build_optimizer(self.learnable_params, cfg.optimizer, cfg.optimizer.rates(accumulate)[0])
        scheduler = build_scheduler(optimizer, cfg.scheduler, *length, accumulate)
        return {"optimizer": optimizer, **({"lr_scheduler": scheduler} if scheduler else {})}


def pooled(x: Tensor) -> Tensor:
    """Outputs [B, D] as they are; feature maps [B, C, H, W] and tokens [B, N, D] averaged over their places."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.flatten(2).mean(2, dtype=wide) if x.dim() == 4 else x.mean(1, dtype=wide) if x.dim() == 3 else x
