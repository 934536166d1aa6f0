"""Datasets, augmentations and loaders. A view is drawn once; each format reads and renders it.

datasets        the `data` section, and the datasets by name; images, h5, imagenet100: how their files are read
augmentations   the `augmentations` section
views           what is drawn for a view, out of counter-based uniform numbers
render          drawn views on tensors
transforms      image to view
loader, dali    batches of views, made in worker processes, on the device, or by DALI
modules         the Lightning data modules of a run, and which format reads them
"""
