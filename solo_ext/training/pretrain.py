"""Pre-training: trains an encoder without labels."""

import importlib
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from solo_ext.data.modules import PretrainData
from solo_ext.errors import ConfigError
from solo_ext.methods import METHODS
from solo_ext.training.callbacks import MONITORS
from solo_ext.training.config import PretrainConfig
from solo_ext.training.trainer import RunResult, fit, prepare, print_result, runs_folder


def pretrain(cfg: PretrainConfig) -> RunResult:
    """Trains an encoder without labels, as the resolved `cfg` says.

    Raises:
        SoloExtError: something in the configuration, the data or the checkpoint to resume; nothing is written then.
        NonFiniteError: the loss or a weight became NaN or infinite.
    """
    data = PretrainData(cfg.data, cfg.augmentations, cfg.optimizer.batch_size, cfg.seed)
    cfg = prepare(cfg, data)
    method = METHODS[cfg.method](cfg)
    check_sizes(method.backbone, cfg)
    result = fit(cfg, method, data, runs_folder(cfg) / cfg.method, callbacks_of(cfg, data))
    print_result(result, ("val_acc1", "val_knn1", "val_knn20", "gap_sim"))
    return result


def callbacks_of(cfg: PretrainConfig, data: PretrainData) -> list[pl.Callback]:
    """The monitors that `cfg` switches on, and the user's own callbacks that it names.

    Raises:
        ConfigError: `callbacks` names what cannot be imported, or gives arguments that do not fit.
    """
    sections = [(monitor, getattr(cfg, key)) for key, monitor in MONITORS.items()]
    made = [monitor.make(section, cfg, data) for monitor, section in sections if section.enabled]
    return [callback for callback in made if callback] + [_import(*item) for item in (cfg.callbacks or {}).items()]


def _import(path: str, arguments: Any) -> pl.Callback:
    module, _, name = path.rpartition(".")
    try:
        callback = getattr(importlib.import_module(module), name)(**(arguments or {}))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"callbacks.{path}: {error}") from error
    if not isinstance(callback, pl.Callback):
        raise ConfigError(f"callbacks.{path} is not a callback of Lightning's, but a {type(callback).__name__}")
    return callback


@torch.no_grad()
def check_sizes(backbone: nn.Module, cfg: PretrainConfig) -> None:
    """Raises ConfigError if the backbone cannot take one of the crop sizes: too small for it, or not a ViT's own."""
    backbone.eval()
    for size in dict.fromkeys(view.crop_size for view in cfg.augmentations):
        try:
            backbone(torch.zeros(1, 3, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"backbone.name: {cfg.backbone.name} cannot take crops of {size} px: {reason}") from error
    backbone.train()
