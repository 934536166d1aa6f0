"""A folder for the Hugging Face Hub, which timm and `load_backbone` take: safetensors, config.json and a card."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm.models
import yaml
from timm.models._hub import save_config_for_hf
from torch import nn

from solo_ext.data.datasets import DATASETS
from solo_ext.data.transforms import Transform
from solo_ext.files import read_json
from solo_ext.zoo.export import RECORD, Product, Source, render, safetensors, torchvision
from solo_ext.zoo.export import timm as timms
from solo_ext.zoo.hub import CONFIG, upload
from solo_ext.zoo.index import figures_of
from solo_ext.zoo.model import solo_ext_backbone

CARD = "README.md"
REPOSITORY = "OWNER/NAME"  # in a card, until it is pushed
LICENSE = "mit"
OURS = solo_ext_backbone.__name__


def supports(backbone: nn.Module) -> str | None:
    """None: all backbones; what timm lacks, `solo_ext_backbone` builds for it."""
    return None


def architecture(source: Source) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the `timm.create_model` call that builds the network: of timm itself, where it can."""
    backbone = source.backbone
    if timms.supports(backbone) is None and not torchvision.replaced(backbone):
        return timms.architecture(source)
    config = source.config["backbone"]
    config = {
        "name": config["name"],
        "kwargs": torchvision.kwargs_of(config),
        "stem": "small" if torchvision.replaced(backbone) else "imagenet",
        "last_norm": bool(config.get("last_norm")),
    }
    return OURS, {"num_classes": 0, "config": {"backbone": config}}


def preprocessing(transform: Transform) -> dict[str, Any]:
    """What timm's `create_transform` takes to do the same."""
    size, shorter = transform.size, transform.shorter or transform.size
    share = size / shorter
    if math.floor(size / share) < shorter:  # as timm computes it, and rounding can make it a pixel less
        share = math.nextafter(share, 0)
    return {
        "input_size": (3, size, size),
        "interpolation": transform.mode,
        "crop_pct": share,
        "crop_mode": "center" if transform.shorter else "squash",
        "mean": tuple(map(_decimal, transform.mean.tolist())),
        "std": tuple(map(_decimal, transform.std.tolist())),
    }


def _decimal(x: float) -> float:
    """0.4914 of float32's 0.49140000343322754."""
    return float(f"{x:.7g}")


def export(source: Source) -> Product:
    """All that --to safetensors writes, timm's config.json and README.md."""
    name, kwargs = architecture(source)
    name = name.partition(".")[0]  # without the tag of somebody's weights
    ours = name == OURS
    known = timm.models.PretrainedCfg(first_conv="conv1", classifier="fc")
    known = known if ours else timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    layers = {key: getattr(known, key) for key in ("first_conv", "classifier", "fixed_input_size")}
    image = preprocessing(source.transform)
    described = {"architecture": name, "num_classes": kwargs["num_classes"], "license": LICENSE, **layers, **image}
    model, classifying = (
        timm.create_model(name, pretrained_cfg=described, **{**kwargs, "num_classes": classes})
        for classes in (kwargs["num_classes"], 0 if ours else 1000)
    )
    with TemporaryDirectory() as folder:
        file: Any = Path(folder) / CONFIG  # annotated as a string, but timm before 1.0.27 needs the Path
        save_config_for_hf(model, file, model_args=kwargs)
        config = file.read_bytes()
    base = safetensors.export(source)
    imports = ("import solo_ext.zoo.model",) if ours else ()
    return replace(
        base,
        files={**base.files, CONFIG: config, CARD: card(source, image, imports).encode()},
        network=lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        architecture=f"timm's {name}" + ", after import solo_ext.zoo.model" * ours,
        want=list(classifying.state_dict()),
        load=(
            *imports,
            f"model = timm.create_model('local-dir:{source.out}', pretrained=True)",
            f"model = solo_ext.load_backbone({str(source.out)!r})",
        ),
        record={"model": name},
    )


def card(source: Source, image: Mapping[str, Any], imports: Sequence[str]) -> str:
    """README.md: what it is, how it is loaded, what it reached, what it comes from."""
    config, backbone = source.config, source.backbone
    method, dataset = config.get("method"), (config.get("data") or {}).get("dataset")
    front = {
        "library_name": "timm",
        "license": LICENSE,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "solo_ext", "self-supervised-learning", *([method] if method else [])],
        **({"datasets": [info.hub]} if (info := DATASETS.get(dataset or "")) and info.hub else {}),
    }
    name = config["backbone"]["name"]
    stem = ", CIFAR stem" if torchvision.replaced(backbone) else ""
    parameters = sum(x.numel() for x in backbone.parameters())
    environment = read_json(source.path.with_name(safetensors.ENVIRONMENT)) or {}
    trained = environment.get("data", {}).get("train") or {}
    facts = {
        "network": f"`{name}`{stem}: {parameters:,} parameters, {backbone.num_features} features, in {source.dtype}",
        "trained by": f"`{method}`, without labels" if method else "solo_ext, without labels",
        "trained on": f"`{dataset}`" + (f", {trained['images']:,} images" if "images" in trained else ""),
        "epochs": config.get("max_epochs"),
        "encoder": "the teacher, an exponential moving average" if source.teacher else "the student",
        "images": f"RGB, {source.transform.size} x {source.transform.size} px ({image['crop_mode']}, "
        f"{image['interpolation']}), mean {list(image['mean'])}, std {list(image['std'])}",
    }
    return render(
        "card.md.j2",
        front=yaml.safe_dump(front, sort_keys=False),
        name=name,
        method=method,
        dataset=dataset,
        facts=facts,
        imports=imports,
        features=backbone.num_features,
        figures=[] if source.teacher else figures_of(source.path.parent, source.path.name),
        rounded="" if source.dtype == "float32" else f"; before the weights were rounded to {source.dtype}",
        repository=REPOSITORY,
    )


def push(folder: Path, repository: str) -> str:
    """Uploads what `export` wrote into `folder`, in one commit, and returns the page's URL.

    Raises:
        CheckpointError: the Hub cannot be reached or refuses.
    """
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != RECORD}
    files[CARD] = files[CARD].replace(REPOSITORY.encode(), repository.encode())
    url, _ = upload(repository, files, "Encoder written by solo-ext export", f"{folder} is not pushed")
    return str(url)
