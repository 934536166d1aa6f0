"""Bad numbers: no loss or gradient that is NaN or infinite touches a weight."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from solo_ext.errors import NonFiniteError
from solo_ext.files import log
from solo_ext.losses.distributed import max_over_ranks
from solo_ext.training.callbacks import is_logging_step


@torch.no_grad()
def check_finite(module: nn.Module, step: int) -> None:
    """Raises NonFiniteError if a weight or running statistic is NaN or infinite; one device sync."""
    named = list(module.named_parameters()) + [b for b in module.named_buffers() if "running_" in b[0]]
    finite = torch.stack([x.isfinite().all() for _, x in named]).tolist() if named else []
    if not all(finite):
        bad = f"{finite.count(False)} of {len(finite)} tensors of the network are not finite"
        saved = f"(first: {named[finite.index(False)][0]}), so it is not saved"
        raise NonFiniteError(f"after {step} steps {bad} {saved}; a lower learning rate or precision 32 may help")


class FiniteSteps(pl.Callback):
    """Ends the run, with a sentence, before a loss or gradient that is NaN or infinite touches a weight.

    On a CPU it looks before the optimizer's step. A GPU would have to be waited for: there the device takes a bad step
    back, and the run ends at the next logging step. In 16-mixed the loss alone counts: its scaler leaves out the steps
    of infinite gradients itself. skip: how many bad steps are passed over, with a warning.
    """

    def __init__(self, skip: int = 0):
        self.skip, self.skipped = skip, 0
        self.group: list[tuple[Any, Tensor, dict[str, Tensor]]] = []  # indexes, loss and its parts, of a step's batches
        self.steps: list[tuple[int, Tensor, list]] = []  # step, whether it is bad, its group: not looked at yet
        self.before: list[tuple[Tensor, Tensor]] = []  # what the step changes, and a copy

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._take_back)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, i: int) -> None:
        self.indexes = batch[0] if isinstance(batch, tuple | list) and len(batch) == 3 else None

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        self.group.append((self.indexes, loss.detach(), dict(getattr(module, "loss_parts", {}))))

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        numbers = [loss for _, loss, _ in self.group]
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            numbers = [*numbers, *torch._foreach_norm(gradients)]
        bad = ~torch.stack([x.float() for x in numbers]).isfinite().all()
        self.steps.append((trainer.global_step, bad, self.group))
        self.group = []
        if module.device.type == "cpu" and not self.skip:
            self._look(trainer)
            return
        self.bad = bad
        self.before = [(x, x.clone()) for x in _changing(optimizer) if x.device == bad.device]

    @torch.no_grad()
    def _take_back(self, optimizer: Optimizer, *_: Any) -> None:
        if self.before:
            for x, old in self.before:
                x.copy_(torch.where(self.bad, old, x))
            known = {id(x) for x, _ in self.before}
            for x in _changing(optimizer):  # what the first step made
                if id(x) not in known and x.device == self.bad.device:
                    x.masked_fill_(self.bad, 0)
        self.before = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        if is_logging_step(trainer):
            self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        if not self.steps:
            return
        bad = torch.stack([bad for _, bad, _ in self.steps]).float()
        for (step, _, group), is_bad in zip(self.steps, max_over_ranks(bad), strict=True):
            if is_bad:
                self.skipped += 1
                said = _description(step, group)
                if self.skipped > self.skip:
                    helps = "a lower learning rate, a longer warm-up or precision 32 may help"
                    raise NonFiniteError(f"{said}; no weight is changed by it, and the checkpoints are finite: {helps}")
                log.warning("%s; the step is left out (%d of at most %d)", said, self.skipped, self.skip)
        self.steps = []


def _changing(optimizer: Optimizer) -> list[Tensor]:
    """What a step of the optimizer changes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    states = [x for p in parameters for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [*parameters, *states]


def _description(step: int, group: list[tuple[Any, Tensor, dict[str, Tensor]]]) -> str:
    bad = [(indexes, parts) for indexes, loss, parts in group if not loss.isfinite()]
    what = "the loss became" if bad else "the losses are finite, but a gradient became"
    indexes, parts = (bad or [(indexes, parts) for indexes, _, parts in group])[0]
    named = "".join(f", {name} {float(value):g}" for name, value in parts.items())
    samples = [] if indexes is None else indexes.tolist()
    some = f", samples {', '.join(map(str, samples[:16]))}{', ...' if len(samples) > 16 else ''}" if samples else ""
    return f"{what} NaN or infinite at step {step}{named}{some}"
