"""The configuration of a run: `resolve` makes a typed one from a YAML's values, and adds what follows from them.

The keys are solo-learn's; each section's dataclass is beside its owner. Nothing here builds a network or opens an
image, and configured values are never overwritten: what is derived has keys of its own.
"""

import copyreg
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from solo_ext.data.augmentations import AugmentationConfig, count_crops
from solo_ext.data.datasets import FACTS, LINEAR_REFERENCE, DataConfig, dataset_info
from solo_ext.errors import ConfigError, must_have
from solo_ext.evaluation.features import Kept
from solo_ext.evaluation.finetune import DetectorConfig, LinearOptions
from solo_ext.evaluation.knn import Distance
from solo_ext.files import log
from solo_ext.methods import METHODS, Method
from solo_ext.methods.base import MethodConfig, PerformanceConfig
from solo_ext.networks import BackboneConfig
from solo_ext.optim.config import OptimizerConfig, SchedulerConfig
from solo_ext.runs.checkpoints import AutoResumeConfig, CheckpointConfig, find_checkpoint, foreign_config
from solo_ext.runs.encoder import evaluation_view, network_of
from solo_ext.runs.run import Run
from solo_ext.schema import MISSING, Bounds, Config, Count, Positive, UnknownKey, build, keys, plain
from solo_ext.training import recipes
from solo_ext.training.callbacks import MONITORS, MonitorCallback
from solo_ext.training.callbacks.collapse import Action
from solo_ext.training.compose import compose, key_of, overlay, refuse_resolvers, sentence
from solo_ext.training.trainer_config import NO_LOOP, OWN, TensorboardConfig, TrainerConfig, WandbConfig
from solo_ext.training.unread import ONE_PROCESS, UNREAD, reset, without_derived

EVALUATION_DATA = (  # what an evaluation takes over from the run
    *("dataset", "train_path", "val_path", "val_fraction"),
    *("num_workers", "download", "corrupt", "corrupt_limit", "decode", "channels"),
)
# of SimCLR's fine-tuning with few labels (Chen et al., 2020, App. B.5), where it has 60 epochs for 1% of ImageNet
FINETUNE_RECIPE: dict[str, Any] = {
    "optimizer": {"name": "sgd", "batch_size": 256, "lr": 0.05, "weight_decay": 0, "kwargs": {"nesterov": True}},
    "scheduler": {"name": "warmup_cosine", "warmup_epochs": 0},
    "max_epochs": 30,
}
LINEAR_RECIPE: dict[str, Any] = {
    "optimizer": {"name": "sgd", "batch_size": 256, "lr": 0.3, "weight_decay": 0},
    "scheduler": {"name": "step", "lr_decay_steps": [60, 80]},
    "max_epochs": 100,
}
# keys of solo-learn's and of Lightning's that nothing here reads
UNUSED = ("auto_umap", "dali", "debug_augmentations", "augmentations_cfg", "wandb_cfg", *NO_LOOP)


@dataclass(kw_only=True)
class RunConfig(TrainerConfig):
    name: str = "solo-ext"  # of the run, for a reader
    data: DataConfig
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 5
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        usable = 0 < len(self.name.encode()) <= 180 and not {*"/\\\0"} & {*self.name}
        self.require(usable, "name", "a name for files, of at most 180 bytes and without slashes")


@dataclass(kw_only=True)
class TrainingConfig(RunConfig):
    max_epochs: Count = MISSING  # type: ignore[assignment]  # no default
    backbone: BackboneConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    auto_resume: AutoResumeConfig = field(default_factory=AutoResumeConfig)
    resume_from_checkpoint: str | None = None
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    skip_non_finite: Annotated[int, Bounds(0)] = 0  # steps with a loss or gradient that is NaN or infinite, left out
    callbacks: dict[str, Any] | None = None  # {my_module.MyCallback: {every: 3}}: class and arguments
    when_given = TrainerConfig.when_given | {"callbacks"}


@dataclass(kw_only=True)
class PretrainConfig(TrainingConfig, MethodConfig):  # type: ignore[misc]  # here, max_epochs cannot be null
    """A pre-training. `method_kwargs` is the method's `Kwargs`; each of `MONITORS` adds its section."""

    method: str
    augmentations: list[AugmentationConfig]
    pretrained_feature_extractor: str | None = None  # whose weights the backbone begins with: a run, or any program's
    collapse: Action = "warn"  # what happens when the outputs collapse; off: nobody looks
    compile: bool = False  # true: student and teacher through torch.compile, which takes about a minute before step 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.augmentations:
            raise ConfigError("augmentations: empty, but at least two views are needed")
        if self.optimizer.batch_size == 1 and not (self.processes > 1 and self.sync_batchnorm):
            problem = "one image is too few for BatchNorm and for a contrastive loss; use at least 2"
            raise ConfigError(f"optimizer.batch_size: {problem}")
        sizes = [view.crop_size for view in self.augmentations]
        for i, size in enumerate(sizes):
            if size == max(sizes) > min(sizes[: i + 1]):
                raise ConfigError(f"augmentations.{i}.crop_size: {size} px after smaller crops; the largest come first")
        large, small = count_crops(self.augmentations)
        if large + small < 2:
            raise ConfigError("augmentations gives one view of each image; set num_crops=2 or add an entry")
        if large < 2:
            raise ConfigError("augmentations.0 gives one large view of each image; two need the same crop_size")


@dataclass(kw_only=True)
class EvaluationConfig(RunConfig):
    pretrained_feature_extractor: str | None = None  # its run folder or checkpoint, ours or solo-learn's
    pretrain_method: str | None = None
    untrained: bool = False  # true: a freshly initialised encoder instead
    teacher: bool = False  # true: the momentum encoder instead
    encoder: str | None = None  # SHA-256 of its weights
    branch: str | None = None  # `teacher`, of an export that is one
    keep_features: Kept = "float32"  # how, where they are extracted first; file: a temporary one, in place of memory


@dataclass(kw_only=True)
class LinearConfig(LinearOptions, TrainingConfig, EvaluationConfig):
    """An offline linear evaluation; `cache_features` trains on features of un-augmented images, extracted once."""

    recipe: str | None = None  # from which optimizer, schedule and epochs were taken, if nobody named a YAML
    cache_features: bool = False
    auto_augment: Literal[False] = False  # solo-learn's key; the augmentation is a random crop and flip

    def __post_init__(self) -> None:
        super().__post_init__()
        trains_more = self.cache_features and (self.finetune or self.mixup or self.cutmix or self.label_smoothing)
        self.require(not trains_more, "cache_features", "false with finetune, mixup, cutmix or label_smoothing")
        for key in ("lr_grid", "weight_decay_grid"):
            apart = not (getattr(self, key) and self.gradient_clip_val)
            self.require(apart, key, "empty with gradient_clip_val, which sees all classifiers at once")
        self.require(not self.lr_grid or self.optimizer.lr > 0, "lr_grid", "empty where optimizer.lr is 0")


@dataclass(kw_only=True)
class DetectionConfig(TrainingConfig, EvaluationConfig):
    """A transfer to object detection; finetune: false: the encoder stays as it is, and the rest is trained."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    finetune: bool = True


@dataclass
class OfflineKNNConfig(Config, section="knn_eval"):
    """`knn_eval` of an offline evaluation, which takes every combination; T: temperatures of the cosine votes."""

    k: list[Count] = field(default_factory=lambda: [1, 20])
    distance_func: list[Distance] = field(default_factory=lambda: ["cosine", "euclidean"])
    T: list[Positive] = field(default_factory=lambda: [0.07])


@dataclass(kw_only=True)
class KNNRunConfig(EvaluationConfig):
    backbone: BackboneConfig | None = None  # only for a checkpoint without args.json
    knn_eval: OfflineKNNConfig = field(default_factory=OfflineKNNConfig)


@dataclass(kw_only=True)
class QualityConfig(EvaluationConfig):
    """Measures of features without labels, on `images` training images in `views` views each: the first augmentation of
    a pre-training, or crops and flips where there is none."""

    backbone: BackboneConfig | None = None
    images: Annotated[int, Bounds(2)] = 1000
    views: Annotated[int, Bounds(2)] = 10
    augmentations: list[AugmentationConfig] = field(default_factory=list)


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


@cache
def _pretraining(*monitors: type[MonitorCallback]) -> type[RunConfig]:
    sections = [(m.key, m.Config, field(default_factory=m.Config)) for m in monitors]
    cls = make_dataclass("PretrainConfig", sections, bases=(PretrainConfig,), kw_only=True)
    copyreg.pickle(cls, lambda cfg: (_unpickled, (monitors,), vars(cfg)))
    return cls


def _unpickled(monitors: Sequence[type[MonitorCallback]]) -> RunConfig:
    return object.__new__(_pretraining(*monitors))  # type: ignore[arg-type]  # classes can be hashed


def resolve(raw: RunConfig | DictConfig | Mapping[str, Any], kind: str = "pretrain") -> Any:
    """The configuration that runs: checked, typed, with defaults filled in and derived keys added.

    raw: what `compose` returned, the content of an args.json, or a typed configuration; `resolve` of its own result is
    the same again. kind: `pretrain`, `linear` or `knn`, for a `PretrainConfig`, `LinearConfig` or `KNNRunConfig`.
    Raises ConfigError, with the full key, for an unknown key or method, or a value that cannot work.
    """
    values = _values(raw)
    _drop_unused(values, UNUSED)
    if own := [key for key in values if key in OWN]:
        raise ConfigError(f"{own[0]} is set by solo-ext itself; {OWN[own[0]]}")
    pretraining = _pretraining(*MONITORS.values())  # type: ignore[arg-type]  # classes can be hashed
    kinds = {"pretrain": pretraining, "linear": LinearConfig, "detect": DetectionConfig, "knn": KNNRunConfig}
    kinds["quality"] = QualityConfig
    cls: type[RunConfig] = kinds[kind]
    try:
        if unknown := [key for key in values if key not in cls.__dataclass_fields__]:
            raise UnknownKey(str(unknown[0]), ())
        if kind == "pretrain":
            method = declared_method(values.get("method"))
            _drop_unused(values, [f"method_kwargs.{key}" for key in method.unused_kwargs])
            values = method.with_defaults(values)
        cfg = build(cls, values)
    except UnknownKey as error:  # the right key may be in another section
        kwargs = keys(method.Kwargs, "method_kwargs") if error.key.startswith("method_kwargs.") else ()
        raise UnknownKey(error.key, [*kwargs, *keys(cls)]) from None
    run = "linear with cache_features" if isinstance(cfg, LinearConfig) and cfg.cache_features else kind
    unread = reset(cfg, UNREAD[run])
    if run in ONE_PROCESS and cfg.processes > 1:
        unread.append(f"more than one of {cfg.processes} devices")
    if unread:
        log.warning("%s does not use %s", run, ", ".join(unread))
    return _derive(cfg)


def _values(raw: RunConfig | DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """`raw` as plain values, without Hydra's node and null Trainer arguments."""
    try:
        unresolved: Any = OmegaConf.to_container(raw) if OmegaConf.is_config(raw) else plain(raw)
        unresolved.pop("hydra", None)
        refuse_resolvers(unresolved)
        values: Any = OmegaConf.to_container(OmegaConf.create(unresolved), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from error
    optional = TrainerConfig.__dataclass_fields__
    return {key: x for key, x in values.items() if not (key in optional and x in (None, "None"))}


def _drop_unused(values: dict[str, Any], unused: Sequence[str]) -> None:
    """Takes out of `values` what solo-learn's YAMLs have and nothing here reads."""
    for full_key in unused:
        section, _, key = full_key.rpartition(".")
        node = values.get(section) if section else values
        if isinstance(node, dict) and key in node:
            log.warning("%s is accepted, as solo-learn's YAMLs have it, but not used", full_key)
            del node[key]


def declared_method(name: Any) -> type[Method]:
    """The method that is registered as `name`; ConfigError if there is none."""
    if name is None:
        raise ConfigError(f"method is missing (one of {', '.join(METHODS)})")
    must_have(str(name), METHODS, "method: there is no method")
    return METHODS.declared[str(name)]


def _derive(cfg: AnyConfig) -> AnyConfig:
    """Fills in the derived keys, in place of those that an args.json has."""
    info = dataset_info(cfg.data)
    cfg.data.info = {key: plain(getattr(info, key)) for key in FACTS}
    cfg.data.content = None  # until the images are read
    if info.num_classes is not None:  # else its folder is not there yet
        cfg.data.num_classes = info.num_classes
    if isinstance(cfg, TrainingConfig):
        o, accumulate = cfg.optimizer, 1  # in a linear evaluation, solo-learn's scaling leaves the accumulation out
        processes = 1 if isinstance(cfg, LinearConfig) and cfg.cache_features else cfg.processes
        if isinstance(cfg, PretrainConfig):
            accumulate = cfg.accumulate_grad_batches
            # an encoder is read where its method is not known, too
            cfg.backbone.kwargs = declared_method(cfg.method).own_arguments(cfg.backbone.name) | cfg.backbone.kwargs
            cfg.gap.place = None  # until the network is there
            cfg.data.num_large_crops, cfg.data.num_small_crops = count_crops(cfg.augmentations)
            if cfg.data.num_classes != 0 and o.classifier_lr is None:
                problem = "is null, but the data has labels (data.no_labels=True ignores them)"
                raise ConfigError(f"optimizer.classifier_lr {problem}")
        else:
            o.classifier_lr = None  # only the classifier is trained
        o.scale(o.batch_size * processes, accumulate)
    return cfg


def run_values(run: str | Path, kind: str, overrides: Sequence[str] = ()) -> DictConfig:
    """What `resolve` needs to evaluate the encoder of `run`, a folder or checkpoint, ours or solo-learn's, on its data.

    For `linear`, optimizer, schedule and epochs are those of the method's linear recipe for the dataset, or else for
    ImageNet-100, or else solo-learn's for most methods; with cached features, whose scale does not depend on the
    method, always the last; of a fine-tuning SimCLR's. Raises CheckpointError without a checkpoint, or for an args.json
    that is something else, and ConfigError for an override that makes no sense.
    """
    checkpoint = find_checkpoint(run)
    config = Run(checkpoint.parent).config or {}
    with foreign_config(checkpoint):
        method = config.get("method") or config.get("pretrain_method")
        data = {key: value for key, value in config.get("data", {}).items() if key in EVALUATION_DATA}
        if kind != "quality" and (view := evaluation_view(config)):
            data["augmentations"] = view
        # an args.json may be anybody's: nothing is written where it says, but into the folder that holds the run
        own, place = {key_of(text) for text in overrides}, config.get("checkpoint", {}).get("dir", "")
        folder = checkpoint.absolute().parent.parent.parent
        here = Path(place).expanduser().resolve() == folder.resolve() and os.access(folder, os.W_OK)
        other = [text for text in overrides if key_of(text) == "data.dataset"]
        if other and overlay({"data": {"dataset": None}}, other).data.get("dataset") != data.get("dataset"):
            data |= dict.fromkeys(("train_path", "val_path"))  # another dataset is elsewhere
        if any(data.get(key) and f"data.{key}" not in own for key in ("train_path", "val_path")):
            data["download"] = False
        values: dict[str, Any] = {
            "name": f"{config.get('name', checkpoint.stem)}-{kind}",
            "pretrained_feature_extractor": str(checkpoint),
            "data": data,
            "devices": 1,
            "checkpoint": {"enabled": kind == "linear", "dir": place if here else CheckpointConfig.dir},
            **({"precision": config["precision"]} if "precision" in config else {}),
            **({"augmentations": config.get("augmentations", [])[:1]} if kind == "quality" else {}),
            **(network_of(config) if config.get("backbone") else {"pretrain_method": method}),
        }
        (values.get("backbone", {}).get("kwargs") or {}).pop("cache_dir", None)
    if kind == "linear":
        values |= LINEAR_RECIPE
        asked = overlay(values, overrides)
        if asked.get("finetune"):
            values |= FINETUNE_RECIPE
        elif not asked.get("cache_features"):
            values |= _linear_recipe(str(data.get("dataset")), str(method))
            said = str(values.get("recipe", f"none of {method}, but that of most methods")).removeprefix("linear/")
            log.info("linear recipe: %s, lr %g", said, values["optimizer"]["lr"])
    return overlay(values, without_derived(overrides))


def _linear_recipe(dataset: str, method: str) -> dict[str, Any]:
    lineage = getattr(METHODS.declared.get(method), "__mro__", ())  # a method of one's own has its framework's
    names = [method, *(name for base in lineage for name, cls in METHODS.declared.items() if cls is base)]
    for folder, name in product((dataset, LINEAR_REFERENCE), names):
        with suppress(ConfigError):
            file = recipes.find(f"{folder}/{name}", "linear")
            values = plain(compose(file.parent, file.name))
            return {"recipe": f"linear/{folder}/{name}", **{key: values[key] for key in LINEAR_RECIPE}}
    return {}


def recipe_taken(cfg: LinearConfig) -> str | None:
    """The linear recipe of the encoder's method for the data, if optimizer, schedule and epochs are those in it."""
    other = cfg.cache_features or cfg.lr_grid or cfg.weight_decay_grid
    values = {} if other else _linear_recipe(cfg.data.dataset, str(cfg.pretrain_method))
    if not values:
        return None
    derived = ("classifier_lr", "joint_batch", "effective_lr", "effective_classifier_lr")
    own = {key: getattr(cfg.optimizer, key) for key in derived}
    optimizer = replace(build(OptimizerConfig, values["optimizer"], "optimizer"), **own)
    scheduler = build(SchedulerConfig, values["scheduler"], "scheduler")
    same = (optimizer, scheduler, values["max_epochs"]) == (cfg.optimizer, cfg.scheduler, cfg.max_epochs)
    return values["recipe"] if same else None
