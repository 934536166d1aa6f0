"""What a pre-training will cost and do, before anything is spent: `solo-ext plan`."""

import copy
import ctypes
import gc
import inspect
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from torchvision.models.resnet import ResNet

from solo_ext.data.config import DataConfig
from solo_ext.data.datasets import dataset_info, load_dataset
from solo_ext.data.loader import identity
from solo_ext.errors import ConfigError, DataError
from solo_ext.methods import METHODS, Method
from solo_ext.momentum import Tau
from solo_ext.networks import Stage
from solo_ext.optim import LARS
from solo_ext.runtime.environment import environment
from solo_ext.runtime.hardware import device_count
from solo_ext.runtime.precision import pick_precision
from solo_ext.runtime.resume import plain
from solo_ext.runtime.run import _check_sizes, _explained, _quietly, _trainer
from solo_ext.schema import section

SMALL_CROP = 32  # pixels, where no augmentations say how large the views are
WARM_UP, LEAST, STEPS = 3, 3, 10  # optimizer steps: before those that count, and how few and many of these
SECONDS = 30.0  # after which LEAST steps are enough
PROBE = 8  # images of a first try, where running out of memory would end the process
# of the Trainer's arguments, those that change what a step does
STEP_KEYS = ("max_epochs", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark")
# data set -> the smallest and the largest trust coefficient that the papers and solo-learn print
LARS_ETA = {"cifar10": (0.02, 0.02), "cifar100": (0.02, 0.02), "imagenet100": (0.02, 0.02), "imagenet": (0.001, 0.002)}


@dataclass(frozen=True)
class Measurement:
    """Training steps on synthetic images: forward, backward, optimizer and teacher, run by the trainer.

    Attributes:
        device: its model, and a CPU's number of threads.
        precision: Lightning's name of it, on this device.
        images: in a batch; fewer than asked for where those do not fit or take too long, and the rest is scaled.
        steps: how many optimizer steps `seconds` and `quartiles` are of.
        seconds: of an optimizer step with the full batch, the median.
        quartiles: the first and the third.
        memory: peak in bytes with the full batch; None where it cannot be measured.
        memory_of: what that is the peak of.
        fits: whether the full batch fits the memory that is free here, as far as that can be known.
    """

    device: str
    precision: str
    images: int
    steps: int
    seconds: float
    quartiles: tuple[float, float]
    memory: int | None
    memory_of: str
    fits: bool


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
    _check_sizes(method.backbone, cfg)
    parts = anatomy(method)
    images, unknown = training_images(cfg)
    per_epoch, steps = optimizer_steps(cfg, images)
    complaints = _complaints(cfg, method, images, per_epoch)
    measured = _measure(cfg, method) if measure else None
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


def anatomy(method: Method) -> dict[str, Any]:
    """What the built `method` consists of, and how often it runs its backbone; measured on a synthetic step.

    Neither `method` nor the global random state is changed.

    Returns:
        student_parameters: of backbone and heads, without the probes.
        teacher_parameters: of the teacher's copies.
        teacher_tensors: {stage: names of its parameters in the method's state_dict}; stages in order.
        teacher_tau: {stage: {"base", "final", "schedule"}}; 0, constant: a copy of the student ("sharing").
        teacher_layers: weight layers with an EMA copy, counted as paper A does (Sec. 5, Table 4); see `_layers`.
        parameters_millions: of all backbones, student's and teacher's: paper A, Table 4, "Params (MB)".
        backbone_stages, teacher_backbone_stages: their names; those of which the teacher has copies.
        student_forwards, teacher_forwards: passes through the backbone per view, as the share of its stages that ran.
        forwards_per_view: their sum: paper A, Table 4, "#Fwd".
    """
    teacher = method.teacher
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    owned = {stage: stage.parameters(teacher.pair(stage)[0]) for stage in teacher.stages}
    row = [stage for stage in teacher.row if stage.part == "backbone"]
    student = [parameter for name in method.parts for parameter in method.part(name).parameters()]
    backbones = [*method.backbone.parameters(), *(p for stage in row for p in owned.get(stage, ()))]
    student_passes, teacher_passes = _backbone_passes(method, row)
    return {
        "student_parameters": _count(student),
        "teacher_parameters": _count(parameter for parameters in owned.values() for parameter in parameters),
        "teacher_tensors": {stage.name: [names[id(tensor)] for tensor in owned[stage]] for stage in owned},
        "teacher_tau": {stage: asdict(tau) for stage, tau in teacher.taus.items()},
        "teacher_layers": _layers(method, row),
        "parameters_millions": _count(backbones) / 1e6,
        "backbone_stages": [stage.name for stage in row],
        "teacher_backbone_stages": [stage.name for stage in row if stage in owned],
        "student_forwards": student_passes,
        "teacher_forwards": teacher_passes,
        "forwards_per_view": student_passes + teacher_passes,
    }


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _layers(method: Method, row: Sequence[Stage]) -> int:
    """Convolutions and linear layers with an EMA copy.

    The paper's 53 and 21 are 50 + 3 and 18 + 3: a ResNet's own number, which leaves out the convolutions of its
    shortcuts and counts the classification layer, here removed; and the 3 layers of DINO's head, whose prototypes
    (weight-normed, no `nn.Linear`) it leaves out. Copies with tau 0 do not count.

    row: the backbone's stages.
    """
    teacher = method.teacher
    averaged = [stage for stage in teacher.stages if not _is_constant(teacher.taus[stage.name], 0)]
    layers = [
        path
        for stage in averaged
        for path, layer in teacher.pair(stage)[0].named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and stage.holds(path) and "downsample" not in path
    ]
    return len(layers) + (isinstance(method.backbone, ResNet) and all(stage in averaged for stage in row))


def _is_constant(tau: Tau, value: float) -> bool:
    """Whether `tau` is `value` from the first update to the last."""
    return tau.base == value and (tau.schedule == "constant" or tau.final == value)


def _backbone_passes(method: Method, row: Sequence[Stage]) -> tuple[float, float]:
    """(student's, teacher's) backbone passes per view in one training step, as shares of the stages in `row`."""
    step = copy.deepcopy(method).train()
    step.gap = replace(step.gap, enabled=False)  # the gap is measured now and then, not in every step
    images = Counter()

    def count(who: str, stage: Stage, part: nn.Module) -> None:
        first = attrgetter(stage.steps[0])(part) if stage.steps else part
        first.register_forward_pre_hook(lambda _, inputs: images.update({who: len(inputs[0])}))

    for stage in row:
        count("student", stage, step.backbone)
        if stage in step.teacher.stages:
            count("teacher", stage, step.teacher.pair(stage)[0])
    batch = synthetic_batch(step.cfg, 2, next(step.parameters()).device)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # Lightning's, that nobody hears what the step logs
        step.training_step(batch, 0)
    whole = len(row) * sum(map(len, batch[1]))
    return images["student"] / whole, images["teacher"] / whole


def crop_sizes(cfg: Any) -> list[int]:
    """The side of each view in pixels."""
    augmentations = cfg.get("augmentations")
    if not augmentations:
        return [SMALL_CROP] * OmegaConf.select(cfg, "data.num_large_crops", default=2)
    return [view.crop_size for view in augmentations for _ in range(view.get("num_crops", 1))]


def synthetic_batch(cfg: Any, images: int, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
    """A batch of random images as `cfg` has them: (indexes [B], views [B, 3, H, W], targets [B])."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(images, 3, side, side, generator=generator).to(device) for side in crop_sizes(cfg)]
    classes = cfg.data.get("num_classes") or 0
    targets = torch.randint(classes, (images,), generator=generator) if classes else torch.full((images,), -1)
    return torch.arange(images, device=device), views, targets.to(device)


# The length of the run, and what is odd about it.


def training_images(cfg: DictConfig) -> tuple[int | None, str | None]:
    """How many there are; or None, and why that is not known. Folders of data sets of a known size are not read."""
    data = section(DataConfig, cfg.data, "data")
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
    for limit in (cfg.get("limit_train_batches"), cfg.get("overfit_batches") or None):
        if limit is not None:
            batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    epoch = math.ceil(batches / cfg.accumulate_grad_batches)  # the last step of an epoch may have fewer batches
    most = cfg.get("max_steps", -1)
    return epoch, epoch * cfg.max_epochs if most < 0 else min(most, epoch * cfg.max_epochs)


def _devices(cfg: DictConfig) -> int:
    return device_count(cfg) * cfg.num_nodes


def _complaints(cfg: DictConfig, method: Method, images: int | None, steps_per_epoch: int | None) -> list[str]:
    """What is allowed but hardly meant, a sentence each."""
    devices, batch, epochs = _devices(cfg), cfg.optimizer.batch_size, cfg.max_epochs
    found = []
    if frozen := [stage for stage, tau in method.teacher.taus.items() if _is_constant(tau, 1)]:
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
    queue = cfg.method_kwargs.get("queue_size")
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
    if cfg.optimizer.name == "lars" and cfg.data.dataset in LARS_ETA:
        low, high = LARS_ETA[cfg.data.dataset]
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


# Time and memory.


class _Clock(pl.Callback):
    """Seconds of every batch: of those that end with an optimizer step, and of those that only accumulate."""

    def __init__(self):
        self.stepping: list[float] = []
        self.waiting: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, i: int) -> None:
        self.step, self.began = trainer.global_step, _now(module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        stepped = trainer.global_step > self.step
        (self.stepping if stepped else self.waiting).append(_now(module.device) - self.began)
        if stepped and len(self.stepping) >= WARM_UP + LEAST and sum(self.stepping) + sum(self.waiting) > SECONDS:
            trainer.should_stop = True


def _now(device: torch.device) -> float:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class _Trial:
    """A few optimizer steps: seconds of each, peak and lasting (weights, gradients, optimizer) bytes, where."""

    seconds: list[float]
    peak: int | None
    lasting: int
    device: torch.device


def _measure(cfg: DictConfig, method: Method) -> Measurement:
    """Time and memory of a step at `optimizer.batch_size`, or at fewer images and scaled."""
    accelerator = "cpu" if cfg.accelerator == "cpu" else "auto"
    gpu = accelerator == "auto" and torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if gpu else _free_memory()
    precision = pick_precision(cfg.precision, accelerator)
    images = asked = cfg.optimizer.batch_size
    trial, warm_up = None, WARM_UP
    if not gpu and asked > PROBE:
        probe = _try(cfg, method, PROBE, 3, accelerator, precision)
        # measuring one batch of an accumulated step, and one that steps, is enough
        batches = min(cfg.accumulate_grad_batches, 2) / cfg.accumulate_grad_batches
        most = SECONDS / ((WARM_UP + LEAST) * batches * min(probe.seconds))
        if probe.peak and free:
            most = min(most, (0.8 * free - probe.lasting) / max(probe.peak - probe.lasting, 1))
        images = min(asked, max(PROBE, int(PROBE * most)))
        if images == PROBE:
            trial, warm_up = probe, 1
    while not trial and not (trial := _try(cfg, method, images, WARM_UP + STEPS, accelerator, precision)):
        images //= 2
        if images < 2:
            raise ConfigError(f"backbone.name: {cfg.backbone.name} does not fit this GPU's memory")
    scale = asked / images
    seconds = [scale * step for step in trial.seconds[warm_up:]]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    memory = None if trial.peak is None else round(trial.lasting + scale * (trial.peak - trial.lasting))
    return Measurement(
        device=torch.cuda.get_device_name(trial.device) if gpu else _cpu(trial.device),
        precision=precision,
        images=images,
        steps=len(seconds),
        seconds=median,
        quartiles=(low, high),
        memory=memory,
        memory_of="torch.cuda.max_memory_allocated" if gpu else "the process, beyond what it took before",
        fits=not ((gpu and images < asked) or (memory and free and memory > free)),
    )


def _try(cfg: DictConfig, method: Method, images: int, steps: int, accelerator: str, precision: str) -> _Trial | None:
    """Trains `method` for so many optimizer steps on batches of so many images; None if they do not fit the GPU."""
    accumulate = min(cfg.accumulate_grad_batches, 2)  # of the batches that only accumulate, one speaks for all
    values = {key: value for key, value in plain(cfg).items() if key in STEP_KEYS}
    values |= {"accelerator": accelerator, "precision": precision, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    values |= {"max_steps": steps, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    values |= {"enable_progress_bar": False}
    size = SimpleNamespace(train_set=range(images * steps), batch_size=images)
    clock = _Clock()
    with _quietly(), _explained():
        trainer = _trainer(OmegaConf.create(values), Path(), size, [clock])
        device = trainer.strategy.root_device
        if not cfg.performance.disable_channel_last:
            method = method.to(memory_format=torch.channels_last)
        method.zero_grad(set_to_none=True)
        weights = _bytes(method.state_dict().values())
        before = _reset_peak(device)
        batches = [synthetic_batch(cfg, images, device)] * (steps * accumulate)
        try:
            trainer.fit(method, DataLoader(batches, batch_size=None, collate_fn=identity))
        except torch.OutOfMemoryError:
            return None
        peak = _peak(device, before)
    states = [tensor for state in trainer.optimizers[0].state.values() for tensor in state.values()]
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    lasting = weights + _bytes(tensor for tensor in [*states, *gradients] if isinstance(tensor, Tensor))
    if peak is not None and device.type == "cpu":
        peak += weights  # they were there before
    waiting = clock.waiting or [0.0] * len(clock.stepping)
    more = cfg.accumulate_grad_batches - 1
    seconds = [step + more * wait for step, wait in zip(clock.stepping, waiting, strict=True)]
    return _Trial(seconds, peak, lasting, device)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _reset_peak(device: torch.device) -> int | None:
    """Has the peak of the memory in use measured from now on; on a CPU, the bytes in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if device.type == "cpu":
        with suppress(OSError, AttributeError):  # glibc keeps what was freed; Linux, the process' former peak
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            return _kilobytes("/proc/self/status", "VmRSS")
    return None


def _peak(device: torch.device, before: int | None) -> int | None:
    """The peak in bytes since `_reset_peak`, of a CPU beyond what that gave; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _kilobytes("/proc/self/status", "VmHWM")
    return None if before is None or peak is None else peak - before


def _kilobytes(file: str, name: str) -> int | None:
    """The line `name: 123 kB` of a file of Linux, in bytes."""
    with suppress(OSError, StopIteration):
        lines = Path(file).read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    return None


def _free_memory() -> int | None:
    """Bytes that this process may still take, by the machine and by its control group; None if not on Linux."""
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    with suppress(OSError, ValueError):  # no control group, or one without a limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        return min(limit - used, limit if free is None else free)
    return free


def _cpu(device: torch.device) -> str:
    return f"{environment()['cpu']}, threads: {torch.get_num_threads()}" if device.type == "cpu" else device.type


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
