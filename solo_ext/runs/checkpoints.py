"""Checkpoints: finding the one to load or resume, reading without running code, checking SHA-256, saving whole."""

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from solo_ext.errors import CheckpointError, naming
from solo_ext.files import log, replacing, sha256
from solo_ext.runs.comparison import differences
from solo_ext.runs.foreign import tensors_of
from solo_ext.runs.layouts import PLACEHOLDERS, current_names
from solo_ext.runs.run import ARGS, RECORDS, WEIGHTS, Run, place_of, saved_at
from solo_ext.schema import Config, Count, Positive, plain
from solo_ext.text import nearest

SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")


@dataclass
class CheckpointConfig(Config, section="checkpoint"):
    """The YAML's `checkpoint`.

    dir: a run lies in `<dir>/<method>/<run id>`.
    frequency: epochs between two checkpoints; the last epoch is always saved.
    every_n_steps, every_minutes: saved inside an epoch too.
    keep_last: how many of the newest stay; keep_every: one of so many epochs stays for good; keep_prev: all stay.
    keep_best: a metric, such as val_acc1: the epoch at which it is highest, or lowest if it is a loss, stays too.
    """

    enabled: bool = False
    dir: str = "trained_models"
    frequency: Count = 1
    every_n_steps: Count | None = None
    every_minutes: Positive | None = None
    keep_last: Count = 2
    keep_every: Count | None = None
    keep_best: str | None = None
    keep_prev: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.dir), "dir", "a folder such as trained_models")


@dataclass
class AutoResumeConfig(Config, section="auto_resume"):
    """The YAML's `auto_resume`: continue the newest unfinished run of this very configuration; one whose last
    checkpoint is older than `max_hours` is refused."""

    enabled: bool = False
    max_hours: Positive | None = None


@dataclass
class Checkpoint:
    """The content of the file `path`, on the CPU, and the configuration of its run; None for a bare file."""

    path: Path
    content: dict[str, Any]
    config: dict[str, Any] | None

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of networks, under their current names; CheckpointError if there are none."""
        held = self.content.get("state_dict")
        if not (state := dict(tensors_of(held if isinstance(held, dict) else self.content))):
            raise CheckpointError(f"{self.path} is not a checkpoint of a network: it holds no tensors by name")
        return current_names(state)

    def take(self) -> dict[str, Any]:
        """The content, which this object then no longer keeps in memory."""
        content, self.content = self.content, {}
        return content


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest undamaged one of the run folder there; CheckpointError without one."""
    file, loaded = _find(path)
    return Checkpoint(file, load_checkpoint(file) if loaded is None else loaded, Run(file.parent).config)


def find_checkpoint(path: str | Path) -> Path:
    """The file that `open_checkpoint` reads, or its CheckpointError."""
    return _find(path)[0]


def _find(path: str | Path) -> tuple[Path, dict[str, Any] | None]:
    """The file, and its content if it was read to choose it."""
    path = Path(path).expanduser()
    if not path.is_dir():
        if not path.exists():
            here = path.parent.glob("*") if path.parent.is_dir() else ()
            names = sorted(file.name for file in here if file.suffix in SUFFIXES)
            near = nearest(path.name, names) or (f"; {path.parent} holds {', '.join(names[:3])}" if names else "")
            raise CheckpointError(f"{path} does not exist{near}")
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"{path} is neither a run folder nor a {', '.join(SUFFIXES)} file")
        return path, None
    candidates = Run(path).checkpoints
    if not candidates and (path / WEIGHTS).is_file():
        return path / WEIGHTS, None
    for candidate in candidates:
        try:
            return candidate, load_checkpoint(candidate)
        except CheckpointError as error:
            if candidate == candidates[-1]:
                raise CheckpointError(f"{path} holds no undamaged checkpoint: {error}") from error
            log.warning("%s; trying the one before it", error)
    inner = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and any(folder.glob("*.ckpt")))
    hint = f"; did you mean {path / inner[-1]}?" if inner else ""
    raise CheckpointError(f"{path} holds no checkpoint (*.ckpt, {WEIGHTS}){hint}")


def find_resumable(cfg: Any, base: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint of the newest run in the folder `base` that has the resolved configuration `cfg`;
    None if there is no such run, or if it is finished or running.

    Raises CheckpointError, rather than train twice, if it is older than `auto_resume.max_hours` or wholly damaged.
    """
    now = plain(cfg)
    runs = []
    for run in map(Run, base.iterdir() if base.is_dir() else ()):
        if newest := next((file for file in run.checkpoints if place_of(file)[0] >= 0), None):
            runs.append((run, newest))
    for run, newest in sorted(runs, key=lambda pair: saved_at(pair[1]), reverse=True):
        try:
            if differences(run.args, now):
                continue
        except CheckpointError as error:
            log.warning("%s; it is not continued", error)
            continue
        if run.running or run.finished:
            problem = "is running" if run.running else "is finished"
            log.warning("%s has this configuration but %s: starting a new run", run.dir, problem)
            return None
        hours, most = (time.time() - saved_at(newest)) / 3600, cfg.auto_resume.max_hours
        if most is not None and hours > most:
            raise CheckpointError(
                f"{run.dir} has this configuration, but saved its last checkpoint {hours:.0f} hours ago: raise "
                f"auto_resume.max_hours={most:g} to continue it, or start anew with auto_resume.enabled=false"
            )
        try:
            return open_checkpoint(run.dir)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; auto_resume.enabled=false starts anew") from error
    return None


def find_unsaved(cfg: Any, base: Path) -> Run | None:
    """A run in the folder `base` that has the resolved configuration `cfg` but ended before its first checkpoint."""
    now = plain(cfg)
    for run in map(Run, base.iterdir() if base.is_dir() else ()):
        with suppress(CheckpointError):
            if run.args and not (run.checkpoints or run.finished or run.running or differences(run.args, now)):
                return run
    return None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of the file at `path`, on the CPU: tensors and plain values only; no code in it is executed.

    CheckpointError if it is missing, damaged (its recorded SHA-256 differs, or it does not load), or no checkpoint.
    """
    path = Path(path)
    with naming(f"{path} cannot be read", error=CheckpointError), open(path, "rb") as file:
        recorded = Run(path.parent).records.get(path.name, {}).get("sha256")
        if recorded and recorded != sha256(file):
            raise CheckpointError(f"{path} is damaged: it differs from its SHA-256 in {RECORDS}")
        if not recorded and not _intact(file):
            raise CheckpointError(f"{path} is damaged: it differs from the SHA-256 in it")
        file.seek(0)
        return decode(path, file)


def decode(path: Path, file: BinaryIO) -> dict[str, Any]:
    """What `load_checkpoint` returns, of the open `file`, whose SHA-256 is known to be right."""
    try:
        if path.suffix == ".safetensors":
            return {"state_dict": safetensors.torch.load(file.read())}
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLACEHOLDERS):
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # zip, pickle and tensor errors of many types
        raise CheckpointError(f"{path} {_diagnosis(path, error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(loaded).__name__}, not a dictionary")
    return loaded


def save_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """A .safetensors that holds its own SHA-256, taken with zeros in its place."""
    metadata = {"format": "pt", "sha256": _ZEROS.decode()}
    content = safetensors.torch.save(dict(tensors), metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start]) | {"__metadata__": metadata}  # whose order safetensors leaves to chance
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(start - 8)
    content = content[:8] + text + content[start:]
    return content.replace(_ZEROS, hashlib.sha256(content).hexdigest().encode(), 1)


_ZEROS = b"0" * 64
_END, _TAG = b"PK\5\6", b"sha256="  # of a zip archive, and of its comment
_END_SIZE, _SEAL_SIZE = 22, len(_TAG) + 64


def _seal(file: BinaryIO) -> None:
    """Writes the SHA-256 of a zip archive as its comment, so that a copy of the file alone carries its proof."""
    file.seek(-2, os.SEEK_END)
    file.write(_SEAL_SIZE.to_bytes(2, "little"))
    file.seek(0)
    file.write(_TAG + sha256(file).encode())


def _intact(file: BinaryIO) -> bool:
    """Whether a file equals the SHA-256 that it holds; True as well if it holds none."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_SIZE - _SEAL_SIZE))
    _, _, end = file.read().partition(_END)
    file.seek(0)
    if end:
        length, comment = end[_END_SIZE - 6 : _END_SIZE - 4], end[_END_SIZE - 4 :]
        return not (any(length) or comment) or comment == _TAG + sha256(file, size - _SEAL_SIZE).encode()
    header_size = int.from_bytes(file.read(8), "little")  # of a .safetensors
    header = bytes(8) + file.read(min(header_size, size))
    # either of the two may be what has been changed
    if not (held := re.search(rb'(?<="sha256":").{64}(?=")|(?<=")[0-9a-f]{64}(?=")', header, re.DOTALL)):
        return True
    file.seek(0)
    content = file.read()
    zeroed = content[: held.start()] + _ZEROS + content[held.end() :]
    return hashlib.sha256(zeroed).hexdigest().encode() == held[0]


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


def foreign_config(checkpoint: Path) -> AbstractContextManager[None]:
    """Raises CheckpointError for any error in the values of the args.json beside `checkpoint`, whoever wrote them."""
    errors = AttributeError, LookupError, RuntimeError, TypeError, ValueError
    return naming(f"{checkpoint.with_name(ARGS)} is not a run's configuration", *errors, error=CheckpointError)


def save_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Writes `checkpoint`, and its epoch, step, SHA-256 and size into the folder's `checkpoints.json`."""
    run = Run(path.parent)
    records = run.records
    if records.pop(path.name, None):  # killed between the two files, the new one must not be held against the old sum
        run.records = records
    with replacing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # what its zip writer makes of an OSError
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        _seal(file)
        size = file.tell()
        file.seek(0)
        digest = sha256(file)
    record = {"epoch": checkpoint.get("epoch"), "step": checkpoint.get("global_step"), "sha256": digest, "size": size}
    record |= {"score": checkpoint["score"]} if "score" in checkpoint else {}
    run.records = {**records, path.name: record}
