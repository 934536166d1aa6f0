"""The processes of one run: they stop together, and none outlives the one that started it."""

import contextlib
import ctypes
import os
import signal
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from solo_ext.errors import ConfigError


def cluster_environment(devices: int, nodes: int) -> ClusterEnvironment | None:
    """Who starts the processes: torchrun, SLURM's srun, or Lightning; None leaves it to Lightning to find out.

    devices: of each node.

    Raises:
        ConfigError: torchrun or srun started another number of processes than there are devices.
    """
    if TorchElasticEnvironment.detect():
        found, who = TorchElasticEnvironment(), "torchrun (--nnodes, --nproc-per-node)"
    elif not SLURMEnvironment.detect():
        return None
    elif "SLURM_STEP_ID" not in os.environ:  # in a job, but not under srun: nobody started the others
        return LightningEnvironment()
    else:
        try:
            # requeueing is left to the job: Lightning's own would resume whichever run wrote last into a shared folder
            found, who = SLURMEnvironment(auto_requeue=False), "srun (--nodes, --ntasks-per-node)"
        except RuntimeError as error:
            raise ConfigError(f"SLURM: {error}") from error
    if found.world_size() != devices * nodes:
        raise ConfigError(
            f"{who} started {found.world_size()} processes, but devices={devices} and num_nodes={nodes} need "
            f"{devices * nodes}: one for each device"
        )
    return found


def die_with(parent: int) -> None:
    """Ends this process (on Linux) when the process `parent`, which started it, has ended, however that was."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGKILL)


class StopTogether(pl.Callback):
    """After a SIGTERM to any process of a run, all stop after the same step, where the checkpointer can save.

    Lightning alone broadcasts from its signal handler, in between whatever the processes are exchanging, and hangs;
    and before each step it waits for the device to ask rank 0. Here every step sends the question along, and the answer
    is read one step later, when the device has it already.
    """

    def __init__(self):
        self.asked = self.stopping = False
        self.answer, self.arrived = torch.zeros(1), None  # on the CPU; the event after which it is there

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            trainer._signal_connector._sigterm_notifier_fn = self._ask
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _ask(self, signum: int, frame: Any) -> None:
        self.asked = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        if trainer.world_size == 1:
            return
        if self.arrived:
            self.arrived.synchronize()
        self.stopping |= bool(self.answer)
        asked = torch.full((1,), float(self.asked), device=module.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.answer = asked.to("cpu", non_blocking=True)
        if asked.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        # not where validation follows, whose batches may differ in number; nor between accumulated batches
        if self.stopping and not trainer.is_last_batch and (i + 1) % trainer.accumulate_grad_batches == 0:
            trainer._signal_connector.received_sigterm = True
