"""Offline evaluation of a frozen encoder: linear and kNN."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solo_ext.data.modules import ClassificationData
from solo_ext.errors import ConfigError
from solo_ext.evaluation.features import features_of_sets
from solo_ext.evaluation.knn import knn_accuracy
from solo_ext.evaluation.linear import LinearModel, fit_cached_linear
from solo_ext.methods import backbone_of
from solo_ext.networks import BackboneConfig
from solo_ext.networks.backbones import check_sizes
from solo_ext.runs.checkpoints import Checkpoint, open_checkpoint
from solo_ext.runs.encoder import branch_of, check_heads, evaluation_view, load_encoder, network_of, weights_sum
from solo_ext.runs.environment import environment
from solo_ext.runs.run import CLASSIFIERS, KNN, LINEAR, UNTRAINED, Run, RunResult
from solo_ext.schema import build, plain
from solo_ext.training.config import KNNRunConfig, LinearConfig, RunConfig
from solo_ext.training.start import begin, is_first, runs_folder
from solo_ext.training.trainer import fit, prepare, print_result

log = logging.getLogger("solo_ext")

KNN_BATCH = 256  # images per forward pass; it does not change a result


def linear(cfg: LinearConfig, results: Path | None = None, encoder: Checkpoint | None = None) -> RunResult:
    """Trains a linear classifier on the frozen encoder `cfg.pretrained_feature_extractor`, in solo-learn's protocol.

    `untrained` takes a freshly initialised encoder of `cfg.seed` instead: the one that a pre-training of that seed
    starts from. The result's `metrics` have val_acc1 and val_acc5, as linear.json has them.

    Args:
        results: the folder that gets linear.json and the encoder's args.json; default: the encoder's own.
        encoder: the checkpoint that `cfg` names, if it has been read already.
    """
    cached, base = cfg.cache_features, runs_folder(cfg) / CLASSIFIERS
    data = ClassificationData(cfg.data, cfg.optimizer.batch_size, cfg.seed, augment=not cached)
    cfg = prepare(cfg, data)
    backbone, source = _encoder(cfg, encoder, data)
    if cached:
        result = _fit_cached(cfg, backbone, data, Run.new(base))
    else:
        layout = not cfg.performance.disable_channel_last
        model = LinearModel(backbone, data.num_classes, cfg.optimizer, cfg.scheduler, cfg, layout)
        result = fit(cfg, model, data, begin(cfg, base))
    recipe = {key: value for key, value in plain(cfg).items() if key in ("optimizer", "scheduler", "seed")}
    protocol = {"augmented": not cached, "dataset": cfg.data.dataset, **recipe}
    protocol |= {"recipe": cfg.recipe, "checkpoint": source and source.name, "run": str(result.dir)}
    scores = {name: result.metrics.get(f"val_{name}") for name in ("acc1", "acc5")}
    content = {"protocol": protocol, **scores, "epochs": cfg.max_epochs, "seconds": result.seconds}
    _record(LINEAR, content, cfg, source, results)
    print_result(result, ("val_acc1", "val_acc5"))
    return result


def knn(cfg: KNNRunConfig, results: Path | None = None, encoder: Checkpoint | None = None) -> list[dict[str, Any]]:
    """Classifies the test images by their nearest training images, by the features of the frozen encoder.

    Returns what knn.json has: {"features", "distance", "k", "T", "acc1", "acc5"} for every combination in
    `cfg.knn_eval`. `results` and `encoder` are as for `linear`.
    """
    data = ClassificationData(cfg.data, KNN_BATCH, cfg.seed, augment=False)
    cfg = prepare(cfg, data)
    backbone, source = _encoder(cfg, encoder, data)
    features = _features(cfg, backbone, data)
    options, rows = cfg.knn_eval, []
    for distance in dict.fromkeys(options.distance_func):
        for temperature in dict.fromkeys(options.T) if distance == "cosine" else [None]:
            scores = knn_accuracy(*features, k=options.k, distance=distance, temperature=temperature or 0.07)
            for k, score in scores.items():
                rows.append({"features": "backbone", "distance": distance, "k": k, "T": temperature, **score})
    protocol = {"augmented": False, "dataset": cfg.data.dataset, "checkpoint": source and source.name}
    _record(KNN, {"protocol": protocol, "results": rows}, cfg, source, results)
    for row in rows:
        votes = "" if row["T"] is None else f"  T {row['T']}"
        print(f"{row['distance']:9}  k {row['k']:<4}{votes}  acc@1 {row['acc1']:.2f}  acc@5 {row['acc5']:.2f}")
    return rows


def _encoder(
    cfg: LinearConfig | KNNRunConfig, opened: Checkpoint | None, data: ClassificationData
) -> tuple[nn.Module, Path | None]:
    """The frozen encoder to evaluate, and its checkpoint; None if it is untrained."""
    if cfg.untrained:
        if cfg.backbone is None:
            raise ConfigError("backbone is missing: which network untrained=true is about")
        check_heads(plain(cfg))
        backbone, source = backbone_of(cfg).eval(), None
    else:
        backbone, source = _trained(cfg, opened, data)
    assert cfg.backbone is not None  # or the checkpoint would not have been read
    check_sizes(backbone, cfg.backbone.name, data.eval_view[:1])
    cfg.encoder = weights_sum(backbone)
    return backbone, source


def _trained(
    cfg: LinearConfig | KNNRunConfig, opened: Checkpoint | None, data: ClassificationData
) -> tuple[nn.Module, Path]:
    """The encoder of a checkpoint, whose network `cfg` takes over. Says where `data` shows it images otherwise than it
    was trained on."""
    if not cfg.pretrained_feature_extractor:
        raise ConfigError("pretrained_feature_extractor is missing (a run folder or checkpoint; or set untrained=true)")
    if opened is None or str(opened.path) != cfg.pretrained_feature_extractor:
        opened = open_checkpoint(cfg.pretrained_feature_extractor)
    backbone, _ = load_encoder(opened, plain(cfg))
    opened.take()  # the memory
    cfg.branch = branch_of(opened.config)
    if opened.config and opened.config.get("backbone"):  # else cfg has said it
        network = network_of(opened.config, plain(cfg.backbone))
        if cfg.pretrain_method not in (None, network["pretrain_method"]):
            log.warning(
                "pretrain_method is %s, but the encoder's is %s", cfg.pretrain_method, network["pretrain_method"]
            )
        cfg.backbone, cfg.pretrain_method = build(BackboneConfig, network["backbone"]), network["pretrain_method"]
    here = dict(zip(("crop_size", "mean", "std"), plain(data.eval_view), strict=True))
    trained = evaluation_view(opened.config or {})
    if other := [f"{key} {value}, not {here[key]}" for key, value in trained.items() if value != here[key]]:
        log.warning("data.augmentations: the encoder was trained with %s", "; ".join(other))
    return backbone, opened.path


def _features(cfg: RunConfig, backbone: nn.Module, data: ClassificationData) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the training images, then of the test images, on the device."""
    device, precision = cfg.first_device, cfg.pick_precision()
    layout = not cfg.performance.disable_channel_last
    backbone = backbone.to(device).to(memory_format=torch.channels_last if layout else torch.preserve_format)
    return features_of_sets(backbone, (data.train_dataloader(), data.val_dataloader()), device, precision, layout)


def _fit_cached(cfg: LinearConfig, backbone: nn.Module, data: ClassificationData, run: Run) -> RunResult:
    began = time.perf_counter()
    features = _features(cfg, backbone, data)
    scores = fit_cached_linear(
        *features, optimizer=cfg.optimizer, scheduler=cfg.scheduler, epochs=cfg.max_epochs, seed=cfg.seed
    )
    metrics = {name if "_" in name else f"val_{name}": value for name, value in scores.items()}
    with run.in_use(plain(cfg), {**environment(), "data": data.record(data.device)}):
        result = RunResult(run.dir, None, metrics, time.perf_counter() - began, None)
        run.finish(result)
    return result


def untrained_folder(cfg: Any) -> Path:
    """The folder of the evaluations of the untrained encoder of `cfg`."""
    return runs_folder(cfg) / UNTRAINED / f"{cfg.backbone.name.replace('/', '-')}-seed{cfg.seed}"


def _record(name: str, content: dict[str, Any], cfg: RunConfig, source: Path | None, results: Path | None) -> None:
    """Writes an evaluation's result into `results`, or else into the run folder of the encoder, where there is one."""
    encoder = Run(source.parent) if source else None
    args = encoder.config if encoder else plain(cfg)
    if args is None or not is_first():
        return
    target = Run(results or (encoder.dir if encoder else untrained_folder(cfg)))
    target.write_evaluation(name, content, None if encoder and target.dir == encoder.dir else args)
