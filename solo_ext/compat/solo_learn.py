"""Our methods in solo-learn's registry, and its own scripts, unchanged, run out of a checkout on today's libraries.

A repair undoes, in this process only, what a newer library changed under solo-learn, where that is needed.
"""

import functools
import importlib.machinery
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from solo_ext.errors import ConfigError, must_have
from solo_ext.evaluation.linear import image_and_target
from solo_ext.files import log
from solo_ext.methods import METHODS
from solo_ext.methods.module import LightningMethod
from solo_ext.methods.step import Monitor, Outputs, Step
from solo_ext.networks.backbones import BACKBONES, MOCO_VITS, BackboneConfig, build_backbone
from solo_ext.runs.layouts import PLACEHOLDERS
from solo_ext.schema import build, plain
from solo_ext.training.sync_bn import SyncNorms
from solo_ext.training.trainer_config import TrainerConfig

_RUN = "_SOLO_EXT_WITH_SOLO_LEARN"  # the checkout and script, for the processes that Lightning starts
_PACKAGES = {  # module -> package, where the names differ
    "PIL": "pillow",
    "hydra": "hydra-core",
    "nvidia": "nvidia-dali-cuda120",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
}


def register() -> list[str]:
    """Adds the methods that solo-learn lacks to `solo.methods.METHODS`, and the backbones to its `BaseMethod`.

    solo-learn must be importable. Returns the names of the added methods.
    """
    from solo.methods import METHODS as registry
    from solo.methods.base import BaseMethod

    added = [name for name in METHODS if name not in registry]
    registry.update({name: solo_method(METHODS[name]) for name in added})  # type: ignore[arg-type]  # classes can be hashed
    backbones = BaseMethod._BACKBONES
    for name in [*BACKBONES, *(f"timm/{model}" for model in timm.list_models())]:
        backbones.setdefault(name, functools.partial(_backbone, name))
    for name in MOCO_VITS if added else ():
        backbones[name] = functools.partial(_vit, backbones[name])
    return added


class SoloMethod(LightningMethod):
    """What solo-learn's scripts, callbacks and tests ask of a method, beside what every method of ours has."""

    add_and_assert_specific_cfg: Callable[[DictConfig], DictConfig]  # BaseMethod's: solo-learn's defaults

    def __init__(self, cfg: DictConfig) -> None:
        cfg = self.add_and_assert_specific_cfg(cfg)  # which its scripts read, too
        super().__init__(cfg)
        self.features_dim, self.num_classes = self.backbone.num_features, cfg.data.num_classes
        self.num_large_crops, self.num_small_crops = self.large_crops, cfg.data.num_small_crops
        self.num_crops, self.multicrop = self.num_large_crops + self.num_small_crops, self.num_small_crops > 0
        self.max_epochs, self.knn_eval = cfg.max_epochs, cfg.knn_eval.enabled
        if self.knn_eval:
            from solo.utils.knn import WeightedKNNClassifier

            self.knn = WeightedKNNClassifier(k=cfg.knn_eval.k, distance_fx=cfg.knn_eval.distance_func)
            self.monitors.append(_Bank(knn=self.knn))

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(student's, teacher's) of each part that the teacher has copies of."""
        return [self.teacher.pair(stages[0])[::-1] for stages in self.teacher.parts.values() if stages]

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Like `LightningMethod.forward`; the last head's output is also `p`."""
        out = super().forward(X)
        return {**out, "p": out["q"]}

    def multicrop_forward(self, X: Tensor) -> dict[str, Tensor]:
        """The outputs on a small crop: the same."""
        return self(X)

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Tensor]:
        """The teacher's feats [B, F] and, as z and as k, its projector's output [B, D]."""
        out = self.teach(X, {} if self.teacher.whole else self.student(X), "projector")
        return {"feats": out["backbone"], "z": out["projector"], "k": out["projector"]}

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> Outputs:
        out = super().validation_step(batch, batch_idx)
        if self.knn_eval and not self.trainer.sanity_checking:
            images, labels = image_and_target(batch)
            self.knn(test_features=self.backbone(images), test_targets=labels)
        return out

    def on_validation_epoch_end(self) -> None:
        if self.knn_eval and not self.trainer.sanity_checking:
            top1, top5 = self.knn.compute()
            self.log_dict({"val_knn_acc1": top1, "val_knn_acc5": top5}, sync_dist=True)


@dataclass(frozen=True)
class _Bank(Monitor):
    """solo-learn's online kNN: its bank is the features of the augmented views, as they were when they trained."""

    knn: Callable[..., None] = field(kw_only=True)

    def __call__(self, step: Step) -> dict[str, Tensor]:
        known = step.labels != -1
        for view in step.passes.probed:
            self.knn(train_features=step.students[view]["backbone"][known], train_targets=step.labels[known])
        return {}


def solo_method(method: type[LightningMethod]) -> type[SoloMethod]:
    """`method` as a subclass of solo-learn's `BaseMethod`, of which it takes only what it lacks."""
    from solo.methods.base import BaseMethod

    theirs = {name for name in vars(BaseMethod) if not name.startswith("__")} - vars(SoloMethod).keys()
    ours = {name: inspect.getattr_static(method, name) for name in theirs if hasattr(method, name)}
    return type(method.__name__, (SoloMethod, method, BaseMethod), {**ours, "__module__": method.__module__})


def _own(method: str | None) -> Any:
    return METHODS.declared[method].backbones if method and method in METHODS else None


def _backbone(name: str, method: str | None = None, **kwargs: Any) -> nn.Module:
    """`build_backbone`, as solo-learn calls its constructors."""
    return build_backbone(BackboneConfig(name, kwargs), own=_own(method))


def _vit(solo_learns: Callable[..., nn.Module], method: str | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """solo-learn's ViT, with MoCo v3's own for all methods that have them: its heads are others at the same shapes."""
    return solo_learns("mocov3" if _own(method) is MOCO_VITS else method, *args, **kwargs)


@dataclass(frozen=True)
class Repair:
    """What the scripts `main_<name>.py` of solo-learn, by default all, need to run here.

    apply: changes this process where the installed libraries make it necessary, and returns whether they do.
    """

    name: str
    why: str
    apply: Callable[[], bool]
    scripts: Sequence[str] = ()


def _accept() -> bool:
    from solo.utils.knn import WeightedKNNClassifier
    from torchmetrics import Metric

    try:
        WeightedKNNClassifier()
        return False
    except (TypeError, ValueError):
        init = Metric.__init__

    @functools.wraps(init)
    def without(self, *args: Any, compute_on_step: bool | None = None, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

    Metric.__init__ = without  # type: ignore[method-assign]
    # what compute_on_step=False meant: a batch is stored, and not classified
    WeightedKNNClassifier.forward = lambda self, *args, **kwargs: self.update(*args, **kwargs)
    return True


def _read_objects() -> bool:
    from torch.optim.lr_scheduler import LRScheduler

    if torch.__version__ < "2.6":  # which loads anything
        return False
    torch.serialization.add_safe_globals(PLACEHOLDERS)
    load = LRScheduler.load_state_dict

    @functools.wraps(load)
    def without(self, state: dict[str, Any]) -> None:
        load(self, {key: value for key, value in state.items() if key != "get_lr"})  # the scheduler has its own

    LRScheduler.load_state_dict = without  # type: ignore[method-assign, assignment]  # `self` has no type
    return True


def _stay_on_the_cpu() -> bool:
    if torch.cuda.is_available():
        return False

    def here(place: Any) -> Any:
        return "cpu" if isinstance(place, str | torch.device) and torch.device(place).type == "cuda" else place

    def staying(to: Callable) -> Callable:
        @functools.wraps(to)
        def moved(self, *args: Any, **kwargs: Any) -> Any:
            return to(self, *map(here, args), **{key: here(value) for key, value in kwargs.items()})

        return moved

    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    torch.Tensor.to = staying(torch.Tensor.to)  # type: ignore[method-assign]
    torch.nn.Module.to = staying(torch.nn.Module.to)  # type: ignore[method-assign]
    return True


def _suit_the_machine() -> bool:
    from lightning.pytorch.trainer.connectors import accelerator_connector
    from solo.args import linear, pretrain

    def suiting(parse: Callable[[DictConfig], DictConfig]) -> Callable[[DictConfig], DictConfig]:
        @functools.wraps(parse)
        def parsed(cfg: DictConfig) -> DictConfig:
            cfg = parse(cfg)
            changes = {key: value for key, value in _here(cfg).items() if OmegaConf.select(cfg, key) != value}
            for key, value in changes.items():
                OmegaConf.update(cfg, key, value)
            if changes:
                log.disabled = False  # Hydra disables what it finds
                _say("keys for another machine", ", ".join(f"{key}={value}" for key, value in changes.items()))
            return cfg

        return parsed

    for args in (linear, pretrain):
        args.parse_cfg = suiting(args.parse_cfg)
    if not torch.cuda.is_available():
        accelerator_connector.TorchSyncBatchNorm = functools.partial(SyncNorms, on_gpu=False)  # type: ignore[misc, assignment]
    return False  # which of them, is not known before a YAML is read


def _here(cfg: DictConfig) -> dict[str, Any]:
    """What the keys of a YAML for GPUs become on a machine without one, and wandb's where nobody has logged in."""
    here: dict[str, Any] = {}
    if not torch.cuda.is_available():
        if cfg.get("accelerator") != "cpu":
            asked = {key: value for key in ("devices", "num_nodes", "precision") if (value := plain(cfg).get(key))}
            trainer = build(TrainerConfig, {**asked, "accelerator": "cpu"}, "")
            here = {"accelerator": "cpu", "devices": trainer.device_count, "precision": trainer.pick_precision(False)}
            if trainer.processes == 1:  # a process group of one only costs time
                here |= {"strategy": "auto", "sync_batchnorm": False}
        if cfg.data.format == "dali" and OmegaConf.select(cfg, "dali.device") != "cpu":
            here["data.format"] = "image_folder"
    if cfg.wandb.enabled and not cfg.wandb.offline and not _wandb_key():
        here["wandb.offline"] = True
    return here


def _wandb_key() -> bool:
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    wandb.teardown()  # so that it reads the environment again, which Lightning changes
    return bool(settings.api_key or get_netrc_auth(settings.base_url)) or settings.mode != "online"


REPAIRS: Sequence[Repair] = (
    Repair("compute_on_step", "torchmetrics dropped an argument that the kNN passes", _accept, ("pretrain", "knn")),
    Repair("checkpoint objects", "torch.load refuses the scheduler that SimSiam saves; it is skipped", _read_objects),
    Repair("no GPU", "the script moves everything to a GPU, and there is none", _stay_on_the_cpu, ("knn", "umap")),
    Repair("keys for another machine", "it says itself which", _suit_the_machine, ("pretrain", "linear")),
)


def apply_repairs(script: str) -> list[str]:
    """Applies the repairs that `script` needs here and logs them; `solo` must be importable. Returns their names."""
    kind = script.removeprefix("main_").removesuffix(".py")
    applied = [repair for repair in REPAIRS if kind in (repair.scripts or [kind]) and repair.apply()]
    for repair in applied:
        _say(repair.name, repair.why)
    return [repair.name for repair in applied]


def _say(name: str, why: str) -> None:
    log.info("repaired for solo-learn: %s (%s)", name, why)


def run_script(checkout: str | Path, script: str, argv: Sequence[str] = ()) -> None:
    """Runs `script` of the folder `checkout` as if by itself, in the current folder, with the command line `argv`.

    Raises ConfigError if there is no such checkout or script, the checkout is older than the move to `lightning`, or a
    package that the script needs is not installed.
    """
    checkout = Path(checkout).expanduser().absolute()
    base, names = checkout / "solo/methods/base.py", sorted(file.name for file in checkout.glob("main_*.py"))
    if not base.with_name("__init__.py").is_file():
        raise ConfigError(f"{checkout} is not a checkout of solo-learn: it has no solo/methods/__init__.py")
    if base.is_file() and "import lightning.pytorch" not in base.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{checkout} is older than December 2023, when solo-learn moved to lightning; update it")
    must_have(script, names, f"{checkout} has no")
    path = checkout / script
    sys.path.insert(0, str(checkout))
    # Lightning starts the other processes of a run as `python -m <the name in __spec__> <argv>`: they come here, too
    os.environ[_RUN] = json.dumps([str(checkout), script])
    main = ModuleType("__main__")
    main.__file__ = str(path)
    main.__spec__ = importlib.machinery.ModuleSpec("solo_ext.compat.solo_learn", None)
    own = sys.modules["__main__"], sys.argv
    try:
        register()
        apply_repairs(script)
        sys.modules["__main__"], sys.argv = main, [str(path), *argv]
        exec(compile(path.read_bytes(), path, "exec"), main.__dict__)
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module in ("", "solo", "solo_ext"):
            raise
        package = _PACKAGES.get(module, module)
        raise ConfigError(f"{script} needs {module}, which is not installed: pip install {package}") from error
    finally:
        sys.modules["__main__"], sys.argv = own


if __name__ == "__main__":
    checkout, script = json.loads(os.environ[_RUN])
    run_script(checkout, script, sys.argv[1:])
