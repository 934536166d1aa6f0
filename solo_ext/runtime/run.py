"""The one assembly of a run, behind every command: pre-training, linear evaluation, kNN."""

import contextlib
import copy
import inspect
import json
import logging
import math
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
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from solo_ext.analysis.gradients import GradientMonitor
from solo_ext.data.modules import ClassificationData, ImageData, PretrainData
from solo_ext.errors import CheckpointError, ConfigError, NonFiniteError, SoloExtError
from solo_ext.evaluation.features import extract_features
from solo_ext.evaluation.knn import knn_accuracy
from solo_ext.evaluation.linear import LinearModel, fit_cached_linear
from solo_ext.evaluation.online import OnlineKNN
from solo_ext.files import write_json
from solo_ext.methods import METHODS
from solo_ext.methods.base import backbone_of
from solo_ext.optim import OptimizerConfig, SchedulerConfig
from solo_ext.runtime.checkpoint import Checkpointer, CheckpointIO
from solo_ext.runtime.environment import environment
from solo_ext.runtime.hardware import check_hardware, device_count, on_gpu, trainer_devices
from solo_ext.runtime.loggers import close, make_loggers
from solo_ext.runtime.precision import pick_precision
from solo_ext.runtime.progress import RunProgress, Throughput
from solo_ext.runtime.ranks import StopTogether, cluster_environment, die_with
from solo_ext.runtime.resume import RESULT, ExactResume, RunLock, differences, find_resumable, plain
from solo_ext.runtime.sync_bn import SyncNorms
from solo_ext.runtime.weights import (
    checkpoints_in,
    explain_mismatch,
    find_checkpoint,
    load_checkpoint,
    load_encoder,
    run_config,
    state_of,
)
from solo_ext.schema import section

log = logging.getLogger("solo_ext")

KNN_BATCH = 256  # images per forward pass; it does not change a result

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


class StopOnNonFinite(pl.Callback):
    """Ends the run at the next logging step, or epoch end, after a loss that is not finite; the device keeps count."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first = torch.full((), math.inf, device=module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        loss = out["loss"] if isinstance(out, dict) else out
        step = max(trainer.global_step - 1, 0)
        self.first = torch.where(loss.detach().isfinite(), self.first, self.first.clamp(max=step))
        if trainer.global_step % trainer.log_every_n_steps == 0 or trainer.is_last_batch:
            first = trainer.strategy.reduce(self.first, reduce_op="min")
            if math.isfinite(first):
                raise NonFiniteError(
                    f"the loss is not finite since step {int(first)} (epoch {trainer.current_epoch}); the checkpoints "
                    "saved before are, and a lower learning rate, a longer warm-up or precision 32 may help"
                )


def pretrain(cfg: DictConfig) -> RunResult:
    """Trains an encoder without labels, as the resolved `cfg` says.

    Raises:
        SoloExtError: something in the configuration, the data or the checkpoint to resume; nothing is written then.
        NonFiniteError: the loss or a weight became NaN or infinite.
    """
    data = PretrainData(cfg.data, cfg.augmentations, cfg.optimizer.batch_size, cfg.seed)
    cfg = _prepare(cfg, data)
    method = METHODS[cfg.method](cfg)
    check_sizes(method.backbone, cfg)
    callbacks: list[pl.Callback] = [GradientMonitor(cfg.gradients.every)] if cfg.gradients.enabled else []
    if cfg.knn_eval.enabled and data.val_set is not None:
        callbacks.append(OnlineKNN(data.probe_dataloaders, cfg.knn_eval, not cfg.performance.disable_channel_last))
    result = _fit(cfg, method, data, _runs(cfg) / cfg.method, callbacks)
    _say(result, ("val_acc1", "val_knn1", "val_knn20", "gap_sim"))
    return result


def linear(cfg: DictConfig) -> RunResult:
    """Trains a linear classifier on the frozen encoder `cfg.pretrained_feature_extractor`, in solo-learn's protocol.

    `untrained` takes a freshly initialised encoder of `cfg.seed` instead: the one that a pre-training of that seed
    starts from. `cache_features` trains on features of un-augmented images, extracted once.

    Returns:
        The run; `metrics` has val_acc1 and val_acc5. They are also in `linear.json`, beside the encoder's `args.json`.
    """
    cached = bool(cfg.get("cache_features"))
    data = ClassificationData(cfg.data, None, cfg.optimizer.batch_size, cfg.seed, augment=not cached)
    cfg = _prepare(cfg, data)
    backbone, source = _encoder(cfg)
    base = _runs(cfg) / "linear"
    fit = _fit_cached if cached else _fit
    result = fit(cfg, backbone if cached else LinearModel(backbone, cfg), data, base)
    values = plain(cfg)
    protocol = {
        "augmented": not cached,
        "dataset": cfg.data.dataset,
        "optimizer": values["optimizer"],
        "scheduler": values["scheduler"],
        "seed": cfg.seed,
        "checkpoint": source and source.name,
        "run": str(result.dir),
    }
    content = {
        "protocol": protocol,
        "acc1": result.metrics.get("val_acc1"),
        "acc5": result.metrics.get("val_acc5"),
        "epochs": cfg.max_epochs,
        "seconds": result.seconds,
    }
    _record("linear.json", cfg, source, content)
    _say(result, ("val_acc1", "val_acc5"))
    return result


def knn(cfg: DictConfig) -> list[dict[str, Any]]:
    """Classifies the test images by their nearest training images, by the features of the frozen encoder.

    Returns:
        {"features", "distance", "k", "T", "acc1", "acc5"} for every combination in `cfg.knn_eval`; also written to
        `knn.json`, beside the encoder's `args.json`.
    """
    data = ClassificationData(cfg.data, None, KNN_BATCH, cfg.seed, augment=False)
    cfg = _prepare(cfg, data)
    backbone, source = _encoder(cfg)
    sides = _features(cfg, backbone, data)
    asked, results = plain(cfg)["knn_eval"], []
    for distance in asked["distance_func"]:
        for temperature in asked["T"] if distance == "cosine" else [None]:
            scores = knn_accuracy(*sides, k=asked["k"], distance=distance, temperature=temperature or 0.07)
            for k, score in scores.items():
                results.append({"features": "backbone", "distance": distance, "k": k, "T": temperature, **score})
    protocol = {"augmented": False, "dataset": cfg.data.dataset, "checkpoint": source and source.name}
    _record("knn.json", cfg, source, {"protocol": protocol, "results": results})
    for row in results:
        temperature = "" if row["T"] is None else f"  T {row['T']}"
        print(f"{row['distance']:9}  k {row['k']:<4}{temperature}  acc@1 {row['acc1']:.2f}  acc@5 {row['acc5']:.2f}")
    return results


# What the commands share.


def _prepare(cfg: DictConfig, data: ImageData) -> DictConfig:
    """Checks hardware and data, then seeds; `cfg` with the number of classes that the data turned out to have."""
    check_hardware(cfg)
    data.check(device_count(cfg) * cfg.num_nodes)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    cfg = copy.deepcopy(cfg)
    cfg.data.num_classes = data.num_classes
    return cfg


@torch.no_grad()
def check_sizes(backbone: nn.Module, cfg: DictConfig) -> None:
    """Raises ConfigError if the backbone cannot take one of the crop sizes: too small for it, or not a ViT's own."""
    backbone.eval()
    for size in dict.fromkeys(view.crop_size for view in cfg.augmentations):
        try:
            backbone(torch.zeros(1, 3, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"backbone.name: {cfg.backbone.name} cannot take crops of {size} px: {reason}") from error
    backbone.train()


def _encoder(cfg: DictConfig) -> tuple[nn.Module, Path | None]:
    """The frozen encoder to evaluate, and its checkpoint; None if it is untrained."""
    if cfg.get("untrained"):
        return backbone_of(cfg).eval(), None
    if not cfg.get("pretrained_feature_extractor"):
        raise ConfigError(
            "pretrained_feature_extractor is missing: a run folder or checkpoint, or untrained=true without one"
        )
    path = find_checkpoint(cfg.pretrained_feature_extractor)
    return load_encoder(path, plain(cfg))[0], path


def _features(cfg: DictConfig, backbone: nn.Module, data: ClassificationData) -> list[Tensor]:
    """Features and labels of the training and the test images, on the device."""
    on_gpu = cfg.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    index = cfg.devices[0] if OmegaConf.is_list(cfg.devices) else 0
    device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    layout = not cfg.performance.disable_channel_last
    backbone = backbone.to(device, memory_format=torch.channels_last if layout else torch.preserve_format)
    precision = pick_precision(cfg.precision, cfg.accelerator)
    sides: list[Tensor] = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        sides += [part.to(device) for part in extract_features(backbone, loader, device, precision, layout)]
    return sides


def _fit_cached(cfg: DictConfig, backbone: nn.Module, data: ClassificationData, base: Path) -> RunResult:
    began = time.perf_counter()
    scores = fit_cached_linear(
        *_features(cfg, backbone, data),
        optimizer=section(OptimizerConfig, cfg.optimizer, "optimizer"),
        scheduler=section(SchedulerConfig, cfg.scheduler, "scheduler"),
        epochs=cfg.max_epochs,
        seed=cfg.seed,
    )
    metrics = {name if "_" in name else f"val_{name}": value for name, value in scores.items()}
    with _run_folder(cfg, data, Start(_new_folder(base))) as folder:
        result = RunResult(folder, None, metrics, time.perf_counter() - began, None)
        write_json(folder / RESULT, asdict(result))
    return result


def _runs(cfg: DictConfig) -> Path:
    """The folder below which all runs lie."""
    return Path(cfg.checkpoint.dir).expanduser()


def untrained_folder(cfg: DictConfig) -> Path:
    """Where the evaluations of the untrained encoder of `cfg` are kept."""
    return _runs(cfg) / "untrained" / f"{cfg.backbone.name.replace('/', '-')}-seed{cfg.seed}"


@rank_zero_only
def _record(name: str, cfg: DictConfig, source: Path | None, content: dict[str, Any]) -> None:
    """Writes an evaluation's result into the run folder of the encoder, where there is one."""
    if source is None:
        folder = untrained_folder(cfg)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "args.json", plain(cfg))
        write_json(folder / name, content)
    elif run_config(source) is not None:
        write_json(source.with_name(name), content)


@rank_zero_only
def _say(result: RunResult, names: Sequence[str]) -> None:
    shown = [f"{name} {result.metrics[name]:.4g}" for name in names if name in result.metrics]
    print("  ".join([f"{result.dir}:", *shown, f"{result.seconds:.0f} s"]), flush=True)


def _fit(
    cfg: DictConfig,
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
    bar = [RunProgress()] if cfg.get("enable_progress_bar", True) else []
    with quietly():
        trainer = make_trainer(
            cfg, base, data, [ExactResume(cfg.seed), StopTogether(), StopOnNonFinite(), *callbacks, throughput, *bar]
        )
        start = _agree(trainer, lambda: _choose_start(cfg, base))
        step = _check_resumable(module, start.checkpoint, cfg.max_epochs) if start.checkpoint else 0
        with _run_folder(cfg, data, start, trainer) as folder:
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


def make_trainer(cfg: DictConfig, base: Path, data: ImageData, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer for the resolved `cfg`, without logger; of `data`, only the size of an epoch is read."""
    values = plain(cfg)
    kwargs = {name: values[name] for name in inspect.signature(pl.Trainer.__init__).parameters if name in values}
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


def _choose_start(cfg: DictConfig, base: Path) -> Start:
    if cfg.resume_from_checkpoint:
        checkpoint = find_checkpoint(cfg.resume_from_checkpoint)
        args = run_config(checkpoint)
        if args is None:  # a bare file: a new run that begins with it
            return Start(_new_folder(base), checkpoint)
        for key in ("method", "backbone.name"):
            had, asked = (OmegaConf.select(OmegaConf.create(config), key) for config in (args, plain(cfg)))
            if had != asked:
                raise CheckpointError(f"{checkpoint} holds {key} {had}, but {key} is {asked}")
        changed = ", ".join(differences(args, plain(cfg))[:5])
        log.warning("resuming %s%s", checkpoint, f" with another configuration: {changed}" if changed else "")
        return Start(checkpoint.parent, checkpoint)
    checkpoint = find_resumable(cfg, base) if cfg.auto_resume.enabled else None
    if checkpoint is None:
        return Start(_new_folder(base))
    log.warning("resuming %s", checkpoint)
    return Start(checkpoint.parent, checkpoint)


def _new_folder(base: Path) -> Path:
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
def _run_folder(cfg: DictConfig, data: ImageData, start: Start, trainer: pl.Trainer | None = None) -> Iterator[Path]:
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
