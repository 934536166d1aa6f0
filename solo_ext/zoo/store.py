"""Where an entry of the zoo is: in a folder on the disk, or on the Hugging Face Hub."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import solo_ext
from solo_ext.errors import CheckpointError
from solo_ext.runs.run import WEIGHTS
from solo_ext.text import nearest
from solo_ext.zoo import hub
from solo_ext.zoo.index import INDEX, Entry, read_index

log = logging.getLogger("solo_ext")

ZOO = "SOLO_EXT_ZOO"  # environment variable


def installed() -> Path:
    """The zoo that comes with the code: of the checkout, or else of the installed package."""
    package = Path(solo_ext.__file__).parent
    checkout = package.parent / "zoo"
    return checkout if (checkout / INDEX).is_file() else package / "zoo" / "files"


def folders() -> list[Path]:
    """The zoos on the disk: that of $SOLO_EXT_ZOO, if it is set, and the installed one."""
    own = os.environ.get(ZOO)
    if not own:
        return [installed()]
    folder = Path(own).expanduser().absolute()
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{ZOO}: '{own}' is not the folder of a zoo: it has no {INDEX}")
    return [folder, installed()]


def entries() -> dict[str, Entry]:
    """Name -> entry; one in $SOLO_EXT_ZOO takes precedence over one of the same name that came with the code."""
    return {name: entry for folder in reversed(folders()) for name, entry in read_index(folder).items()}


def find(name: str, choices: Mapping[str, Entry] | None = None) -> Entry:
    """The entry `name` of `choices`, by default `entries()`; if there is none, a CheckpointError names the nearest."""
    choices = entries() if choices is None else choices
    if name not in choices:
        raise CheckpointError(f"the zoo has no '{name}'{nearest(name, choices) or ' (solo-ext zoo list shows all)'}")
    return choices[name]


def fetch(entry: Entry) -> tuple[Path, bytes]:
    """The weights of `entry` and their content, with the run's other files beside them, all verified.

    They are used in place if a zoo on the disk has them, and otherwise downloaded into the Hub's cache. An entry
    without weights, and files that are not what the index says, raise a CheckpointError.
    """
    if not entry.files:
        train = f"; it is trained by solo-ext pretrain {entry.recipe.path}" if entry.recipe else ""
        raise CheckpointError(f"'{entry.name}' is a recipe without weights: the paper published none{train}")
    if folder := _on_disk(entry):
        contents = {file.name: file.read(folder / file.name) for file in entry.files}
        bad = next((folder / name for name, content in contents.items() if content is None), None)
        if bad is None and (weights := contents[WEIGHTS]) is not None:
            return folder / WEIGHTS, weights
        if not entry.repository:
            raise CheckpointError(f"{bad} is missing or damaged: it is not what the index says")
        log.warning("%s is missing or damaged; '%s' is taken from the Hugging Face Hub", bad, entry.name)
    if not entry.repository:
        raise CheckpointError(f"the files of '{entry.name}' are neither in {' nor in '.join(map(str, folders()))}")
    downloads = [hub.read(entry, file) for file in entry.files]
    return next((path, content) for path, content in downloads if path.name == WEIGHTS)


def verify(entry: Entry) -> list[tuple[Path, str]]:
    """The place of each file of `entry`, and whether it is ok, missing or damaged."""
    folder, states = _on_disk(entry), []
    for file in entry.files:
        path = folder / file.name if folder else hub.cache_path(entry, file)
        if path is None or not os.path.lexists(path):
            states.append((path or Path(file.path), "missing"))
        else:
            states.append((path, "damaged" if file.read(path) is None else "ok"))
    return states


def _on_disk(entry: Entry) -> Path | None:
    """The folder of `entry` in a zoo on the disk."""
    return next((zoo / entry.folder for zoo in folders() if (zoo / entry.folder / WEIGHTS).is_file()), None)
