"""How far: one line that says where the run stands."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from rich.progress import BarColumn, Progress, TaskProgressColumn

from solo_ext.training.metrics import metric_of, metrics


class RunProgress(pl.Callback):
    """One bar for the whole run; one line per epoch where the output is not a terminal.

    Lightning's own bars start again with each epoch and do not know where the run ends.
    """

    bar = Progress(disable=True)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
        total = epochs * int(batches) if epochs > 0 and batches != float("inf") else None
        self.before = trainer.fit_loop.total_batch_idx + 1
        columns = ("{task.description}", BarColumn(), TaskProgressColumn(), "{task.fields[text]}")
        self.bar = Progress(*columns, disable=not (trainer.is_global_zero and sys.stdout.isatty()))
        self.bar.add_task("", total=total, completed=self.before, text="")
        self.text = ""
        self.bar.start()
        self.on_train_epoch_start(trainer, module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.epoch_began = time.monotonic()
        self._update(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._update(trainer, ", validating")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        # the loss is on the device: reading it waits for the step, so only when it is logged (and waited for) anyway
        if not self.bar.disable and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning's
            self.text = _metrics(trainer)
        self._update(trainer, advance=1)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.text = _metrics(trainer)
        self._update(trainer)
        if trainer.is_global_zero and self.bar.disable:
            seconds = f"{time.monotonic() - self.epoch_began:.1f} s"
            print(f"{_epoch(trainer)}  {self.text}  {seconds}  ETA {self._eta()}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.bar.stop()

    def _update(self, trainer: pl.Trainer, doing: str = "", advance: int = 0) -> None:
        if self.bar.tasks:  # none in the sanity check, before the training
            text = f"{self.text}  ETA {self._eta()}"
            self.bar.update(self.bar.tasks[0].id, advance=advance, description=_epoch(trainer) + doing, text=text)

    def _eta(self) -> str:
        [task] = self.bar.tasks
        steps = task.completed - self.before
        if not task.total or not task.elapsed or not steps:
            return "?"
        seconds = round(task.elapsed / steps * max(task.total - task.completed, 0))
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
