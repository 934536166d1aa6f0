"""How far: one line that says where the run stands."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from solo_ext.training.metrics import metric_of, metrics


class RunProgress(ProgressBar):
    """One bar for the whole run; one line per epoch where the output is not a terminal."""

    def __init__(self):
        super().__init__()
        self.enabled, self.bar, self.task, self.text = True, None, None, ""

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.started, self.steps, self.shown = time.monotonic(), 0, 0.0
        self.before = trainer.fit_loop.total_batch_idx + 1
        epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
        self.total = epochs * batches if epochs > 0 and batches != float("inf") else None
        if self.enabled and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns)
            self.task = self.bar.add_task("", total=self.total, completed=self.before, text="")
            self.bar.start()
        self.on_train_epoch_start(trainer, module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.epoch_started = time.monotonic()
        self._describe(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._describe(trainer, ", validating")

    def _describe(self, trainer: pl.Trainer, doing: str = "") -> None:
        if self.bar:
            self.bar.update(self.task, description=f"{self._epoch(trainer)}{doing}")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        self.steps += 1
        if not self.bar:
            return
        self.bar.update(self.task, advance=1)
        # the loss is on the device: reading it waits for the step, so only when it is logged (and waited for) anyway
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set by Lightning
            self.text = self._metrics(trainer)
        if time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            self.bar.update(self.task, text=f"{self.text}  ETA {self._eta(trainer)}")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.text = self._metrics(trainer)
        self._describe(trainer)
        if self.bar:
            self.bar.update(self.task, text=f"{self.text}  ETA {self._eta(trainer)}")
        elif self.enabled:
            seconds = f"{time.monotonic() - self.epoch_started:.1f} s"
            self.print(f"{self._epoch(trainer)}  {self.text}  {seconds}  ETA {self._eta(trainer)}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    @staticmethod
    def _epoch(trainer: pl.Trainer) -> str:
        last = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else "?"
        return f"epoch {trainer.current_epoch + 1:>{len(str(last))}}/{last}"

    @staticmethod
    def _metrics(trainer: pl.Trainer) -> str:
        values = trainer.callback_metrics
        found = {name: metric_of(name) for name in values}
        shown = [
            name for known in metrics() for name, metric in found.items() if metric.name == known and metric.progress
        ]
        return "  ".join(f"{found[name].label} {found[name].form.format(float(values[name]))}" for name in shown)

    def _eta(self, trainer: pl.Trainer) -> str:
        if not self.total or not self.steps:
            return "?"
        left = self.total - self.before - self.steps
        seconds = round((time.monotonic() - self.started) / self.steps * max(left, 0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
