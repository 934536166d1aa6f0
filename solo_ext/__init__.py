"""Projector-only and residual momentum for self-supervised learning, on solo-learn's contract.

`pretrain()` trains an encoder and returns it as `Trained`, which evaluates it; `Trained(source)` is any trained one.
`load_backbone()` gives the network alone, of the zoo, a run or the Hugging Face Hub. `METHODS` is the registry;
`register()` adds its methods to an importable solo-learn.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["METHODS", "Trained", "load_backbone", "pretrain", "register"]

_HOMES = {
    "METHODS": "solo_ext.methods",
    "Trained": "solo_ext.api",
    "pretrain": "solo_ext.api",
    "load_backbone": "solo_ext.zoo.model",
    "register": "solo_ext.compat.solo_learn",
}


def __getattr__(name: str):
    # so that `solo-ext --help` does not import torch
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'solo_ext' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
