"""What the commands do, for a script or a notebook.

    run = solo_ext.pretrain("custom/res_mocov3", data="/my/train", val_data="/my/val", optimizer={"lr": 0.1})
    run.linear(), run.knn(k=[20])
    backbone = run.backbone()

What takes seconds to import is imported when it is needed: a run's first line is out before Lightning is imported.
"""

import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from solo_ext.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from lightning.pytorch import Callback, LightningDataModule
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from solo_ext.runs.run import RunResult
    from solo_ext.training.pretrain import AnyMethod

Recipe: TypeAlias = str | os.PathLike | Mapping[str, Any]


def composed(command: str, values: Recipe, overrides: Sequence[str] = ()) -> Any:
    """What a recipe's name, a YAML's path or a mapping says, with overrides in Hydra's grammar; not yet checked."""
    from solo_ext.training import recipes
    from solo_ext.training.compose import compose, overlay

    if isinstance(values, Mapping):
        return overlay(values, overrides)
    named = isinstance(values, str) and not values.endswith((".yaml", ".yml"))
    file = recipes.find(str(values), command) if named else Path(values)
    return compose(file.parent, file.name, overrides)


def configured(command: str, values: Recipe | None, overrides: Sequence[str], run: Path | None = None) -> Any:
    """The resolved configuration of a run: what `values` say, or without them what an evaluation of `run` takes over
    from it. Raises ConfigError, with the full key."""
    from solo_ext.training.compose import assign
    from solo_ext.training.config import resolve, run_values
    from solo_ext.training.unread import warn_of_idle, without_derived

    if values is not None:
        own = list(overrides) if command == "pretrain" else without_derived(overrides)
        raw = composed(command, values, own + ([assign("pretrained_feature_extractor", run)] if run else []))
    elif run:
        raw = run_values(run, command, overrides)
    else:
        raise ConfigError("which YAML? name it, as in solo-ext pretrain cifar10/byol; solo-ext recipes lists them")
    cfg = resolve(raw, command)
    warn_of_idle(cfg, overrides)
    return cfg


def evaluation(
    command: str,
    source: str | os.PathLike | None,
    values: Recipe | None = None,
    overrides: Sequence[str] = (),
    results: str | os.PathLike | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The configuration of an evaluation of the encoder `source`, and what runs it besides. Results of a zoo's or the
    Hub's go to a folder of the user's, since they do not belong in a package or a cache."""
    from solo_ext.training.start import runs_folder
    from solo_ext.zoo.store import open_source

    encoder = open_source(source) if source else None
    cfg = configured(command, values, overrides, encoder.path if encoder else None)
    place = None if results is None else Path(results).expanduser()
    if encoder and not place and not Path(str(source)).expanduser().exists():
        place = runs_folder(cfg) / "zoo" / re.sub(r"[^\w.-]+", "-", str(source).removeprefix("hf://"))
    return cfg, {"encoder": encoder, "results": place}


def start(command: str, cfg: Any, **options: Any) -> Any:
    """Runs the resolved `cfg`."""
    module = import_module(f"solo_ext.training.{'pretrain' if command == 'pretrain' else 'evaluate'}")
    return getattr(module, command)(cfg, **options)


class Trained:
    """A trained encoder, and the run that trained it.

    Args:
        source: a run's folder or checkpoint, ours or solo-learn's; an entry of the zoo; `hf://owner/name`.

    Attributes:
        dir: the run's folder, or that of an entry's files.
        metrics: the last value of everything that the run logged; empty for one that has not ended.
    """

    def __init__(self, source: str | os.PathLike):
        from solo_ext.runs.run import Run
        from solo_ext.zoo.store import open_source

        path = Path(source).expanduser()
        self.source, self.dir = source, path if path.is_dir() else path.parent
        if not path.exists():
            self.dir = open_source(source).path.parent
        self._run = Run(self.dir)
        self.metrics: dict[str, float] = self._run.summary.get("metrics", {})

    def __repr__(self) -> str:
        return f"Trained({str(self.source)!r})"

    def linear(self, recipe: Recipe | None = None, **options: Any) -> "RunResult":
        """Trains a linear classifier on the frozen encoder, as `solo-ext linear` does.

        recipe: as for `pretrain`; default: the data of the run, and the linear recipe of its method. options: `data`
        and `val_data` as for `pretrain`, to transfer the encoder; `teacher=True`; any key of the configuration. The
        result's `metrics` have val_acc1 and val_acc5 in percent.
        """
        return self._evaluate("linear", recipe, options)

    def finetune(self, recipe: Recipe | None = None, **options: Any) -> "RunResult":
        """Trains the encoder, too, with a classifier on it, as `solo-ext finetune` does; arguments as of `linear`."""
        return self._evaluate("linear", recipe, {"finetune": True, **options})

    def knn(self, k: Sequence[int] = (1, 20), **options: Any) -> list[dict[str, Any]]:
        """Classifies by nearest neighbours, as `solo-ext knn` does: a row {"distance", "k", "T", "acc1", "acc5", ...}
        for each combination of `knn_eval`; options as of `linear`."""
        return self._evaluate("knn", None, {"knn_eval.k": list(k), **options})

    def quality(self, **options: Any) -> dict[str, float]:
        """Measures the features without labels, as `solo-ext quality` does; options as of `linear`."""
        return self._evaluate("quality", None, options)

    def backbone(self, teacher: bool = False) -> "nn.Module":
        """The network [B, C, H, W] -> [B, num_features], see `load_backbone`."""
        from solo_ext.zoo.model import load_backbone

        return load_backbone(self.source, teacher)

    def features(self, images: str | os.PathLike | None = None, teacher: bool = False) -> "np.ndarray":
        """Features float32 [N, D] of the images at a path, in the order of their names; default: the run's validation
        images."""
        from solo_ext.analysis.features import features_of
        from solo_ext.zoo.store import open_source

        return features_of(open_source(self.source), None if images is None else os.fspath(images), teacher)[0]

    def _evaluate(self, command: str, recipe: Recipe | None, options: dict[str, Any]) -> Any:
        like = (self._run.config or {}).get("data", {}).get("dataset")
        cfg, rest = evaluation(command, self.source, recipe, _overrides(options, like))
        return start(command, cfg, **rest)


def pretrain(
    recipe: Recipe,
    *,
    data: "str | os.PathLike | Dataset | DataLoader | LightningDataModule | None" = None,
    val_data: "str | os.PathLike | Dataset | DataLoader | None" = None,
    backbone: "str | nn.Module | None" = None,
    method: "AnyMethod | None" = None,
    callbacks: "Sequence[Callback]" = (),
    **keys: Any,
) -> Trained:
    """Trains an encoder without labels, as `solo-ext pretrain` does: strictly by the same keys.

    Args:
        recipe: a recipe's name (`solo-ext recipes` lists them), the path of a YAML, or a mapping with the same keys.
        data: the training images: a path, in place of the recipe's `data.train_path` (a folder, list of files or HDF5
            file of your own goes with a `custom/` recipe); a PyTorch Dataset of images, of (image, label), or of
            {"image": ..., "label": ...}, un-augmented, with any recipe; or views of your own, as a DataLoader with
            batches `([view, ...], targets)`, or as a LightningDataModule with batches `(indexes, [view, ...],
            targets)`, with a `custom/` recipe where `data.num_classes` says how many classes there are.
        val_data: labelled images for the online classifier and kNN, as a path, Dataset or DataLoader.
        backbone: a name, or a module [B, C, H, W] -> [B, num_features], of which a copy is trained.
        method: a registered name, or a class or module of your own.
        callbacks: Lightning's, beside those that follow from the configuration.
        keys: of the configuration, `max_epochs=100, optimizer={"lr": 0.1}`, or by full keys, `**{"optimizer.lr": 0.1}`.

    Raises:
        SoloExtError: for the configuration, data or checkpoint, before anything is written, and see
            `solo_ext.training.pretrain`.
    """
    options, given = {"data": data, "val_data": val_data, **keys}, dict[str, Any]()
    if isinstance(method, str):
        options["method"] = method
    elif method is not None:
        given["method"] = method
    if isinstance(backbone, str):
        options["backbone.name"] = backbone
    if hasattr(data, "batch_sampler"):
        from solo_ext.data.modules import GivenLoaders

        data = GivenLoaders(data, options.pop("val_data"))  # type: ignore[arg-type]
        if data.train.batch_size:
            options = {"optimizer.batch_size": data.train.batch_size, **options}
    if hasattr(data, "train_dataloader"):
        options.pop("data")
        given["data"] = data
    like = None if data is None else (composed("pretrain", recipe).get("data") or {}).get("dataset")
    overrides = _overrides(options, like)
    if backbone is not None and not isinstance(backbone, str):
        from solo_ext.data.datasets import CUSTOM, recorded_info
        from solo_ext.networks.backbones import give_backbone

        info = recorded_info(composed("pretrain", recipe, overrides).get("data") or {}) or CUSTOM
        name = give_backbone(backbone, info.channels)
        # as it is: with its own first layer
        overrides += _overrides({"backbone.name": name, "backbone.kwargs": {}, "backbone.stem": "imagenet"}, None)
    cfg = configured("pretrain", recipe, overrides)
    return Trained(start("pretrain", cfg, callbacks=callbacks, **given).dir)


def _overrides(options: Mapping[str, Any], like: str | None) -> list[str]:
    """The options of a call in Hydra's grammar; what is silent about Datasets is as in the dataset `like`."""
    keys = dict(options)
    data, val = keys.pop("data", None), keys.pop("val_data", None)
    for key, value in (("data.train_path", data), ("data.val_path", val)):
        if isinstance(value, str | os.PathLike):
            keys[key] = os.fspath(value)
    if isinstance(data, Mapping):
        keys |= {f"data.{key}": value for key, value in data.items()}
    elif data is not None and "data.train_path" not in keys:
        from solo_ext.data.given import give

        own = give(data, val, like)
        keys |= {key: value for key, value in own.items() if key != "data.channels" or key not in keys}
    elif val is not None and "data.val_path" not in keys:
        raise ConfigError("val_data is a Dataset, so data has to be one, too")
    return [f"{key}={_spelled(value)}" for key, value in keys.items()]


def _spelled(value: Any) -> str:
    """`value` in Hydra's grammar."""
    from solo_ext.training.compose import quoted

    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_spelled(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_spelled, value)) + "]"
    return repr(value) if isinstance(value, int | float) else quoted(value)
