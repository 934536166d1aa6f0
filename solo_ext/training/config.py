"""The configuration: Hydra composes the YAML, `resolve` checks it and adds what follows from it.

The schema is solo-learn's; each section's dataclass stands beside its owner. Nothing here builds a network or
opens an image, and the configured values stay as they are: what is derived has keys of its own.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from solo_ext.data.config import AugmentationConfig, DataConfig, count_crops
from solo_ext.data.datasets import dataset_info
from solo_ext.errors import ConfigError
from solo_ext.evaluation.knn import DISTANCES, KNNConfig
from solo_ext.evaluation.linear import LinearOptions
from solo_ext.methods import METHODS, Method
from solo_ext.momentum import GapConfig, IntraMomentum, MomentumConfig
from solo_ext.networks import BackboneConfig
from solo_ext.optim import OptimizerConfig, SchedulerConfig, effective_lrs
from solo_ext.runs.checkpoints import CheckpointConfig, find_checkpoint, foreign_config, run_config
from solo_ext.runs.resume import AutoResumeConfig
from solo_ext.schema import UnknownKey, build, check_choice, check_integer, fit, keys, nearest_key
from solo_ext.text import hint
from solo_ext.training.callbacks.gradients import GradientsConfig
from solo_ext.training.compose import compose, overlay, sentence
from solo_ext.training.hardware import check_hardware, device_count, parse_devices, trainer_devices
from solo_ext.training.logger_config import TensorboardConfig, WandbConfig

__all__ = [
    "check_hardware",
    "compose",
    "device_count",
    "overlay",
    "resolve",
    "run_values",
    "to_yaml",
    "trainer_devices",
]

log = logging.getLogger("solo_ext")

TRAINER_DEFAULTS = {
    "max_epochs": None,  # has to be given
    "devices": "auto",
    "num_nodes": 1,
    "accelerator": "auto",
    "strategy": "auto",
    "precision": "32-true",
    "sync_batchnorm": False,
    "accumulate_grad_batches": 1,
}
TRAINER_OWN = {
    "callbacks": "the callbacks follow from the other keys",
    "logger": "use wandb.enabled",
    "enable_checkpointing": "use checkpoint.enabled",
    "default_root_dir": "use checkpoint.dir",
    "plugins": "they write the checkpoints",
}
TRAINER_MINIMUM = {
    "max_epochs": 1,
    "min_epochs": 1,
    "num_nodes": 1,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "max_steps": -1,
    "gradient_clip_val": 0,
}
# computed by `resolve`; accepted on input, since args.json has them, and computed anew
DERIVED = {
    "data": ("num_classes", "num_large_crops", "num_small_crops"),
    "optimizer": ("effective_lr", "effective_classifier_lr"),
}
EVALUATION_DATA = ("dataset", "train_path", "val_path", "num_workers", "download", "corrupt", "corrupt_limit")
LINEAR_RECIPE = {
    "optimizer": {"name": "sgd", "batch_size": 256, "lr": 0.3, "weight_decay": 0},
    "scheduler": {"name": "step", "lr_decay_steps": [60, 80]},
    "max_epochs": 100,
}
# solo-learn's keys that nothing here reads
UNUSED = ("auto_umap", "dali", "debug_augmentations", "augmentations_cfg", "wandb_cfg")


@dataclass
class PerformanceConfig:
    """The YAML's `performance`."""

    disable_channel_last: bool = False


@dataclass(kw_only=True)
class _Run:
    """What every run has."""

    name: str = "solo-ext"
    data: DataConfig
    seed: int = 5
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)

    def __post_init__(self):
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, not {self.seed}")


@dataclass(kw_only=True)
class _Training(_Run):
    backbone: BackboneConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    auto_resume: AutoResumeConfig = field(default_factory=AutoResumeConfig)
    resume_from_checkpoint: str | None = None
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)


@dataclass(kw_only=True)
class PretrainConfig(_Training):
    """A pre-training. `method_kwargs` is the method's `Kwargs`."""

    method: str
    method_kwargs: dict[str, Any]
    momentum: MomentumConfig
    intra: IntraMomentum
    gap: GapConfig = field(default_factory=GapConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    augmentations: list[AugmentationConfig]
    knn_eval: KNNConfig = field(default_factory=KNNConfig)

    def __post_init__(self):
        super().__post_init__()
        if sum(count_crops(self.augmentations)) < 2:
            raise ConfigError("augmentations gives one view of each image; set num_crops=2 or add an entry")
        if count_crops(self.augmentations)[0] < 2:
            raise ConfigError("augmentations.0 gives one large view of each image; two need the same crop_size")


@dataclass(kw_only=True)
class _Evaluation(_Run):
    """What evaluates an encoder.

    pretrained_feature_extractor: its run folder or checkpoint, ours or solo-learn's.
    untrained: evaluate a freshly initialised one instead.
    """

    pretrained_feature_extractor: str | None = None
    pretrain_method: str | None = None
    untrained: bool = False


@dataclass(kw_only=True)
class LinearConfig(LinearOptions, _Evaluation, _Training):
    """An offline linear evaluation.

    cache_features: train on features of un-augmented images, extracted once; a quick look.
    """

    cache_features: bool = False
    auto_augment: bool = False

    def __post_init__(self):
        LinearOptions.__post_init__(self)
        _Run.__post_init__(self)
        if self.auto_augment:
            raise ConfigError("auto_augment=true is not supported; the augmentation is a random crop and flip")


@dataclass
class OfflineKNNConfig:
    """`knn_eval` of an offline evaluation: every combination. T: temperatures of the cosine votes."""

    k: list[int] = field(default_factory=lambda: [1, 20])
    distance_func: list[str] = field(default_factory=lambda: ["cosine", "euclidean"])
    T: list[float] = field(default_factory=lambda: [0.07])

    def __post_init__(self):
        for k in self.k:
            check_integer("knn_eval.k", k, low=1)
        for distance in self.distance_func:
            check_choice("knn_eval.distance_func", distance, DISTANCES)
        if any(temperature <= 0 for temperature in self.T):
            raise ConfigError(f"knn_eval.T must be above 0, not {self.T}")


@dataclass(kw_only=True)
class KNNRunConfig(_Evaluation):
    """An offline kNN evaluation."""

    backbone: BackboneConfig | None = None  # only for a checkpoint without args.json
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # its folder, for an untrained encoder
    knn_eval: OfflineKNNConfig = field(default_factory=OfflineKNNConfig)


SCHEMAS = {"pretrain": PretrainConfig, "linear": LinearConfig, "knn": KNNRunConfig}


def resolve(raw: DictConfig | Mapping[str, Any], kind: str = "pretrain") -> DictConfig:
    """The configuration that runs: checked against the schema, defaults filled in, derived keys added.

    Derived are `data.num_classes`, `data.num_large_crops`, `data.num_small_crops` and, by solo-learn's rule,
    `optimizer.effective_lr` and `optimizer.effective_classifier_lr`. `resolve` of its own result, or of the
    args.json that holds it, is the same again.

    Args:
        raw: what `compose` returned, or the content of an args.json.
        kind: `pretrain`, `linear` or `knn`.

    Raises:
        ConfigError: an unknown key or method, a wrong type, a value that cannot work; with the full key.
    """
    given, derived = _plain(raw)
    _warn_unused(given, UNUSED)
    schema, method = SCHEMAS[kind], None
    hints = {key: hint for key, hint in get_type_hints(Trainer.__init__).items() if key != "return"}
    valid = [*keys(schema), *hints]
    try:
        for key in given:
            if key not in valid:
                raise UnknownKey(str(key))
        if kind == "pretrain":
            method = _method(given)
            for section, defaults in OmegaConf.to_container(method.defaults()).items():
                _fill(given, section, defaults)
            _warn_unused(given, [f"method_kwargs.{key}" for key in method.unused_kwargs])
            kwargs = build(method.Kwargs, given["method_kwargs"], "method_kwargs")
        config = build(schema, {key: value for key, value in given.items() if key not in hints})
    except UnknownKey as error:
        if method and error.key.startswith("method_kwargs."):
            valid = list(keys(method.Kwargs, "method_kwargs"))
        raise ConfigError(f"{error}{nearest_key(error.key, valid)}") from error
    resolved = dataclasses.asdict(config)
    if method:
        resolved["method_kwargs"] = dataclasses.asdict(kwargs)
    trainer = {key: value for key, value in given.items() if key in hints}
    resolved |= _trainer(trainer, hints, needs_epochs=kind != "knn")
    first = ("name", "method", "method_kwargs", "momentum", "intra", "gap", "backbone")
    ordered = {key: resolved[key] for key in dict.fromkeys((*first, *resolved)) if key in resolved}
    return _derive(OmegaConf.create(ordered), derived)


def _plain(raw: DictConfig | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`raw` as plain values without Hydra's node and the derived keys, and the derived keys that it had."""
    try:
        unresolved = OmegaConf.to_container(raw if OmegaConf.is_config(raw) else OmegaConf.create(dict(raw)))
        unresolved.pop("hydra", None)
        given = OmegaConf.to_container(OmegaConf.create(unresolved), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from error
    derived = {}
    for section, names in DERIVED.items():
        if isinstance(given.get(section), dict):
            derived |= {name: given[section].pop(name) for name in names if name in given[section]}
    return given, derived


def _warn_unused(given: dict[str, Any], unused: Sequence[str]) -> None:
    for full_key in unused:
        section, _, key = full_key.rpartition(".")
        node = given.get(section) if section else given
        if isinstance(node, dict) and key in node:
            log.warning("%s is accepted, as solo-learn's YAMLs have it, but not used", full_key)
            del node[key]


def _method(given: Mapping[str, Any]) -> type[Method]:
    name = given.get("method")
    if name is None:
        raise ConfigError(f"method is missing (one of {', '.join(METHODS)})")
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"method: there is no method '{name}'{hint(name, METHODS)}")
    return METHODS[name]


def _fill(given: dict[str, Any], section: str, defaults: Mapping[str, Any]) -> None:
    """Puts what the method declares where the section is silent."""
    node = given.get(section)
    if node is None or isinstance(node, dict):
        said = {key: value for key, value in (node or {}).items() if value is not None or key not in defaults}
        given[section] = {**defaults, **said}


def _trainer(given: Mapping[str, Any], hints: Mapping[str, Any], needs_epochs: bool) -> dict[str, Any]:
    """Trainer's arguments, checked without any hardware; those that are read elsewhere too have defaults."""
    for key, instead in TRAINER_OWN.items():
        if key in given:
            raise ConfigError(f"{key} is set by solo-ext itself; {instead}")
    said = {key: fit(hints[key], value, key) for key, value in given.items() if value not in (None, "None")}
    said = {**TRAINER_DEFAULTS, **said}
    if said["max_epochs"] is None:
        if needs_epochs:
            raise ConfigError("max_epochs is missing")
        del said["max_epochs"]
    for key, least in TRAINER_MINIMUM.items():
        if key in said and said[key] < least:
            raise ConfigError(f"{key} must be at least {least}, not {said[key]}")
    for key, value in said.items():
        share = key.startswith("limit_") or key in ("overfit_batches", "val_check_interval")
        if share and ((isinstance(value, int | float) and value < 0) or (isinstance(value, float) and value > 1)):
            raise ConfigError(f"{key} must be a number of batches or a share between 0.0 and 1.0, not {value}")
    for key, choices in (
        ("accelerator", ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]),
        ("strategy", ["auto", *StrategyRegistry.available_strategies()]),
        ("gradient_clip_algorithm", ["norm", "value"]),
    ):
        if key in said and said[key] not in choices:
            raise ConfigError(f"{key}: there is no '{said[key]}'{hint(said[key], choices)}")
    parse_devices(said["devices"])
    return said


def _derive(cfg: DictConfig, derived: Mapping[str, Any]) -> DictConfig:
    """Adds what follows from the rest."""
    classes = dataset_info(cfg.data).num_classes
    # a folder that is not there yet: what a run's args.json says, else unknown until the data is read
    cfg.data.num_classes = derived.get("num_classes") if classes is None else classes
    if "augmentations" in cfg:
        cfg.data.num_large_crops, cfg.data.num_small_crops = count_crops(cfg.augmentations)
    if "optimizer" in cfg:
        o, pretrain = cfg.optimizer, "method" in cfg
        if pretrain and cfg.data.num_classes != 0 and o.classifier_lr is None:
            raise ConfigError(
                "optimizer.classifier_lr is null, but the data has labels (data.no_labels=True ignores them)"
            )
        if not pretrain:
            o.classifier_lr = None  # the classifier is all that learns
        # in a linear evaluation, solo-learn's scaling leaves the accumulation out
        accumulate = cfg.accumulate_grad_batches if pretrain else 1
        o.effective_lr, o.effective_classifier_lr = effective_lrs(
            o.lr, o.classifier_lr, o.batch_size, device_count(cfg) * cfg.num_nodes, accumulate
        )
    return cfg


def run_values(run: str | Path, kind: str) -> dict[str, Any]:
    """What `resolve` needs for a linear or kNN evaluation of a pre-training, taken from its folder.

    Args:
        run: run folder or checkpoint, ours or solo-learn's.
        kind: `linear` or `knn`.

    Returns:
        The encoder, the data (all of it, with labels) and, for `linear`, solo-learn's ImageNet-100 recipe.

    Raises:
        CheckpointError: no checkpoint there, or an args.json that is something else.
    """
    checkpoint = find_checkpoint(run)
    config = run_config(checkpoint) or {}
    with foreign_config(checkpoint):
        data = {key: value for key, value in config.get("data", {}).items() if key in EVALUATION_DATA}
        if views := config.get("augmentations"):
            data["augmentations"] = {key: views[0][key] for key in ("crop_size", "mean", "std") if key in views[0]}
        values = {
            "name": f"{config.get('name', checkpoint.stem)}-{kind}",
            "pretrained_feature_extractor": str(checkpoint),
            "pretrain_method": config.get("method"),
            "data": data,
            "devices": 1,
            **{key: config[key] for key in ("backbone", "precision") if key in config},
        }
        folder = config.get("checkpoint", {}).get("dir", CheckpointConfig.dir)
        values["checkpoint"] = {"enabled": kind == "linear", "dir": folder}
    return values | LINEAR_RECIPE if kind == "linear" else values


def to_yaml(cfg: DictConfig) -> str:
    """`cfg` as a person reads it, and as `compose` and `resolve` take it again."""
    return OmegaConf.to_yaml(cfg)
