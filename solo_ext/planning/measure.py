"""Time and memory of training steps on synthetic images, on this machine."""

import statistics
from contextlib import nullcontext, suppress
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback, Timer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from solo_ext.data.datasets import dataset_info
from solo_ext.data.loader import free_memory
from solo_ext.errors import ConfigError
from solo_ext.runs.environment import environment
from solo_ext.training.callbacks.throughput import now
from solo_ext.training.config import DetectionConfig, PretrainConfig
from solo_ext.training.trainer import explained, keep_freed_memory, make_trainer, quietly
from solo_ext.training.trainer_config import TrainerConfig

WARM_UP, LEAST, STEPS = 3, 3, 10  # steps that do not count; the least and the most that do
SECONDS = 30  # after which LEAST steps are enough
CPU_PIXELS, CPU_IMAGES = 2**17, 8  # on a CPU, a batch has about this many pixels, and at least 8 images
OBJECTS = 8  # of a photograph; COCO's have seven on average
STEP_KEYS = ("max_epochs", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark")


def crop_sizes(cfg: PretrainConfig) -> list[int]:
    """The side of each view in pixels."""
    return [view.crop_size for view in cfg.augmentations for _ in range(view.num_crops)]


def photograph_size(cfg: DetectionConfig) -> tuple[int, int]:
    """Height and width in pixels of a photograph, 4:3 if it may be, at the largest size of a detector's training."""
    side = max(cfg.detector.min_size)
    return side, max(side, min(round(side * 4 / 3), cfg.detector.max_size))


def synthetic_batch(
    cfg: PretrainConfig | DetectionConfig, images: int, device: torch.device
) -> tuple[Tensor, Any, Any]:
    """A random batch in the shapes of `cfg`: (indexes [B], views [B, C, H, W], targets [B]), or a detector's."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(cfg, DetectionConfig):
        size = photograph_size(cfg)
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator).to(device)
        corners = torch.rand(OBJECTS, 2, 2, generator=generator).sort(1).values * torch.tensor(size[::-1])
        target = {"boxes": corners.flatten(1), "labels": torch.ones(OBJECTS, dtype=torch.long)}
        target["crowd"] = torch.zeros(OBJECTS, dtype=torch.bool)
        target |= {"masks": torch.ones(OBJECTS, *size, dtype=torch.bool)} if cfg.detector.masks else {}
        target = {name: x.to(device) for name, x in target.items()}
        return torch.arange(images, device=device), [image] * images, [target] * images
    shape = images, dataset_info(cfg.data).channels
    views = [torch.randn(*shape, side, side, generator=generator).to(device) for side in crop_sizes(cfg)]
    classes = cfg.data.num_classes or 0
    targets = torch.randint(classes, (images,), generator=generator) if classes else torch.full((images,), -1)
    return torch.arange(images, device=device), views, targets.to(device)


def measure_steps(cfg: PretrainConfig | DetectionConfig, method: pl.LightningModule) -> dict[str, Any]:
    """Time and memory of an optimizer step at `optimizer.batch_size`; trains `method` for a few steps.

    `seconds` is the median and `quartiles` the first and third of `steps` steps, without data loading; `forward` is
    what an evaluation takes for an image; `memory` is the peak in bytes, of what `memory_of` says. Both are scaled if a
    batch of fewer `images` was measured: on a CPU, or if more do not fit a GPU. `fits`: whether the full batch fits the
    free memory. ConfigError: not even two images do, or a detector's one.
    """
    images, least, most = cfg.optimizer.batch_size, 1, 1  # of a detector's, one alone may take a CPU a minute
    if isinstance(cfg, PretrainConfig):
        least, most = 2, max(CPU_IMAGES, CPU_PIXELS // sum(side**2 for side in crop_sizes(cfg)))
    if cfg.accelerator == "cpu" or not torch.cuda.is_available():
        images = min(images, most)
        keep_freed_memory()  # as a training does
    with quietly(), explained():
        while True:
            with suppress(torch.OutOfMemoryError):
                return _measure(cfg, method, images)
            images //= 2
            if images < least:
                raise ConfigError(f"backbone.name: {cfg.backbone.name} does not fit this GPU's memory")


@torch.no_grad()
def _forward(method: Any, view: Tensor) -> float:
    """Median seconds of the backbone on a batch of images [B, C, H, W] in eval mode."""
    times = []
    with method.trainer.precision_plugin.forward_context():
        for _ in range(LEAST):
            began = now(view.device)
            method.backbone.eval()(view)
            times.append(now(view.device) - began)
    return statistics.median(times)


def _measure(cfg: PretrainConfig | DetectionConfig, method: pl.LightningModule, images: int) -> dict[str, Any]:
    warm_up, least = (1, 2) if isinstance(cfg, DetectionConfig) else (WARM_UP, LEAST)
    steps, batch = warm_up + STEPS, cfg.optimizer.batch_size
    values: dict[str, Any] = {key: getattr(cfg, key) for key in STEP_KEYS}  # all that change what a step does
    values |= {"accelerator": "cpu" if cfg.accelerator == "cpu" else "auto", "devices": 1, "limit_val_batches": 0}
    values |= {"min_steps": warm_up + least, "max_steps": steps}
    ends: list[float] = []  # when each step was done
    saved: dict[int, int] = {}  # address -> bytes of what the backward pass of the first step needs

    def keep(tensor: Tensor) -> Tensor:
        if not ends:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    clock = LambdaCallback(on_train_batch_end=lambda trainer, module, *_: ends.append(now(module.device)))
    trainer = make_trainer(TrainerConfig(**values), [clock, Timer({"seconds": SECONDS})])
    trainer.fit_loop.min_epochs = 0  # so that the time limit ends it within the first
    device = trainer.strategy.root_device
    gpu, free = device.type == "cuda", free_memory(device)
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if not cfg.performance.disable_channel_last:
        method = method.to(memory_format=torch.channels_last)
    method.zero_grad(set_to_none=True)
    batches: Any = [synthetic_batch(cfg, images, device)] * steps
    with nullcontext() if gpu else saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.fit(method, DataLoader(batches, batch_size=None, collate_fn=tuple))
    forward = _forward(method, batches[0][1][0]) / images if isinstance(cfg, PretrainConfig) else None
    weights = list(method.state_dict().values())
    for tensor in weights:  # the backward pass keeps them too
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    stay = sum(value.nbytes for value in (*weights, *gradients, *states) if isinstance(value, Tensor))
    grow = torch.cuda.max_memory_allocated() - stay if gpu else sum(saved.values())
    memory = stay + grow * batch // images
    scale = cfg.accumulate_grad_batches * batch / images
    seconds = [scale * (end - begin) for begin, end in pairwise(ends[warm_up - 1 :])]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    cpu = f"{environment()['cpu']}, threads: {torch.get_num_threads()}"
    return {
        "device": torch.cuda.get_device_name() if gpu else cpu if device.type == "cpu" else device.type,
        "precision": trainer.precision,
        "images": images,
        "steps": len(seconds),
        "seconds": median,
        "quartiles": (low, high),
        "forward": forward,
        "memory": memory,
        "memory_of": "torch.cuda.max_memory_allocated" if gpu else "weights, optimizer, what the backward pass keeps",
        "fits": images == batch if gpu else memory <= free,
    }
