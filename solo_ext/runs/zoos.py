"""The folders of zoos on this machine."""

import os
from pathlib import Path

import solo_ext
from solo_ext.errors import CheckpointError

ZOO = "SOLO_EXT_ZOO"  # environment variable
INDEX = "index.yaml"


def installed() -> Path:
    """The zoo that comes with the code: of the checkout, or else of the installed package."""
    package = Path(solo_ext.__file__).parent
    checkout = package.parent / "zoo"
    return checkout if (checkout / INDEX).is_file() else package / "zoo" / "files"


def folders() -> list[Path]:
    """The zoos on disk: that of $SOLO_EXT_ZOO, if it is set, and the installed one."""
    own = os.environ.get(ZOO)
    if not own:
        return [installed()]
    folder = Path(own).expanduser().absolute()
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{ZOO}: '{own}' is not the folder of a zoo: it has no {INDEX}")
    return [folder, installed()]
