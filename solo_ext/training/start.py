"""How a run starts: its folder, what it continues, its first line, which comes before anything slow is imported, and
the processes that have to agree on them."""

import contextlib
import copy
import ctypes
import json
import os
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from solo_ext.data.shared import begin_node
from solo_ext.errors import CheckpointError, ConfigError, naming
from solo_ext.files import log
from solo_ext.runs.checkpoints import Checkpoint, find_resumable, find_unsaved, foreign_config, open_checkpoint
from solo_ext.runs.comparison import differences, flatten
from solo_ext.runs.encoder import is_neutral, network_of
from solo_ext.runs.run import Run
from solo_ext.schema import plain
from solo_ext.text import line_width
from solo_ext.training.config import PretrainConfig, RunConfig, TrainingConfig
from solo_ext.training.trainer_config import TrainerConfig

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import ClusterEnvironment

# what a run that is continued cannot change: its network, and the parts of its optimizer's state
NETWORK = ("method", "backbone.name", "data.channels", "encoder")
OPTIMIZER = ("optimizer.name", "optimizer.exclude_bias_n_norm_wd", "optimizer.layer_decay")
_CHOICE = "SOLO_EXT_START"  # how the processes that Lightning starts learn what the first one chose


class Start(NamedTuple):
    run: Run
    checkpoint: Checkpoint | None = None  # that it continues


def runs_folder(cfg: RunConfig) -> Path:
    return Path(cfg.checkpoint.dir).expanduser()


def is_first() -> bool:
    """Whether this is the first process of a run, or the only one."""
    ranks = (os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ)
    return next(ranks, "0") == "0" and ("RANK" in os.environ or os.environ.get("NODE_RANK", "0") == "0")


def begin(cfg: TrainingConfig, base: Path) -> Start | None:
    """Chooses the folder below `base` for the run of the resolved `cfg`, and prints it; None on the other processes.
    CheckpointError if the checkpoint to resume is damaged or another network's, ConfigError for missing hardware."""
    cfg.check_hardware()
    begin_node(cfg.processes)
    if cfg.processes > 1 and not is_first():
        return None
    checkpoint = _checkpoint(cfg, base)
    unsaved = find_unsaved(cfg, base) if cfg.auto_resume.enabled and not checkpoint else None
    run, resumed = unsaved or Run.new(base), f", resuming {checkpoint.path.name}" if checkpoint else ""
    if checkpoint and checkpoint.config is not None:  # a bare file begins a new run
        old = Run(checkpoint.path.parent)
        if checkpoint.path == old.checkpoints[0]:
            run = old
        else:  # the old run stays what it is
            resumed += f" of {old.dir}, which has gone on from there"
        if (images := keep_batch(copy.deepcopy(cfg), checkpoint.config)) != cfg.optimizer.batch_size:
            resumed += f", {images} images on each device"
            if not cfg.sync_batchnorm:
                log.warning("sync_batchnorm=false: a BatchNorm sees the %d images of its device", images)
    if is_first():
        line = f"{cfg.name}: {cfg.devices_text}, {run.dir}{resumed}"
        follow = f"follow: solo-ext runs {shlex.quote(str(run.dir))} --watch 5"
        print(line, follow, sep="; " if len(line + follow) + 2 <= line_width() else "\n", flush=True)
    return Start(run, checkpoint)


def _checkpoint(cfg: TrainingConfig, base: Path) -> Checkpoint | None:
    if not cfg.resume_from_checkpoint:
        return find_resumable(cfg, base) if cfg.auto_resume.enabled else None
    checkpoint = open_checkpoint(cfg.resume_from_checkpoint)
    if checkpoint.config is None:
        return checkpoint
    with foreign_config(checkpoint.path):
        saved, now = (config | network_of(config) for config in (checkpoint.config, plain(cfg)))
    changed, known = differences(saved, now), flatten(saved)
    for change in changed:
        key, _, _ = change.partition(": ")
        argument = key.removeprefix("backbone.kwargs.")
        if key in NETWORK or (key in OPTIMIZER and key in known) or (argument != key and not is_neutral(argument)):
            raise CheckpointError(f"{checkpoint.path} was trained with another {change}")
    if changed:
        log.warning("resuming with another configuration: %s", ", ".join(changed))
    return checkpoint


def keep_batch(cfg: TrainingConfig, saved: Mapping[str, Any] | None) -> int:
    """Makes `cfg` take over the joint batch of the run that it continues, of the configuration `saved`, unless another
    batch size or accumulation asks for another one; returns the images on each of the devices that there are now.
    ConfigError if these cannot share it evenly."""
    saved, o, n = saved or {}, cfg.optimizer, cfg.processes
    before = saved.get("optimizer", {})
    asked = (before.get("batch_size"), saved.get("accumulate_grad_batches")) != (
        o.batch_size,
        cfg.accumulate_grad_batches,
    )
    if asked or not (joint := before.get("joint_batch")):
        return o.batch_size
    if joint % n:
        can = ", ".join(str(k) for k in range(1, 2 * n) if joint % k == 0)
        problem = f"{n} cannot share the {joint} images of a batch of the run evenly"
        raise ConfigError(f"devices: {problem}, as {can} can; another optimizer.batch_size gives it other batches")
    o.scale(joint, cfg.accumulate_grad_batches if isinstance(cfg, PretrainConfig) else 1)
    return joint // n


def cluster_environment(cfg: TrainerConfig) -> "ClusterEnvironment | None":
    """Who starts the processes: torchrun, SLURM's srun, or Lightning; None leaves it to Lightning to find out.
    ConfigError if the first two started another number of processes than there are devices."""
    from lightning.fabric.plugins import environments

    launcher: ClusterEnvironment
    if environments.TorchElasticEnvironment.detect():
        launcher, name = environments.TorchElasticEnvironment(), "torchrun (--nnodes, --nproc-per-node)"
    elif not environments.SLURMEnvironment.detect():
        return None
    elif "SLURM_STEP_ID" not in os.environ:  # in a job, but not under srun: nobody started the others
        return environments.LightningEnvironment()
    else:
        with naming("SLURM", RuntimeError):
            # requeueing is left to the job: Lightning's own would resume whichever run wrote last into a shared folder
            launcher, name = environments.SLURMEnvironment(auto_requeue=False), "srun (--nodes, --ntasks-per-node)"
    if (started := launcher.world_size()) != cfg.processes:
        needed = f"devices={cfg.device_count} and num_nodes={cfg.num_nodes} need {cfg.processes}"
        raise ConfigError(f"{name} started {started} processes, but {needed}: one for each device")
    return launcher


def agree(trainer: "pl.Trainer", start: Start | None) -> Start:
    """The start that the first process chose, on all; ConfigError if nobody started those of the other nodes."""
    choice: Any = start and [str(start.run.dir), str(start.checkpoint.path) if start.checkpoint else None]
    if trainer.world_size > 1:
        launcher: ClusterEnvironment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]  # of several
        if not launcher.creates_processes_externally:
            if trainer.global_rank:
                raise ConfigError(f"num_nodes={trainer.num_nodes}: torchrun or srun has to start the processes")
            # Lightning starts the others, with this environment, when the fit begins
            os.environ[_CHOICE] = json.dumps([choice, os.getpid()])
        elif trainer.global_rank and _of_lightning(launcher) and (message := os.environ.pop(_CHOICE, None)):
            choice, parent = json.loads(message)
            die_with(parent)
        else:
            trainer.strategy.setup_environment()
            choice = trainer.strategy.broadcast(choice)
    folder, path = choice
    if start and str(start.run.dir) == folder:
        return start
    return Start(Run(folder), open_checkpoint(path) if path else None)


def _of_lightning(launcher: "ClusterEnvironment") -> bool:
    """Whether Lightning started this process; others may inherit a choice that was never theirs."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    return isinstance(launcher, LightningEnvironment)


def die_with(parent: int) -> None:
    """Ends this process (on Linux) when the process `parent`, which started it, has ended, however that was."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGKILL)
