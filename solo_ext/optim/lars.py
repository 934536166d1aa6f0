"""LARS, layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017), with solo-learn's semantics."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from solo_ext.errors import ConfigError


class LARS(Optimizer):
    """SGD whose gradients are scaled, tensor by tensor, to the norm of the weights.

    For a tensor w with gradient g, both with non-zero norm:

        trust = eta |w| / (|g| + weight_decay |w| + eps);  with clip_lr: trust = min(trust / lr, 1)
        g    := trust (g + weight_decay w)

    If either norm is zero, g stays as it is, without decay; with `exclude_bias_n_norm`, so does that of a 1-D tensor.
    Then momentum, dampening and nesterov as in `torch.optim.SGD`. A step never waits for the device, and leaves the
    gradients as they are. The state is solo-learn's. ConfigError for an option that is negative or not finite.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eta: float = 1e-3,
        eps: float = 1e-8,
        clip_lr: bool = False,
        exclude_bias_n_norm: bool = False,
    ):
        as_in_sgd = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        own = {"eta": eta, "eps": eps, "clip_lr": clip_lr, "exclude_bias_n_norm": exclude_bias_n_norm}
        defaults = {"lr": lr, **as_in_sgd, **own}
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("LARS does not take sparse gradients")
            if params:
                updates = self._add_momentum(params, _adapted_gradients(params, group), group)
                torch._foreach_add_(params, updates, alpha=-group["lr"])
        return loss

    def _add_momentum(self, params: list[Tensor], updates: list[Tensor], group: dict) -> list[Tensor]:
        momentum = group["momentum"]
        if momentum == 0:
            return updates
        later = [(self.state[p]["momentum_buffer"], u) for p, u in zip(params, updates, strict=True) if self.state[p]]
        for p, update in zip(params, updates, strict=True):
            if not self.state[p]:  # as in torch.optim.SGD, dampening leaves the first update alone
                self.state[p]["momentum_buffer"] = update.clone()
        if later:
            running, new = map(list, zip(*later, strict=True))
            torch._foreach_mul_(running, momentum)
            torch._foreach_add_(running, new, alpha=1 - group["dampening"])
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        return list(torch._foreach_add(updates, buffers, alpha=momentum)) if group["nesterov"] else buffers


def _check(options: dict[str, Any]) -> None:
    for key in ("lr", "momentum", "dampening", "weight_decay", "eta", "eps"):
        if not (math.isfinite(options[key]) and options[key] >= 0):
            raise ConfigError(f"LARS: {key} must be a finite number of at least 0, not {options[key]}")
    if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
        raise ConfigError("LARS: nesterov needs a momentum above 0 and no dampening")


def _adapted_gradients(params: list[Tensor], group: dict) -> list[Tensor]:
    """The gradients, scaled and decayed by the group's rules: new tensors, or the gradients themselves."""
    out = [p.grad for p in params if p.grad is not None]  # all of them
    adapted = [i for i, p in enumerate(params) if p.ndim != 1 or not group["exclude_bias_n_norm"]]
    if not adapted:
        return out
    weights, grads = [params[i] for i in adapted], [out[i] for i in adapted]
    weight_norm = torch.stack(torch._foreach_norm(weights))
    grad_norm = torch.stack(torch._foreach_norm(grads))
    decay = group["weight_decay"]
    trust = group["eta"] * weight_norm / (grad_norm + decay * weight_norm + group["eps"])
    if group["clip_lr"]:
        trust = (trust / group["lr"]).clamp(max=1)
    # weights of zero decay to nothing, and with a gradient of zero nothing is left of the decay
    trust = torch.where(weight_norm == 0, 1, torch.where(grad_norm == 0, 0, trust))
    updates = torch._foreach_add(grads, weights, alpha=decay)
    torch._foreach_mul_(updates, list(trust.unbind()))
    for i, update in zip(adapted, updates, strict=True):
        out[i] = update
    return out
