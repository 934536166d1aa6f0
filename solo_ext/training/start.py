"""How a run starts: its folder, what it continues, and the line that says so before anything slow is imported."""

import logging
from dataclasses import dataclass
from pathlib import Path

from solo_ext.errors import CheckpointError
from solo_ext.runs.checkpoints import Checkpoint, open_checkpoint
from solo_ext.runs.comparison import differences, flatten
from solo_ext.runs.resume import find_resumable
from solo_ext.runs.run import Run
from solo_ext.schema import plain
from solo_ext.training.config import RunConfig, TrainingConfig
from solo_ext.training.distributed.ranks import is_first
from solo_ext.training.hardware import check_hardware, devices_text, processes

log = logging.getLogger("solo_ext")


@dataclass(frozen=True)
class Start:
    """The folder of a run and the checkpoint that it continues."""

    run: Run
    checkpoint: Checkpoint | None = None


def runs_folder(cfg: RunConfig) -> Path:
    """The folder of all runs."""
    return Path(cfg.checkpoint.dir).expanduser()


def begin(cfg: TrainingConfig, base: Path) -> Start | None:
    """Chooses the folder below `base` for the run of the resolved `cfg`, and prints it; None on the other processes.

    Raises:
        ConfigError: this machine lacks the hardware.
        CheckpointError: what is to be resumed is damaged or belongs to another network.
    """
    check_hardware(cfg)
    if processes(cfg) > 1 and not is_first():
        return None
    start = _resumed(cfg, base) or Start(Run.new(base))
    if is_first():
        resumed = f", resuming {start.checkpoint.path.name}" if start.checkpoint else ""
        print(f"{cfg.name}: {devices_text(cfg)}, {start.run.dir}{resumed}", flush=True)
    return start


def _resumed(cfg: TrainingConfig, base: Path) -> Start | None:
    if not cfg.resume_from_checkpoint:
        checkpoint = find_resumable(cfg, base) if cfg.auto_resume.enabled else None
        return Start(Run(checkpoint.path.parent), checkpoint) if checkpoint else None
    checkpoint = open_checkpoint(cfg.resume_from_checkpoint)
    if checkpoint.config is None:  # a bare file: a new run that begins with it
        return Start(Run.new(base), checkpoint)
    saved, current = flatten(checkpoint.config), flatten(plain(cfg))
    for key in ("method", "backbone.name"):
        if saved.get(key) != current.get(key):
            raise CheckpointError(f"{checkpoint.path} holds {key} {saved.get(key)}, but {key} is {current.get(key)}")
    if changed := differences(checkpoint.config, cfg):
        log.warning("resuming with another configuration: %s", ", ".join(changed[:5]))
    return Start(Run(checkpoint.path.parent), checkpoint)
