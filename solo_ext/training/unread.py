"""Keys that a run takes and does not read are named, so that nobody waits for their effect."""

from collections.abc import Mapping, Sequence
from typing import Any

from solo_ext.data.datasets import BUNDLED, dataset_info
from solo_ext.files import log
from solo_ext.methods import METHODS
from solo_ext.networks.backbones import VITS
from solo_ext.runs.checkpoints import CheckpointConfig
from solo_ext.runs.comparison import flatten
from solo_ext.schema import Config
from solo_ext.training.compose import key_of, parse
from solo_ext.training.trainer_config import TrainerConfig

PLACE = ("accelerator", "devices", "num_nodes", "precision")
NO_TRAINER = tuple(key for key in TrainerConfig.__dataclass_fields__ if key not in (*PLACE, "max_epochs"))
SAVING = tuple(f"checkpoint.{key}" for key in CheckpointConfig.__dataclass_fields__ if key not in ("enabled", "dir"))
UNREAD = {  # by the kind of run
    "pretrain": ("data.augmentations", "optimizer.layer_decay"),
    "linear": ("optimizer.classifier_lr", "keep_features"),
    "detect": (
        "optimizer.classifier_lr",
        "optimizer.layer_decay",
        "data.val_fraction",
        "data.no_labels",
        "data.channels",
        "keep_features",
    ),
    "linear with cache_features": (
        *("optimizer.classifier_lr", "optimizer.layer_decay", "wandb.enabled", "tensorboard.enabled"),
        *("auto_resume.enabled", "resume_from_checkpoint", "callbacks", "skip_non_finite", "data.accept_changes"),
        *(*SAVING, *NO_TRAINER),
    ),
    "quality": ("max_epochs", "data.accept_changes", "data.augmentations", *SAVING, *NO_TRAINER),
    "knn": ("max_epochs", "data.accept_changes", *SAVING, *NO_TRAINER),
}
DERIVED = (
    *("data.num_classes", "data.num_large_crops", "data.num_small_crops", "data.info", "data.content"),
    *("optimizer.joint_batch", "optimizer.effective_lr", "optimizer.effective_classifier_lr"),
    *("recipe", "encoder", "branch", "gap.place"),
)
ONE_PROCESS = ("linear with cache_features", "knn", "quality")
READ_BY = {  # scheduler.name -> keys of its section that it reads
    "none": (),
    "step": ("lr_decay_steps",),
    "warmup_step": ("lr_decay_steps", "warmup_steps", "warmup_start_lr"),
    "warmup_cosine": ("warmup_epochs", "warmup_start_lr", "min_lr", "interval"),
}


def without_derived(overrides: Sequence[str]) -> list[str]:
    """Those of `overrides` that set no key of `DERIVED`."""
    return [text for text in overrides if key_of(text) not in DERIVED]


def reset(cfg: Any, keys: Sequence[str]) -> list[str]:
    """Gives `keys` their defaults; returns those that had another value."""
    changed = []
    for full_key in keys:
        section, _, key = full_key.rpartition(".")
        owner = getattr(cfg, section) if section else cfg
        default, value = owner.__dataclass_fields__[key].default, getattr(owner, key)
        changed += [full_key] if value not in (None, default) else []
        setattr(owner, key, default)
    return changed


def warn_of_idle(cfg: Any, overrides: Sequence[str]) -> None:
    """Says which of `overrides` set a key that another key has switched off."""
    off = idle(cfg)
    for text in overrides:
        override = parse(text)
        for key in flatten(override.value(), override.key_or_group):  # a mapping sets several
            if key in off:
                log.warning("%s has no effect: %s", key, off[key])


def idle(cfg: Any) -> dict[str, str]:
    """Full key -> the key that has switched it off, and its value."""
    sections: dict[str, Any] = {name: section for name, section in vars(cfg).items() if isinstance(section, Config)}
    off = {}

    def switch(by: str, is_off: Any, *keys: str) -> None:
        """Notes `keys` of the section of the key `by`, by default all others, if `is_off`."""
        name, _, switching = by.partition(".")
        if is_off:
            section = sections[name]
            reason = f"{by} is {str(getattr(section, switching)).lower()}"
            off.update({f"{name}.{key}": reason for key in keys or vars(section).keys() - {switching}})

    for name, section in sections.items():
        switch(f"{name}.enabled", getattr(section, "enabled", True) is False)
    off.pop("checkpoint.dir", None)  # where the run's folder is
    off |= dict.fromkeys(DERIVED, "it follows from other keys")
    if dataset_info(cfg.data).num_classes is None:  # of loaders that a program hands over
        off.pop("data.num_classes")
    if cfg.processes == 1:
        off |= dict.fromkeys(("strategy", "sync_batchnorm", "collective_timeout"), "there is one process")
    if cfg.gradient_clip_val is None:
        off["gradient_clip_algorithm"] = "gradient_clip_val is null"
    data = sections["data"]
    switch("data.corrupt", data.corrupt == "error", "corrupt_limit")
    switch("data.format", data.format == "tensor", "num_workers")
    bundled = data.dataset == BUNDLED
    switch("data.dataset", bundled, "train_path", "val_path", "download", "accept_changes")
    switch("data.val_fraction", data.val_fraction and not bundled, "val_path")
    if not cfg.checkpoint.enabled:
        off |= dict.fromkeys(["auto_resume.enabled", "auto_resume.max_hours"], "checkpoint.enabled is false")
    backbone = sections.get("backbone")
    switch("backbone.name", backbone and (backbone.name in VITS or backbone.name.startswith("timm/")), "stem")
    for i, view in enumerate(getattr(cfg, "augmentations", ())):
        for name, op in vars(view).items():
            for by, value in (("enabled", False), ("prob", 0)):
                if isinstance(op, Config) and getattr(op, by, None) == value:
                    path = f"augmentations.{i}.{name}"
                    off |= {f"{path}.{key}": f"{path}.{by} is {str(value).lower()}" for key in vars(op) if key != by}
    if "scheduler" in sections:
        read = READ_BY[sections["scheduler"].name]
        rest = [key for keys in READ_BY.values() for key in keys if key not in read]
        switch("scheduler.name", True, *rest)
    if "intra" not in sections and not getattr(cfg, "finetune", False):
        drops = [f"backbone.kwargs.{key}" for key in getattr(backbone, "kwargs", ()) if "drop" in key]
        off |= dict.fromkeys(drops, "the encoder is frozen")
    if "intra" in sections:
        if data.no_labels:
            keys = ["optimizer.classifier_lr", *(f"knn_eval.{key}" for key in vars(sections["knn_eval"]))]
            off |= dict.fromkeys(keys, "data.no_labels is true")
        intra, momentum, method = sections["intra"], sections["momentum"], METHODS.declared[cfg.method]
        switch("intra.weight", not intra.weight)
        switch("intra.distance", intra.weight and not intra.distance.startswith("ce"), "temperature")
        no_teacher, target = momentum.preset == "none", ["target"] if method.own_targets else []
        switch("momentum.stages", no_teacher, "base_tau", "final_tau", "schedule", "buffers", "inter", *target)
        switch("momentum.schedule", not no_teacher and momentum.schedule == "constant", "final_tau")
        if no_teacher:
            for name in ("gap",) if sections["val_gap"].per_class else ("gap", "val_gap"):
                off |= {f"{name}.{key}": "momentum.stages is none" for key in vars(sections[name])}
        if isinstance(momentum.stages, Mapping):
            off["momentum.base_tau"] = "momentum.stages gives each its own"
        if method.loss_scale is None:
            off["method_kwargs.loss_scale"] = f"{cfg.method} has one scale"
        for key, (by, value) in method.idle_kwargs.items():
            section, _, name = by.rpartition(".")
            if getattr(getattr(cfg, section), name) == value:
                off[f"method_kwargs.{key}"] = f"{by} is {value}"
    knn = sections.get("knn_eval")
    switch("knn_eval.distance_func", knn and "T" in vars(knn) and "cosine" not in knn.distance_func, "T")
    return off
