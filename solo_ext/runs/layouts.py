"""Readers of the keys, names and objects that solo-learn's releases wrote into run folders."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Placeholder:
    """Stands for a class or function that a checkpoint names: accepts what is stored for it, and does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Value(Placeholder):
    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.value = state.get("_val")


class _List(list):
    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self[:] = [getattr(node, "value", node) for node in state.get("_content") or ()]


class _Dict(dict):
    def __new__(cls, *_args: Any) -> dict:  # type: ignore[misc]  # a plain one: torch.load fills no other
        return {}


def _placeholder(path: str, base: type = Placeholder) -> type:
    module, _, name = path.rpartition(".")
    return type(name, (base,), {"__module__": module})


_NAMES = (
    *("omegaconf.dictconfig.DictConfig", "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "typing.Any"),
    "argparse.Namespace",  # of DINO, MAE, DeiT
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "getattr", "int", "list", "str")),
    *("functools.partial", "solo.methods.base.static_lr", "solo.utils.lars.LARS"),
    *(f"{module}.lr_scheduler.LinearWarmupCosineAnnealingLR" for module in ("solo.utils", "pl_bolts.optimizers")),
    *(f"torch.optim.{name}" for name in ("lr_scheduler.MultiStepLR", "sgd.SGD", "adam.Adam", "adamw.AdamW")),
)
# With AdamW, solo-learn before PyTorch 2.6 saved `betas` as OmegaConf's list, and with it the whole configuration. With
# SimSiam it saves the function that fixes the predictor's learning rate, and with it the scheduler and the optimizer.
# For `torch.serialization.safe_globals`: reading runs none of their code, and other names are refused.
PLACEHOLDERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    _placeholder("omegaconf.listconfig.ListConfig", _List),
    _placeholder("omegaconf.nodes.AnyNode", _Value),
    _placeholder("collections.defaultdict", _Dict),
    *map(_placeholder, _NAMES),
]


def current_names(state: Mapping[str, T]) -> dict[str, T]:
    """The tensors under the names since solo-learn 1.0.3, in which `encoder.*` became `backbone.*`."""
    return {re.sub(r"^(momentum_)?encoder\.", r"\1backbone.", name): x for name, x in state.items()}


def current_config(args: dict[str, Any]) -> dict[str, Any]:
    """An args.json under the current keys. Until solo-learn 1.0.5 it was a flat list of command-line options, of which
    the network, the data and the size of the crops are taken; a nested one is returned unchanged."""
    name = args.get("backbone") or args.get("encoder")
    if not isinstance(name, str):
        return args
    from solo_ext.data.datasets import CUSTOM, DATASETS
    from solo_ext.networks.backbones import BACKBONES, MOCO_VITS

    options = args.get("backbone_args") or args  # until 0.9 they were options like the others
    kwargs = {}  # those that change the network
    if name.startswith("vit"):
        kwargs = {key: options[key] for key in ("img_size", "patch_size") if key in options}
    if name in MOCO_VITS:  # MoCo v3 had no ViTs of its own yet
        kwargs["num_heads"] = BACKBONES[name].keywords["num_heads"]
    data, folder = {"dataset": args.get("dataset")}, args.get("data_dir")
    for split in ("train", "val"):
        inside = folder and str(Path(folder, args.get(f"{split}_dir") or ""))
        data[f"{split}_path"] = inside or args.get(f"{split}_data_path")
    views = []
    info = DATASETS.get(str(data["dataset"]))
    if info and info.image_size is None:  # for the others the option had no effect
        sizes = args.get("crop_size") or args.get("size")
        statistics = {key: args[key] for key in ("mean", "std") if key in args and info is CUSTOM}
        views = [{"crop_size": size, **statistics} for size in sizes or ()]
    return {
        "name": args.get("name") or args.get("method"),
        "method": args.get("method"),
        "backbone": {"name": name, "kwargs": kwargs, "stem": "small" if options.get("cifar") else "imagenet"},
        "data": {key: value for key, value in data.items() if value is not None},
        "augmentations": views,
    }
