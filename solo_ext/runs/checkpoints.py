"""Checkpoint files: saved whole with their SHA-256, found, and read without running code."""

import functools
import hashlib
import io
import json
import logging
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import RECORDS, WEIGHTS, replacing, sha256, write_json
from solo_ext.runs.layouts import STAND_INS
from solo_ext.text import nearest

log = logging.getLogger("solo_ext")

SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")
_PLACE = re.compile(r"-ep=(\d+)(?:-step=(\d+))?\.ckpt$")


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {epoch, step, sha256, size} of the folder's checkpoints, as far as they were recorded and exist."""
    try:
        recorded = json.loads((folder / RECORDS).read_text(encoding="utf-8"))
        return {name: dict(entry) for name, entry in recorded.items() if (folder / name).is_file()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError):
        log.warning("%s is damaged; the checkpoints beside it are read without their checksums", folder / RECORDS)
        return {}


def load_checkpoint(path: str | Path, content: bytes | None = None) -> dict[str, Any]:
    """The checkpoint at `path` on the CPU: tensors and plain values only; nothing in the file is executed.

    Args:
        content: of a .safetensors, where it has been read and verified already.

    Raises:
        CheckpointError: missing, damaged (the recorded SHA-256 differs, or it does not load), or not a checkpoint.
    """
    path = Path(path)
    recorded = records(path.parent).get(path.name, {}).get("sha256")
    try:
        if path.suffix == ".safetensors":
            if content is None:
                content = path.read_bytes()
                _check_sum(path, recorded, hashlib.sha256(content).hexdigest())
            return {"state_dict": safetensors.torch.load(content)}
        _check_sum(path, recorded, recorded and sha256(path))
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist{_nearest_file(path)}") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zip, pickle and tensor errors of many types
        raise CheckpointError(f"{path} {_diagnosis(path, error)}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dictionary")
    return checkpoint


def _check_sum(path: Path, recorded: str | None, found: str | None) -> None:
    if recorded and recorded != found:
        raise CheckpointError(f"{path} is damaged: it differs from its SHA-256 in {RECORDS}")


def _diagnosis(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    if refused := re.search(r"(?i)unsupported (?:global: )?(?:global|class) (\S+)", str(error)):
        return f"is not loaded: it holds code or objects ({refused[1]}), not only weights"
    if not head:
        return "is empty"
    if head[:1] == b"<":
        return "is not a checkpoint but a web page, as a failed download leaves it"
    if head[:2] == b"PK" or path.suffix == ".safetensors":
        return "is damaged: it is cut short or was changed"
    return "is not a checkpoint that PyTorch can read"


def _nearest_file(path: Path) -> str:
    names = [file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES] if path.parent.is_dir() else []
    return nearest(path.name, names) or (f"; {path.parent} holds {', '.join(sorted(names)[:3])}" if names else "")


def place_of(path: Path) -> tuple[int, float]:
    """(N, step inside the epoch) of `...-ep=N.ckpt` (the end of epoch N: step infinity) or `...-ep=N-step=S.ckpt`."""
    match = _PLACE.search(path.name)
    return (int(match[1]), float(match[2] or "inf")) if match else (-1, 0.0)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    return sorted(folder.glob("*.ckpt"), key=lambda file: (place_of(file), file.stat().st_mtime), reverse=True)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `path` names, or the newest undamaged one if it is a run folder.

    Raises:
        CheckpointError: none there, none undamaged, or a file of another kind.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path} does not exist{_nearest_file(path)}")
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"{path} is neither a run folder nor a {', '.join(SUFFIXES)} file")
        return path
    found = checkpoints_in(path)
    if not found and (path / WEIGHTS).is_file():
        return path / WEIGHTS
    for candidate in found:
        try:
            load_checkpoint(candidate)
            return candidate
        except CheckpointError as error:
            if len(found) == 1:
                raise
            if candidate == found[-1]:
                raise CheckpointError(f"{path} holds no undamaged checkpoint: {error}") from error
            log.warning("%s; trying the one before it", error)
    inner = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and any(folder.glob("*.ckpt")))
    hint = f"; did you mean {path / inner[-1]}?" if inner else ""
    raise CheckpointError(f"{path} holds no checkpoint (*.ckpt, {WEIGHTS}){hint}")


def refuses_objects() -> bool:
    """Whether PyTorch by default (since 2.6) reads tensors and plain values only."""
    file = io.BytesIO()
    torch.save(functools.partial(len), file)
    file.seek(0)
    try:
        torch.load(file)
    except pickle.UnpicklingError:
        return True
    return False


@dataclass
class CheckpointConfig:
    """The YAML's `checkpoint`.

    dir: base folder of the runs; a run lies in `<dir>/<method>/<run id>`.
    frequency: epochs between two checkpoints; the last epoch is always saved.
    keep_prev: keep every checkpoint, not only the newest.
    """

    enabled: bool = False
    dir: str = "trained_models"
    frequency: int = 1
    keep_prev: bool = False

    def __post_init__(self):
        if self.frequency < 1:
            raise ConfigError(f"checkpoint.frequency must be at least 1 epoch, not {self.frequency}")
        if not self.dir:
            raise ConfigError("checkpoint.dir is empty; the default is trained_models")


class _Hashed:
    """A binary file that knows the SHA-256 and the size of what was written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Writes `checkpoint` and records its epoch, step, SHA-256 and size in the folder's `checkpoints.json`."""
    record = {"epoch": checkpoint.get("epoch"), "step": checkpoint.get("global_step")}
    recorded = records(path.parent)
    if recorded.pop(path.name, None):  # killed between the two files, the new one must not be held against the old sum
        write_json(path.with_name(RECORDS), recorded)
    with replacing(path) as file:
        hashed = _Hashed(file)
        torch.save(checkpoint, hashed)
    record.update(sha256=hashed.sha256.hexdigest(), size=hashed.size)
    write_json(path.with_name(RECORDS), {**recorded, path.name: record})
