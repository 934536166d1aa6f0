"""What keeps a run safe: checkpoints, and a stop of all processes together that saves."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from torch import Tensor
from torch.utils._pytree import tree_map

from solo_ext.errors import CheckpointError, CollapseError, FailedRun, must_have
from solo_ext.files import remove
from solo_ext.runs.checkpoints import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from solo_ext.runs.run import Run, place_of
from solo_ext.training.callbacks import MonitorCallback
from solo_ext.training.finite import check_finite
from solo_ext.training.loggers import CSVMetrics
from solo_ext.training.start import is_first


class CheckpointIO(TorchCheckpointIO):
    """Writes checkpoints for Lightning, in the background, from a copy; reads them unless one is already `opened`."""

    opened: Checkpoint | None = None

    def __init__(self) -> None:
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future | None = None
        self.written: Callable[[Path], None] = lambda path: None  # called after each

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()
        copies: dict[tuple, Tensor] = {}  # tensors that share their memory are saved once

        def copied(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            key = x.data_ptr(), x.device, x.shape, x.stride(), x.dtype
            return copies.setdefault(key, x.detach().to("cpu", copy=True)) if key[0] else x

        self.writing = self.writer.submit(self._write, tree_map(copied, checkpoint), Path(path))

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        save_checkpoint(checkpoint, path)
        self.written(path)

    def wait(self, done: bool = False) -> None:
        """Until the last one is on the disk; raises what went wrong. done: only if there is nothing to wait for."""
        if self.writing and (self.writing.done() or not done):
            writing, self.writing = self.writing, None
            writing.result()

    def teardown(self) -> None:
        self.writer.shutdown()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        opened, self.opened = self.opened, None
        return opened.take() if opened and opened.path == Path(path) else load_checkpoint(path)


class Stopped(Exception):
    """A run that was told to end. signal: which one told it; None: its time was over."""

    def __init__(self, number: int | None):
        super().__init__(f"stopped by {signal.Signals(number).name}" if number else "stopped at max_time")
        self.signal = number


_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
SAVE, TIME = 0.5, 1000.0  # what a process may wish for at a step, beside the number of a signal


class Checkpointer(CheckpointCallback):
    """Saves `<name>-<run id>-ep=N.ckpt` (N counts from 0) at the end of training epochs, after validation, and
    `...-ep=N-step=S.ckpt` inside them: by steps, by minutes, and when the run is told to stop.

    The first of `SIGNALS`, or the end of `max_time`, stops all processes after the same optimizer step (gradients that
    are being accumulated are in no checkpoint), or inside a validation, which is made again. A second one kills.

    Lightning alone broadcasts from its signal handler, while the processes may be exchanging something else, and hangs;
    and before each step it waits for the device to ask rank 0. Here each step starts an all-reduce of what each process
    wishes, whose result is read one step later. A `Checkpoint` is called last, after optimizer, schedulers and teacher.
    """

    def __init__(self, run: Run, name: str, cfg: CheckpointConfig, max_time: float = math.inf):
        self.run, self.name, self.cfg, self.max_time = run, name, cfg, max_time
        self.received, self.process = 0, os.getpid()  # the signal, and who receives it
        self.training = False
        self.last: tuple[int, int | None] | None = None  # epoch and batch of the last checkpoint
        self.io = CheckpointIO()
        self.score: float | None = None  # of the checkpoint that is being saved
        self.answer = torch.zeros(1)  # on the CPU
        self.arrived: torch.cuda.Event | None = None  # after which it is there

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receives signals, except those that somebody else handles or ignores."""
        ours: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            defaults = {signal.SIG_DFL, signal.default_int_handler}
            ours = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) in defaults}
        for number in ours:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in ours.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if not self.training:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if is_first() and os.getpid() == self.process:  # not a worker
            text = f"{signal.Signals(number).name}: stopping after this step; once more to leave at once\n"
            os.write(2, text.encode())  # where the signal arrived, logging may be at work

    def _wish(self, trainer: pl.Trainer) -> float:
        now, minutes = time.monotonic(), self.cfg.every_minutes
        if self.received:
            return float(self.received)
        if trainer.is_global_zero and now - self.began >= self.max_time:
            return TIME
        return SAVE if trainer.is_global_zero and minutes and now - self.saved_at >= 60 * minutes else 0.0

    def _agreed(self, trainer: pl.Trainer, module: pl.LightningModule) -> float:
        """The strongest wish of any process; of several processes, at the call before this one."""
        if trainer.world_size == 1:
            return self._wish(trainer)
        if self.arrived:
            self.arrived.synchronize()
        agreed = float(self.answer)
        wish = torch.full((1,), self._wish(trainer), device=module.device)
        dist.all_reduce(wish, dist.ReduceOp.MAX)
        self.answer = wish.to("cpu", non_blocking=True)
        if wish.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        return agreed

    def _stop_or(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Whether to save; raises Stopped if the run ends here."""
        if (agreed := self._agreed(trainer, module)) >= 1:
            self.training = False  # from now on a signal ends it at once
            raise Stopped(None if agreed == TIME else int(agreed))
        return agreed == SAVE

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.io = trainer.strategy.checkpoint_io  # type: ignore[assignment]
        self.io.written = self._prune

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.training, self.began = True, time.monotonic()
        self.saved_at = self.began
        if trainer.is_global_zero:
            for left_over in self.run.dir.glob(".*.tmp"):  # of a run that was killed while it wrote
                remove(left_over)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        self.io.wait(done=True)
        if trainer.fit_loop._should_accumulate():
            return
        due, step = self._stop_or(trainer, module), trainer.global_step
        due |= bool(self.cfg.every_n_steps and step % self.cfg.every_n_steps == 0)
        cut = 0 <= trainer.max_steps <= step or trainer.should_stop  # the epoch ends here, but is not whole
        if due or (cut and i + 1 < trainer.num_training_batches):
            self._save(trainer, module, trainer.current_epoch, i + 1)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.training and trainer.world_size > 1:  # where they can differ in number
            batches = torch.tensor(trainer.num_val_batches[0], device=module.device, dtype=torch.float32)
            dist.all_reduce(batches, dist.ReduceOp.MIN)
            self.common = int(batches)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int, loader: int = 0
    ) -> None:
        alone = trainer.world_size == 1
        if self.training and not trainer.fit_loop._should_accumulate() and (alone or (i < self.common and not loader)):
            self._stop_or(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        whole = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        if whole and (epoch % self.cfg.frequency == 0 or last):
            if metric := self.cfg.keep_best:
                must_have(metric, trainer.callback_metrics, "checkpoint.keep_best: there is no metric")
                self.score = float(trainer.callback_metrics[metric])
            self._save(trainer, module, epoch)
            self.score = None

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.training = False
        self.io.wait()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Saves where a run was stopped, or failed between two steps; alone, as other processes may not have failed."""
        self.training = False
        epochs: Any = trainer.fit_loop.epoch_progress.current
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        good = isinstance(exception, Stopped | CollapseError) or (
            trainer.world_size == 1 and not isinstance(exception, CheckpointError | FailedRun)
        )
        if good and trainer.global_step:
            if epochs.started == epochs.processed:
                self._save(trainer, module, epochs.processed - 1)
            elif batches.ready == batches.processed and not trainer.fit_loop._should_accumulate():
                self._save(trainer, module, epochs.processed, batches.processed)
        self.io.wait()

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, batch: int | None = None) -> None:
        if not self.cfg.enabled or self.last == (epoch, batch):
            return
        check_finite(module, trainer.global_step)
        self._log_ahead(trainer, epoch, batch)
        trainer.save_checkpoint(self.run.checkpoint_path(self.name, epoch, batch), weights_only=False)
        self.last, self.saved_at = (epoch, batch), time.monotonic()

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.score is not None:
            checkpoint["score"] = self.score

    @staticmethod
    def _log_ahead(trainer: pl.Trainer, epoch: int, batch: int | None) -> None:
        """Writes all metrics before the checkpoint; Lightning logs those of this step, or epoch, after it."""
        loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
        batches: Any = loop.batch_progress.current
        at_batch_end = not trainer.validating and batches.completed < batches.processed
        due = batch is None or (at_batch_end and connector.should_update_logs)
        metrics: dict[str, Any] = {**connector.metrics["log"], "epoch": epoch} if due else {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning
            if isinstance(callback, MonitorCallback):
                callback.flush(trainer, trainer.lightning_module)
        for logger in trainer.loggers:
            if isinstance(logger, CSVMetrics):
                if due:
                    logger.log_metrics(metrics, loop._batches_that_stepped - (batch is None))
                # a checkpoint inside an epoch has the row of its step, which will get the epoch's means
                logger.flush(math.inf if batch is None else trainer.global_step - 1)

    def _prune(self, newest: Path) -> None:
        """Removes what need not stay beside `newest`, in the thread that wrote it."""
        kept = self.run.checkpoints[: self.cfg.keep_last]
        lower = "loss" in (self.cfg.keep_best or "")
        scores = {name: entry["score"] for name, entry in self.run.records.items() if "score" in entry}
        if scores and self.cfg.keep_best:
            kept.append(self.run.dir / (min if lower else max)(scores, key=scores.__getitem__))
        for older in self.run.checkpoints:
            epoch, step = place_of(older)
            kept_epoch = self.cfg.keep_prev or (self.cfg.keep_every and (epoch + 1) % self.cfg.keep_every == 0)
            for_good = step == math.inf and kept_epoch
            if epoch >= 0 and older not in (*kept, newest) and not for_good:
                remove(older)
        self.run.records = self.run.records
