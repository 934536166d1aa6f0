"""Checkpoints of a run: when they are saved, and how."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from solo_ext.errors import NonFiniteError
from solo_ext.files import write_json
from solo_ext.runs.checkpoints import RECORDS, load_checkpoint, records, save_checkpoint


class CheckpointIO(TorchCheckpointIO):
    """Lightning's way to the functions of this file."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        return load_checkpoint(path)


class Checkpointer(Checkpoint):
    """Saves `<name>-<run id>-ep=N.ckpt` (N counts from 0) at the end of training epochs, after validation.

    It is a `Checkpoint`, for Lightning calls these after all other callbacks and the module: optimizer, schedulers and
    teacher have made their last step of the epoch, and the saved loops resume at the next one. On SIGTERM it saves
    `...-ep=N-step=S.ckpt` after the step of that moment, unless it is one of several accumulated batches, whose
    gradients no checkpoint holds.

    Args:
        folder: the run's folder; its name is the run id.
        name: the configuration's `name`.
        frequency: saves when N is a multiple of it, and after the last epoch.
        keep_prev: whether the older checkpoints stay; if not, each is removed once the next one is complete.

    Raises:
        CheckpointError: a checkpoint cannot be written.
        NonFiniteError: a weight is not finite; the checkpoints saved so far are.
    """

    def __init__(self, folder: Path, name: str, frequency: int = 1, keep_prev: bool = False):
        self.folder, self.name, self.frequency, self.keep_prev = Path(folder), name, frequency, keep_prev
        self.last_step = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for left_over in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                left_over.unlink()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop
        if epoch % self.frequency == 0 or last or 0 <= trainer.max_steps <= trainer.global_step:
            self._save(trainer, module, f"ep={epoch}")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException) or trainer.global_step == self.last_step:
            return
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.processed == epochs.ready:
            self._save(trainer, module, f"ep={epochs.processed - 1}")
        elif (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save(trainer, module, f"ep={epochs.processed}-step={trainer.fit_loop.batch_idx + 1}")

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, place: str) -> None:
        check_finite(module, trainer.global_step)
        path = self.folder / f"{self.name}-{self.folder.name}-{place}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self.last_step = trainer.global_step
        if trainer.is_global_zero:
            for older in self.folder.glob("*-ep=*.ckpt"):
                # one from the middle of an epoch is for resuming only, and does not stay
                if older != path and (not self.keep_prev or "-step=" in older.name):
                    older.unlink()
            write_json(self.folder / RECORDS, records(self.folder))


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
