"""Going on exactly where a checkpoint was saved."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loggers import WandbLogger

from solo_ext.data.loader import derive_seed
from solo_ext.files import log
from solo_ext.optim.schedules import ClosedFormLR
from solo_ext.training.loggers import CSVMetrics


def place_in(loops: dict[str, Any]) -> tuple[int, int | None, bool]:
    """Where a checkpoint's `loops` stand: the whole epochs done; inside an epoch, the batches done of it, else None;
    whether what follows the last batch is still to come: validation if it is due, and the epoch's end."""
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    if epochs["started"] <= epochs["processed"]:
        return epochs["processed"], None, False
    return epochs["processed"], batches["processed"], batches["completed"] < batches["processed"]


class ExactResume(pl.Callback):
    """Continues a resumed run exactly as if it had not been interrupted. The random state of a step becomes a pure
    function of (seed, epoch, batch, rank), as what the data draws is already.

    Lightning restarts its loops by guessing where a checkpoint was saved, and so loses a validation here, an epoch's
    hooks or steps there, and the sums behind an epoch's means everywhere. Here the loops start at the `place_in` the
    checkpoint, which has the sums, too. Optimizer and schedule follow a configuration that has changed.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.loops: dict[str, Any] = {}  # of the checkpoint
        self.sums: dict[str, list] = {}  # what was logged in the epoch -> its weighted sum, the weight, whether forked

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["processes"] = trainer.world_size
        checkpoint["wandb_step"] = max([0, *(x.experiment.step for x in trainer.loggers if isinstance(x, WandbLogger))])
        if trainer.validating:  # it is not over, and will be made again
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] -= 1
        if place_in(checkpoint["loops"]["fit_loop"])[1] is not None:
            [table] = [logger for logger in trainer.loggers if isinstance(logger, CSVMetrics)]
            checkpoint["row"] = table.row(trainer.global_step - 1)  # as it is before the epoch's means
            sums = checkpoint["epoch_sums"] = dict(self.sums)
            for key, item in trainer.fit_loop.epoch_loop._results.items():
                if item.is_tensor and item.meta.is_mean_reduction and item.meta.on_epoch and not item.has_reset:
                    both = (item.meta.sync(x.clone()).cpu() for x in (item.value, item.cumulated_batch_size))
                    sums[key] = [*both, item.meta.on_step]

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loops, sums = checkpoint.pop("loops")["fit_loop"], checkpoint.get("epoch_sums", {})
        ratio = checkpoint.get("processes", trainer.world_size) / trainer.world_size  # the sums are the mean process's
        self.sums = {key: [total * ratio, weight * ratio, forked] for key, (total, weight, forked) in sums.items()}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.loops:
            return
        self._restore_place(trainer)
        if all(isinstance(config.scheduler, ClosedFormLR) for config in trainer.lr_scheduler_configs):
            # the state of an optimizer brings its old options with it, and a schedule that is new has no state
            for old, new in zip(trainer.optimizers, _init_optimizers_and_lr_schedulers(module)[0], strict=True):
                for group, fresh in zip(old.param_groups, new.param_groups, strict=True):
                    group |= {key: value for key, value in fresh.items() if key != "params"}
            for config in trainer.lr_scheduler_configs:
                place = trainer.global_step if config.interval == "step" else trainer.current_epoch
                config.scheduler.load_state_dict({"last_epoch": place})

    def _restore_place(self, trainer: pl.Trainer) -> None:
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        _, batch, unended = place_in(self.loops)
        [place] = self.loops["state_dict"].get("combined_loader") or [None]
        fit.load_state_dict(self.loops)
        for each in (fit, loop, loop.val_loop, loop.automatic_optimization, loop.manual_optimization):
            each.on_iteration_done()  # it is not restarting
        _complete(fit.epoch_progress)
        if batch is None:
            return
        data: Any = trainer.train_dataloader
        if place:
            data.load_state_dict(place)
        elif batch:
            log.warning("the data cannot go on inside an epoch: its first batches come again")
        batches, reset, limit = loop.batch_progress.state_dict(), loop.reset, loop.max_steps
        advance: Any = loop.advance

        def reset_once() -> None:
            loop.reset = reset  # type: ignore[method-assign]
            reset()
            loop.batch_progress.load_state_dict(batches)
            loop.batch_progress.is_last_batch = batch >= trainer.num_training_batches
            _complete(loop.batch_progress)
            loop._restarting = unended  # or it would be over without another batch

        def advance_once(fetcher: Any) -> None:
            """The batch is done: Lightning goes on with what follows it, also after the last step of all."""
            loop.advance, loop.max_steps = advance, limit  # type: ignore[method-assign]

        loop.reset = reset_once  # type: ignore[method-assign]
        if unended:
            loop.advance, loop.max_steps = advance_once, -1  # type: ignore[method-assign,assignment]

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, i: int) -> None:
        value = derive_seed(self.seed, trainer.current_epoch, i, trainer.global_rank)
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        results = trainer.fit_loop.epoch_loop._results
        for key in [*filter(results.__contains__, self.sums)]:
            total, weight, _ = self.sums.pop(key)
            results[key].value += total.to(module.device)
            # a float, also where processes share a weight unevenly
            results[key].cumulated_batch_size = results[key].cumulated_batch_size + weight.to(module.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for key, (total, weight, forked) in self.sums.items():  # of what was not logged again
            name, mean = key.partition(".")[2], total / weight
            module.log(name, mean, logger=not forked)
            if forked:
                module.log(f"{name}_epoch", mean)
        self.sums = {}


def _complete(progress: Any) -> None:
    """What was processed is complete, and nothing else has begun."""
    for count in (progress.total, progress.current):
        count.ready = count.started = count.completed = count.processed
