"""Projector-only and residual momentum for self-supervised learning, on solo-learn's contract.

`METHODS` is the registry; `register()` adds its methods to an importable solo-learn.
"""

__version__ = "0.1.0"
__all__ = ["METHODS", "register"]


def __getattr__(name: str):
    # torch is imported when the registry is asked for, not when `solo-ext --help` is
    if name in __all__:
        import solo_ext.methods

        return getattr(solo_ext.methods, name)
    raise AttributeError(f"module 'solo_ext' has no attribute '{name}'")
