"""Data sets, augmentations and loaders. A view is drawn once; each format reads and renders it.

config      the YAML keys
datasets    the sets by name, and how their files are read; images, h5, imagenet100
views       what is drawn for a view, out of counter-based uniform numbers
render      drawn views on tensors; reference: by Pillow, as solo-learn does
transforms  image to view
formats     which pipeline: loader (workers), resident (on the device), dali
certify     that all of them draw the same distribution
modules     the Lightning data modules of a run
"""
