"""The end of a run whose loss is not finite."""

import math
from typing import Any

import lightning.pytorch as pl
import torch

from solo_ext.errors import NonFiniteError


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
                    f"the loss is not finite since step {int(first)} (epoch {trainer.current_epoch}); the checkpoints "
                    "saved before are, and a lower learning rate, a longer warm-up or precision 32 may help"
                )
