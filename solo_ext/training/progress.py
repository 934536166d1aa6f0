"""How far: one line that says where the run stands."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TaskProgressColumn

from solo_ext.training.metrics import metric_of, metrics


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
        if self.bar and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning's
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
    """The metrics that are declared as worth a place on the line, in the order in which they are declared."""
    values = trainer.callback_metrics
    declared = [metric.name for metric in metrics().values() if metric.progress]
    logged = [(metric, name) for name in values if (metric := metric_of(name)).name in declared]
    logged.sort(key=lambda pair: declared.index(pair[0].name))
    return "  ".join(f"{metric.label} {metric.form.format(float(values[name]))}" for metric, name in logged)
