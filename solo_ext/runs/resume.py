"""Continuing a run: which one, and when it is the same run."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from solo_ext import schema
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.runs.checkpoints import checkpoints_in, find_checkpoint, place_of

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

log = logging.getLogger("solo_ext")

RESULT = "result.json"  # written when a run has ended
LOCK = ".lock"

# A run continues another one if their whole resolved configurations agree, but for:
IGNORED = (
    # where and how often something is written, and who watches
    "checkpoint",
    "wandb",
    "tensorboard",
    "log_every_n_steps",
    "enable_progress_bar",
    "enable_model_summary",
    "auto_resume",
    "resume_from_checkpoint",
    # how the batches are loaded, not what they hold
    "data.num_workers",
    # which devices: their number times the batch size is compared in optimizer.effective_lr, which it scales
    "devices",
    "num_nodes",
)


@dataclass
class AutoResumeConfig:
    """The YAML's `auto_resume`: continue the newest unfinished run of this very configuration.

    max_hours: how long ago that run may have saved its last checkpoint.
    """

    enabled: bool = False
    max_hours: float = 36.0

    def __post_init__(self):
        if not self.max_hours > 0:
            raise ConfigError(f"auto_resume.max_hours must be positive, not {self.max_hours}")


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The full keys, outside `IGNORED`, at which two resolved configurations differ; `key: old -> new`."""
    old, new = dict(_flat(saved)), dict(_flat(now))
    keys = [key for key in {**old, **new} if not any(f"{key}.".startswith(f"{name}.") for name in IGNORED)]
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in keys if k not in old or k not in new or old[k] != new[k]]


def _flat(config: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    for name, value in items:
        key = f"{at}.{name}" if at else str(name)
        if isinstance(value, Mapping | list) and value:
            yield from _flat(value, key)
        else:
            yield key, value


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as `args.json` holds it."""
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=True)
    return json.loads(json.dumps(cfg if isinstance(cfg, Mapping) else schema.plain(cfg), default=str))


def find_resumable(cfg: DictConfig, base: Path) -> Path | None:
    """The checkpoint from which auto-resume continues.

    Args:
        cfg: the resolved configuration.
        base: the folder of this method's runs.

    Returns:
        The newest checkpoint of the newest run below `base` that has the same configuration, is not finished, not
        running, and not older than `auto_resume.max_hours`; None if there is no such run.
    """
    oldest = time.time() - cfg.auto_resume.max_hours * 3600
    runs = ((files[0].stat().st_mtime, files) for files in _runs(base))
    for _, files in sorted((run for run in runs if run[0] >= oldest), reverse=True):
        folder = files[0].parent
        try:
            args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(args, dict) or differences(args, plain(cfg)):
            continue
        if not RunLock(folder).free():
            why_not = "is running"
        elif (folder / RESULT).exists() or place_of(files[0]) >= (cfg.max_epochs - 1, math.inf):
            why_not = "is finished"
        else:
            try:
                return find_checkpoint(folder)
            except CheckpointError:
                why_not = "holds no undamaged checkpoint"
        log.warning("%s has this configuration but %s: starting a new run", folder, why_not)
        return None
    return None


def _runs(base: Path) -> Iterator[list[Path]]:
    """The checkpoints, newest first, of each run folder below `base` that has any."""
    for folder in base.iterdir() if base.is_dir() else ():
        if files := [file for file in checkpoints_in(folder) if place_of(file)[0] >= 0]:
            yield files


class RunLock:
    """Marks a run folder as in use, so that no two jobs of one configuration write into it; ends with the process."""

    def __init__(self, folder: Path):
        self.path, self.file = Path(folder) / LOCK, None

    def take(self) -> bool:
        """Whether the lock is ours now; True as well where the file system has no locks."""
        self.file = open(self.path, "a")  # noqa: SIM115, held open for the run
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            return False
        except OSError:
            pass
        return True

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()

    def free(self) -> bool:
        """Whether no process holds it."""
        if not self.path.exists():
            return True
        free = self.take()
        if free:
            self.file.close()
        return free
