"""Offline evaluation of a frozen encoder: linear and kNN."""

import hashlib
import json
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solo_ext.data.augmentations import AugmentationConfig, ClassificationAugmentationConfig, ProbConfig
from solo_ext.data.detection import DetectionData
from solo_ext.data.modules import ClassificationData, ImageData, PretrainData
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.evaluation.detection import DetectionModel
from solo_ext.evaluation.features import extract_features
from solo_ext.evaluation.knn import knn_accuracy
from solo_ext.evaluation.linear import LinearModel, fit_cached_linear
from solo_ext.evaluation.quality import quality as measured
from solo_ext.files import log
from solo_ext.methods import backbone_of
from solo_ext.networks import BackboneConfig
from solo_ext.networks.backbones import check_sizes
from solo_ext.runs.checkpoints import Checkpoint, open_checkpoint
from solo_ext.runs.comparison import IGNORED, flatten, within
from solo_ext.runs.encoder import branch_of, check_heads, evaluation_view, load_encoder, network_of, weights_sum
from solo_ext.runs.environment import environment
from solo_ext.runs.evaluations import Result
from solo_ext.runs.run import CLASSIFIERS, DETECTION, DETECTORS, KNN, LINEAR, QUALITY, UNTRAINED, Run, RunResult
from solo_ext.schema import build, plain
from solo_ext.text import hanging
from solo_ext.training.config import (
    DetectionConfig,
    KNNRunConfig,
    LinearConfig,
    QualityConfig,
    recipe_taken,
)
from solo_ext.training.start import begin, is_first, runs_folder
from solo_ext.training.trainer import explained, fit, prepare, print_result

AnyEvaluation = DetectionConfig | KNNRunConfig | LinearConfig | QualityConfig
KNN_BATCH = 256  # images per forward pass; it does not change a result
# the run folder that gets the results, and the args.json that goes into a new one; None: they are only printed
Place = tuple[Run, dict[str, Any] | None] | None

# no part of a protocol: places, what is shown, and what `protocol_of` has more exactly
LEFT_OUT = (
    *(*IGNORED, "name", "accelerator", "pretrained_feature_extractor", "knn_eval"),
    *("data.train_path", "data.val_path", "data.download", "data.augmentations"),
    *("profiler", "detect_anomaly", "num_sanity_val_steps", "enable_autolog_hparams", "model_registry"),
)


def linear(cfg: LinearConfig, results: Path | None = None, encoder: Checkpoint | None = None) -> RunResult:
    """Trains a linear classifier on the frozen encoder `cfg.pretrained_feature_extractor`, in solo-learn's protocol.

    `untrained` takes the encoder that a pre-training of `cfg.seed` starts from instead. The result's `metrics` have
    val_acc1 and val_acc5, which linear.json gets beside those of other protocols. results: the folder that gets it;
    default: the encoder's own. encoder: the checkpoint that `cfg` names, if it has been read already.
    """
    cached, base = cfg.cache_features, runs_folder(cfg) / CLASSIFIERS
    data = ClassificationData(cfg.data, cfg.optimizer.batch_size, cfg.seed, augment=not cached)
    cfg = prepare(cfg, data)
    backbone, about, place = _encoder(cfg, encoder, data, results)
    cfg.recipe = recipe_taken(cfg)
    heads = cfg.heads(cfg.optimizer)
    if cached:
        began, run = time.perf_counter(), Run.new(base)
        features = _features(cfg, backbone, data)
        reached = fit_cached_linear(
            *features, optimizers=[*heads.values()], scheduler=cfg.scheduler, epochs=cfg.max_epochs, seed=cfg.seed
        )
        scores_of = zip(heads, reached, strict=True)
        metrics = {f"{name}{head}": value for head, scores in scores_of for name, value in scores.items()}
        with run.in_use(plain(cfg), {**environment(), "data": data.record(data.device)}):
            result = RunResult(run.dir, None, metrics, time.perf_counter() - began, None)
            run.finish(result)
    else:
        layout = not cfg.performance.disable_channel_last
        model = LinearModel(backbone, data.num_classes, cfg.optimizer, cfg.scheduler, cfg, layout)
        result = fit(cfg, model, data, begin(cfg, base))
    rows: list[Result] = []
    for head, optimizer in heads.items():
        print_result(result, (f"val_acc1{head}", f"val_acc5{head}"))
        scores = {name: result.metrics.get(f"val_{name}{head}") for name in ("acc1", "acc5")}
        rates = {f"optimizer.{key}": getattr(optimizer, key) for key in ("lr", "effective_lr", "weight_decay")}
        rows.append(scores | {"protocol": rates if head else {}} | _spent(result))
    if len(rows) > 1 and rows[0]["acc1"] is not None and is_first():
        head, best = max(zip(heads, rows, strict=True), key=lambda pair: pair[1]["acc1"])
        test = "the test images themselves; data.val_fraction=0.1 would hold out training images for it"
        on = "training images (data.val_fraction)" if cfg.data.val_fraction else test
        print(hanging(f"best of {len(rows)}: val_acc1{head}\xa0{best['acc1']:.4g}, chosen on {on}"))
    _record(LINEAR, cfg, data, about, rows, place)
    return result


def detect(cfg: DetectionConfig, results: Path | None = None, encoder: Checkpoint | None = None) -> RunResult:
    """Fine-tunes a detector that begins with the encoder `cfg.pretrained_feature_extractor`, or with `untrained` with a
    freshly initialised one.

    The result's `metrics` have val_ap, val_ap50 and val_ap75, which detection.json gets beside those of other
    protocols. Images are normalised as the encoder's were. `results` and `encoder` are as for `linear`.
    """
    if encoder is None and cfg.pretrained_feature_extractor and not cfg.untrained:
        encoder = open_checkpoint(cfg.pretrained_feature_extractor)
    if not cfg.data.augmentations:
        view = evaluation_view((encoder and encoder.config) or {"data": plain(cfg.data)})
        cfg.data.augmentations = ClassificationAugmentationConfig(mean=view["mean"], std=view["std"])
    side, masks = cfg.detector.min_size[-1], cfg.detector.masks
    data = DetectionData(cfg.data, cfg.optimizer.batch_size, cfg.seed, side, masks)
    cfg = prepare(cfg, data)
    backbone, about, place = _encoder(cfg, encoder, data, results)
    view = _view(data)
    model = DetectionModel(
        backbone, data.num_classes, cfg.optimizer, cfg.scheduler, cfg.detector, view["mean"], view["std"], cfg.finetune
    )
    result = fit(cfg, model, data, begin(cfg, runs_folder(cfg) / DETECTORS))
    print_result(result, ("val_ap", "val_ap50", "val_ap75"))
    scores = {name[4:]: value for name, value in result.metrics.items() if name.startswith("val_")}
    _record(DETECTION, cfg, data, about, [scores | _spent(result)], place)
    return result


def knn(cfg: KNNRunConfig, results: Path | None = None, encoder: Checkpoint | None = None) -> list[dict[str, Any]]:
    """Classifies the test images by their nearest training images: {"features", "distance", "k", "T", "acc1", "acc5"}
    for every combination in `cfg.knn_eval`, which knn.json gets, too. `results` and `encoder` are as for `linear`."""
    data = ClassificationData(cfg.data, KNN_BATCH, cfg.seed, augment=False)
    cfg = prepare(cfg, data)
    backbone, about, place = _encoder(cfg, encoder, data, results)
    features = _features(cfg, backbone, data)
    options, rows, recorded = cfg.knn_eval, [], []
    for distance in dict.fromkeys(options.distance_func):
        for temperature in dict.fromkeys(options.T) if distance == "cosine" else [None]:
            votes = "" if temperature is None else f"  T {temperature}"
            found = knn_accuracy(*features, k=options.k, distance=distance, temperature=temperature or 0.07)
            for k, scores in found.items():
                vote = {"features": "backbone", "distance": distance, "k": k, "T": temperature}
                rows.append({**vote, **scores})
                recorded.append({"protocol": vote, **scores})
                print(f"{distance:9}  k {k:<4}{votes}  acc@1 {scores['acc1']:.2f}  acc@5 {scores['acc5']:.2f}")
    _record(KNN, cfg, data, about, recorded, place)
    return rows


def quality(cfg: QualityConfig, results: Path | None = None, encoder: Checkpoint | None = None) -> dict[str, float]:
    """Measures the features of training images without their labels: what `evaluation.quality.quality` gives, which
    quality.json gets, too. `results` and `encoder` are as for `linear`."""
    view = cfg.augmentations[0] if cfg.augmentations else AugmentationConfig(horizontal_flip=ProbConfig(0.5))
    data = PretrainData(cfg.data, [replace(view, num_crops=cfg.views)], KNN_BATCH, cfg.seed)
    cfg.images = min(cfg.images, len(data.train_set))
    data.train_set = data.train_set.evenly(cfg.images)
    data.batch_size = max(1, min(KNN_BATCH // cfg.views, cfg.images))
    cfg = prepare(cfg, data)
    backbone, about, place = _encoder(cfg, encoder, data, results)
    flat = ((i, [torch.stack(views, 1).flatten(0, 1)], y) for i, views, y in data.view_dataloader())
    features, _ = _extracted(cfg, backbone, flat)
    found = measured(features.unflatten(0, (cfg.images, cfg.views)))
    print(hanging("  ".join(f"{name}\xa0{value:.4g}" for name, value in found.items())))
    _record(QUALITY, cfg, data, about, [{**found}], place)
    return found


def _encoder(
    cfg: AnyEvaluation, opened: Checkpoint | None, data: ImageData, results: Path | None
) -> tuple[nn.Module, dict[str, Any], Place]:
    """The frozen encoder to evaluate, what a protocol says of it, and where the results go."""
    if cfg.untrained:
        if cfg.backbone is None:
            raise ConfigError("backbone is missing: which network untrained=true is about")
        check_heads(plain(cfg))
        backbone, source = backbone_of(cfg).eval(), None
        about: dict[str, Any] = {"checkpoint": None, "sha256": None, "branch": "student"}
    else:
        backbone, source, about = _trained(cfg, opened, data)
    assert cfg.backbone is not None  # or the checkpoint would not have been read
    check_sizes(backbone, cfg.backbone.name, data.eval_view[:1], built=True, channels=data.info.channels)
    cfg.encoder = weights_sum(backbone)
    return backbone, about, _place(cfg, source, results)


def _trained(
    cfg: AnyEvaluation, opened: Checkpoint | None, data: ImageData
) -> tuple[nn.Module, Checkpoint, dict[str, Any]]:
    """The encoder of a checkpoint, whose network `cfg` takes over. Warns where `data` shows it images otherwise."""
    if not cfg.pretrained_feature_extractor:
        raise ConfigError("pretrained_feature_extractor is missing (a run folder or checkpoint; or set untrained=true)")
    if opened is None or Path(cfg.pretrained_feature_extractor) not in (opened.path, opened.path.parent):
        opened = open_checkpoint(cfg.pretrained_feature_extractor)
    backbone, _ = load_encoder(opened, plain(cfg), cfg.teacher)
    opened.take()  # the memory
    cfg.branch = "teacher" if cfg.teacher else branch_of(opened.config)
    if opened.config and opened.config.get("backbone"):  # else cfg has said it
        network = network_of(opened.config, plain(cfg.backbone))
        method = network["pretrain_method"]
        if cfg.pretrain_method not in (None, method):
            log.warning("pretrain_method is %s, but the encoder's is %s", cfg.pretrain_method, method)
        cfg.backbone, cfg.pretrain_method = build(BackboneConfig, network["backbone"]), method
    here, trained = _view(data), evaluation_view(opened.config or {})
    if other := [f"{key} {value}, not {here[key]}" for key, value in trained.items() if value != here[key]]:
        log.warning("data.augmentations: the encoder was trained with %s", "; ".join(other))
    name = opened.path.name
    about = {"checkpoint": name, "sha256": Run(opened.path.parent).sha256(name), "other_view": bool(other)}
    return backbone, opened, about | {"branch": cfg.branch or "student"}


def _view(data: ImageData) -> dict[str, Any]:
    return dict(zip(("crop_size", "mean", "std"), plain(data.eval_view), strict=True))


def protocol_of(cfg: AnyEvaluation, data: ImageData) -> dict[str, Any]:
    """All that an evaluation by `cfg` depends on but for its encoder, by full keys, without places and paths."""
    device = data.device
    facts = {
        "data": {**data.record(device), "augmentations": _view(data)},
        "augmented": data.augment,
        "precision": re.sub(r"^(32|64)$", r"\1-true", cfg.pick_precision(warn=False)),
        "devices": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": data.trainer.world_size if data.trainer else 1,
    }
    chosen = {key: value for key, value in flatten(plain(cfg)).items() if not within(key, LEFT_OUT)}
    if subset := chosen.get("data.subset"):
        chosen["data.subset"] = Path(subset).name
    return chosen | flatten(plain(facts))


def _features(
    cfg: AnyEvaluation, backbone: nn.Module, data: ClassificationData
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the training images, then of the test images, on the device."""
    bank = _extracted(cfg, backbone, data.train_dataloader())
    return *bank, *_extracted(cfg, backbone, data.val_dataloader(), warn=False)


def _extracted(cfg: AnyEvaluation, backbone: nn.Module, loader: Iterable, warn: bool = True) -> tuple[Tensor, Tensor]:
    """Features and labels of the images of `loader`, on the device; `warn`: as of `pick_precision`."""
    device, precision = cfg.first_device, cfg.pick_precision(warn)
    layout = not cfg.performance.disable_channel_last
    backbone = backbone.to(device).to(memory_format=torch.channels_last if layout else torch.preserve_format)
    with explained():
        features, labels = extract_features(backbone, loader, device, precision, layout, cfg.keep_features)
    return features if cfg.keep_features == "file" else features.to(device), labels.to(device)


def untrained_folder(cfg: Any) -> Path:
    """The folder of the evaluations of the untrained encoder of `cfg`: of its very network and seed."""
    network = json.dumps(network_of(plain(cfg))["backbone"], sort_keys=True)
    name = f"{cfg.backbone.name.replace('/', '-')}-seed{cfg.seed}-{hashlib.sha256(network.encode()).hexdigest()[:8]}"
    return runs_folder(cfg) / UNTRAINED / name


def _place(cfg: AnyEvaluation, source: Checkpoint | None, results: Path | None) -> Place:
    """Where the results go; ConfigError for the folder of another run."""
    encoder = Run(source.path.parent) if source else None
    if encoder and (results is None or results.resolve() == encoder.dir.resolve()):
        return (encoder, None) if encoder.config else None
    run, args = Run(results or untrained_folder(cfg)), encoder and encoder.config
    if results and (old := run.args):
        keys = ("untrained", "pretrained_feature_extractor")
        if old != args and (args or any(old.get(key) != getattr(cfg, key) for key in keys)):
            raise ConfigError(f"--out: {run.dir} has the args.json of another run; name another folder")
    return run, args or plain(cfg)


def _spent(result: RunResult) -> dict[str, Any]:
    """What a result says of the run that it took."""
    return {"seconds": result.seconds, "run": str(result.dir)}


def _record(
    file: str, cfg: AnyEvaluation, data: ImageData, about: dict[str, Any], results: list[Result], place: Place
) -> None:
    """Adds the results, each with its whole protocol, of which it may have a part of its own."""
    if not place or not is_first():
        return
    whole, (run, args) = protocol_of(cfg, data) | about, place
    rows = [{**row, "protocol": whole | row.get("protocol", {}), "name": cfg.name} for row in results]
    try:
        run.add_results(file, rows, args)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --out takes the results to another folder") from None
