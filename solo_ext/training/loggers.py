"""Where metrics go: to `metrics.csv`, to wandb and TensorBoard if the YAML says so, and to a line on the terminal."""

import contextlib
import heapq
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.columns import Columns
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn

from solo_ext.errors import reason
from solo_ext.files import log, sync
from solo_ext.runs.checkpoints import Checkpoint
from solo_ext.runs.metrics import read_table, write_table
from solo_ext.runs.run import METRICS
from solo_ext.schema import plain
from solo_ext.training.callbacks.throughput import Throughput
from solo_ext.training.config import TrainingConfig
from solo_ext.training.metrics import metric_of, metrics
from solo_ext.training.start import is_first
from solo_ext.training.trainer_config import WandbConfig


class CSVMetrics(Logger):
    """One row per optimizer step in the `folder`'s `metrics.csv`, with a column for every metric ever logged. Rows are
    appended, the newest once the next one comes: it may get more values. `flush` comes before a checkpoint.

    A resumed run continues the file in the folder `continued`; rows from the optimizer step `resume_at` on are made
    again. `row`: the one before it, if its epoch was not over.
    """

    name = "csv"
    version = ""

    def __init__(
        self, folder: Path, resume_at: int = 0, continued: Path | None = None, row: Mapping[str, Any] | None = None
    ):
        super().__init__()
        self.path = Path(folder) / METRICS
        # the file whose rows before the step `until` are taken over when all is written `anew`
        self.source, self.until, self.anew = Path(continued or folder) / METRICS, float(resume_at - bool(row)), True
        columns = read_table(self.source)[0] if resume_at else []
        self.columns = list(dict.fromkeys([*(columns or ("epoch", "step")), *(row or ())]))
        # step -> row: those to be written, and the last that were
        self.rows: dict[int, dict[str, Any]] = {resume_at - 1: dict(row)} if row else {}
        self.last: dict[int, dict[str, Any]] = {}
        self.newest = resume_at - 1  # step in the file

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = max([*self.rows, self.newest]) + 1 if step is None else int(step)
        values = {name: float(value) for name, value in metrics.items()}
        if "epoch" in metrics:
            values["epoch"] = int(metrics["epoch"])
        old = self.last.get(step, {})
        if step in self.last and step not in self.rows and values.items() <= old.items():
            return
        new = [name for name in values if name not in self.columns]
        self.anew |= bool(new) or (step <= self.newest and step not in self.rows)
        self.columns += new
        self.rows.setdefault(step, {"step": step, **old}).update(values)

    def row(self, step: int) -> dict[str, Any]:
        """What has been logged at `step`, if that was lately."""
        return self.rows.get(step) or self.last.get(step) or {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in `args.json`."""

    @rank_zero_only
    def save(self) -> None:
        """Writes all rows but the newest; Lightning calls it after each."""
        self._write(sorted(self.rows)[:-1])

    @rank_zero_only
    def flush(self, before: float = math.inf) -> None:
        """Writes all rows, or those before a step, to the disk."""
        self._write(sorted(step for step in self.rows if step < before))
        if self.path.exists():
            sync(self.path)

    def _write(self, steps: list[int]) -> None:
        if not (steps or (self.anew and self.until > 0)):
            return
        rows = [self.rows[step] for step in steps]
        write_table(self.path, self.columns, self._with_older(rows) if self.anew else rows, append=not self.anew)
        self.last = {step: self.rows.pop(step) for step in steps} or self.last
        self.newest = max([self.newest, *steps])
        self.source, self.until, self.anew = self.path, math.inf, False

    def _with_older(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        older = (row for row in read_table(self.source)[1] if (row.get("step") or "").isdigit())
        kept = (row for row in older if int(row["step"]) < self.until)
        for _, same in groupby(heapq.merge(kept, rows, key=_step), _step):
            yield {name: value for row in same for name, value in row.items()}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.path.parent.is_dir():
            self.flush()


def _step(row: Mapping[str, Any]) -> int:
    return int(row["step"])


def _grouped(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics under the report's sections, by which wandb and TensorBoard group them: `accuracies/val_acc1`."""
    return {_below_section(name): value for name, value in metrics.items()}


@cache
def _below_section(name: str) -> str:
    if "/" in name or name == "epoch":
        return name
    return f"{metric_of(name.removesuffix('_step').removesuffix('_epoch')).section}/{name}"


class GroupedWandb(WandbLogger):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(_grouped(metrics), step)


class GroupedTensorBoard(TensorBoardLogger):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(_grouped(metrics), step)


def make_loggers(cfg: TrainingConfig, folder: Path, resume_at: int, checkpoint: Checkpoint | None) -> list[Logger]:
    """The loggers of the run in `folder`, which continues `checkpoint` at the optimizer step `resume_at`."""
    saved, continued = (checkpoint.content, checkpoint.path.parent) if checkpoint else ({}, None)
    loggers: list[Logger] = [CSVMetrics(folder, resume_at, continued, saved.get("row"))]
    if cfg.wandb.enabled and is_first() and (wandb := wandb_logger(cfg.wandb, cfg.name, folder)):
        wandb.log_hyperparams(plain(cfg))
        if (run := wandb.experiment).offline:  # its history begins at 0, but the server will join it to what was before
            run.log({}, step=saved.get("wandb_step", 0))
        loggers.append(wandb)
    if cfg.tensorboard.enabled:
        loggers.append(GroupedTensorBoard(str(folder), name="", version="tensorboard", purge_step=resume_at or None))
    return loggers


def wandb_logger(cfg: WandbConfig, name: str, folder: Path) -> WandbLogger | None:
    """A wandb run with the run folder's name as its id, online or else offline; None if wandb fails. Never prompts."""
    os.environ.setdefault("WANDB_SILENT", "true")  # no prompt, no banner; wandb reads it when it is first set up
    import wandb

    first = "offline" if cfg.offline else os.environ.get("WANDB_MODE", "online")
    for mode in ("online", "offline") if first == "online" else (first,):
        try:
            url = wandb.setup().settings.base_url
            if mode == "online" and not reachable(url):
                raise ConnectionError(f"{urlsplit(url).hostname} cannot be reached")
            run = wandb.init(
                mode=mode,  # type: ignore[arg-type]  # wandb checks it
                id=folder.name,
                name=name,
                project=cfg.project,
                entity=cfg.entity,
                dir=str(folder),
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(silent=True, init_timeout=30, login_timeout=1),
            )
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        except Exception as error:  # no network, no key, a wrong one, a server's refusal
            offline = f"logging offline to {folder / 'wandb'} (`wandb sync` uploads it)"
            instead = offline if mode == "online" else "continuing without it"
            log.warning("wandb: %s; %s", reason(error).rstrip("."), instead)
            wandb.teardown()  # frees the run id
            continue
        if getattr(run, "url", None):
            log.warning("wandb: logging to %s", run.url)
        return GroupedWandb(experiment=run, save_dir=str(folder))
    return None


def reachable(url: str, seconds: float = 3.0) -> bool:
    """Whether the server of `url` answers within `seconds`, by way of the proxy that the environment names, if any."""
    import requests  # only runs with wandb pay for it

    with contextlib.suppress(requests.RequestException):
        requests.head(url, timeout=seconds, allow_redirects=False)
        return True
    return False


def close(loggers: list[Logger]) -> None:
    """Ends the wandb run, so that the next run of this process gets one of its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            with contextlib.suppress(Exception):
                logger.experiment.finish()


class _Bar(Progress):
    """A bar, and below it the metrics in as many columns as the terminal has room for."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Columns(self.tasks[0].fields["metrics"] if self.tasks else (), padding=(0, 2))


class RunProgress(pl.Callback):
    """One bar for the whole run, where Lightning's have one per epoch; one line per epoch without a terminal."""

    bar = _Bar(disable=True)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
        total = epochs * int(batches) if epochs > 0 and batches != float("inf") else None
        columns = ("{task.description}", BarColumn(), TaskProgressColumn(), "ETA {task.fields[eta]}")
        hidden = not (trainer.is_global_zero and sys.stdout.isatty())
        self.shown: list[str] = []
        self.bar = _Bar(*columns, disable=hidden, speed_estimate_period=3600, redirect_stderr=sys.stderr.isatty())
        self.bar.add_task("", total=total, completed=trainer.fit_loop.total_batch_idx + 1, metrics=self.shown, eta="?")
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
            latest = (callback.latest for callback in trainer.callbacks if isinstance(callback, Throughput))  # type: ignore[attr-defined]
            self.shown = _metrics({**trainer.callback_metrics, **next(latest, {})})
        self._update(trainer, advance=1)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.shown = _metrics(trainer.callback_metrics)
        self._update(trainer)
        if trainer.is_global_zero and self.bar.disable:
            seconds = f"{time.monotonic() - self.epoch_began:.1f} s"
            print("  ".join([_epoch(trainer), *self.shown, seconds, f"ETA {self._eta()}"]), flush=True)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.bar.stop()

    def _update(self, trainer: pl.Trainer, doing: str = "", advance: int = 0) -> None:
        if self.bar.tasks:  # none in the sanity check, before the training
            [task], text = self.bar.task_ids, _epoch(trainer) + doing
            self.bar.update(task, advance=advance, description=text, metrics=self.shown, eta=self._eta())

    def _eta(self) -> str:
        seconds = self.bar.tasks[0].time_remaining
        return "?" if seconds is None else str(timedelta(seconds=seconds))


def _epoch(trainer: pl.Trainer) -> str:
    last = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else "?"
    return f"epoch {trainer.current_epoch + 1:>{len(str(last))}}/{last}"


def _metrics(values: Mapping[str, Any]) -> list[str]:
    """Those that declare `progress`, in the order in which they are declared."""
    declared = [metric.name for metric in metrics().values() if metric.progress]
    logged = [(metric, name) for name in values if (metric := metric_of(name)).name in declared]
    logged.sort(key=lambda pair: declared.index(pair[0].name))
    return [f"{metric.label} {metric.form.format(float(values[name]))}" for metric, name in logged]
