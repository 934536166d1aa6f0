"""What keeps a run safe: checkpoints, exact resume, a SIGTERM that stops all processes together, a stop at NaN."""

import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from solo_ext.data.loader import derive_seed
from solo_ext.errors import NonFiniteError
from solo_ext.optim.schedules import ClosedFormLR
from solo_ext.runs.checkpoints import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from solo_ext.runs.run import Run, place_of


class CheckpointIO(TorchCheckpointIO):
    """Writes checkpoints for Lightning, and reads them unless one is already `opened`."""

    opened: Checkpoint | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        opened, self.opened = self.opened, None
        return opened.take() if opened and opened.path == Path(path) else load_checkpoint(path)


class Checkpointer(CheckpointCallback):
    """Saves `<name>-<run id>-ep=N.ckpt` (N counts from 0) at the end of training epochs, after validation.

    Lightning calls a `Checkpoint` last, when optimizer, schedulers and teacher have made their last step of the epoch.
    On SIGTERM it saves `...-ep=N-step=S.ckpt` after the current step, unless gradients are being accumulated, which no
    checkpoint holds. Without `keep_prev`, each is removed once the next one is complete.
    """

    def __init__(self, run: Run, name: str, cfg: CheckpointConfig):
        self.run, self.name, self.cfg = run, name, cfg
        self.last_step = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for left_over in self.run.dir.glob(".*.tmp"):  # of a run that was killed while it wrote
                left_over.unlink()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop
        if epoch % self.cfg.frequency == 0 or last or 0 <= trainer.max_steps <= trainer.global_step:
            self._save(trainer, module, epoch)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException) or trainer.global_step == self.last_step:
            return
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if epochs.processed == epochs.ready:
            self._save(trainer, module, epochs.processed - 1)
        elif (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save(trainer, module, epochs.processed, trainer.fit_loop.batch_idx + 1)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, batch: int | None = None) -> None:
        check_finite(module, trainer.global_step)
        path = self.run.checkpoint_path(self.name, epoch, batch)
        trainer.save_checkpoint(path, weights_only=False)
        self.last_step = trainer.global_step
        if trainer.is_global_zero:
            for older in self.run.checkpoints:
                epoch, step = place_of(older)
                # one from the middle of an epoch is for resuming only, and does not stay
                if older != path and epoch >= 0 and (not self.cfg.keep_prev or step < math.inf):
                    older.unlink()
            self.run.records = self.run.records


@torch.no_grad()
def check_finite(module: nn.Module, step: int) -> None:
    """Raises NonFiniteError if a weight or running statistic is NaN or infinite; one device sync."""
    named = list(module.named_parameters()) + [b for b in module.named_buffers() if "running_" in b[0]]
    finite = torch.stack([x.isfinite().all() for _, x in named]).tolist() if named else []
    if not all(finite):
        raise NonFiniteError(
            f"after {step} steps {finite.count(False)} of {len(finite)} tensors of the network are not finite (first: "
            f"{named[finite.index(False)][0]}), so it is not saved; a lower learning rate or precision 32 may help"
        )


class StopOnNonFinite(pl.Callback):
    """Ends the run at the next logging step, or epoch end, after a loss that is not finite; the device keeps count."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first = torch.full((), math.inf, device=module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        loss = out["loss"] if isinstance(out, dict) else out
        step = max(trainer.global_step - 1, 0)
        self.first = torch.where(loss.detach().isfinite(), self.first, self.first.clamp(max=step))
        if trainer.global_step % trainer.log_every_n_steps == 0 or trainer.is_last_batch:  # type: ignore[attr-defined]  # set by Lightning
            first = trainer.strategy.reduce(self.first, reduce_op="min")
            if math.isfinite(first):
                raise NonFiniteError(
                    f"the loss became NaN or infinite at step {int(first)} (epoch {trainer.current_epoch}); the "
                    "checkpoints are finite, and a lower learning rate, a longer warm-up or precision 32 may help"
                )


class StopTogether(pl.Callback):
    """After a SIGTERM to any process of a run, all stop after the same step, where the checkpointer can save.

    Lightning alone broadcasts from its signal handler, while the processes may be exchanging something else, and hangs;
    and before each step it waits for the device to ask rank 0. Here each step starts an all-reduce of the signal, whose
    result is read one step later, when the device has it already.
    """

    def __init__(self) -> None:
        self.signalled = self.stopping = False
        self.answer = torch.zeros(1)  # on the CPU
        self.arrived: torch.cuda.Event | None = None  # after which it is there

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            trainer._signal_connector._sigterm_notifier_fn = self._receive  # type: ignore[method-assign]  # in its place
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _receive(self, signum: int, _: Any) -> None:
        self.signalled = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        if trainer.world_size == 1:
            return
        if self.arrived:
            self.arrived.synchronize()
        self.stopping |= bool(self.answer)
        signalled = torch.full((1,), float(self.signalled), device=module.device)
        dist.all_reduce(signalled, dist.ReduceOp.MAX)
        self.answer = signalled.to("cpu", non_blocking=True)
        if signalled.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        # not where validation follows, whose batches may differ in number; nor between accumulated batches
        if self.stopping and not trainer.is_last_batch and (i + 1) % trainer.accumulate_grad_batches == 0:
            trainer._signal_connector.received_sigterm = True


class ExactResume(pl.Callback):
    """Continues a resumed run exactly as if it had not been interrupted; it stores nothing.

    The random state of a step becomes a pure function of (seed, epoch, batch, rank). What the data draws is such a
    function already; with this, so is what the network draws (dropout, drop path, mixing). And the loader gets its
    place in the epoch back: Lightning saves it, but does not restore it if the number of steps was read before the fit,
    as every schedule does. Where the configuration has changed, optimizer and schedule follow the new one.
    """

    def __init__(self, seed: int):
        self.seed, self.place, self.resumed = seed, None, False

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        [self.place] = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader") or [None]
        self.resumed = True

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.place:
            trainer.train_dataloader.load_state_dict(self.place)
        if self.resumed and all(isinstance(config.scheduler, ClosedFormLR) for config in trainer.lr_scheduler_configs):
            # the state of an optimizer brings its old options with it, and a schedule that is new has no state
            for old, new in zip(trainer.optimizers, _init_optimizers_and_lr_schedulers(module)[0], strict=True):
                for group, fresh in zip(old.param_groups, new.param_groups, strict=True):
                    group |= {key: value for key, value in fresh.items() if key != "params"}
            for config in trainer.lr_scheduler_configs:
                place = trainer.global_step if config.interval == "step" else trainer.current_epoch
                config.scheduler.load_state_dict({"last_epoch": place})

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, i: int) -> None:
        value = derive_seed(self.seed, trainer.current_epoch, i, trainer.global_rank)
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)
