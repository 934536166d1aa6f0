"""Continuing a run automatically: which one."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo_ext.errors import CheckpointError
from solo_ext.runs.checkpoints import Checkpoint, open_checkpoint
from solo_ext.runs.comparison import differences
from solo_ext.runs.run import Run, place_of, saved_at
from solo_ext.schema import Config, Positive, plain

log = logging.getLogger("solo_ext")


@dataclass
class AutoResumeConfig(Config, section="auto_resume"):
    """The YAML's `auto_resume`: continue the newest unfinished run of this very configuration.

    max_hours: how long ago that run may have saved its last checkpoint.
    """

    enabled: bool = False
    max_hours: Positive = 36.0


def find_resumable(cfg: Any, base: Path) -> Checkpoint | None:
    """The checkpoint from which auto-resume continues.

    Args:
        cfg: the resolved configuration.
        base: the folder of this method's runs.

    Returns:
        The newest checkpoint of the newest run below `base` that has the same configuration, is not finished, not
        running, and not older than `auto_resume.max_hours`; None if there is no such run.
    """
    now = plain(cfg)
    oldest = time.time() - cfg.auto_resume.max_hours * 3600
    runs = [(run, files[0]) for run in _runs(base) if (files := [f for f in run.checkpoints if place_of(f)[0] >= 0])]
    for run, newest in sorted(runs, key=lambda pair: saved_at(pair[1]), reverse=True):
        try:
            if saved_at(newest) < oldest or differences(run.args, now):
                continue
        except CheckpointError:  # its args.json is damaged
            continue
        if run.running:
            reason = "is running"
        elif run.finished or place_of(newest) >= (cfg.max_epochs - 1, math.inf):
            reason = "is finished"
        else:
            try:
                return open_checkpoint(run.dir)
            except CheckpointError:
                reason = "holds no undamaged checkpoint"
        log.warning("%s has this configuration but %s: starting a new run", run.dir, reason)
        return None
    return None


def _runs(base: Path) -> list[Run]:
    return [Run(folder) for folder in base.iterdir()] if base.is_dir() else []
