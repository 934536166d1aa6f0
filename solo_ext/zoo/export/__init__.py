"""What `solo-ext export` writes: one module per target, and the frame that keeps files only if they prove right.

A target is a module of this folder with

    export(source: Source, folder: Path) -> Product    writes its files, and loads them with its own library
    supports(backbone) -> str | None                   optional: why it cannot hold this network, as one clause
    BOUND = 1e-5                                       optional: of the proof, relative to the largest feature
    DTYPES = ("float32", "float16", "bfloat16")        optional: in which it can hold matrices, the default first
"""

import io
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import Template
from torch import Tensor, nn

from solo_ext.data.transforms import Transform
from solo_ext.errors import CheckpointError, ConfigError, must_have
from solo_ext.files import json_text, new_folder, sha256
from solo_ext.runs.checkpoints import Checkpoint
from solo_ext.runs.encoder import branch_of, eval_transform, load_encoder
from solo_ext.runs.environment import environment
from solo_ext.runs.run import WEIGHTS
from solo_ext.zoo.store import open_source

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BATCHES = (1, 2, 5)  # images in each of the proof's forward passes
RECORD = "export.json"
TARGETS = [module.name for module in iter_modules(__path__)]


@dataclass(frozen=True)
class Source:
    """What is exported.

    name: of the files, such as `byol-cifar10-ab12cd34-teacher`. out: where their folder will be.
    backbone: in eval mode, float32, its matrices rounded to `dtype`: what a target has to compute.
    tensors: its state_dict as files hold it: matrices (ndim > 1) in `dtype`, all else unchanged; contiguous.
    transform: of the images that it takes; has `size` in pixels, and `mean`, `std` of each channel, in [0, 1].
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    name: str
    teacher: bool
    dtype: str
    backbone: nn.Module
    tensors: dict[str, Tensor]
    transform: Transform
    out: Path

    @property
    def channels(self) -> int:
        return len(self.transform.mean)

    def failure(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint.path} is not exported: {reason}")


@dataclass(frozen=True)
class Product:
    """What a target makes of a source.

    network: images [B, C, H, W] -> features [B, D]: built by the target's library, loaded from its files, in eval mode.
    architecture: the library's name for it.
    have, want: names of the tensors in the file, and in that architecture with its classifier.
    load: lines of code that load the files from their folder.
    reference: (backbone, images) -> what `network` has to equal, if not the backbone's features.
    record: what else export.json says.
    """

    network: Callable[[Tensor], Tensor]
    architecture: str
    have: Collection[str]
    want: Collection[str]
    load: tuple[str, ...]
    reference: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What was exported, and what the proof found.

    load: lines of code that load the files. record: what export.json says; in it, `difference` is the largest one
    between the features of both networks, relative to the largest feature; `rounding` is null in float32, else what
    rounding does to the features: `difference`, likewise, and `cosine`, the lowest similarity before and after.
    """

    folder: Path
    load: tuple[str, ...]
    record: dict[str, Any]

    def __str__(self) -> str:
        return render("report.txt.j2", **{**self.record, "folder": self.folder, "load": self.load})


def export(
    checkpoint: str | os.PathLike,
    to: str,
    out: str | Path | None = None,
    teacher: bool = False,
    dtype: str | None = None,
) -> Report:
    """Writes the backbone of a run for another library, proves that it computes the same there, and reports both.

    Args:
        checkpoint: as in `load_backbone`; `teacher`: the momentum encoder instead of the student.
        to: one of `TARGETS`.
        out: the folder to make; default `exports/<name>-<to>`.
        dtype: of the matrices in the files: float32, float16 or bfloat16; default: the target's.

    Raises:
        ConfigError: unknown target or type, a network that the target cannot hold, or a folder that exists.
        CheckpointError: no or damaged weights, a failed proof, a folder that cannot be written. Nothing is left behind.
    """
    must_have(to, TARGETS, "--to: there is no")
    target = import_module(f"{__name__}.{to}")
    dtypes: tuple[str, ...] = getattr(target, "DTYPES", tuple(DTYPES))
    must_have(dtypes[0] if dtype is None else dtype, dtypes, f"--dtype: --to {to} has no")
    weights = open_source(checkpoint)
    run, file = weights.path.absolute().parent.name, weights.path.name
    stem = run if file == WEIGHTS else re.sub(r"-ep=\d+(-step=\d+)?$", "", weights.path.stem)
    name = (re.sub(r"[^\w.-]+", "_", stem).strip("._") or "backbone") + "-teacher" * teacher
    folder = Path(out).expanduser() if out is not None else Path("exports") / f"{name}-{to}"
    if os.path.lexists(folder):
        raise ConfigError(f"--out: {folder} exists; name another folder, or remove it")
    teacher = teacher or branch_of(weights.config) == "teacher"
    source = _source(weights, name, teacher, dtype or dtypes[0], folder)
    obstacles = supporting(source.backbone)
    if obstacles[to]:
        others = ", ".join(name for name, obstacle in obstacles.items() if obstacle is None)
        raise ConfigError(f"--to {to} has no place for this network: {obstacles[to]}; possible: {others}")
    with new_folder(folder) as temporary:
        product = target.export(source, temporary)
        record = _prove(source, product, to, getattr(target, "BOUND", 1e-5), temporary)
        (temporary / RECORD).write_text(json_text(record), encoding="utf-8")
    return Report(folder, product.load, record)


def _source(checkpoint: Checkpoint, name: str, teacher: bool, dtype: str, out: Path) -> Source:
    backbone, config = load_encoder(checkpoint, teacher=teacher)
    tensors = {}
    for key, x in backbone.state_dict().items():
        matrix = x.ndim > 1 and x.is_floating_point()
        # tensors that share memory, which safetensors refuses, get a copy each
        tensors[key] = x.to(DTYPES[dtype] if matrix else x.dtype, copy=True).contiguous()
        if not tensors[key].isfinite().all():
            why = "does not fit into float16; --dtype bfloat16 holds it" if x.isfinite().all() else "is not finite"
            raise CheckpointError(f"{checkpoint.path} is not exported: {key} {why}")
    backbone.load_state_dict(tensors)
    return Source(checkpoint, dict(config or {}), name, teacher, dtype, backbone, tensors, eval_transform(config), out)


def supporting(backbone: nn.Module) -> dict[str, str | None]:
    """Target -> why it cannot hold `backbone`; None: it can."""
    modules = {name: import_module(f"{__name__}.{name}") for name in TARGETS}
    return {name: getattr(module, "supports", lambda _: None)(backbone) for name, module in modules.items()}


def preprocessing(transform: Transform) -> dict[str, Any]:
    """The arguments with which timm's `create_transform` does the same."""
    size, shorter = transform.size, transform.shorter or transform.size
    share = size / shorter
    if math.floor(size / share) < shorter:  # as timm computes it, and rounding can make it a pixel less
        share = math.nextafter(share, 0)
    # 0.4914 of float32's 0.49140000343322754
    mean, std = (tuple(float(f"{x:.7g}") for x in values.tolist()) for values in (transform.mean, transform.std))
    return {
        "input_size": (len(mean), size, size),
        "interpolation": transform.mode,
        "crop_pct": share,
        "crop_mode": "center" if transform.shorter else "squash",
        "mean": mean,
        "std": std,
    }


def saved(content: Any) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def render(template: str, **values: Any) -> str:
    """The file `template` of this folder with `values` in their places."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return Template(text, keep_trailing_newline=True).render(values)


@torch.no_grad()
def _prove(source: Source, product: Product, to: str, bound: float, folder: Path) -> dict[str, Any]:
    """Compares the product's network with ours; a CheckpointError if they differ, else the content of export.json."""
    generator = torch.Generator().manual_seed(0)
    size = source.transform.size
    batches = [torch.randn(count, source.channels, size, size, generator=generator) for count in BATCHES]
    ours = torch.cat([product.reference(source.backbone, batch) for batch in batches])
    theirs = torch.cat([product.network(batch) for batch in batches])
    if ours.shape != theirs.shape:
        raise source.failure(f"--to {to} gives features {list(theirs.shape)}, ours are {list(ours.shape)}")
    difference = _difference(ours, theirs)
    if not 0 < ours.abs().max() < torch.inf:
        raise source.failure("its features of random images are all 0 or not finite")
    if not difference <= bound:  # nor is NaN
        excess = f"{difference:.1e} of the largest, more than {bound:.0e}"
        raise source.failure(f"the features of --to {to} differ from ours by {excess}")
    rounding = None
    if source.dtype != "float32":
        exact, _ = load_encoder(source.checkpoint, teacher=source.teacher)
        before, after = (torch.cat([network(batch) for batch in batches]) for network in (exact, source.backbone))
        cosine = F.cosine_similarity(before, after)
        rounding = {"difference": _difference(before, after), "cosine": cosine.min().item()}
    return {
        "folder": source.out.name,
        "target": to,
        "checkpoint": source.checkpoint.path.name,
        "teacher": source.teacher,
        "backbone": source.config["backbone"]["name"],
        "dtype": source.dtype,
        "architecture": product.architecture,
        "load": [line.replace(str(source.out), source.out.name) for line in product.load],  # no path of this machine
        "files": {x.name: {"size": x.stat().st_size, "sha256": sha256(x)} for x in sorted(folder.iterdir())},
        "matched": [key for key in product.want if key in product.have],
        "missing": [key for key in product.want if key not in product.have],
        "unexpected": [key for key in product.have if key not in product.want],
        "difference": difference,
        "bound": bound,
        "images": sum(BATCHES),
        "image_size": size,
        "preprocessing": preprocessing(source.transform),
        "rounding": rounding,
        **product.record,
        "packages": environment()["packages"],
    }


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of ours; NaN if anything is not finite or all of ours are 0."""
    return ((ours.double() - theirs.double()).abs().max() / ours.double().abs().max()).item()
