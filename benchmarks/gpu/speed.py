"""Parts 2 to 5: steps, loaders, the speedrun, and studies for all the time that is left."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pieces
import torch
from step_time import Setting, measure
from study_runs import finished
from timing import shown

from gpu.correct import of
from gpu.work import ROOT, Kit, Skip, Unfinished, Unit
from solo_ext.studies.study import load_study

FRAMEWORKS = ("byol", "dino", "mocov2plus", "mocov3", "ressl", "simclr", "simsiam")
NETWORKS = {
    "ResNet-18, 32 px": Setting(backbone="resnet18", dataset="cifar10", size=32, batch=256),
    "ResNet-50, 224 px": Setting(backbone="resnet50", dataset="imagenet", size=224, batch=128),
    "ViT-S, 224 px": Setting(backbone="vit_small", dataset="imagenet", size=224, batch=128),
}
TINY = {"ResNet-10, 16 px": Setting(backbone="resnet10_w16", size=16, batch=8)}
STUDIES = ("residual", "projector_only", "both", "stages", "tau", "multicrop")


def step(kit: Kit, framework: str, setting: Setting) -> tuple[str, Any]:
    setting = Setting(**vars(setting) | {"method": framework, "device": kit.device, "bf16": True})
    setting.scopes = ("full", "projector", "none")
    torch.backends.cudnn.benchmark = True
    rows = measure(setting, 2 if kit.tiny else 20 if setting.size < 100 else 10)
    said = []
    for name, row in rows.items():
        if not name.startswith("floor"):
            above = f", {row['over_floor']['median']:.3f}x its floor" if "over_floor" in row else ""
            memory = f", {row['memory'] / 2**30:.2f} GiB" if "memory" in row else ""
            said.append(f"{name} {row['ms']['median']:.1f} ms ({row['speedup']['median']:.2f}x{above}{memory})")
    return "; ".join(said), rows


def piece(kit: Kit, name: str) -> tuple[str, Any]:
    rows = pieces.PIECES[name](kit.device, 2 if kit.tiny else 10, kit.tiny)
    return "; ".join(" ".join([name, "ms:", *filter(None, rest)]) for name, *rest in pieces.cells(rows)), rows


def loaders(kit: Kit, kind: str) -> tuple[str, Any]:
    """By data.py itself, whose process must not have used CUDA."""
    size = "--rounds 1 --seconds 0.01 --workers 1 --files 4 --small 16 --batch 4" if kit.tiny else "--rounds 3"
    out = kit.folder("loaders") / f"{kind}.json"
    words = ["--only", kind, "--device", kit.device, "--out", out, *size.split()]
    kit.run(ROOT / "benchmarks" / "data.py", *words)
    rows = json.loads(out.read_text())[kind]
    key, unit = ("share %", "% of a step is waiting") if kind == "step" else ("images/s", "images/s")
    return "; ".join(f"{name}: {shown(row[key], 1)} {unit}" for name, row in rows.items()), rows


def whole(kit: Kit) -> tuple[str, Any]:
    """Trainings beside solo-learn's."""
    if not (theirs := os.environ.get("SOLO_LEARN")):
        raise Skip("SOLO_LEARN names no checkout of solo-learn")
    out = kit.folder("whole") / "rates.json"
    kit.run(ROOT / "benchmarks" / "end_to_end.py", theirs, kit.photos(), "--device", kit.device, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    said = (
        f"{name}: {shown(row['images/s'], 0)} images/s, {shown(row['ratio'], 2, 'x')}" for name, row in rows.items()
    )
    return "; ".join(said), rows


def study(kit: Kit, file: str, jobs: int = 0) -> tuple[str, Any]:
    """One of scripts/studies, on a ResNet-18, in all the time that is left; jobs at a time, by default one a GPU."""
    photos, out = kit.photos(), kit.folder("studies") / file.replace("/", "-")
    own = ["backbone.name=resnet18", "data.fraction=-1"] + ["max_epochs=200"] * file.startswith("photographs")
    if kit.tiny:
        own = ["data.fraction=-1", "optimizer.batch_size=8", "max_epochs=1", "seeds=[0]", "accelerator=cpu"]
        own += ["backbone.name=resnet10_w16", "scheduler.warmup_epochs=0", "knn_eval.enabled=False"]
    own += [f"data.train_path={photos / 'train'}", f"data.val_path={photos / 'test'}"]
    spec = load_study(path := ROOT / "scripts" / "studies" / f"{file}.yaml", own)
    only = ["--only", spec.cells[0].name] if kit.tiny else []
    words = [path, *own, "--out", out, "--jobs", jobs or max(1, torch.cuda.device_count()), *only]
    kit.run("solo_ext", "study", *words, module=True, timeout=max(1.0, kit.left()))
    runs = [f"{cell}, seed {seed}" for cell, seed, _ in finished(out)]
    number = len(spec.cells[:1] if kit.tiny else spec.cells) * len(spec.seeds)
    if len(runs) < number:
        raise Unfinished(f"{len(runs)} of {number} runs", runs)
    return f"all of its {number} runs", (out / "study.md").read_text(encoding="utf-8")


def units(kit: Kit) -> Iterator[Unit]:
    for network, setting in (TINY if kit.tiny else NETWORKS).items():
        for framework in FRAMEWORKS[:2] if kit.tiny else FRAMEWORKS:
            yield Unit("2 step", f"{framework}, {network}", of(step, framework, setting), 45, done="measured")
    for name in pieces.PIECES:
        yield Unit("2 step", name, of(piece, name), done="measured")
    for kind in ("cifar", "step") if kit.tiny else ("cifar", "step", "photos"):
        yield Unit("3 loaders", kind, of(loaders, kind), 60, done="measured")
    if not kit.tiny:
        yield Unit("3 loaders", "whole trainings", whole, 120, limit=600, done="measured")
    yield Unit("4 speedrun", "speedrun", of(study, "speedrun/gpu", 1), 60, limit=0, done="measured")
    for name in STUDIES[:1] if kit.tiny else STUDIES:
        yield Unit("5 studies", name, of(study, f"photographs/{name}"), 60, limit=0, done="measured")
