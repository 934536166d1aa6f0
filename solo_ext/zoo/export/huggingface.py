"""A folder for the Hugging Face Hub, which timm and `load_backbone` take: safetensors, config.json and a card."""

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm.models
import yaml
from timm.models._hub import save_config_for_hf
from torch import nn
from torchvision.models.resnet import ResNet

from solo_ext.data.transforms import EvalTransform
from solo_ext.files import read_json
from solo_ext.runs.run import ENVIRONMENT
from solo_ext.zoo.export import Product, Source, safetensors, torchvision
from solo_ext.zoo.export import timm as timms
from solo_ext.zoo.hub import CARD, CONFIG, REPOSITORY
from solo_ext.zoo.index import figures_of
from solo_ext.zoo.model import solo_ext_backbone

LICENSE = "mit"
OURS = solo_ext_backbone.__name__
ON_THE_HUB = {  # data set -> its id there
    "fashion_mnist_mini": "zalando-datasets/fashion_mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet100": "ILSVRC/imagenet-1k",
    "imagenet": "ILSVRC/imagenet-1k",
}


def supports(backbone: nn.Module) -> str | None:
    """None: all backbones; what timm lacks, `solo_ext_backbone` builds for it."""
    return None


def architecture(source: Source) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the `timm.create_model` call that builds the network: of timm itself, where it can."""
    backbone = source.backbone
    if timms.supports(backbone) is None and not (isinstance(backbone, ResNet) and torchvision.replaced(backbone)):
        return timms.architecture(source)
    asked = source.config["backbone"]
    kwargs = {key: value for key, value in (asked.get("kwargs") or {}).items() if key not in torchvision.IGNORED}
    stem = "small" if torchvision.replaced(backbone) else "imagenet"
    config = {"name": asked["name"], "kwargs": kwargs, "stem": stem, "last_norm": bool(asked.get("last_norm"))}
    return OURS, {"num_classes": 0, "config": {"backbone": config}}


def preprocessing(transform: EvalTransform) -> dict[str, Any]:
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
        save_config_for_hf(model, Path(folder) / CONFIG, model_args=kwargs)
        config = (Path(folder) / CONFIG).read_bytes()
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


def card(source: Source, image: dict[str, Any], imports: tuple[str, ...]) -> str:
    """README.md: what it is, how it is loaded, what it reached, what it comes from."""
    config, backbone = source.config, source.backbone
    method, dataset = config.get("method"), (config.get("data") or {}).get("dataset")
    front = {
        "library_name": "timm",
        "license": LICENSE,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "solo_ext", "self-supervised-learning", *([method] if method else [])],
        **({"datasets": [ON_THE_HUB[dataset]]} if dataset in ON_THE_HUB else {}),
    }
    name = config["backbone"]["name"]
    stem = ", CIFAR stem" if isinstance(backbone, ResNet) and torchvision.replaced(backbone) else ""
    parameters = sum(x.numel() for x in backbone.parameters())
    trained = (read_json(source.path.with_name(ENVIRONMENT)) or {}).get("data", {}).get("train") or {}
    rows = {
        "network": f"`{name}`{stem}: {parameters:,} parameters, {backbone.num_features} features, in {source.dtype}",
        "trained by": f"`{method}`, without labels" if method else "solo_ext, without labels",
        "trained on": f"`{dataset}`" + (f", {trained['images']:,} images" if "images" in trained else ""),
        "epochs": config.get("max_epochs"),
        "encoder": "the teacher, an exponential moving average" if source.teacher else "the student",
        "images": f"RGB, {source.transform.size} x {source.transform.size} px ({image['crop_mode']}, "
        f"{image['interpolation']}), mean {list(image['mean'])}, std {list(image['std'])}",
    }
    facts = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    needs = "timm has no such network of its own: solo_ext has to be installed and imported.\n\n" if imports else ""
    lines = "\n".join((*imports, "import timm"))
    return f"""\
---
{yaml.safe_dump(front, sort_keys=False)}---

# {name} by {method or "solo_ext"} on {dataset}

An image encoder, trained without labels with solo_ext. Its features are for kNN, linear classifiers and fine-tuning.

| | |
|---|---|
{facts}

## Use

{needs}```python
{lines}

model = timm.create_model("hf-hub:{REPOSITORY}", pretrained=True).eval()  # a folder on the disk: local-dir:FOLDER
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image.convert("RGB"))[None])  # [1, {backbone.num_features}]
```

```python
import solo_ext

model = solo_ext.load_backbone("hf://{REPOSITORY}")  # checks the SHA-256; a folder on the disk: its path
features = model(model.transform(image)[None])
```

```bash
solo-ext knn --run FOLDER  # and all other commands that take a run, with the folder on the disk
```

## Results

{_results(source)}

## References

* Pham et al., On the Pros and Cons of Momentum Encoder in Self-Supervised Visual Representation Learning, 2022,
  [arXiv:2208.05744](https://arxiv.org/abs/2208.05744)
* Pham et al., Self-Supervised Visual Representation Learning via Residual Momentum, 2022,
  [arXiv:2211.09861](https://arxiv.org/abs/2211.09861)
* da Costa et al., solo-learn: A Library of Self-supervised Methods for Visual Representation Learning, JMLR, 2022,
  [23(56)](https://jmlr.org/papers/v23/21-1155.html)
"""


def _results(source: Source) -> str:
    figures = [] if source.teacher else figures_of(source.path.parent, source.path.name)
    if not figures:
        return "It has not been evaluated."
    rounded = "" if source.dtype == "float32" else f"; before the weights were rounded to {source.dtype}"
    rows = [f"| {figure.metric} | {figure.value:.2f} | {figure.protocol}{rounded} |" for figure in figures]
    return "\n".join(["| | accuracy, percent | protocol |", "|---|---|---|", *rows])
