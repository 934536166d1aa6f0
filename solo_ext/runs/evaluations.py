"""The results of evaluations, such as `linear.json` in a run folder: each with its whole protocol.

A result is {"protocol": {full key: value}, "acc1": percent, ...}. The protocol is all that its figures depend on: the
evaluation's configuration without places and paths, the encoder, the images as they were found, and the device.
"""

from pathlib import Path
from typing import Any

from solo_ext.errors import CheckpointError
from solo_ext.files import read_json
from solo_ext.runs.comparison import OFF, within

Result = dict[str, Any]

# in these, evaluations by the standard protocol may differ; it is frozen, on all labels of the encoder's own data
FREE = (
    *("checkpoint", "sha256", "encoder", "branch", "untrained", "pretrain_method", "backbone", "data"),
    *("cache_features", "keep_features", "augmented", "optimizer", "scheduler", "recipe", "max_epochs", "min_epochs"),
    "accumulate_grad_batches",
    *("gradient_clip_val", "gradient_clip_algorithm", "seed", "precision", "devices", "processes", "strategy"),
    *("sync_batchnorm", "performance", "deterministic", "check_val_every_n_epoch", "val_check_interval"),
    *("features", "distance", "k", "T"),
)
SHARES = ("data.fraction", "data.subset", "data.val_fraction")


def read_results(path: Path) -> list[Result]:
    """The results in the file, the latest last; none without a file. CheckpointError if it is damaged."""
    rows = (read_json(path, results=list) or {"results": []}).get("results", [None])
    if all(isinstance(row, dict) and isinstance(row.get("protocol"), dict) for row in rows):
        return rows
    raise CheckpointError(f"{path} is damaged: its results are not objects, each with its protocol")


def departures(protocol: dict[str, Any]) -> dict[str, Any]:
    """What makes a protocol another than the standard one: fine-tuning, a share of the labels, limits, ..."""
    changed = {key: value for key, value in protocol.items() if key in SHARES or not within(key, FREE)}
    return {key: value for key, value in changed.items() if value not in OFF}
