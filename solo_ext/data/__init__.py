"""Datasets, augmentations and loaders. A view is drawn once; each format reads and renders it."""
