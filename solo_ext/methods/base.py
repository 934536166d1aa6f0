"""What a method declares: its framework's heads and loss, and the defaults of its teacher and intra-momentum term.

Lightning is not imported here: a configuration is checked, and a run announced, without it. `METHODS` gives the
LightningModule that is made of a declaration.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from solo_ext.data.datasets import CUSTOM, FOLDER, DataConfig, recorded_info
from solo_ext.losses import enqueue
from solo_ext.methods.step import GapConfig
from solo_ext.methods.variants import variants
from solo_ext.momentum import IntraMomentum, MomentumConfig
from solo_ext.networks import BackboneConfig, build_backbone
from solo_ext.networks.backbones import BACKBONES
from solo_ext.optim import OptimizerConfig, SchedulerConfig
from solo_ext.schema import Config, Count, build
from solo_ext.text import Metric

TOTAL = Metric("train_loss", "Total loss", "loss", "{:.4f}", "losses", progress=True)
METRICS = (
    Metric("train_intra_loss", "Intra-momentum loss, unweighted", section="losses"),
    Metric("intra_on", "Intra-momentum on (share of the epoch)", section="losses"),
    Metric("train_class_loss", "Online classifier, cross-entropy", section="losses"),
    Metric("val_acc1", "Online classifier, top-1 (%)", "val acc", "{:.2f}", "accuracies", progress=True),
    Metric("momentum_val_acc1", "Teacher's online classifier, top-1 (%)", form="{:.2f}", section="accuracies"),
    Metric("weight_distance/*", "Weight distance, *", section="weight distance"),
    Metric("tau", "EMA coefficient of the teacher", section="schedules"),
    Metric("train_acc1", "Online classifier, top-1 in training (%)", form="{:.2f}"),
    Metric("train_acc5", "Online classifier, top-5 in training (%)", form="{:.2f}"),
    Metric("train_momentum_acc1", "Teacher's online classifier, top-1 in training (%)", form="{:.2f}"),
    Metric("train_momentum_acc5", "Teacher's online classifier, top-5 in training (%)", form="{:.2f}"),
    Metric("train_momentum_class_loss", "Teacher's online classifier, cross-entropy"),
    Metric("val_acc5", "Online classifier, top-5 (%)", form="{:.2f}"),
    Metric("momentum_val_acc5", "Teacher's online classifier, top-5 (%)", form="{:.2f}"),
    Metric("val_loss", "Online classifier, cross-entropy in validation"),
    Metric("momentum_val_loss", "Teacher's online classifier, cross-entropy in validation"),
)
DECLARED: dict[str, type["Method"]] = {}  # see `METHODS`


@dataclass
class PerformanceConfig(Config, section="performance"):
    """The YAML's `performance`."""

    disable_channel_last: bool = False  # true: convolutions in PyTorch's usual memory layout


@dataclass(kw_only=True)
class MethodConfig(Config):
    """The configuration of a method. `method_kwargs` is the method's `Kwargs`. By default, for unlabelled images, a
    ResNet-18 and SGD.

    `optimizer.lr` is taken as it is (solo-learn scales it before it builds the method) and multiplied by the
    accumulated batches, unless `optimizer.effective_lr`, which is the final value, is given beside it.
    """

    method: str | None = None
    method_kwargs: Any = None
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    intra: IntraMomentum = field(default_factory=IntraMomentum)
    gap: GapConfig = field(default_factory=GapConfig)
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("resnet18"))
    data: DataConfig = field(default_factory=lambda: DataConfig(FOLDER, no_labels=True))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("sgd", batch_size=256, lr=0.06))
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    max_epochs: Count | None = None
    accumulate_grad_batches: Count | None = 1


class Method(nn.Module):
    """A self-supervised method = framework x teacher stages x intra-momentum.

    A framework subclasses it with `Kwargs`, `build_heads` and `loss`; a variant of a framework declares other defaults:

        class Block4BYOL(BYOL, name="block4_byol"):
            teacher_stages = ["block4", "projector"]

    `name` registers the class; with a framework, also its `variants` by both papers. An object is a LightningModule,
    also of `METHODS[name]`: see `LightningMethod` for the attributes that heads and loss may read.
    """

    lightning: ClassVar[Callable[[Any], Any]]  # the class of such objects, which the package gives

    cfg: MethodConfig
    kwargs: Any
    backbone: nn.Module
    large_crops: int  # number of large views
    current_epoch: int

    @dataclass
    class Kwargs(Config, section="method_kwargs"):
        """The framework's `method_kwargs`. loss_scale: the loss as solo-learn codes it, or as the paper prints it; null
        where both are one."""

        loss_scale: Literal["solo", "paper"] | None = "solo"

    teacher_stages: ClassVar[Any] = "full"
    intra: IntraMomentum = IntraMomentum()
    loss_scale: ClassVar[str | None] = "solo"  # None: the framework has one scale, whatever the YAML says
    loss_name: ClassVar[str] = "train_ssl_loss"  # under which the loss is logged
    loss_title: ClassVar[str] = ""  # of its plot
    # places of the views that the loss takes from the student (None: all) and from the target branch, and on which the
    # online probe learns (None: all large ones)
    query_views: Sequence[int] | None = None
    target_views: Sequence[int] | None = None
    probe_views: Sequence[int] | None = None
    # without a teacher's targets, the loss gets none, rather than the student's detached outputs
    own_targets: ClassVar[bool] = False
    # constructors of backbones that go before the common ones
    backbones: ClassVar[Mapping[str, Callable[..., nn.Module]]] = MappingProxyType({})
    # parts that have another name in solo-learn's checkpoints -> that name; heads with a constant learning rate
    attributes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    static_lr: ClassVar[Sequence[str]] = ()
    unused_kwargs: ClassVar[Sequence[str]] = ("momentum_classifier",)  # what solo-learn's YAMLs carry without using it
    # key of Kwargs -> the full key that switches it off, and with which value
    idle_kwargs: ClassVar[Mapping[str, tuple[str, Any]]] = MappingProxyType({})

    def __new__(cls, *args: Any, **kwargs: Any):
        return super().__new__(cls.lightning(cls))

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name is not None:
            of_another = any(base in DECLARED.values() for base in cls.__mro__[1:])
            DECLARED.update({name: cls} if of_another else {name: cls, **variants(cls, name)})

    @classmethod
    def with_defaults(cls, sections: Mapping[str, Any]) -> dict[str, Any]:
        """`sections` completed by what this method declares, `method_kwargs` typed and without `unused_kwargs`."""
        declared = {
            "momentum": {"stages": cls.teacher_stages},
            "intra": dataclasses.asdict(cls.intra),
            "method_kwargs": {"loss_scale": cls.loss_scale},
        }
        complete = dict(sections)
        for name, defaults in declared.items():
            node = sections.get(name)
            if node is None or isinstance(node, Mapping):
                own = {key: value for key, value in (node or {}).items() if value is not None or key not in defaults}
                complete[name] = {**defaults, **own}
        if isinstance(kwargs := complete["method_kwargs"], Mapping):
            used = {key: value for key, value in kwargs.items() if key not in cls.unused_kwargs}
            complete["method_kwargs"] = build(cls.Kwargs, used, "method_kwargs")
            if cls.loss_scale is None:
                complete["method_kwargs"].loss_scale = None
        return complete

    @classmethod
    def configuration(cls, cfg: "MethodConfig | Mapping[str, Any]") -> MethodConfig:
        """The typed configuration, or ConfigError; one that is typed already is returned unchanged.

        A mapping is taken strictly. solo-learn's DictConfig may have other top-level keys, which are ignored, and
        `method_kwargs` of other methods, since its scripts take any YAML with `method=`.
        """
        if isinstance(cfg, MethodConfig):
            return cfg
        values: Any = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
        own, of_solo_learn = {f.name for f in fields(MethodConfig)}, OmegaConf.is_config(cfg)
        sections = {k: x for k, x in values.items() if x is not None and (k in own or not of_solo_learn)}
        if of_solo_learn and "method_kwargs" in sections:
            known = {f.name for method in DECLARED.values() for f in fields(method.Kwargs)}
            others = known - {f.name for f in fields(cls.Kwargs)}
            sections["method_kwargs"] = {k: v for k, v in sections["method_kwargs"].items() if k not in others}
        return build(MethodConfig, cls.with_defaults(sections))

    @classmethod
    def own_arguments(cls, backbone: str) -> dict[str, Any]:
        """What its own constructor of `backbone` gives otherwise than the usual one: MoCo v3's number of heads."""
        own, usual = (getattr(known.get(backbone), "keywords", {}) for known in (cls.backbones, BACKBONES))
        return {key: x for key, x in own.items() if usual.get(key) != x}

    # To be written by a framework.

    def build_heads(self, features: int) -> None:
        """Sets `self.projector` and, if the framework has one, `self.predictor`, on `features`-wide inputs."""
        raise NotImplementedError

    def loss(self, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The framework's loss, a scalar; it changes nothing.

        queries: per view of `query_views`, the output [B, D] of the student's last head, with gradient. targets: per
        large view of `target_views`, the target branch's output [B, D] at `momentum.target`, without gradient; empty
        for a framework with `own_targets` and no teacher.
        """
        raise NotImplementedError

    def remember(self, targets: list[Tensor]) -> None:
        """Takes a batch's targets into the framework's memory, such as a queue or a centre, after the backward pass,
        which still reads that memory."""


class QueuedMethod(Method):
    """A framework whose `loss` contrasts with `queue`: earlier outputs of the target branch."""

    queue: Tensor
    queue_ptr: Tensor

    @dataclass
    class Kwargs(Method.Kwargs):
        queue_size: Count = 65536

    def build_queue(self, *shape: int) -> None:
        """Registers `queue`, of unit vectors along dimension 1, and its pointer.

        shape: [K, D] for one queue, [V, D, K], as solo-learn has it, for one per target view.
        """
        queue = F.normalize(torch.randn(*shape), dim=1)
        if len(shape) == 3:
            queue = queue.mT.contiguous().mT  # a key lies in one place, or writing a batch takes four times as long
        self.register_buffer("queue", queue)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def remember(self, targets: list[Tensor]) -> None:
        keys = torch.stack(targets) if self.queue.dim() == 3 else targets[0]
        enqueue(self.queue, self.queue_ptr, keys)


def cross_views(queries: Sequence[Tensor], targets: Sequence[Any]) -> list[tuple[Tensor, Any]]:
    """All (query, target) pairs of different views; with two views, both directions."""
    return [(q, k) for j, k in enumerate(targets) for i, q in enumerate(queries) if i != j]


def backbone_of(cfg: Any, method: type[Method] | None = None) -> nn.Module:
    """The randomly initialised backbone of a run's configuration, typed or as its args.json has it.

    cfg: with `backbone` and `data`, and `method` or `pretrain_method`. method: the class, if it is known; it may have
    constructors of its own.
    """
    values = cfg if isinstance(cfg, Mapping) else vars(cfg)
    backbone, data = values["backbone"], values.get("data") or {}
    if isinstance(backbone, Mapping):  # of any origin
        declared = {field.name for field in fields(BackboneConfig)}
        backbone = build(BackboneConfig, {k: v for k, v in backbone.items() if k in declared}, "backbone")
    name = str(values.get("method") or values.get("pretrain_method")).lower()
    info = recorded_info(data if isinstance(data, Mapping) else vars(data)) or CUSTOM
    own = (method or DECLARED.get(name, Method)).backbones
    return build_backbone(backbone, info.small_images, own, info.channels)
