"""A SIGTERM to one process of a run, heard by all of them."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist


class StopTogether(pl.Callback):
    """After a SIGTERM to any process of a run, all stop after the same step, where the checkpointer can save.

    Lightning alone broadcasts from its signal handler, while the processes may be exchanging something else, and hangs;
    and before each step it waits for the device to ask rank 0. Here every step sends the question along, and the answer
    is read one step later, when the device has it already.
    """

    def __init__(self) -> None:
        self.told = self.stopping = False
        self.answer = torch.zeros(1)  # on the CPU
        self.arrived: torch.cuda.Event | None = None  # after which it is there

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            trainer._signal_connector._sigterm_notifier_fn = self._tell  # type: ignore[method-assign]  # in its place
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _tell(self, signum: int, _: Any) -> None:
        self.told = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        if trainer.world_size == 1:
            return
        if self.arrived:
            self.arrived.synchronize()
        self.stopping |= bool(self.answer)
        told = torch.full((1,), float(self.told), device=module.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        self.answer = told.to("cpu", non_blocking=True)
        if told.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        # not where validation follows, whose batches may differ in number; nor between accumulated batches
        if self.stopping and not trainer.is_last_batch and (i + 1) % trainer.accumulate_grad_batches == 0:
            trainer._signal_connector.received_sigterm = True
