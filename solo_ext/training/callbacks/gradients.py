"""How strongly the loss pulls at each part of the network over training (ProjectorEMA, Sec. 4 and Fig. 5)."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from solo_ext.losses.distributed import max_over_ranks
from solo_ext.schema import Config, Count
from solo_ext.text import Metric
from solo_ext.training.callbacks import LightningModule, MonitorCallback, Trainer, is_logging_step, our_method


@dataclass
class GradientsConfig(Config, section="gradients"):
    enabled: bool = False
    every: Count = 50  # optimizer steps
    views: Literal["first", "all"] = "first"  # that the student learns on


class GradientMonitor(MonitorCallback):
    """Logs `grad_linf/<stage>`: the l-infinity norm of d(loss) / d(output of the stage), over a batch of one view or of
    all. Of the backbone's last stage it is the map before the pooling.

    The loss is the whole loss of the batch, without the loss scale of
    16-bit precision and not divided by the accumulated batches, of which only the first is monitored. Over several
    devices it is the largest value. Infinite where the scaled gradient overflows: the optimizer skips such a step.
    """

    key = "gradients"
    Config = GradientsConfig
    metrics = (Metric("grad_linf/*", "Largest gradient at *"),)

    def __init__(self, cfg: GradientsConfig):
        self.every, self.views = cfg.every, cfg.views
        self.waiting: set[str] = set()  # modules that have not run in this step
        self.norms: dict[str, Tensor] = {}  # of this step
        self.pending: dict[int, dict[str, Tensor]] = {}  # step -> norms, to be logged
        self.hooks: list[Any] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        method = our_method(module, self.key)
        stages = [stage for stage in method.row if stage.part == "backbone"]
        heads = {name: method.part(name) for name in method.parts if name != "backbone"}
        maps = {stage.name: method.backbone.get_submodule(stage.places) for stage in stages if stage.steps}
        self.modules = (maps or {"backbone": method.backbone}) | heads
        self.hooks = [m.register_forward_hook(partial(self._watch, name)) for name, m in self.modules.items()]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, i: int) -> None:
        due = trainer.global_step % self.every == 0 and i % trainer.accumulate_grad_batches == 0
        self.waiting, self.norms = set(self.modules if due else ()), {}

    def _watch(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if name in self.waiting and output.requires_grad:
            if self.views == "first":
                self.waiting.remove(name)
            output.register_hook(partial(self._keep, name))

    def _keep(self, name: str, gradient: Tensor) -> None:
        norm = gradient.detach().abs().amax()
        self.norms[name] = torch.maximum(norm, self.norms.get(name, norm))

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        if self.norms:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            one = torch.ones((), device=module.device)
            scale = (one if scaler is None else scaler.scale(one)) / trainer.accumulate_grad_batches
            norms = {name: self.norms[name] / scale for name in self.modules if name in self.norms}
            self.pending[trainer.global_step] = norms

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, i: int) -> None:
        if is_logging_step(trainer):
            self.flush(trainer, module)

    def flush(self, trainer: Any, module: Any) -> None:
        for step, norms in self.pending.items():
            values = max_over_ranks(torch.stack(list(norms.values()))).tolist()
            row = {f"grad_linf/{name}": value for name, value in zip(norms, values, strict=True)}
            for logger in trainer.loggers:
                logger.log_metrics(row, step=step)
        self.pending = {}

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
