"""The one assembly of a Trainer, behind every command that trains."""

import contextlib
import copy
import ctypes
import inspect
import logging
import pkgutil
import reprlib
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.warnings import disable_possible_user_warnings
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from solo_ext.data.modules import ImageData
from solo_ext.errors import CheckpointError, ConfigError, DataError, FailedRun, SoloExtError, naming, reason
from solo_ext.files import log
from solo_ext.methods import Method
from solo_ext.runs.checkpoints import Checkpoint
from solo_ext.runs.encoder import explain_mismatch
from solo_ext.runs.environment import environment
from solo_ext.runs.run import RunResult
from solo_ext.schema import plain
from solo_ext.text import hanging
from solo_ext.training.callbacks.throughput import Throughput
from solo_ext.training.config import AnyConfig, TrainingConfig
from solo_ext.training.finite import FiniteSteps
from solo_ext.training.loggers import RunProgress, close, make_loggers
from solo_ext.training.resume import ExactResume, place_in
from solo_ext.training.safety import Checkpointer, CheckpointIO, Stopped
from solo_ext.training.shares import Shares
from solo_ext.training.start import Start, agree, cluster_environment, is_first, keep_batch, runs_folder
from solo_ext.training.trainer_config import TrainerConfig

_CONTENT = {"images": "images", "classes": "classes", "fingerprint": "names and labels"}
_CONTENT |= {"sizes": "file sizes", "bytes": "file contents"}
_CHATTER = (r".*LeafSpec.*", r".*isinstance.treespec.*", r".*across ranks is zero.*")  # beside Lightning's tips


def prepare(cfg: AnyConfig, data: pl.LightningDataModule) -> AnyConfig:
    """Checks hardware and data, then seeds; `cfg` with the number of classes that the data turned out to have."""
    cfg.check_hardware()
    cfg = copy.deepcopy(cfg)
    if cfg.first_device.type == "cpu":
        keep_freed_memory()
    if isinstance(data, ImageData):
        data.device = cfg.first_device  # until a trainer is attached
        data.check(1)  # for all devices, when it is known what is continued
        cfg.data.num_classes = data.num_classes
        if cfg.data.channels and cfg.data.info:  # whose mean and std may have been measured
            cfg.data.info |= dict(zip(("mean", "std"), plain(data.eval_view[1:]), strict=True))
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    return cfg


def keep_freed_memory() -> None:
    """Has glibc keep the memory of large tensors for the next ones; by default it asks the kernel for new pages in each
    step, which takes a CPU a fifth of a small network's time. Nothing happens with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller ones come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which stays as large as it has become


def _imported(path: str, arguments: dict[str, Any] | None) -> pl.Callback:
    with naming(f"callbacks.{path}", SoloExtError, ImportError, AttributeError, ValueError, TypeError):
        cls = pkgutil.resolve_name(path)
        if not (isinstance(cls, type) and issubclass(cls, pl.Callback)):  # and is not called to find out
            raise ConfigError(f"not a class of Lightning callbacks but {reprlib.repr(cls)}")
        return cls(**(arguments or {}))


class NormsOfTheFirst(pl.Callback):
    """Gives all processes the BatchNorm statistics of the first one, which checkpoints hold, before a validation. DDP
    would broadcast them in every step, and with them the queues, which are alike."""

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        norms = (layer for layer in module.modules() if isinstance(layer, _BatchNorm))
        for buffer in (buffer for norm in norms for buffer in norm.buffers(recurse=False)):
            torch.distributed.broadcast(buffer, 0)


def fit(
    cfg: TrainingConfig,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    start: Start | None,
    callbacks: Sequence[pl.Callback] = (),
) -> RunResult:
    """Trains `module` on `data`; `start` is None where another process has chosen it. Raises ConfigError for a value
    that Lightning cannot work with; CheckpointError for one that cannot be resumed or written; NonFiniteError; after a
    signal SystemExit, 128 + its number, or 0 on the other ranks."""
    if not cfg.performance.disable_channel_last:
        module = module.to(memory_format=torch.channels_last)
    named = [_imported(*item) for item in (cfg.callbacks or {}).items()]
    safety = ExactResume(cfg.seed), FiniteSteps(cfg.skip_non_finite)
    callbacks = [*safety, *callbacks, *named, throughput := Throughput()]
    if cfg.enable_progress_bar is not False:
        callbacks.append(RunProgress())
    with quietly():
        trainer = make_trainer(cfg, callbacks, isinstance(data, ImageData), runs_folder(cfg))
        if isinstance(module, Method) and isinstance(trainer.strategy, DDPStrategy):
            newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.14
            trainer.strategy._ddp_kwargs["forward_sync_buffers" if newer else "broadcast_buffers"] = False
            trainer.callbacks.append(NormsOfTheFirst())  # type: ignore[attr-defined]  # set by Lightning
        start = agree(trainer, start)
        on_each, batches = keep_batch(cfg, start.checkpoint.config if start.checkpoint else None), 1
        if isinstance(data, ImageData):
            data.batch_size = on_each
            data.check_shares(cfg.processes)
            batches = len(data.train_set) // (on_each * cfg.processes)
        # at least one row an epoch
        trainer.log_every_n_steps = cfg.log_every_n_steps or max(1, min(50, batches))  # type: ignore[attr-defined]
        step, inside, over = _check_resumable(module, start, cfg) if start.checkpoint else (0, False, False)
        with contextlib.ExitStack() as in_use:
            if trainer.is_global_zero:  # which alone locks and writes the folder
                images = data.record(trainer.strategy.root_device) if isinstance(data, ImageData) else None
                if images:
                    cfg.data.content = {split: images[split] for split in ("train", "val")}
                    if not cfg.data.accept_changes:
                        _check_unchanged(cfg, start.checkpoint)
                about = {**environment(), "data": images or type(data).__name__}
                in_use.enter_context(start.run.in_use(plain(cfg), about, lambda: trainer.global_step > 0))
            checkpointer = Checkpointer(start.run, cfg.name, cfg.checkpoint, cfg.seconds)
            trainer.callbacks.append(checkpointer)  # type: ignore[attr-defined]
            in_use.enter_context(checkpointer.listening())
            if not over:
                trainer.loggers = make_loggers(cfg, start.run.dir, step, start.checkpoint)
            began, finished = time.perf_counter(), over or _train(cfg, trainer, module, data, start)
            if trainer.global_step == step and finished and not (inside or over):
                raise ConfigError(f"max_epochs={cfg.max_epochs} and the limits on batches leave no step to train")
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            newest, seconds = next(iter(start.run.checkpoints), None), time.perf_counter() - began
            speed = statistics.median(throughput.epochs) if throughput.epochs else None
            parts = dict(getattr(trainer.profiler, "seconds", {}))  # type: ignore[attr-defined]  # set by Lightning
            if getattr(cfg, "compile", False) and "steps" in parts:
                from torch._dynamo.utils import calculate_time_spent  # which takes a second to import

                parts["compiling"] = calculate_time_spent()["total_wall_time"]
                parts["steps"] -= parts["compiling"]
            result = RunResult(
                start.run.dir, newest, start.run.last_metrics if over else metrics, seconds, speed, parts
            )
            if trainer.is_global_zero and finished:
                start.run.finish(result)
    return result


def make_trainer(
    cfg: TrainerConfig, callbacks: Sequence[pl.Callback], own_data: bool = False, folder: Path | None = None
) -> pl.Trainer:
    """Lightning's Trainer for the resolved `cfg`, without logger; ConfigError if Lightning cannot work with a value.
    own_data: whose samplers split it. folder: where Lightning writes, such as a profiler's output; default: the current
    one."""
    alone = cfg.processes == 1
    strategy: Any = "auto" if alone else cfg.strategy  # a process group of one only costs time
    if strategy in ("auto", "ddp") and not alone:
        strategy = DDPStrategy(find_unused_parameters=False, timeout=timedelta(minutes=cfg.collective_timeout))
    plugins = [CheckpointIO(), *filter(None, [cluster_environment(cfg)])]
    if cfg.sync_batchnorm and not alone:
        from solo_ext.training.sync_bn import SyncNorms  # with timm, which takes a second to import

        plugins.append(SyncNorms(cfg.on_gpu))
    defaults = {
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": not own_data,
    }
    # the checkpointer looks at the clock
    given = TrainerConfig.__dataclass_fields__.keys() - {"max_time", "collective_timeout"}
    configured = {key: value for key in given if (value := getattr(cfg, key)) is not None}
    ours = {
        "precision": cfg.pick_precision(),
        "devices": cfg.trainer_devices,
        "strategy": strategy,
        "plugins": plugins,
        "callbacks": list(callbacks),
        "default_root_dir": folder,
        "profiler": cfg.profiler or Shares(),
    }
    replaced = ("sync_batchnorm", "enable_progress_bar", "logger", "enable_checkpointing")  # by plugins and callbacks
    with explained(ValueError, TypeError):  # about the arguments, which are the user's
        return pl.Trainer(**{**defaults, **configured, **ours, **dict.fromkeys(replaced, False)})


def _check_resumable(module: pl.LightningModule, start: Start, cfg: TrainingConfig) -> tuple[int, bool, bool]:
    """The optimizer step at which the checkpoint resumes, whether that is inside an epoch, and whether only the result
    of the run is missing. Raises CheckpointError or ConfigError if it cannot be resumed."""
    checkpoint: Any = start.checkpoint
    try:
        done, batch, _ = place_in(checkpoint.content["loops"]["fit_loop"])
        step = checkpoint.content["global_step"]
    except (KeyError, TypeError):
        instead = f"pretrained_feature_extractor={checkpoint.path} begins a pre-training with them"
        raise CheckpointError(f"{checkpoint.path} holds weights only, so it cannot be resumed; {instead}") from None
    if difference := explain_mismatch(checkpoint.state, module.state_dict()):
        raise CheckpointError(f"{checkpoint.path} does not fit this configuration's network: {difference}")
    limits = {"max_epochs": (done, cfg.max_epochs or -1), "max_steps": (step, cfg.max_steps or -1)}
    reached = [(key, number, limit) for key, (number, limit) in limits.items() if 0 < limit <= number]
    if reached and (start.run.finished or checkpoint.path.parent != start.run.dir):
        key, number, limit = reached[0]
        raise ConfigError(f"{key} is {limit}, but {checkpoint.path} already has {number} {key[4:]}")
    return step, batch is not None, bool(reached) and batch is None


def _check_unchanged(cfg: TrainingConfig, checkpoint: Checkpoint | None) -> None:
    """DataError if a run that is continued began with other images."""
    before = (checkpoint and (checkpoint.config or {}).get("data", {}).get("content")) or {}
    for split, now in (cfg.data.content or {}).items():
        old = before.get(split) or {}
        pairs = [(what, old.get(name), (now or {}).get(name)) for name, what in _CONTENT.items()]
        changed = [pair for pair in pairs if None not in pair and pair[1] != pair[2]]  # null: nobody looked
        if changed:
            what, was, here = (str(part)[:16] for part in changed[0])
            others = f"not those that {checkpoint and checkpoint.path.parent} began with"
            ways = "data.accept_changes=true goes on with them, auto_resume.enabled=false begins a new run"
            raise DataError(f"data: the {split} images are {others} (first difference: {what} {was} -> {here}); {ways}")


def _train(
    cfg: TrainingConfig, trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, start: Start
) -> bool:
    """Lightning's fit, and whether it came to its end: False after `max_time`."""
    again = "the same command" if cfg.auto_resume.enabled else "auto_resume.enabled=true"
    trainer.strategy.checkpoint_io.opened = start.checkpoint  # type: ignore[attr-defined]  # ours
    path = start.checkpoint.path if start.checkpoint else None
    trainer.precision_plugin.convert_module(module)  # before it reads weights; Lightning would round those of 64-true
    try:
        with explained():
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    except Stopped as stopped:
        if trainer.is_global_zero:
            saved = cfg.checkpoint.enabled and bool(start.run.checkpoints)
            log.warning("%s; %s", stopped, f"{again} continues {start.run.dir}" if saved else "nothing is saved")
        if stopped.signal is None:
            return False
        # a launcher kills all processes, also those that still write, when one ends otherwise than with 0
        raise SystemExit(0 if trainer.global_rank else 128 + stopped.signal) from None
    except SystemExit as error:  # what Lightning makes of a Ctrl-C before the training
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except Exception:
        if trainer.is_global_zero and (newest := next(iter(start.run.checkpoints), None)):
            log.warning("%s continues from %s", again, newest)
        raise
    finally:
        close(trainer.loggers)
    return True


@contextlib.contextmanager
def explained(*kinds: type[Exception]) -> Iterator[None]:
    """Makes one sentence of a full GPU, a lost worker or process, and what Lightning or `kinds` say about a value."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError("optimizer.batch_size: the GPU's memory is too small; lower it, or use 16-mixed") from error
    except RuntimeError as error:
        said, distributed = reason(error), getattr(torch.distributed, "DistError", ())
        if "DataLoader worker" in said:
            raise FailedRun(f"a process of data.num_workers was killed, as for too much memory ({said})") from error
        if "gloo" in said or "pair closure" in said or isinstance(error, distributed):
            raise FailedRun(f"another process ended or let collective_timeout pass ({said[-200:]})") from error
        raise
    except (MisconfigurationException, ValueError, TypeError) as error:
        if not isinstance(error, (MisconfigurationException, *kinds)) and "`val_check_interval`" not in str(error):
            raise
        raise ConfigError(reason(error)) from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Lightning's tips, hardware lines and warnings about choices that are made on purpose."""
    with warnings.catch_warnings(), contextlib.ExitStack() as restored:
        disable_possible_user_warnings()
        for pattern in _CHATTER:
            warnings.filterwarnings("ignore", pattern)
        for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric")):
            restored.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        yield


def print_result(result: RunResult, names: Sequence[str]) -> None:
    """One line about the run, from the first process."""
    if is_first():
        values = [f"{name}\xa0{result.metrics[name]:.4g}" for name in names if name in result.metrics]
        print(hanging("  ".join([f"{result.dir}:", *values, f"{result.seconds:.0f}\xa0s"])), flush=True)
