"""Weights: where they come from, and how they go elsewhere."""
