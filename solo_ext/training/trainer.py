"""The one assembly of a Trainer, behind every command that trains, and the folder that its run lies in."""

import contextlib
import copy
import json
import logging
import os
import secrets
import shutil
import string
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from solo_ext.data.modules import ImageData
from solo_ext.errors import CheckpointError, ConfigError, SoloExtError
from solo_ext.files import write_json
from solo_ext.runs.checkpoints import checkpoints_in, find_checkpoint, load_checkpoint
from solo_ext.runs.encoder import explain_mismatch, run_config, state_of
from solo_ext.runs.environment import environment
from solo_ext.runs.resume import RESULT, RunLock, differences, find_resumable, plain
from solo_ext.runs.run import flatten
from solo_ext.training.callbacks.checkpointer import Checkpointer, CheckpointIO
from solo_ext.training.callbacks.exact_resume import ExactResume
from solo_ext.training.callbacks.non_finite import StopOnNonFinite
from solo_ext.training.callbacks.throughput import Throughput
from solo_ext.training.distributed.ranks import StopTogether, cluster_environment, die_with
from solo_ext.training.distributed.sync_bn import SyncNorms
from solo_ext.training.hardware import check_hardware, device_count, on_gpu, trainer_devices
from solo_ext.training.loggers import close, make_loggers
from solo_ext.training.precision import pick_precision
from solo_ext.training.progress import RunProgress
from solo_ext.training.trainer_config import TrainerConfig

log = logging.getLogger("solo_ext")

_START = "SOLO_EXT_START"  # how the processes that Lightning starts learn where the run lies
_CHATTER = (
    r".*does not have many workers.*",
    r".*GPU available but not used.*",
    r".*`srun` command is available.*",
    r".*number of training batches .* is smaller than the logging interval.*",
    r".*module\(s\) in eval mode.*",
    r".*LeafSpec.*",
    r".*isinstance.treespec.*",
    r".*across ranks is zero.*",
    r".*you defined a `validation_step` but have no `val_dataloader`.*",
    r".*sync_dist=True.*when logging on epoch level.*",  # what is not reduced is the same on all ranks
)


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        dir: the run folder.
        checkpoint: the newest checkpoint in it, if any.
        metrics: the last value of everything logged.
        seconds: wall-clock time of the fit, of this process only.
        images_per_s: training throughput, the median over this process' epochs.
    """

    dir: Path
    checkpoint: Path | None
    metrics: dict[str, float]
    seconds: float
    images_per_s: float | None


@dataclass(frozen=True)
class Start:
    """Where a run lies and what it continues."""

    folder: Path
    checkpoint: Path | None = None


def prepare(cfg: Any, data: ImageData) -> Any:
    """Checks hardware and data, then seeds; `cfg` with the number of classes that the data turned out to have."""
    check_hardware(cfg)
    data.check(device_count(cfg) * cfg.num_nodes)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    cfg = copy.deepcopy(cfg)
    cfg.data.num_classes = data.num_classes
    return cfg


def runs_folder(cfg: Any) -> Path:
    """The folder below which all runs lie."""
    return Path(cfg.checkpoint.dir).expanduser()


@rank_zero_only
def print_result(result: RunResult, names: Sequence[str]) -> None:
    shown = [f"{name} {result.metrics[name]:.4g}" for name in names if name in result.metrics]
    print("  ".join([f"{result.dir}:", *shown, f"{result.seconds:.0f} s"]), flush=True)


def fit(
    cfg: Any,
    module: pl.LightningModule,
    data: ImageData,
    base: Path,
    callbacks: Sequence[pl.Callback] = (),
) -> RunResult:
    """Trains `module` on `data` in a new folder below `base`, or in that of the run that is resumed.

    Raises:
        ConfigError: Lightning cannot work with a value.
        CheckpointError: what is to be resumed is damaged or does not fit, or a checkpoint cannot be written.
        NonFiniteError: the loss or a weight became NaN or infinite.
        SystemExit: 143 after a SIGTERM; 0 on the other ranks.
    """
    if not cfg.performance.disable_channel_last:
        module = module.to(memory_format=torch.channels_last)
    throughput = Throughput()
    bar = [] if cfg.enable_progress_bar is False else [RunProgress()]
    with quietly():
        trainer = make_trainer(
            cfg, base, data, [ExactResume(cfg.seed), StopTogether(), StopOnNonFinite(), *callbacks, throughput, *bar]
        )
        start = _agree(trainer, lambda: _choose_start(cfg, base))
        step = _check_resumable(module, start.checkpoint, cfg.max_epochs) if start.checkpoint else 0
        with run_folder(cfg, data, start, trainer) as folder:
            if cfg.checkpoint.enabled:
                every, keep = cfg.checkpoint.frequency, cfg.checkpoint.keep_prev
                trainer.callbacks.append(Checkpointer(folder, cfg.name, every, keep))
            trainer.loggers = make_loggers(cfg, folder, resume_at=step)
            began = time.perf_counter()
            try:
                trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
            except SIGTERMException:
                if trainer.is_global_zero:
                    log.warning("stopped by SIGTERM; auto_resume.enabled=true continues %s", folder)
                # a launcher kills all, also those that still write, when one ends otherwise than with 0
                raise SystemExit(0 if trainer.global_rank else 143) from None
            except SystemExit as error:  # what Lightning makes of Ctrl-C
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from None
                raise
            finally:
                close(trainer.loggers)
            if trainer.global_step == step:
                raise ConfigError(f"max_epochs={cfg.max_epochs} and the limits on batches leave no step to train")
            result = RunResult(
                dir=folder,
                checkpoint=next(iter(checkpoints_in(folder)), None),
                metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
                seconds=time.perf_counter() - began,
                images_per_s=throughput.median,
            )
            if trainer.is_global_zero:
                write_json(folder / RESULT, asdict(result))
    return result


def make_trainer(cfg: Any, base: Path, data: ImageData, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer for the resolved `cfg`, without logger; of `data`, only the size of an epoch is read."""
    values = plain(cfg)
    kwargs = {name: values[name] for name in TrainerConfig.__dataclass_fields__ if name in values}
    alone = device_count(cfg) * cfg.num_nodes == 1
    kwargs["precision"] = pick_precision(cfg.precision, cfg.accelerator)
    kwargs["devices"] = trainer_devices(cfg)
    if alone:
        kwargs["strategy"] = "auto"  # a process group of one only costs time
    elif cfg.strategy == "ddp":
        kwargs["strategy"] = DDPStrategy(find_unused_parameters=False)
    started_by = cluster_environment(device_count(cfg), cfg.num_nodes)
    sync = [SyncNorms(on_gpu(cfg))] if kwargs.pop("sync_batchnorm", False) else []
    kwargs["plugins"] = [CheckpointIO(), *([started_by] if started_by else []), *sync]
    steps = len(data.train_set) // (data.batch_size * device_count(cfg) * cfg.num_nodes)
    defaults = {
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the data's own samplers shard
        "log_every_n_steps": max(1, min(50, steps)),  # at least one row an epoch
    }
    with explained():
        return pl.Trainer(
            **{**defaults, **kwargs},
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            default_root_dir=str(base),
        )


def _choose_start(cfg: Any, base: Path) -> Start:
    if cfg.resume_from_checkpoint:
        checkpoint = find_checkpoint(cfg.resume_from_checkpoint)
        args = run_config(checkpoint)
        if args is None:  # a bare file: a new run that begins with it
            return Start(new_folder(base), checkpoint)
        for key in ("method", "backbone.name"):
            had, asked = (flatten(config).get(key) for config in (args, plain(cfg)))
            if had != asked:
                raise CheckpointError(f"{checkpoint} holds {key} {had}, but {key} is {asked}")
        changed = ", ".join(differences(args, plain(cfg))[:5])
        log.warning("resuming %s%s", checkpoint, f" with another configuration: {changed}" if changed else "")
        return Start(checkpoint.parent, checkpoint)
    checkpoint = find_resumable(cfg, base) if cfg.auto_resume.enabled else None
    if checkpoint is None:
        return Start(new_folder(base))
    log.warning("resuming %s", checkpoint)
    return Start(checkpoint.parent, checkpoint)


def new_folder(base: Path) -> Path:
    # not from the seeded generators: two runs of one seed are two runs
    while (folder := base / "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))).exists():
        pass
    return folder


def _agree(trainer: pl.Trainer, choose: Callable[[], Start]) -> Start:
    """What rank 0 chooses, on every rank."""
    if trainer.world_size == 1:
        return choose()
    if trainer.strategy.cluster_environment.creates_processes_externally and _START not in os.environ:  # torchrun, srun
        trainer.strategy.setup_environment()
        return trainer.strategy.broadcast(choose() if trainer.is_global_zero else None)
    if trainer.global_rank == 0:  # Lightning starts the others, with this environment, when the fit begins
        start = choose()
        checkpoint = start.checkpoint and str(start.checkpoint)
        os.environ[_START] = json.dumps([str(start.folder), checkpoint, os.getpid()])
        return start
    folder, checkpoint, parent = json.loads(os.environ[_START])
    die_with(parent)
    return Start(Path(folder), checkpoint and Path(checkpoint))


def _check_resumable(module: pl.LightningModule, checkpoint: Path, max_epochs: int) -> int:
    """The optimizer step at which `checkpoint` resumes; CheckpointError if it cannot."""
    content = load_checkpoint(checkpoint)
    if difference := explain_mismatch(state_of(content, checkpoint), module.state_dict()):
        raise CheckpointError(f"{checkpoint} does not fit this configuration's network: {difference}")
    try:
        done = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        step = content["global_step"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{checkpoint} holds weights only: it cannot be resumed") from None
    if 0 < max_epochs <= done:
        raise ConfigError(f"max_epochs is {max_epochs}, but {checkpoint} has {done} epochs already")
    return step


@contextlib.contextmanager
def run_folder(cfg: Any, data: ImageData, start: Start, trainer: pl.Trainer | None = None) -> Iterator[Path]:
    """The run folder, locked and with its `args.json`; a new one goes again if the run fails before its first step."""
    folder = start.folder
    if trainer and not trainer.is_global_zero:
        yield folder
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"checkpoint.dir: {folder} cannot be made: {error.strerror}") from error
    lock = RunLock(folder)
    if not lock.take():
        raise ConfigError(f"resume_from_checkpoint: {folder} is in use by a run that has not ended")
    try:
        write_json(folder / "args.json", plain(cfg))
        device = trainer.strategy.root_device if trainer else data.device
        write_json(folder / "environment.json", {**_environment(folder), "data": data.record(device)})
        (folder / RESULT).unlink(missing_ok=True)
        with explained():
            yield folder
    except BaseException as error:
        # what the user has to mend leaves nothing behind that could not be resumed; other failures leave their metrics
        useless = isinstance(error, SoloExtError) and not checkpoints_in(folder)
        if made and (useless or not (trainer and trainer.global_step)):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                for parent in made[1:]:
                    parent.rmdir()
        raise
    finally:
        lock.release()


def _environment(folder: Path) -> dict[str, Any]:
    """`environment()`, and `before`: what was recorded of the processes that this one continues."""
    try:
        before = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        return {**environment(), "before": [*before.pop("before", []), before]}
    except (OSError, ValueError):
        return environment()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns Lightning's complaints about values, and a full GPU, into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError("optimizer.batch_size: the GPU's memory is too small; lower it, or use 16-mixed") from error
    except (MisconfigurationException, ValueError, TypeError) as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        from_lightning = trace.tb_frame.f_globals.get("__name__", "").startswith("lightning.")
        if from_lightning and type(error) in (MisconfigurationException, ValueError, TypeError):
            raise ConfigError(" ".join(str(error).split())) from error
        raise


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Lightning's tips, hardware lines and warnings about choices that are made on purpose."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for pattern in _CHATTER:
            warnings.filterwarnings("ignore", pattern)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
