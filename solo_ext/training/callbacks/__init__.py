"""Callbacks of a training; the files of this folder that define a `MonitorCallback` are found by being here."""

import importlib
import pkgutil

from solo_ext.training.callbacks.monitor import MONITORS, MonitorCallback

__all__ = ["MONITORS", "MonitorCallback"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
