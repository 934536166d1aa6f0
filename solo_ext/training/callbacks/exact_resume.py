"""A random state that needs no restoring, and the loader's place in the epoch."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from solo_ext.data.loader import derive_seed


class ExactResume(pl.Callback):
    """Continues a resumed run exactly as if it had not been interrupted; it stores nothing.

    The random state of a step becomes a pure function of (seed, epoch, batch, rank). What the data draws is such
    a function already; with this, so is what the network draws (dropout, drop path, mixing). And the loader gets
    its place in the epoch back: Lightning saves it, but restores it only if nobody asked for the number of steps
    before the fit, as every schedule does.
    """

    def __init__(self, seed: int):
        self.seed, self.place = seed, None

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        [self.place] = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader") or [None]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.place:
            trainer.train_dataloader.load_state_dict(self.place)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, i: int) -> None:
        value = derive_seed(self.seed, trainer.current_epoch, i, trainer.global_rank)
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)
