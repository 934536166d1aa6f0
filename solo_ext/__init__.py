"""Projector-only and residual momentum for self-supervised learning, on solo-learn's contract."""

__version__ = "0.1.0"
