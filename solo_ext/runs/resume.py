"""Auto-resume: which run is continued."""

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
    """The YAML's `auto_resume`: continue the newest unfinished run of this very configuration, if it saved its last
    checkpoint within `max_hours`."""

    enabled: bool = False
    max_hours: Positive = 36.0


def find_resumable(cfg: Any, base: Path) -> Checkpoint | None:
    """The newest checkpoint of the newest run in the folder `base` that has the resolved configuration `cfg`, is not
    finished, not running, and not older than `auto_resume.max_hours`; None if there is no such run."""
    now = plain(cfg)
    oldest = time.time() - cfg.auto_resume.max_hours * 3600
    runs = []
    for run in map(Run, base.iterdir() if base.is_dir() else ()):
        if newest := next((file for file in run.checkpoints if place_of(file)[0] >= 0), None):
            runs.append((run, newest))
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
