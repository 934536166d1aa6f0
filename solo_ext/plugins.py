"""Modules from outside the package that register methods, backbones, datasets or monitors when they are imported.

They are named by `solo-ext --import my_module`, which reaches all child processes, too, or by the entry points of
installed packages, group `solo_ext`.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from typing import Any

from solo_ext.errors import ConfigError, naming

VARIABLE = "SOLO_EXT_IMPORT"  # environment variable: module names, separated by commas
OPTION = "--import"


def take(argv: Sequence[str]) -> list[str]:
    """`argv` without `--import MODULE`, whose modules are noted for this process and its children."""
    rest, names = [], [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    words = iter(argv)
    for word in words:
        option, equals, name = word.partition("=")
        if option != OPTION:
            rest.append(word)
            continue
        name = name if equals else next(words, "")
        if not name or name.startswith("-"):
            raise ConfigError(f"{OPTION} needs the name of a module")
        names += [name] if name not in names else []
    if names:
        os.environ[VARIABLE] = ",".join(names)
    return rest


@cache
def load() -> None:
    """Imports them, once. Raises ConfigError for a module that cannot be imported."""
    names = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where a script of the user's own lies
    for name in names:
        with naming(f"{OPTION} {name}: it cannot be imported", Exception):  # whatever the user's module raises
            importlib.import_module(name)
    for point in metadata.entry_points(group="solo_ext"):
        point.load()


@cache
def derived(cls: Any, base: Any) -> Any:
    """`cls`, registered before `base` was imported, which takes seconds, as a subclass of it; `cls` if it is one."""
    if issubclass(cls, base):
        return cls
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})
