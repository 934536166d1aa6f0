"""Frameworks and their variants; each file of this folder that defines some is found by being here."""

import importlib
import pkgutil
from collections import UserDict
from typing import TYPE_CHECKING, Any

from solo_ext.methods.base import DECLARED, Method, MethodConfig, backbone_of
from solo_ext.plugins import derived

if TYPE_CHECKING:
    from solo_ext.methods.module import LightningMethod

__all__ = ["METHODS", "Method", "MethodConfig", "backbone_of"]


class Registry(UserDict[str, "type[LightningMethod]"]):
    """Name -> the method's LightningModule, which is made, and Lightning imported, when it is looked up.

    A class that gives its `name` is registered when it is defined; `METHODS[name] = cls` adds one, too.
    """

    declared = DECLARED  # name -> what the method declares: its `Method` class

    def __init__(self) -> None:
        super().__init__()
        self.data = DECLARED  # type: ignore[assignment]  # `__getitem__` makes modules of them

    def __getitem__(self, name: str) -> "type[LightningMethod]":
        return lightning_module(self.declared[name])


def lightning_module(method: Any) -> Any:
    """The LightningModule of a declared method; a class that is one already stays as it is."""
    from solo_ext.methods.module import LightningMethod

    return derived(method, LightningMethod) if issubclass(method, Method) else method  # type: ignore[arg-type]


Method.lightning = lightning_module
METHODS = Registry()  # every method, by the name that its YAML gives
for _file in pkgutil.iter_modules(__path__):
    if _file.name != "module":  # which imports Lightning
        importlib.import_module(f"{__name__}.{_file.name}")
