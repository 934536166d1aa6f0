"""How fast: images per second, and the learning rate, as metrics."""

import time
from typing import Any

import torch

from solo_ext.losses.distributed import mean_over_ranks
from solo_ext.text import Metric
from solo_ext.training.callbacks import LightningModule, MonitorCallback, Trainer, is_logging_step


class Throughput(MonitorCallback):
    """Logs `images_per_s` of each epoch, `lr` of the backbone at the logging steps, and what the module `measured`.
    Images are samples of all ranks, whatever the number of views. Validation does not count, nor do the first steps of
    an epoch (five, but at most a fifth), in which loader workers start. The device is synchronised twice an epoch."""

    metrics = (
        Metric("lr", "Learning rate of the backbone", section="schedules"),
        Metric("lr-*", "Learning rate, *", section="schedules"),  # as Lightning's LearningRateMonitor names it
        Metric("images_per_s", "Training throughput (images/s)", "images/s", "{:,.0f}", "schedules", progress=True),
    )

    def __init__(self) -> None:
        self.epochs: list[float] = []  # images per second
        self.since: float | None = None
        self.latest: dict[str, float] = {}  # what the module measured, the mean over ranks

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        if hasattr(module, "measured"):
            module.measures = True

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.skip = int(min(trainer.num_training_batches, 25)) // 5
        self.images, self.seconds, self.since, self.step = 0, 0.0, None, 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, i: int) -> None:
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # before the scheduler moves it
        if self.since is None and self.step >= self.skip:
            self.since = now(module.device)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, i: int) -> None:
        self.step += 1
        if self.since is not None:
            self.images += len(batch[0]) * trainer.world_size
        if is_logging_step(trainer) and not trainer.fit_loop._should_accumulate():
            for logger in trainer.loggers:
                place = {"epoch": trainer.current_epoch}
                logger.log_metrics({"lr": float(self.lr), **place}, step=max(trainer.global_step - 1, 0))
            self.flush(trainer, module)

    def flush(self, trainer: Any, module: Any) -> None:
        measured: dict[int, dict[str, Any]] = getattr(module, "measured", {})
        for step, values in measured.items():
            means = mean_over_ranks(torch.stack(list(values.values()))).tolist()
            self.latest |= zip(values, means, strict=True)
            for logger in trainer.loggers:
                now_read = {f"{name}_step": x for name, x in self.latest.items() if name in values}
                logger.log_metrics({**now_read, "epoch": trainer.current_epoch}, step=step)
        measured.clear()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._pause(module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._pause(module)
        if self.seconds:
            self.epochs.append(self.images / self.seconds)
            module.log("images_per_s", self.epochs[-1])

    def _pause(self, module: LightningModule) -> None:
        if self.since is not None:
            self.seconds += now(module.device) - self.since
            self.since = None


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done what was queued on it."""
    getattr(torch, device.type).synchronize()
    return time.perf_counter()
