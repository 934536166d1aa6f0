"""How fast, how far: images per second as a metric, and one line that says where the run stands."""

import statistics
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TaskProgressColumn

SHOWN = {  # metric -> (label, format), as far as it is logged
    "train_loss": ("loss", "{:.4f}"),
    "val_acc1": ("val acc", "{:.1f}"),
    "val_knn1": ("kNN-1", "{:.1f}"),
    "val_knn20": ("kNN-20", "{:.1f}"),
    "gap_sim": ("gap sim", "{:.3f}"),
    "images_per_s": ("img/s", "{:.0f}"),
}


class Throughput(pl.Callback):
    """Logs `images_per_s` for each epoch, and `lr` (of the backbone, as the step used it) at the logging steps.

    Images are samples of all ranks, whatever the number of views. The first steps of an epoch, in which loader workers
    start and kernels are chosen, and validation do not count. The device is waited for twice an epoch, not each step.

    Args:
        warm_up: steps of an epoch that do not count; at most a fifth of it.
    """

    def __init__(self, warm_up: int = 5):
        self.warm_up = warm_up
        self.epochs: list[float] = []

    @property
    def median(self) -> float | None:
        """Images per second, the median over this process' epochs."""
        return statistics.median(self.epochs) if self.epochs else None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # which Lightning leaves out on a resume inside an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        batches = trainer.num_training_batches
        self.skip = self.warm_up if batches == float("inf") else min(self.warm_up, int(batches) // 5)
        self.images, self.seconds, self.since, self.step = 0, 0.0, None, 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, i: int) -> None:
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # before the scheduler moves it
        if self.since is None and self.step >= self.skip:
            self.since = _now(module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        self.step += 1
        if self.since is not None:
            self.images += len(batch[0]) * trainer.world_size
        if trainer.is_last_batch:
            self._pause(module)
        if trainer.is_last_batch or trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"lr": float(self.lr)}, step=max(trainer.global_step - 1, 0))

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._pause(module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._pause(module)
        if self.seconds:
            self.epochs.append(self.images / self.seconds)
            module.log("images_per_s", self.epochs[-1])

    def _pause(self, module: pl.LightningModule) -> None:
        if self.since is not None:
            self.seconds += _now(module.device) - self.since
            self.since = None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class RunProgress(ProgressBar):
    """One bar for the whole run; one line per epoch where the output is not a terminal.

    Lightning's own bars start again with each epoch, and know no end of the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.text = True, ""
        self.bar: Progress | None = None

    def disable(self) -> None:
        self.enabled = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began, self.steps = time.monotonic(), 0
        self.before = trainer.fit_loop.total_batch_idx + 1
        epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
        self.total = epochs * int(batches) if epochs > 0 and batches != float("inf") else None
        if self.enabled and sys.stdout.isatty():
            self.bar = Progress("{task.description}", BarColumn(), TaskProgressColumn(), "{task.fields[text]}")
            self.task = self.bar.add_task("", total=self.total, text="")
            self.bar.start()
        self.on_train_epoch_start(trainer, module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.epoch_began = time.monotonic()
        self._show(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._show(trainer, ", validating")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        self.steps += 1
        # the loss is on the device: reading it waits for the step, so only when it is logged (and waited for) anyway
        if self.bar and trainer.global_step % trainer.log_every_n_steps == 0:
            self.text = _metrics(trainer)
        self._show(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.text = _metrics(trainer)
        self._show(trainer)
        if self.enabled and not self.bar:
            seconds = f"{time.monotonic() - self.epoch_began:.1f} s"
            print(f"{_epoch(trainer)}  {self.text}  {seconds}  ETA {self._eta()}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def _show(self, trainer: pl.Trainer, doing: str = "") -> None:
        if self.bar:
            text, done = f"{self.text}  ETA {self._eta()}", self.before + self.steps
            self.bar.update(self.task, completed=done, description=f"{_epoch(trainer)}{doing}", text=text)

    def _eta(self) -> str:
        if not self.total or not self.steps:
            return "?"
        left = max(self.total - self.before - self.steps, 0)
        seconds = round((time.monotonic() - self.began) / self.steps * left)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _epoch(trainer: pl.Trainer) -> str:
    last = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else "?"
    return f"epoch {trainer.current_epoch + 1:>{len(str(last))}}/{last}"


def _metrics(trainer: pl.Trainer) -> str:
    values = trainer.callback_metrics
    return "  ".join(f"{label} {form.format(float(values[k]))}" for k, (label, form) in SHOWN.items() if k in values)
