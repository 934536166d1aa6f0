"""The files of a set are looked for once on each node of a run: its first process there shows the others what it found.

That lies in memory, which all map and which ends with the first process. A small file in the temporary folder says
where; what another run has left there names memory that is gone, and is passed over.
"""

import atexit
import hashlib
import json
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from solo_ext.data.images import FileImages, ImageSet

NODE = "SOLO_EXT_NODE"  # in the environment of a run's processes on a node: what they have in common
START, PATIENCE = 30.0, 3600.0  # seconds that the others wait until the first looks, and until it has found
_SHOWN: dict[Path, int] = {}  # file -> descriptor of the memory that it names


def begin_node(processes: int) -> None:
    """Lets the processes of a run on this node share, from now on: those of torchrun, of srun, or those that this one
    will start. A run of one process shares nothing."""
    e = os.environ
    if processes == 1:
        e.pop(NODE, None)
        return
    for launcher in (
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"),
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ):
        if e.keys() >= {*launcher}:
            e[NODE] = "-".join(e[key] for key in launcher)
            return
    if _is_first():
        e[NODE] = str(os.getpid())


def _is_first() -> bool:
    return (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"


def once_on_a_node(read: Callable[[], ImageSet], *what: Any) -> ImageSet:
    """What `read` gives, a folder's or list's images; in a run of several processes, what it gave to the first one on
    this node, which has called this with an equal `what`."""
    node = os.environ.get(NODE)
    if not node or not hasattr(os, "memfd_create"):
        return read()
    name = hashlib.sha256(repr((node, platform.node(), *what)).encode()).hexdigest()[:24]
    place = Path(tempfile.gettempdir()) / f"solo-ext-{os.getuid()}-{name}"
    if _is_first():
        with suppress(OSError):
            _say(place, {})
        images = read()
        with suppress(OSError):  # the others look themselves
            _show(images, place)
            return _shown(place) or images
        return images
    began, patience = time.monotonic(), START
    while time.monotonic() - began < patience:
        patience = START
        try:
            if found := _shown(place):
                return found
            patience = PATIENCE
        except PermissionError:
            break
        except (OSError, ValueError):  # not there yet
            pass
        time.sleep(0.02)
    return read()


def _say(place: Path, where: dict[str, Any]) -> None:
    own = place.with_name(f"{place.name}.{os.getpid()}")
    own.write_text(json.dumps({"process": os.getpid(), **where}))
    os.replace(own, place)
    if place not in _SHOWN:
        atexit.register(place.unlink, missing_ok=True)
        _SHOWN[place] = -1


def _show(images: ImageSet, place: Path) -> None:
    assert isinstance(images.images, FileImages)
    arrays = images.images.paths, images.targets
    memory = os.memfd_create(place.name)
    with open(memory, "wb", closefd=False) as file:
        for array in arrays:
            file.write(array.data)
    where = {"memory": memory, "count": len(images), "types": [x.dtype.str for x in arrays]}
    _say(place, where | {"root": os.fspath(images.images.root), "classes": images.classes})
    if (before := _SHOWN[place]) >= 0:
        os.close(before)
    _SHOWN[place] = memory


def _shown(place: Path) -> ImageSet | None:
    """None while the first process looks; OSError or ValueError if it does not, or has ended."""
    where = json.loads(place.read_text())
    os.stat(f"/proc/{where['process']}")
    if "memory" not in where:
        return None
    memory = f"/proc/{where['process']}/fd/{where['memory']}"
    if not os.readlink(memory).startswith(f"/memfd:{place.name} "):
        raise FileNotFoundError(memory)
    with open(memory, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    first, second = map(np.dtype, where["types"])
    paths = np.frombuffer(mapped, first, where["count"])
    targets = np.frombuffer(mapped, second, where["count"], paths.nbytes)
    return ImageSet(FileImages(Path(where["root"]), paths), targets, tuple(where["classes"]))
