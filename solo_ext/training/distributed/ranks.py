"""The processes of one run: which is the first, who starts them, what all have to know, and when they end.

Lightning is imported only where it is needed: the first process says at once what it is going to do.
"""

import contextlib
import ctypes
import json
import os
import signal
from typing import TYPE_CHECKING, Any

from solo_ext.errors import ConfigError
from solo_ext.training.hardware import device_count, processes
from solo_ext.training.trainer_config import TrainerConfig

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import ClusterEnvironment

_CHOICE = "SOLO_EXT_START"  # how the processes that Lightning starts learn what the first one chose


def is_first() -> bool:
    """Whether this is the first process of a run, or the only one."""
    ranks = (os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ)
    return next(ranks, "0") == "0" and ("RANK" in os.environ or os.environ.get("NODE_RANK", "0") == "0")


def cluster_environment(cfg: TrainerConfig) -> "ClusterEnvironment | None":
    """Who starts the processes: torchrun, SLURM's srun, or Lightning; None leaves it to Lightning to find out.

    Raises:
        ConfigError: torchrun or srun started another number of processes than there are devices.
    """
    from lightning.fabric.plugins import environments

    launcher: ClusterEnvironment
    if environments.TorchElasticEnvironment.detect():
        launcher, who = environments.TorchElasticEnvironment(), "torchrun (--nnodes, --nproc-per-node)"
    elif not environments.SLURMEnvironment.detect():
        return None
    elif "SLURM_STEP_ID" not in os.environ:  # in a job, but not under srun: nobody started the others
        return environments.LightningEnvironment()
    else:
        try:
            # requeueing is left to the job: Lightning's own would resume whichever run wrote last into a shared folder
            launcher, who = environments.SLURMEnvironment(auto_requeue=False), "srun (--nodes, --ntasks-per-node)"
        except RuntimeError as error:
            raise ConfigError(f"SLURM: {error}") from error
    if launcher.world_size() != processes(cfg):
        raise ConfigError(
            f"{who} started {launcher.world_size()} processes, but devices={device_count(cfg)} and "
            f"num_nodes={cfg.num_nodes} need {processes(cfg)}: one for each device"
        )
    return launcher


def agree(trainer: "pl.Trainer", choice: Any) -> Any:
    """What the first process chose, on all of them; a value that JSON holds.

    Raises:
        ConfigError: nobody started the processes of the other nodes.
    """
    if trainer.world_size == 1:
        return choice
    launcher: ClusterEnvironment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]  # not of one process
    if not launcher.creates_processes_externally:
        if trainer.global_rank:
            raise ConfigError(f"num_nodes={trainer.num_nodes}: torchrun or srun has to start the processes")
        # Lightning starts the others, with this environment, when the fit begins
        os.environ[_CHOICE] = json.dumps([choice, os.getpid()])
        return choice
    if trainer.global_rank and (message := os.environ.pop(_CHOICE, None)):
        choice, parent = json.loads(message)
        die_with(parent)
        return choice
    trainer.strategy.setup_environment()
    return trainer.strategy.broadcast(choice)


def die_with(parent: int) -> None:
    """Ends this process (on Linux) when the process `parent`, which started it, has ended, however that was."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGKILL)
