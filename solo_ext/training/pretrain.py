"""Pre-training. What takes seconds to import is imported after the first line about the run is out."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from solo_ext.data.datasets import dataset_info
from solo_ext.methods import METHODS, Method
from solo_ext.networks.backbones import check_sizes
from solo_ext.runs.encoder import load_encoder
from solo_ext.runs.run import RunResult
from solo_ext.schema import plain
from solo_ext.training.callbacks import MONITORS
from solo_ext.training.callbacks.collapse import CollapseWatch
from solo_ext.training.callbacks.gradients import GradientMonitor
from solo_ext.training.callbacks.inputs import Inputs
from solo_ext.training.config import PretrainConfig, declared_method, resolve
from solo_ext.training.start import begin, runs_folder

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from omegaconf import DictConfig

    AnyMethod: TypeAlias = str | type[LightningModule] | LightningModule


def pretrain(
    cfg: "PretrainConfig | DictConfig | Mapping[str, Any]",
    *,
    method: "AnyMethod | None" = None,
    data: "LightningDataModule | None" = None,
    callbacks: "Sequence[Callback]" = (),
) -> RunResult:
    """Trains an encoder without labels, as `cfg` says, which `resolve` has checked or will.

    method: in place of the one in `cfg`: a registered name, a class that is built from `cfg`, or a built module. Its
    name appears in args.json and in the path of the run folder. data: in place of the images in `cfg`, without checks
    or a kNN probe; batches are `(indexes, [view, ...], targets)`. callbacks: beside those that follow from `cfg`.

    Raises SoloExtError for the configuration, the data or the checkpoint to resume, before anything is written;
    NonFiniteError for a loss or weight that is NaN or infinite; CollapseError if `cfg.collapse` is `stop`.
    """
    if not isinstance(cfg, PretrainConfig):
        return pretrain(resolve(cfg), method=method, data=data, callbacks=callbacks)
    if method is not None:
        cfg = copy.deepcopy(cfg)
        cfg.method, declared = _named(method)
        if issubclass(declared, Method):
            cfg.backbone.kwargs = declared.own_arguments(cfg.backbone.name) | cfg.backbone.kwargs
    start = begin(cfg, runs_folder(cfg) / cfg.method)

    from solo_ext.data.modules import ImageData, PretrainData
    from solo_ext.training.trainer import fit, prepare, print_result

    if data is None:
        data = PretrainData(cfg.data, cfg.augmentations, cfg.optimizer.batch_size, cfg.seed)
    cfg = prepare(cfg, data)
    if method is None or isinstance(method, str):
        method = METHODS[cfg.method]
    module: Any = method(cfg) if isinstance(method, type) else method
    cfg.gap.place = getattr(module, "gap_at", None)
    ours = isinstance(module, Method)
    cfg.require(ours or not cfg.compile, "compile", "false for a module that is not one of our methods")
    if ours:
        sizes = [
            side for view in cfg.augmentations for side in (view.crop_size, *(n for _, n in view.progressive or ()))
        ]
        check_sizes(module.backbone, cfg.backbone.name, sizes, channels=dataset_info(cfg.data).channels)
        if cfg.pretrained_feature_extractor and not (start and start.checkpoint):
            network = {"backbone": plain(cfg.backbone), "data": plain(cfg.data), "pretrain_method": cfg.method}
            encoder, _ = load_encoder(cfg.pretrained_feature_extractor, network)
            module.backbone.load_state_dict(encoder.state_dict())
            module.teacher.restart()
        if cfg.compile:
            inside = getattr(cfg, GradientMonitor.key).enabled
            cfg.require(not inside, "compile", "false with gradients.enabled, which looks inside the network")
            module.compile_networks()
    sections = [(monitor, getattr(cfg, key)) for key, monitor in MONITORS.items()]
    images = data if isinstance(data, ImageData) else None
    monitors = [monitor.make(section, cfg, images) for monitor, section in sections if section.enabled]
    watch = [CollapseWatch(cfg.collapse)] if cfg.collapse != "off" else []
    result = fit(cfg, module, data, start, [Inputs(), *filter(None, monitors), *watch, *callbacks])
    print_result(result, ("val_acc1", "val_knn1", "val_knn20", "gap_sim"))
    return result


def _named(method: "AnyMethod") -> tuple[str, type]:
    """The registered name, or else that of the class, and the class."""
    if isinstance(method, str):
        return method, declared_method(method)
    cls = method if isinstance(method, type) else type(method)
    known = METHODS.declared.items()
    return next((name for name, declared in known if cls in (declared, METHODS[name])), cls.__name__), cls
