"""Data sets, augmentations and loaders.

config         the YAML keys
datasets       the sets by name, and how their files are read
images         arrays and folders of images
augmentations  one image to one view
loader         images to batches, reproducibly
modules        the Lightning data modules of a run
"""
