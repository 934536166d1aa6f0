"""A folder for the Hugging Face Hub, which timm and `load_backbone` take: safetensors, config.json and a card."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm.models
from timm.models._hub import save_config_for_hf
from torch import nn

from solo_ext.data.datasets import CUSTOM, DATASETS
from solo_ext.files import json_text
from solo_ext.runs.run import Run
from solo_ext.zoo.export import RECORD, Product, Source, preprocessing, render, safetensors, torchvision
from solo_ext.zoo.export import timm as timms
from solo_ext.zoo.index import scores
from solo_ext.zoo.model import solo_ext_backbone
from solo_ext.zoo.store import CONFIG, upload

CARD = "README.md"
PLACEHOLDER = "OWNER/NAME"  # in a card, until it is pushed
LICENSE = "mit"
OURS = solo_ext_backbone.__name__  # builds the networks that timm lacks


def supports(backbone: nn.Module) -> str | None:
    first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels == 3:
        return None
    return f"its cards and transforms are of RGB images, not of {first.in_channels} channels"


def architecture(source: Source) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the `timm.create_model` call that builds the network: timm's own, if there is one."""
    backbone, config = source.backbone, source.config["backbone"]
    stem = "small" if torchvision.replacements(backbone) else "imagenet"
    if timms.supports(backbone) is None and stem == "imagenet":
        name, kwargs = timms.architecture(source)
        return name.partition(".")[0], kwargs  # without the tag of somebody's weights
    kwargs = {"name": config["name"], "kwargs": torchvision.kwargs_of(config), "stem": stem}
    return OURS, {"num_classes": 0, "config": {"backbone": {**kwargs, "last_norm": bool(config.get("last_norm"))}}}


def export(source: Source, folder: Path) -> Product:
    """All that --to safetensors writes, timm's config.json and README.md."""
    base = safetensors.export(source, folder)
    name, kwargs = architecture(source)
    ours, image = name == OURS, preprocessing(source.transform)
    defaults = timm.models.PretrainedCfg(first_conv="conv1", classifier="fc") if ours else None
    defaults = defaults or timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    layers = {key: getattr(defaults, key) for key in ("first_conv", "classifier", "fixed_input_size")}
    cfg = {"architecture": name, "num_classes": kwargs["num_classes"], "license": LICENSE, **layers, **image}
    model, with_classifier = (
        timm.create_model(name, pretrained_cfg=cfg, **{**kwargs, "num_classes": classes})
        for classes in (kwargs["num_classes"], 0 if ours else 1000)
    )
    file: Any = folder / CONFIG  # annotated as a string, but timm before 1.0.27 needs the Path
    save_config_for_hf(model, file, model_args=kwargs)
    config = json.loads(file.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)  # a key of its own, too: transformers refuses it twice
    file.write_text(json_text(config), encoding="utf-8")
    imports = ("import solo_ext.zoo.model",) if ours else ()
    (folder / CARD).write_text(card(source, image, imports), encoding="utf-8")
    return replace(
        base,
        network=timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        architecture=f"timm's {name}" + ", after import solo_ext.zoo.model" * ours,
        want=list(with_classifier.state_dict()),
        load=(
            *imports,
            f"model = timm.create_model('local-dir:{source.out}', pretrained=True)",
            f"model = solo_ext.load_backbone({str(source.out)!r})",
        ),
        record={"model": name},
    )


def card(source: Source, image: dict[str, Any], imports: tuple[str, ...]) -> str:
    """README.md: what it is, how it is loaded, what it reached, what it comes from."""
    run, config = Run(source.checkpoint.path.parent), source.config
    trains = config.get("method") or config.get("finetune")
    dataset = (config.get("data") or {}).get("dataset") if trains else None  # a linear run's is its own
    return render(
        "card.md.j2",
        source=source,
        config=config,
        license=LICENSE,
        dataset=dataset,
        hub=DATASETS.get(dataset or "", CUSTOM).hub,
        stem=", CIFAR stem" if torchvision.replacements(source.backbone) else "",
        parameters=sum(x.numel() for x in source.backbone.parameters()),
        images=(run.environment.get("data", {}).get("train") or {}).get("images"),
        image=image,
        imports=imports,
        scores=[] if source.teacher else scores(run.dir, source.checkpoint.path.name),
        repository=PLACEHOLDER,
    )


def push(folder: Path, repository: str) -> str:
    """Uploads what `export` wrote into `folder`, in one commit, and returns the page's URL."""
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != RECORD}
    files[CARD] = files[CARD].replace(PLACEHOLDER.encode(), repository.encode())
    url, _ = upload(repository, files, "Encoder written by solo-ext export", f"{folder} is not pushed")
    return str(url)
