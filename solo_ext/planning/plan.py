"""What a pre-training or a detector consists of and will cost, before anything is spent: `solo-ext plan`."""

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import ResNet

from solo_ext.data.boxes import BoxSet
from solo_ext.data.datasets import DATASETS, IMAGENET_MEAN, IMAGENET_STD, dataset_info, load_dataset
from solo_ext.errors import ConfigError, DataError
from solo_ext.evaluation.detection import DetectionModel
from solo_ext.methods import METHODS, backbone_of
from solo_ext.methods.module import LightningMethod
from solo_ext.networks.backbones import check_sizes
from solo_ext.networks.stages import Stage
from solo_ext.optim import LARS, OptimizerConfig
from solo_ext.planning.measure import crop_sizes, measure_steps, photograph_size
from solo_ext.runs.encoder import load_encoder
from solo_ext.schema import plain
from solo_ext.text import duration
from solo_ext.training import recipes
from solo_ext.training.compose import compose
from solo_ext.training.config import DetectionConfig, PretrainConfig, resolve

OPTIMIZER_KEYS = ("batch_size", "lr", "effective_lr", "classifier_lr", "effective_classifier_lr")


def plan(cfg: PretrainConfig | DetectionConfig, measure: bool = True) -> dict[str, Any]:
    """Builds the network of the resolved `cfg` and trains it for a few steps on synthetic images; writes nothing.

    Neither the data nor the hardware that `cfg` names has to be there, only a detector's encoder, if it names one;
    `measure` takes this machine's device. ConfigError: a stage that the network lacks, a backbone that cannot take the
    crops, ...

    Returns plain values, as `solo-ext plan --json` prints them. `batch_size` is per device: an optimizer step has it
    times `devices` (of all nodes) times `accumulate` images. `images` of the training set, and with it the numbers of
    steps, is None if it is unknown here, for the reason `images_unknown`; `steps` is then `max_steps`, if there is one.
    `seconds` is the time of all steps, `evaluating` that of the backbone in validations and online kNN, None where the
    number of images is unknown. `warnings`, a sentence each, are about what is allowed but probably not
    intended.
    """
    images, unknown, classes = _images(cfg)
    model: Any
    if isinstance(cfg, DetectionConfig):
        model, own = _detector(cfg, classes)
    else:
        model = METHODS[cfg.method](cfg)
        check_sizes(model.backbone, cfg.backbone.name, crop_sizes(cfg), channels=dataset_info(cfg.data).channels)
        own = {"method": cfg.method, "crop_sizes": crop_sizes(cfg), "anatomy": anatomy(model)}
    p: dict[str, Any] = {
        "name": cfg.name,
        "backbone": cfg.backbone.name,
        "dataset": cfg.data.dataset,
        **own,
        "devices": cfg.processes,
        "accumulate": cfg.accumulate_grad_batches,
        "epochs": cfg.max_epochs,
        "images": images,
        "images_unknown": unknown,
        **_length(cfg, images),
        **{key: getattr(cfg.optimizer, key) for key in OPTIMIZER_KEYS},
        "measured": measure_steps(cfg, model) if measure else None,
    }
    s, steps, measured = cfg.scheduler, p["steps"], p["measured"]
    p["warmup_epochs"] = warmup = s.warmup_epochs if s.name == "warmup_cosine" else 0
    p["warmup_steps"] = None if images is None else warmup * steps / cfg.max_epochs
    if s.name == "warmup_step":
        p |= {"warmup_steps": s.warmup_steps, "decay_steps": s.lr_decay_steps}
    p["seconds"] = measured["seconds"] * steps if measured and steps is not None else None
    evaluated = _evaluated(cfg, p) if isinstance(cfg, PretrainConfig) and p["steps_per_epoch"] else None
    p["evaluating"] = evaluated * measured["forward"] if measured and evaluated is not None else None
    return p | {"warnings": list(_warnings(p, cfg, model))}


def _images(cfg: PretrainConfig | DetectionConfig) -> tuple[int | None, str | None, int]:
    """The number of training images, or why it is unknown, and of the classes of their boxes; those of a dataset of
    known size are not read."""
    data, size = cfg.data, dataset_info(cfg.data).train_size
    if size and not data.val_fraction:
        return int(size * (1 if data.fraction == -1 else data.fraction)), None, 0
    try:
        found = load_dataset(data, "pretrain")
    except DataError as error:
        return None, str(error), dataset_info(data).box_classes
    return len(found), None, len(found.classes) if isinstance(found, BoxSet) else 0


def _detector(cfg: DetectionConfig, classes: int) -> tuple[DetectionModel, dict[str, Any]]:
    """For images of the largest size alone, to which a batch is padded, and what it consists of."""
    if not classes:
        having = ", ".join(name for name, info in DATASETS.items() if info.box_classes)
        raise DataError(f"data.dataset: '{cfg.data.dataset}' has no boxes (one of {having})")
    source = None if cfg.untrained else cfg.pretrained_feature_extractor
    backbone = load_encoder(source, plain(cfg), cfg.teacher)[0] if source else backbone_of(cfg)
    largest = replace(cfg.detector, min_size=[max(cfg.detector.min_size)])
    options = cfg.optimizer, cfg.scheduler, largest, IMAGENET_MEAN, IMAGENET_STD, cfg.finetune
    model = DetectionModel(backbone, classes, *options)
    about = {"detector": plain(cfg.detector), "classes": classes, "encoder": source, "finetune": cfg.finetune}
    weights = {"": model.parameters(), "encoder_": backbone.parameters()}
    weights["trained_"] = (weight for weight in model.parameters() if weight.requires_grad)
    about |= {f"{part}parameters": sum(map(Tensor.numel, some)) for part, some in weights.items()}
    return model, about | {"measured_size": photograph_size(cfg)}


def _length(cfg: PretrainConfig | DetectionConfig, images: int | None) -> dict[str, Any]:
    """Optimizer steps."""
    if images is None:
        return {"steps_per_epoch": None, "steps": None if cfg.max_steps == -1 else cfg.max_steps}
    batches = images // cfg.processes // cfg.optimizer.batch_size
    for limit in (cfg.limit_train_batches, cfg.overfit_batches or None):
        if limit is not None:
            batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    epoch = math.ceil(batches / cfg.accumulate_grad_batches)  # the last step of an epoch may have fewer batches
    steps = epoch * cfg.max_epochs
    steps = steps if cfg.max_steps in (None, -1) else min(steps, cfg.max_steps)
    return {"steps_per_epoch": epoch, "steps": steps}


def _evaluated(cfg: PretrainConfig, p: dict[str, Any]) -> float | None:
    """How many images each device classifies in validations and online kNN; None if the test images are not known."""
    info, knn = dataset_info(cfg.data), getattr(cfg, "knn_eval", None)
    if info.test_size is None or info.train_size is None:
        return None
    test = info.train_size * cfg.data.val_fraction or info.test_size
    epochs = p["steps"] / p["steps_per_epoch"]
    rounds = epochs // (cfg.check_val_every_n_epoch or 1)
    probed = min(rounds, math.ceil(epochs / knn.every)) if knn and knn.enabled else 0
    return (rounds * test + probed * (p["images"] + test)) / p["devices"]


def anatomy(method: LightningMethod) -> dict[str, Any]:
    """What the built `method` consists of, and how often a training step runs its backbone.

    Parameters are counted without the probes. Backbone passes are per view, and a part of the backbone counts as its
    share of the stages. ProjectorEMA's Table 4 prints `teacher_layers` (see `_layers`), `parameters_millions` (the
    backbones of student and teacher) as "Params (MB)" and `forwards_per_view` as "#Fwd".
    """
    teacher = method.teacher
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    copies = {stage: stage.parameters(teacher.pair(stage)[0]) for stage in teacher.stages}
    row = [stage for stage in teacher.row if stage.part == "backbone"]
    copied = [stage for stage in row if stage in copies]
    student = chain(*(method.part(name).parameters() for name in method.parts))
    backbones = chain(method.backbone.parameters(), *(copies[stage] for stage in copied))
    views = method.large_crops + (method.cfg.data.num_small_crops or 0)
    passes = method.passes(views, method.intra.active(0))
    student_forwards = len(passes.student) / views
    teacher_forwards = len(passes.teacher) / views * len(copied) / len(row)
    return {
        "student_parameters": sum(map(Tensor.numel, student)),
        "teacher_parameters": sum(map(Tensor.numel, chain(*copies.values()))),
        "teacher_tensors": {stage.name: [names[id(tensor)] for tensor in copies[stage]] for stage in copies},
        "teacher_tau": {stage: str(tau) for stage, tau in teacher.taus.items()},
        "teacher_layers": _layers(method, row),
        "parameters_millions": sum(map(Tensor.numel, backbones)) / 1e6,
        "backbone_stages": [stage.name for stage in row],
        "teacher_backbone_stages": [stage.name for stage in copied],
        "student_forwards": student_forwards,
        "teacher_forwards": teacher_forwards,
        "forwards_per_view": student_forwards + teacher_forwards,
    }


def _layers(method: LightningMethod, row: Sequence[Stage]) -> int:
    """Convolutions and linear layers with an EMA copy; tau 0 does not count. `row`: the backbone's stages.

    The paper's 53 and 21 are 50 + 3 and 18 + 3: the number in a ResNet's name, which leaves out the convolutions of the
    shortcuts and counts the classification layer, removed here; and 3 layers of DINO's head, without its prototypes.
    """
    teacher = method.teacher
    averaged = [stage for stage in teacher.stages if not teacher.taus[stage.name].always(0)]
    layers = [
        path
        for stage in averaged
        for path, layer in teacher.pair(stage)[0].named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and stage.holds(path) and "downsample" not in path
    ]
    return len(layers) + (isinstance(method.backbone, ResNet) and all(stage in averaged for stage in row))


def _methods_warnings(p: dict[str, Any], cfg: PretrainConfig, method: LightningMethod) -> Iterator[str]:
    taus = method.teacher.taus
    if frozen := [stage for stage, tau in taus.items() if tau.always(1)]:
        yield f"momentum: tau of {', '.join(frozen)} is always 1, which keeps initial weights (ProjectorEMA, Table 7)"
    parts = {stage.part for stage in method.row if stage.name in taus and not taus[stage.name].always(0)}
    if "backbone" in parts and "projector" not in parts and "predictor" not in method.parts:
        what = f"momentum.stages: {cfg.momentum.stages}, without the projector; {p['method']}, which has no predictor,"
        yield f"{what} collapses by that (docs/results/projector_ema_table3.md)"
    if (queue := getattr(method.kwargs, "queue_size", 0)) % (images := p["batch_size"] * p["devices"]):
        yield f"method_kwargs.queue_size: {queue} is not divisible by the {images} images of a batch on all devices"
    if p["epochs"] <= p["warmup_epochs"]:
        yield f"scheduler.warmup_epochs: {p['warmup_epochs']:g} are the whole run, so the learning rate never decays"
    if (eta := _trust(cfg.optimizer)) is not None and (usual := _recipes_trust(cfg)) not in (None, eta):
        yield f"optimizer.kwargs.eta: {eta:g}, where the recipe of {p['method']} for {p['dataset']} has {usual:g}"


def _warnings(p: dict[str, Any], cfg: Any, model: Any) -> Iterator[str]:
    devices, batch, measured, steps = p["devices"], p["batch_size"], p["measured"], p["steps"]
    if p["steps_per_epoch"] == 0:
        share = p["images"] // devices
        few = f"optimizer.batch_size: the {share} images on each device do not fill a batch of {batch}, so an epoch"
        yield f"{few if share < batch else 'limit_train_batches: an epoch'} has no step"
    if isinstance(cfg, PretrainConfig):
        yield from _methods_warnings(p, cfg, model)
    elif batch * (devices if cfg.sync_batchnorm else 1) == 1:
        yield "optimizer.batch_size: 1, so that each BatchNorm sees one image; take 2, or sync_batchnorm with devices"
    if steps and steps <= (last := max(p.get("decay_steps") or [0])):
        yield f"scheduler.lr_decay_steps: {last:,} is not reached in {steps:,} steps"
    if devices > 1 and not cfg.sync_batchnorm and any(isinstance(module, _BatchNorm) for module in model.modules()):
        yield f"sync_batchnorm: false, so that each of {devices} devices normalises by its own images"
    if measured and not measured["fits"]:
        yield f"optimizer.batch_size: {batch} images take more memory than is free here, on {measured['device']}"


def _trust(optimizer: OptimizerConfig) -> float | None:
    """The trust coefficient of LARS."""
    default = inspect.signature(LARS).parameters["eta"].default
    return optimizer.kwargs.get("eta", default) if optimizer.name == "lars" else None


def _recipes_trust(cfg: PretrainConfig) -> float | None:
    """That in the method's recipe for the dataset, if there is one: it differs between datasets."""
    with suppress(ConfigError):
        file = recipes.find(f"{cfg.data.dataset}/{cfg.method}")
        return _trust(resolve(compose(file.parent, file.name)).optimizer)
    return None


def describe(p: dict[str, Any]) -> str:
    """A plan, for a reader."""
    return "\n".join(f"{title:<9} {line}" for title, line in _lines(p))


def _lines(p: dict[str, Any]) -> Iterator[tuple[str, str]]:
    m, known, detector = p["measured"], p["images"] is not None, "detector" in p
    yield from (_detectors_lines if detector else _methods_lines)(p)
    yield "data", f"{p['images']:,} images" if known else f"unknown number of images: {p['images_unknown']}"
    images = p["batch_size"] * p["devices"] * p["accumulate"]
    factors = f"batch size {p['batch_size']}, devices {p['devices']}, accumulated batches {p['accumulate']}"
    most = "" if p["steps"] is None else f"; {p['steps']:,} at most"
    length = f"; {p['steps_per_epoch']:,} an epoch, {p['steps']:,} in {p['epochs']} epochs" if known else most
    yield "steps", f"{images:,} images each ({factors}){length}"
    warmup = f"{p['warmup_epochs']:g} epochs" + (f" = {p['warmup_steps']:,.0f} steps" if known else "")
    if decay := p.get("decay_steps"):
        warmup = f"{p['warmup_steps']:,} steps, a tenth from step {', again from '.join(f'{n:,}' for n in decay)}"
    yield "lr", f"{p['effective_lr']:g} (configured: {p['lr']:g} per 256 images); warm-up {warmup}"
    if p["effective_classifier_lr"] is not None:
        yield "", f"of the probe {p['effective_classifier_lr']:g} (configured: {p['classifier_lr']:g})"
    if m:
        fewer = m["images"] < p["batch_size"]
        scaled = f", measured with {m['images']} images and scaled to {p['batch_size']}" if fewer else ""
        scaled += f"; images of {' x '.join(map(str, p['measured_size']))} px" if detector else ""
        yield "device", f"{m['device']}, {m['precision']}{scaled}"
        spread = f"median of {m['steps']}, quartiles {' and '.join(map(duration, m['quartiles']))}"
        yield "step time", f"{duration(m['seconds'])} ({spread}){'; on one device alone' * (p['devices'] > 1)}"
        yield "memory", f"{m['memory'] / 2**30:.2f} GiB at the peak ({m['memory_of']})"
        whole = "unknown" if p["seconds"] is None else duration(p["seconds"]) + " at most" * (not known)
        if (evaluating := p["evaluating"]) is None:
            yield "run time", f"{whole}, without loading images{' and tests' if detector else ', validation and kNN'}"
        else:
            share = f"{evaluating / (evaluating + p['seconds']):.1%}"
            yield (
                "run time",
                f"{duration(p['seconds'] + evaluating)}, without loading images; validation and kNN {share}",
            )
    yield from (("warning", warning) for warning in p["warnings"])


def _methods_lines(p: dict[str, Any]) -> Iterator[tuple[str, str]]:
    a = p["anatomy"]
    views = " + ".join(f"{count} of {size} px" for size, count in Counter(p["crop_sizes"]).items())
    yield "run", f"{p['name']}: {p['method']}, {p['backbone']} on {p['dataset']}, views: {views}"
    yield "student", f"{a['student_parameters']:,} parameters, without probes"
    layers = f"{a['teacher_layers']} weight layer{'s' * (a['teacher_layers'] != 1)}"
    copies = f"{a['teacher_parameters']:,} parameters, {layers} with EMA"
    yield "teacher", copies if a["teacher_parameters"] else "none"
    for stage, names in a["teacher_tensors"].items():
        yield "", f"{stage:<20} tau {a['teacher_tau'][stage]:<18} {len(names):3} tensors, first {names[0]}"
    again = a["teacher_backbone_stages"] if a["teacher_forwards"] else []
    share = f" ({len(again)} of {len(a['backbone_stages'])} stages: {', '.join(again)})" if again else ""
    passes = f"student {a['student_forwards']:g}, teacher {a['teacher_forwards']:g}{share}"
    parameters = f"{a['parameters_millions']:.1f} M parameters in all backbones"
    yield "forwards", f"{a['forwards_per_view']:g} through the backbone per view: {passes}; {parameters}"


def _detectors_lines(p: dict[str, Any]) -> Iterator[tuple[str, str]]:
    d, sides = p["detector"], sorted(p["detector"]["min_size"])
    kind = f"{'Mask' if d['masks'] else 'Faster'} R-CNN, {d['head'].upper()}"
    yield "run", f"{p['name']}: {kind}, {p['classes']} classes{' assumed' * (p['images'] is None)}, on {p['dataset']}"
    yield "detector", f"{p['parameters']:,} parameters, {p['trained_parameters']:,} of them trained"
    begins, stays = p["encoder"] or "with random weights", "trained" if p["finetune"] else "left as they are"
    yield "encoder", f"{p['backbone']}, {begins}: {p['encoder_parameters']:,} of these parameters, {stays}"
    shorter = " to ".join(str(side) for side in dict.fromkeys((sides[0], sides[-1])))
    yield "sizes", f"shorter side {shorter} px, {d['min_size'][-1]} in a test; longer side {d['max_size']} px at most"
