"""Pre-training: trains an encoder without labels."""

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import nn

from solo_ext.data.modules import PretrainData
from solo_ext.errors import ConfigError
from solo_ext.methods import METHODS
from solo_ext.training.callbacks.gradients import GradientMonitor
from solo_ext.training.callbacks.knn import OnlineKNN
from solo_ext.training.trainer import RunResult, fit, prepare, print_result, runs_folder


def pretrain(cfg: DictConfig) -> RunResult:
    """Trains an encoder without labels, as the resolved `cfg` says.

    Raises:
        SoloExtError: something in the configuration, the data or the checkpoint to resume; nothing is written then.
        NonFiniteError: the loss or a weight became NaN or infinite.
    """
    data = PretrainData(cfg.data, cfg.augmentations, cfg.optimizer.batch_size, cfg.seed)
    cfg = prepare(cfg, data)
    method = METHODS[cfg.method](cfg)
    check_sizes(method.backbone, cfg)
    callbacks: list[pl.Callback] = [GradientMonitor(cfg.gradients.every)] if cfg.gradients.enabled else []
    if cfg.knn_eval.enabled and data.val_set is not None:
        callbacks.append(OnlineKNN(data.probe_dataloaders, cfg.knn_eval, not cfg.performance.disable_channel_last))
    result = fit(cfg, method, data, runs_folder(cfg) / cfg.method, callbacks)
    print_result(result, ("val_acc1", "val_knn1", "val_knn20", "gap_sim"))
    return result


@torch.no_grad()
def check_sizes(backbone: nn.Module, cfg: DictConfig) -> None:
    """Raises ConfigError if the backbone cannot take one of the crop sizes: too small for it, or not a ViT's own."""
    backbone.eval()
    for size in dict.fromkeys(view.crop_size for view in cfg.augmentations):
        try:
            backbone(torch.zeros(1, 3, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"backbone.name: {cfg.backbone.name} cannot take crops of {size} px: {reason}") from error
    backbone.train()
