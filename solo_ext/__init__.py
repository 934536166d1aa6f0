"""Projector-only and residual momentum for self-supervised learning, on solo-learn's contract.

`METHODS` is the registry; `register()` adds its methods to an importable solo-learn; `load_backbone()` gives a trained
encoder of the zoo, a run or the Hugging Face Hub.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["METHODS", "load_backbone", "register"]

_HOMES = {
    "METHODS": "solo_ext.methods",
    "load_backbone": "solo_ext.zoo.model",
    "register": "solo_ext.compat.solo_learn",
}


def __getattr__(name: str):
    # so that `solo-ext --help` does not import torch
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'solo_ext' has no attribute '{name}'")
