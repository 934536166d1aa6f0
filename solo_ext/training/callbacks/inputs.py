"""What a network is shown: views and batches as numbers, so that runs that should be alike can be compared."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from solo_ext.methods.step import Monitor, Step
from solo_ext.text import Metric
from solo_ext.training.callbacks import LightningModule, MonitorCallback, Trainer


@dataclass(frozen=True)
class Views(Monitor):
    """Of the large views, as they are normalised, of up to 256 images: mean and standard deviation, the deviation of
    single images' means, and the mean differences of neighbouring pixels and of a pixel's channels. Each augmentation
    but the flip moves one of them."""

    every: int = 10
    large_crops: int = 2

    def __call__(self, step: Step) -> dict[str, Tensor]:
        x = torch.stack([view[:256].float() for view in step.views[: self.large_crops]])  # [views, B, C, H, W]
        apart = x - x[:, :, :1]  # 0 for gray; torch.std over channels takes 30 times as long
        return {
            "view_mean": x.mean(),
            "view_std": x.std(),
            "view_brightness": x.mean((2, 3, 4)).std(),
            "view_detail": x.diff(dim=-1).abs_().mean(),
            "view_colour": (apart - apart.mean(2, keepdim=True)).square_().mean(2).sqrt_().mean(),
        }


class Inputs(MonitorCallback):
    """Logs the statistics of the views, and over how many images a BatchNorm of the backbone takes its own."""

    metrics = (
        Metric("view_mean", "Pixels of the views, mean", section="inputs"),
        Metric("view_std", "Pixels of the views, standard deviation", section="inputs"),
        Metric("view_brightness", "Brightness of the views, standard deviation", section="inputs"),
        Metric("view_detail", "Neighbouring pixels, mean difference", section="inputs"),
        Metric("view_colour", "Channels of a pixel, standard deviation", section="inputs"),
        Metric("bn_images", "Images that a BatchNorm sees", section="inputs"),
    )

    images = 0  # of the last batch, on all devices

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        if hasattr(module, "monitors"):  # of our methods
            module.monitors.append(Views(large_crops=module.large_crops))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, i: int) -> None:
        self.images = len(batch[0]) * trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if norm := next((layer for layer in module.modules() if isinstance(layer, _BatchNorm)), None):
            shares = 1 if "Sync" in type(norm).__name__ else trainer.world_size  # torch's, timm's and our own
            module.log("bn_images", self.images / shares)

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images = int(state["images"])
