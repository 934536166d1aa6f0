"""Configurations side by side: where they agree, and where they differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from solo_ext.schema import plain

# A run continues another one if their resolved configurations agree in everything but:
IGNORED = (
    # where and how often something is written or shown
    *("checkpoint", "wandb", "tensorboard", "log_every_n_steps", "enable_progress_bar", "enable_model_summary"),
    *("auto_resume", "collapse", "resume_from_checkpoint"),
    # how the batches are loaded, not what they hold; what follows from other keys
    *("data.num_workers", "data.info", "gap.place"),
    # the images, which are compared when they have been read, see `training.trainer`
    *("data.content", "data.accept_changes"),
    # which devices, since a run keeps its joint batch on any number of them
    *("devices", "num_nodes", "collective_timeout", "optimizer.joint_batch"),
)
RATES = ("optimizer.effective_lr", "optimizer.effective_classifier_lr")  # which other keys and the joint batch give
OFF: tuple = (None, False, 0, -1, [], {})  # the values of a key that asks for nothing
_ABSENT = object()


def flatten(config: Any, at: str = "") -> dict[str, Any]:
    """{full key: value} of nested dictionaries and lists of dictionaries; other lists are values."""
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        config = dict(enumerate(config))
    if not isinstance(config, dict) or not config:
        return {at: config} if at else {}
    items = (flatten(item, f"{at}.{name}" if at else str(name)) for name, item in config.items())
    return {key: value for item in items for key, value in item.items()}


def within(key: str, names: Sequence[str]) -> bool:
    """Whether a full key is one of `names`, or below one."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def _aligned(configs: Sequence[Any]) -> dict[str, list[Any]]:
    """Full key -> the value of each configuration, `_ABSENT` where it has no such key."""
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    return {key: [config.get(key, _ABSENT) for config in flat] for key in keys}


def compare(configs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Where nested dictionaries agree and differ: ({full key: value}, {full key: [value of each]}), values as text."""
    texts = {key: [value_text(value) for value in values] for key, values in _aligned(configs).items()}
    same = {key: values[0] for key, values in texts.items() if len(set(values)) == 1}
    return same, {key: values for key, values in texts.items() if key not in same}


def differences(saved: Any, now: Any) -> list[str]:
    """The full keys, outside `IGNORED`, at which two resolved configurations differ: `key: old -> new`.

    A `data.num_classes` of null in `now`, which is unknown until the images are read, differs from nothing; nor does
    a key that one of them lacks, as another version's has it, from the other's that asks for nothing.
    """
    pairs = _aligned([plain(saved), plain(now)])
    if pairs.get("data.num_classes", [0, 0])[1] is None:
        del pairs["data.num_classes"]
    joint = _ABSENT not in pairs.get("optimizer.joint_batch", [_ABSENT])  # or only the rates tell the devices
    counted = (key for key in pairs if not within(key, (*IGNORED, *RATES * joint)))
    changed = [(key, *pairs[key]) for key in counted if pairs[key][0] != pairs[key][1] and not _new(key, pairs)]
    return [f"{key}: {value_text(old)} -> {value_text(new)}" for key, old, new in changed]


def _new(key: str, pairs: Mapping[str, list[Any]]) -> bool:
    """Whether a key of ours is in one configuration only, and asks for nothing there, or its section is off."""
    theirs = "kwargs." in key or key.startswith("callbacks.")  # whose defaults nobody knows here
    switch = pairs.get(f"{key.rpartition('.')[0]}.enabled", [])
    off = any(value in OFF for value in pairs[key] if value is not _ABSENT) or (_ABSENT in switch and False in switch)
    return not theirs and _ABSENT in pairs[key] and off


def value_text(value: Any) -> str:
    """A value as in a YAML file; `-` for a missing one."""
    if value is _ABSENT:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
