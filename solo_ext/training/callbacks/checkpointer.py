"""Checkpoints of a run: when they are saved, and how."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from solo_ext.errors import NonFiniteError
from solo_ext.runs.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from solo_ext.runs.run import Run, place_of


class CheckpointIO(TorchCheckpointIO):
    """How Lightning writes checkpoints, and reads them unless one is `opened` already."""

    opened: Checkpoint | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        opened, self.opened = self.opened, None
        return opened.take() if opened and opened.path == Path(path) else load_checkpoint(path)


class Checkpointer(CheckpointCallback):
    """Saves `<name>-<run id>-ep=N.ckpt` (N counts from 0) at the end of training epochs, after validation.

    Lightning calls a `Checkpoint` after all other callbacks and the module: optimizer, schedulers and teacher have made
    their last step of the epoch, and the saved loops resume at the next one. On SIGTERM it saves
    `...-ep=N-step=S.ckpt` after the step of that moment, unless it is one of several accumulated batches, whose
    gradients no checkpoint holds.

    Args:
        name: the configuration's `name`.
        frequency: saves when N is a multiple of it, and after the last epoch.
        keep_prev: whether the older checkpoints stay; if not, each is removed once the next one is complete.

    Raises:
        CheckpointError: a checkpoint cannot be written.
        NonFiniteError: a weight is not finite; the checkpoints saved so far are.
    """

    def __init__(self, run: Run, name: str, frequency: int = 1, keep_prev: bool = False):
        self.run, self.name, self.frequency, self.keep_prev = run, name, frequency, keep_prev
        self.last_step = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for left_over in self.run.dir.glob(".*.tmp"):  # of a run that was killed while it wrote
                left_over.unlink()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop
        if epoch % self.frequency == 0 or last or 0 <= trainer.max_steps <= trainer.global_step:
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
                if older != path and epoch >= 0 and (not self.keep_prev or step < math.inf):
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
            f"{named[finite.index(False)][0]}); no checkpoint of it is saved, and a lower learning rate or precision "
            "32 may help"
        )
