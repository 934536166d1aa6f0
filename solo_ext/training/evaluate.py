"""Offline evaluation of a frozen encoder: linear and kNN."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from solo_ext.data.modules import ClassificationData
from solo_ext.errors import ConfigError
from solo_ext.evaluation.features import extract_features
from solo_ext.evaluation.knn import knn_accuracy
from solo_ext.evaluation.linear import LinearModel, fit_cached_linear
from solo_ext.files import write_json
from solo_ext.methods import backbone_of
from solo_ext.runs.checkpoints import find_checkpoint
from solo_ext.runs.encoder import load_encoder, run_config
from solo_ext.runs.resume import RESULT, plain
from solo_ext.training.precision import pick_precision
from solo_ext.training.trainer import (
    RunResult,
    Start,
    fit,
    new_folder,
    prepare,
    print_result,
    run_folder,
    runs_folder,
)

KNN_BATCH = 256  # images per forward pass; it does not change a result


def linear(cfg: Any, results: Path | None = None) -> RunResult:
    """Trains a linear classifier on the frozen encoder `cfg.pretrained_feature_extractor`, in solo-learn's protocol.

    `untrained` takes a freshly initialised encoder of `cfg.seed` instead: the one that a pre-training of that seed
    starts from. `cache_features` trains on features of un-augmented images, extracted once.

    Args:
        results: the folder that gets `linear.json` and the encoder's `args.json`; default: where the latter lies.

    Returns:
        The run; `metrics` has val_acc1 and val_acc5, as `linear.json` has them.
    """
    cached = cfg.cache_features
    data = ClassificationData(cfg.data, None, cfg.optimizer.batch_size, cfg.seed, augment=not cached)
    cfg = prepare(cfg, data)
    backbone, source = _encoder(cfg)
    base = runs_folder(cfg) / "linear"
    result = _fit_cached(cfg, backbone, data, base) if cached else fit(cfg, _linear_model(cfg, backbone), data, base)
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
    _record("linear.json", cfg, source, content, results)
    print_result(result, ("val_acc1", "val_acc5"))
    return result


def knn(cfg: Any, results: Path | None = None) -> list[dict[str, Any]]:
    """Classifies the test images by their nearest training images, by the features of the frozen encoder.

    Args:
        results: the folder that gets `knn.json` and the encoder's `args.json`; default: where the latter lies.

    Returns:
        {"features", "distance", "k", "T", "acc1", "acc5"} for every combination in `cfg.knn_eval`, as in `knn.json`.
    """
    data = ClassificationData(cfg.data, None, KNN_BATCH, cfg.seed, augment=False)
    cfg = prepare(cfg, data)
    backbone, source = _encoder(cfg)
    sides = _features(cfg, backbone, data)
    asked, rows = plain(cfg)["knn_eval"], []
    for distance in asked["distance_func"]:
        for temperature in asked["T"] if distance == "cosine" else [None]:
            scores = knn_accuracy(*sides, k=asked["k"], distance=distance, temperature=temperature or 0.07)
            for k, score in scores.items():
                rows.append({"features": "backbone", "distance": distance, "k": k, "T": temperature, **score})
    protocol = {"augmented": False, "dataset": cfg.data.dataset, "checkpoint": source and source.name}
    _record("knn.json", cfg, source, {"protocol": protocol, "results": rows}, results)
    for row in rows:
        temperature = "" if row["T"] is None else f"  T {row['T']}"
        print(f"{row['distance']:9}  k {row['k']:<4}{temperature}  acc@1 {row['acc1']:.2f}  acc@5 {row['acc5']:.2f}")
    return rows


def _linear_model(cfg: Any, backbone: nn.Module) -> LinearModel:
    layout = not cfg.performance.disable_channel_last
    return LinearModel(backbone, cfg.data.num_classes, cfg.optimizer, cfg.scheduler, cfg, layout)


def _encoder(cfg: Any) -> tuple[nn.Module, Path | None]:
    """The frozen encoder to evaluate, and its checkpoint; None if it is untrained."""
    if cfg.untrained:
        return backbone_of(cfg).eval(), None
    if not cfg.pretrained_feature_extractor:
        raise ConfigError(
            "pretrained_feature_extractor is missing: a run folder or checkpoint, or untrained=true without one"
        )
    path = find_checkpoint(cfg.pretrained_feature_extractor)
    return load_encoder(path, plain(cfg))[0], path


def _features(cfg: Any, backbone: nn.Module, data: ClassificationData) -> list[Tensor]:
    """Features and labels of the training and the test images, on the device."""
    on_gpu = cfg.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    index = cfg.devices[0] if isinstance(cfg.devices, list) else 0
    device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    layout = not cfg.performance.disable_channel_last
    backbone = backbone.to(device, memory_format=torch.channels_last if layout else torch.preserve_format)
    precision = pick_precision(cfg.precision, cfg.accelerator)
    sides: list[Tensor] = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        sides += [part.to(device) for part in extract_features(backbone, loader, device, precision, layout)]
    return sides


def _fit_cached(cfg: Any, backbone: nn.Module, data: ClassificationData, base: Path) -> RunResult:
    began = time.perf_counter()
    scores = fit_cached_linear(
        *_features(cfg, backbone, data),
        optimizer=cfg.optimizer,
        scheduler=cfg.scheduler,
        epochs=cfg.max_epochs,
        seed=cfg.seed,
    )
    metrics = {name if "_" in name else f"val_{name}": value for name, value in scores.items()}
    with run_folder(cfg, data, Start(new_folder(base))) as folder:
        result = RunResult(folder, None, metrics, time.perf_counter() - began, None)
        write_json(folder / RESULT, asdict(result))
    return result


def untrained_folder(cfg: Any) -> Path:
    """Where the evaluations of the untrained encoder of `cfg` are kept."""
    return runs_folder(cfg) / "untrained" / f"{cfg.backbone.name.replace('/', '-')}-seed{cfg.seed}"


@rank_zero_only
def _record(name: str, cfg: Any, source: Path | None, content: dict[str, Any], results: Path | None) -> None:
    """Writes an evaluation's result into `results`, or else into the run folder of the encoder, where there is one."""
    folder = results or (source.parent if source else untrained_folder(cfg))
    args = run_config(source) if source else plain(cfg)
    if args is None:
        return
    if folder != (source and source.parent):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "args.json", args)
    write_json(folder / name, content)
