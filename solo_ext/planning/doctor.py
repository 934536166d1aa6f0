"""`solo-ext doctor`: what works on this machine, tried out, and the command that brings what is missing."""

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import get_args

import torch
from packaging.requirements import Requirement
from PIL import Image
from torch import nn

from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.data.datasets import BUNDLED, FOLDER, DataConfig, Format, load_dataset
from solo_ext.data.loader import free_memory
from solo_ext.data.modules import PretrainData
from solo_ext.errors import SoloExtError, reason
from solo_ext.runs.environment import environment
from solo_ext.schema import fit
from solo_ext.training.trainer_config import TrainerConfig

PACKAGE, NOT_SAID = "solo-ext", ("dev", "docs", "dali", "dali-cuda13")  # for developers; the format says it
ENOUGH = 1 << 30  # bytes of shared memory for four workers and batches of 256 images
PRECISIONS = {"32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "64": torch.float64}
Finding = tuple[str, str, str | None]  # the part, what there is, and what to do about what is missing, or None
INSTALL = "https://pytorch.org/get-started/locally says how"


def examine() -> Iterator[Finding]:
    """What each part of a run depends on."""
    about = environment()
    versions = [f"{name} {version}" for name, version in about["packages"].items() if version]
    yield "versions", ", ".join([f"Python {about['python']}", *versions]), None
    yield _device(about)
    device = TrainerConfig().first_device
    yield _precisions(device)
    yield from _formats(device)
    yield from _shared_memory()
    yield from _extras()
    yield "next", "solo-ext demo trains on bundled images; solo-ext plan RECIPE says what a run will cost here", None


def _device(about: dict) -> Finding:
    free = free_memory(torch.device("cpu")) / 2**30
    cpu = f"{about['cpu']}, {about['cores']} cores" + (f", {free:.0f} GiB free" if free < math.inf else "")
    if about["gpus"]:
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(len(about["gpus"]))]
        cards = [f"{name} ({size / 2**30:.0f} GiB)" for name, size in zip(about["gpus"], sizes, strict=True)]
        return "device", f"{', '.join(cards)}, CUDA {about['cuda']}; {cpu}", None
    if torch.backends.mps.is_available():
        return "device", f"Apple GPU (mps); {cpu}", None
    in_job, on_cluster = "SLURM_JOB_ID" in os.environ, shutil.which("srun")
    if not (on_cluster or Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")):
        return "device", f"{cpu}; no GPU", None
    if not about["cuda"]:
        advice = f"this PyTorch is for CPUs alone; {INSTALL} to install one with CUDA"
    elif in_job or on_cluster:
        place = "this SLURM job has no GPU" if in_job else "this is no SLURM job, and has no GPU"
        advice = f"{place}; srun --gpus=1 solo-ext doctor looks where there is one"
    elif (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) in ("", "-1"):
        advice = f"CUDA_VISIBLE_DEVICES={hidden} hides every GPU"
    else:
        advice = f"a driver, but PyTorch's CUDA {about['cuda']} finds no GPU; update the driver, or {INSTALL}"
    return "device", cpu, advice


def _precisions(device: torch.device) -> Finding:
    """Those in which a step of a small network gives a finite gradient, and what the recipes' becomes."""
    works, failed = [], ""
    for name, dtype in PRECISIONS.items():
        try:
            weights = torch.float64 if dtype == torch.float64 else torch.float32
            layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 1)
            network = nn.Sequential(*layers).to(device, weights)
            with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
                loss = network(torch.rand(4, 3, 8, 8, device=device, dtype=weights)).mean()
            loss.backward()
            finite = all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
            taken = fit(TrainerConfig, {"precision": name}, "").pick_precision(warn=False)
            works += [name] if finite and taken == name else []
        except RuntimeError as error:
            failed = reason(error)
    if not works:
        return "precision", f"none works on the {device.type}", f"{failed}; {INSTALL} to install another PyTorch"
    chosen = TrainerConfig(precision="16").pick_precision(warn=False)
    return "precision", f"{', '.join(works)} work on the {device.type}; precision=16 of a recipe becomes {chosen}", None


def _formats(device: torch.device) -> Iterator[Finding]:
    """Those that give a batch of eight small JPEGs, as a folder or as HDF5."""
    works, missing = [], []
    bundled = load_dataset(DataConfig(BUNDLED), "test").images
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        for i in range(8):
            Image.fromarray(bundled[i][0].numpy()).save(images / f"{i}.jpg")
        for name in (name for name in get_args(Format) if name != "auto"):
            try:
                source = images
                if name == "h5":
                    from solo_ext.data.h5 import write_h5

                    write_h5(images, source := Path(folder, "images.h5"))
                data = DataConfig(FOLDER, train_path=str(source), format=name, num_workers=1, no_labels=True)
                views = PretrainData(data, [AugmentationConfig(crop_size=16, num_crops=2)], 4, seed=0)
                views.device = device
                _, (view, *_), _ = next(iter(views.train_dataloader()))
                works += [name] if view.shape == (4, 3, 16, 16) else []
            except ImportError as error:
                missing.append((name, f"needs {error.name}"))
            except SoloExtError as error:
                missing.append((name, str(error)[max(0, str(error).find("needs ")) :]))
    yield "formats", f"{', '.join(works)} work", None
    for name, why in missing:
        if name == "dali" and device.type == "cpu":  # where image_folder is faster
            continue
        advice = "" if "pip install" in why else f": pip install '{PACKAGE}[{name}]'"
        yield f"format {name}", "missing", why + advice


def _shared_memory() -> Iterator[Finding]:
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        advice = None
        if free < ENOUGH:
            advice = "too little for worker processes; docker run --shm-size=8g, or data.num_workers=0"
        yield "workers", f"{free / 2**20:,.0f} MiB of shared memory", advice


def _extras() -> Iterator[Finding]:
    """The extras of this package whose packages are all there, those that lack some, and what it lacks without them."""
    try:
        requirements = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        yield "extras", "unknown", f"{PACKAGE} is not installed: pip install -e . in the checkout"
        return
    names = [name for name in metadata.metadata(PACKAGE).get_all("Provides-Extra") or () if name not in NOT_SAID]
    core = [r for r in requirements if _asked(r)]
    lacking = {}
    for extra in names:
        own = [r for r in requirements if _asked(r, extra) and r not in core]
        lacking[extra] = [r.name for r in own if r.name != PACKAGE and not _there(r)]
    yield "extras", ", ".join(name for name in names if not lacking[name]) or "none", None
    for name, packages in lacking.items():
        if packages:
            yield f"extra {name}", f"lacks {', '.join(packages)}", f"pip install '{PACKAGE}[{name}]'"
    if packages := [f"'{r.name}{r.specifier}'" for r in core if not _there(r)]:
        yield "packages", "missing, or too old", f"pip install {' '.join(packages)}"


def _asked(requirement: Requirement, extra: str = "") -> bool:
    return not requirement.marker or requirement.marker.evaluate({"extra": extra})


def _there(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(re.sub(r"\+.*", "", metadata.version(requirement.name)), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def describe() -> Iterator[str]:
    """`examine` as lines for a terminal."""
    for part, found, advice in examine():
        yield f"{'-' if advice else ' '} {part:<12} {found}{f': {advice}' if advice else ''}"
