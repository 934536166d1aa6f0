"""What a pre-training will cost and do, before anything is spent: `solo-ext plan`."""

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from torch.nn.modules.batchnorm import _BatchNorm

from solo_ext.data.datasets import DATASETS, dataset_info, load_dataset
from solo_ext.errors import DataError
from solo_ext.methods import METHODS, Method
from solo_ext.optim import LARS
from solo_ext.planning.anatomy import anatomy, crop_sizes
from solo_ext.planning.measure import Measurement, measure_steps
from solo_ext.training.hardware import device_count
from solo_ext.training.pretrain import check_sizes


@dataclass(frozen=True)
class Plan:
    """A pre-training before it begins.

    Attributes:
        crop_sizes: of each view, in pixels.
        anatomy: see `anatomy`.
        images: in the training set; None if that is not known here, because of `images_unknown`.
        batch_size: images per device; times `devices` (of all nodes) and `accumulate` (batches) in an optimizer step.
        steps_per_epoch, steps: optimizer steps; None without `images`.
        lr, effective_lr: as configured, per 256 images, and as the optimizer gets it; likewise the probe's.
        warmup_epochs, warmup_steps: of the learning rates.
        measured: None if it was not asked for.
        seconds: of all optimizer steps; loading of images, validation and kNN come on top.
        warnings: what is allowed but hardly meant, a sentence each.
    """

    name: str
    method: str
    backbone: str
    dataset: str
    crop_sizes: list[int]
    anatomy: dict[str, Any]
    images: int | None
    images_unknown: str | None
    batch_size: int
    devices: int
    accumulate: int
    epochs: int
    steps_per_epoch: int | None
    steps: int | None
    lr: float
    effective_lr: float
    classifier_lr: float | None
    effective_classifier_lr: float | None
    warmup_epochs: float
    warmup_steps: float | None
    measured: Measurement | None
    seconds: float | None
    warnings: list[str]

    def __str__(self) -> str:
        return "\n".join(f"{title:<9} {line}" for title, line in _lines(self))


def plan(cfg: DictConfig, measure: bool = True) -> Plan:
    """Builds the network of the resolved `cfg` and trains it for a few steps on synthetic images; writes nothing.

    Neither the data nor the hardware that `cfg` asks for has to be there.

    Args:
        cfg: of a pre-training.
        measure: take time and memory, on the device at hand.

    Raises:
        ConfigError: a stage that the network lacks, a backbone that cannot take the crops, ...
    """
    method = METHODS[cfg.method](cfg)
    check_sizes(method.backbone, cfg)
    parts = anatomy(method)
    images, unknown = training_images(cfg)
    per_epoch, steps = optimizer_steps(cfg, images)
    complaints = _complaints(cfg, method, images, per_epoch)
    measured = measure_steps(cfg, method) if measure else None
    if measured and not measured.fits:
        complaints.append(
            f"optimizer.batch_size: {cfg.optimizer.batch_size} images take more memory than is free here, on "
            f"{measured.device}"
        )
    o, scheduler = cfg.optimizer, cfg.scheduler
    warmup_epochs = scheduler.warmup_epochs if scheduler.name == "warmup_cosine" else 0
    return Plan(
        name=cfg.name,
        method=cfg.method,
        backbone=cfg.backbone.name,
        dataset=cfg.data.dataset,
        crop_sizes=crop_sizes(cfg),
        anatomy=parts,
        images=images,
        images_unknown=unknown,
        batch_size=o.batch_size,
        devices=_devices(cfg),
        accumulate=cfg.accumulate_grad_batches,
        epochs=cfg.max_epochs,
        steps_per_epoch=per_epoch,
        steps=steps,
        lr=o.lr,
        effective_lr=o.effective_lr,
        classifier_lr=o.classifier_lr,
        effective_classifier_lr=o.effective_classifier_lr,
        warmup_epochs=warmup_epochs,
        warmup_steps=None if steps is None else warmup_epochs * steps / cfg.max_epochs,
        measured=measured,
        seconds=measured.seconds * steps if measured and steps is not None else None,
        warnings=complaints,
    )


# The length of the run, and what is odd about it.


def training_images(cfg: DictConfig) -> tuple[int | None, str | None]:
    """How many there are; or None, and why that is not known. Folders of data sets of a known size are not read."""
    data = cfg.data
    size = dataset_info(data).train_size
    if size is not None:
        return (size if data.fraction == -1 else int(size * data.fraction)), None
    try:
        return len(load_dataset(data, "pretrain")), None
    except DataError as error:
        return None, str(error)


def optimizer_steps(cfg: DictConfig, images: int | None) -> tuple[int | None, int | None]:
    """Optimizer steps of an epoch, and of the run, on so many `images`; None if these are not known."""
    if images is None:
        return None, None
    batches = images // _devices(cfg) // cfg.optimizer.batch_size
    for limit in (cfg.limit_train_batches, cfg.overfit_batches or None):
        if limit is not None:
            batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    epoch = math.ceil(batches / cfg.accumulate_grad_batches)  # the last step of an epoch may have fewer batches
    most = -1 if cfg.max_steps is None else cfg.max_steps
    return epoch, epoch * cfg.max_epochs if most < 0 else min(most, epoch * cfg.max_epochs)


def _devices(cfg: DictConfig) -> int:
    return device_count(cfg) * cfg.num_nodes


def _complaints(cfg: DictConfig, method: Method, images: int | None, steps_per_epoch: int | None) -> list[str]:
    """What is allowed but hardly meant, a sentence each."""
    devices, batch, epochs = _devices(cfg), cfg.optimizer.batch_size, cfg.max_epochs
    found = []
    if frozen := [stage for stage, tau in method.teacher.taus.items() if tau.always(1)]:
        found.append(
            f"momentum: tau of {', '.join(frozen)} is 1 from the first step to the last, so the teacher keeps its "
            "initial weights there; only paper A's frozen target projector (Table 7) wants that"
        )
    if steps_per_epoch == 0 and images // devices < batch:
        found.append(
            f"optimizer.batch_size: an epoch has no step, for {images // devices} images on each device do not fill a "
            f"batch of {batch}"
        )
    elif steps_per_epoch == 0:
        found.append("limit_train_batches: an epoch has no step")
    queue = getattr(cfg.method_kwargs, "queue_size", None)
    if queue and queue % (batch * devices):
        found.append(
            f"method_kwargs.queue_size: {queue} is not divisible by the {batch * devices} images of a batch on all "
            "devices, so the oldest keys are dropped in the middle of a batch; solo-learn refuses that"
        )
    if cfg.scheduler.name == "warmup_cosine" and cfg.scheduler.warmup_epochs >= epochs:
        found.append(
            f"scheduler.warmup_epochs: a warm-up of {cfg.scheduler.warmup_epochs:g} epochs takes the whole run of "
            f"{epochs}, so the learning rate never decays"
        )
    if cfg.optimizer.name == "lars" and (printed := DATASETS[cfg.data.dataset].lars_eta):
        low, high = printed
        eta = cfg.optimizer.kwargs.get("eta", inspect.signature(LARS).parameters["eta"].default)
        if not low <= eta <= high:
            found.append(
                f"optimizer.kwargs.eta: {eta:g} is not the trust coefficient that the papers and solo-learn print for "
                f"{cfg.data.dataset}: {low:g}" + (f" to {high:g}" if high > low else "")
            )
    if devices > 1 and not cfg.sync_batchnorm and any(isinstance(module, _BatchNorm) for module in method.modules()):
        found.append(
            f"sync_batchnorm: false, so each of {devices} devices normalises by its own images; solo-learn's recipes "
            "for several devices have it true"
        )
    return found


# What a person reads.


def _lines(p: Plan) -> Iterator[tuple[str, str]]:
    """(title, line) of the printed plan."""
    a = p.anatomy
    views = " + ".join(f"{n} of {size} px" for size, n in Counter(p.crop_sizes).items())
    yield "run", f"{p.name}: {p.method}, {p.backbone} on {p.dataset}, views: {views}"
    yield "student", f"{a['student_parameters']:,} parameters, without probes"
    yield (
        "teacher",
        (
            f"{a['teacher_parameters']:,} parameters, {a['teacher_layers']} weight layers with EMA"
            if a["teacher_parameters"]
            else "none"
        ),
    )
    others = [name for names in a["teacher_tensors"].values() for name in names]
    for stage, names in a["teacher_tensors"].items():
        where = ", ".join(_prefixes(names, [name for name in others if name not in names]))
        yield "", f"{stage:<20} {_say_tau(**a['teacher_tau'][stage]):<22} {len(names):3} tensors  {where}"
    again = a["teacher_backbone_stages"]
    share = f" ({len(again)} of {len(a['backbone_stages'])} stages: {', '.join(again)})" if again else ""
    yield (
        "forwards",
        (
            f"{a['forwards_per_view']:g} through the backbone per view: student {a['student_forwards']:g}, "
            f"teacher {a['teacher_forwards']:g}{share}; {a['parameters_millions']:.1f} M parameters in all backbones"
        ),
    )
    step = p.batch_size * p.devices * p.accumulate
    yield "data", f"{p.images:,} images" if p.images is not None else f"unknown number of images: {p.images_unknown}"
    yield (
        "steps",
        (
            f"{step:,} images each (batch size {p.batch_size}, devices {p.devices}, accumulated batches {p.accumulate})"
            + (f"; {p.steps_per_epoch:,} an epoch, {p.steps:,} in {p.epochs} epochs" if p.images is not None else "")
        ),
    )
    warmup = f"{p.warmup_epochs:g} epochs" + ("" if p.warmup_steps is None else f" = {p.warmup_steps:,.0f} steps")
    yield "lr", f"{p.effective_lr:g} (configured: {p.lr:g} per 256 images); warm-up {warmup}"
    if p.effective_classifier_lr is not None:
        yield "", f"of the probe {p.effective_classifier_lr:g} (configured: {p.classifier_lr:g})"
    if m := p.measured:
        scaled = f", measured with {m.images} images and scaled to {p.batch_size}" if m.images < p.batch_size else ""
        yield "device", f"{m.device}, {m.precision}{scaled}"
        low, high = m.quartiles
        spread = f"median of {m.steps}, quartiles {_time(low)} and {_time(high)}"
        alone = "" if p.devices == 1 else "; on one device, without what devices exchange"
        yield "step time", f"{_time(m.seconds)} ({spread}){alone}"
        yield "memory", "unknown" if m.memory is None else f"{m.memory / 2**30:.2f} GiB at the peak ({m.memory_of})"
        whole = "unknown" if p.seconds is None else _time(p.seconds)
        yield "run time", f"{whole}, without loading images, validation and kNN"
    for warning in p.warnings:
        yield "warning", warning


def _say_tau(base: float, final: float, schedule: str) -> str:
    if schedule == "constant":
        return f"tau {base:g}" + (", shared" if base == 0 else "")
    return f"tau {base:g} to {final:g}, {schedule}"


def _prefixes(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The shortest paths, of at least two words, that stand for all of `names` and none of `others`."""
    found = {}
    for name in names:
        words = name.split(".")
        paths = (".".join(words[:i]) for i in range(2, len(words) + 1))
        found[next(path for path in paths if not any(f"{other}.".startswith(f"{path}.") for other in others))] = None
    return list(found)


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for unit, size in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < 2 * size:
            return f"{seconds:.3g} {unit}"
        seconds /= size if unit != "h" else 24
    return f"{seconds:,.0f} days"
