"""Parts 0 and 1: what a GPU computes is what a CPU computes."""

import copy
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from data import ours, recipe, small_images, write_images
from omegaconf import OmegaConf
from timing import origin
from torch.utils._python_dispatch import TorchDispatchMode

from gpu.work import ROOT, Failed, Kit, Skip, Unit
from solo_ext.api import Trained, configured
from solo_ext.data.datasets import read_images
from solo_ext.methods import METHODS
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.environment import environment
from solo_ext.runs.run import find_runs
from solo_ext.training.pretrain import pretrain
from solo_ext.zoo.export import export

STEPS = 3
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative difference of losses and weights after STEPS steps
LEVELS = {"tensor": 0.5, "dali": 1.0}  # mean difference of views, of 255


def device(kit: Kit) -> tuple[str, Any]:
    x = torch.randn(1024, 1024, device=kit.device)
    if not (x @ x).isfinite().all():
        raise Failed("a product of matrices is not finite")
    about = environment() | {"command": ["benchmarks/gpu"]}  # without the paths of a machine
    card = about["gpus"][0] if kit.device == "cuda" else about["cpu"]
    return f"{card}, {len(about['gpus'])} GPUs, {origin(about)}", about | {"card": card, "origin": origin(about)}


def words(kit: Kit, folder: str, *more: str) -> list[str]:
    """Overrides of a tiny run: 3 epochs of 4 steps on bundled images."""
    own = ["data.fraction=0.02", "optimizer.batch_size=25", "max_epochs=3", "precision=32-true", "data.num_workers=0"]
    own += [
        f"accelerator={'gpu' if kit.device == 'cuda' else 'cpu'}",
        "enable_progress_bar=False",
        "limit_val_batches=1",
    ]
    return [*own, "devices=1", "knn_eval.enabled=False", f"checkpoint.dir={kit.folder(folder)}", *more]


def tiny_run(kit: Kit, folder: str, *more: str, method: str = "res_mocov3", callbacks: Any = ()) -> Any:
    return pretrain(
        configured("pretrain", f"fashion_mnist_mini/{method}", words(kit, folder, *more)), callbacks=callbacks
    )


def steps(
    model: Any, device: str, channels_last: bool = True, autocast: torch.dtype | None = None
) -> tuple[list[float], torch.Tensor]:
    """The losses of STEPS steps, and all weights in the end, on the CPU."""
    model = copy.deepcopy(model).to(device).train()
    model.log = model.log_dict = lambda *_, **__: None
    model.channels_last = channels_last
    model = model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=autocast == torch.float16)
    made, dtype, losses = torch.Generator().manual_seed(1), next(model.parameters()).dtype, []
    for _ in range(STEPS):
        views = [torch.randn(24, 3, 28, 28, generator=made).to(device, dtype) for _ in range(2)]
        batch = torch.arange(24), views, torch.randint(0, 10, (24,), generator=made).to(device)
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = model.training_step(batch, 0)
        scaler.scale(loss).backward()
        model.on_after_backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.teacher.update(0, 100)
        losses.append(loss.item())
    return losses, torch.cat([x.detach().double().flatten().cpu() for x in model.state_dict().values()])


def agrees(kit: Kit, name: str) -> tuple[str, Any]:
    """On a CPU, the same in another memory layout, whose sums are of another order."""
    cfg = configured("pretrain", f"fashion_mnist_mini/{name}", words(kit, "runs"))
    found: dict[str, float] = {}
    torch.backends.cudnn.allow_tf32 = False
    for dtype, bound in BOUNDS.items():
        torch.manual_seed(0)
        model = METHODS[name](cfg).to(dtype)
        (expected, weights), (losses, ours) = steps(model, "cpu", False), steps(model, kit.device)
        off = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        found[str(dtype)[6:]] = off = max(off, ((ours - weights).norm() / weights.norm()).item())
        if not off <= bound:
            raise Failed(f"differs from the CPU in {dtype} by {off:.1e}, above {bound:.0e}")
    for dtype in (torch.bfloat16, torch.float16):
        losses, weights = steps(model, kit.device, autocast=dtype)
        if not (all(map(math.isfinite, losses)) and weights.isfinite().all()):
            raise Failed(f"is not finite under autocast to {dtype}: losses {losses}")
    torch.backends.cudnn.allow_tf32 = True
    return "off by " + ", ".join(f"{off:.0e} in {name}" for name, off in found.items()) + "; finite in halves", found


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 7:
            raise InterruptedError


def resume(kit: Kit) -> tuple[str, Any]:
    own = ["precision=bf16-mixed", "deterministic=warn", "checkpoint.every_n_steps=2"]
    kit.remove("whole", "parts")
    whole = tiny_run(kit, "whole", *own)
    with suppress(InterruptedError):
        tiny_run(kit, "parts", *own, callbacks=[Stop()])
    parts = tiny_run(kit, "parts", *own)
    states = [load_checkpoint(run.checkpoint)["state_dict"] for run in (whole, parts)]
    other = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    if other:
        raise Failed(f"{len(other)} of {len(states[0])} tensors differ from the uninterrupted run's, {other[0]} first")
    return f"the same bits in all {len(states[0])} tensors, stopped after 7 of 12 steps, bf16-mixed", {}


def evaluations(kit: Kit) -> tuple[str, Any]:
    """Of a ResNet-18, so that torchvision can hold it."""
    small = ["backbone.name=resnet18", "max_epochs=1", "data.fraction=0.01", "auto_resume.enabled=False"]
    trained = Trained(tiny_run(kit, "evaluated", *small).dir)
    own: Any = {"accelerator": "gpu" if kit.device == "cuda" else "cpu", "devices": 1, "data.fraction": 0.02}
    near = trained.knn(k=[5], **own)[0]["acc1"]
    head = trained.linear(max_epochs=1, limit_val_batches=1, **own, **{"optimizer.batch_size": 25}).metrics["val_acc1"]
    kit.remove("exported")
    export(trained.dir, "torchvision", kit.state / "exported")
    return f"kNN-5 {near:.1f}, linear {head:.1f}, exported and proven", {"knn": near, "linear": head}


def difference(kit: Kit, reader: str) -> tuple[str, Any]:
    """Of the views that `reader` makes on the device from image_folder's on the CPU."""
    folder = kit.folder("images")
    args = Namespace(files=32, small=64, workers=1, device="cpu")
    if not (folder / "small.npy").exists():
        write_images(folder, args)
    name = "cifar_asymmetric" if reader == "tensor" else "imagenet_asymmetric"
    views = recipe(OmegaConf.load(ROOT / "scripts/pretrain/_shared/augmentations" / f"{name}.yaml"))

    def batches(reader: str, device: str) -> Any:
        args.device = device
        images = small_images(folder) if name[0] == "c" else read_images(folder / "jpeg", reader)
        return ours(reader, images, views, 16, args)

    total, number = 0.0, 0
    for one, other in zip(batches(reader, kit.device), batches("image_folder", "cpu"), strict=True):
        if not torch.equal(one[0].cpu(), other[0]):
            raise Failed("its batches are of other images")
        for a, b in zip(one[1], other[1], strict=True):
            total, number = total + (a.cpu() - b).abs().mean().item() * 0.226 * 255, number + 1  # 0.226: a mean std
    if not (off := total / number) <= LEVELS[reader]:
        raise Failed(f"its views differ by {off:.2f} levels of 255 in the mean, above {LEVELS[reader]}")
    return f"{number} batches of views, {off:.3f} levels of 255 from the CPU's in the mean", {"levels": off}


def dali(kit: Kit) -> tuple[str, Any]:
    if not (find_spec("nvidia") and find_spec("nvidia.dali")):
        raise Skip("NVIDIA DALI is not installed")
    return difference(kit, "dali")


def ranks(kit: Kit, number: int) -> tuple[str, Any]:
    """The whole command in `number` processes, with synchronised BatchNorm, against one without a process group."""
    if kit.device == "cuda" and torch.cuda.device_count() < number:
        raise Skip(f"there are fewer than {number} GPUs")
    losses = []
    for folder, processes, more in (
        ("rank", 1, []),
        (f"ranks{number}", number, ["strategy=ddp", "sync_batchnorm=True"]),
    ):
        own = words(kit, folder, f"devices={processes}", f"optimizer.batch_size={24 // processes}", *more)
        own += ["max_epochs=1", "auto_resume.enabled=False"]
        kit.run("solo_ext", "pretrain", "fashion_mnist_mini/mocov3", *own, module=True)
        losses.append(find_runs(kit.folder(folder))[-1].last("train_loss"))
    if not (off := abs(losses[0] - losses[1]) / losses[0]) < 1e-2:
        raise Failed(f"the loss is {losses[1]:.5f}, not {losses[0]:.5f} as without a process group")
    backend = "NCCL" if kit.device == "cuda" else "gloo"
    return f"{backend}, SyncBN: the loss of an epoch off by {off:.0e}", {"losses": losses}


def gpu_tests(kit: Kit) -> tuple[str, Any]:
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    try:
        said = kit.run(
            "pytest", "-m", "gpu", "-rs", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml", *files, module=True
        )
    except Failed as why:
        if "status 5" not in str(why):
            raise
        said = "no tests"
    return said.strip().splitlines()[-1], {}


class Items(TorchDispatchMode):
    """Counts what reads a number back."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(device: str, counts: list[int]) -> Iterator[None]:
    """Appends how often the host waited for the device; on a CPU, how often it would have."""
    if device == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    else:
        with Items() as items:
            yield
        counts.append(items.count)


class Waits(pl.Callback):
    """From the beginning of each step, after the other callbacks, to its end."""

    def __init__(self, device: str):
        self.device, self.counts = device, list[int]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.watch = waits(self.device, self.counts)
        self.watch.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.watch.__exit__(None, None, None)


def synchronisations(kit: Kit) -> tuple[str, Any]:
    found = {}
    for method in ("byol", "projector_ema_byol"):
        counter = Waits(kit.device)
        tiny_run(kit, "waits", "auto_resume.enabled=False", method=method, callbacks=[counter])
        found[method] = counter.counts
    parts = [f"{name} {median(counts):g} (at most {max(counts)})" for name, counts in found.items()]
    return f"the host waits in a step of a Trainer: {', '.join(parts)}", found


def of(function: Callable, *arguments: Any) -> Callable[[Kit], tuple[str, Any]]:
    return lambda kit: function(kit, *arguments)


def units(kit: Kit) -> Iterator[Unit]:
    part = "0 DALI"
    yield Unit(part, "device", device)
    yield Unit(part, "DALI decodes", dali, 30)
    part = "1 correctness"
    names = [name for name in METHODS.declared if name != "res_moco"]  # an alias
    for name in names[:: 5 if kit.tiny else 1]:
        yield Unit(part, name, of(agrees, name))
    yield Unit(part, "resume", resume, 30)
    yield Unit(part, "tensor loader", of(difference, "tensor"))
    yield Unit(part, "kNN, linear, export", evaluations, 30)
    for number in (2,) if kit.tiny else (1, 2):
        yield Unit(part, f"ranks: {number}", of(ranks, number), 60)
    yield Unit(part, "synchronisations in a step", synchronisations, 20, done="measured")
    yield Unit(part, "tests of mark gpu", gpu_tests, 60)
