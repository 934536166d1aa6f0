"""Checkpoints: written whole or not at all, read without running code, and checked against their recorded SHA-256."""

import contextlib
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from solo_ext.errors import CheckpointError, ConfigError, NonFiniteError, nearest
from solo_ext.methods.base import backbone_of

log = logging.getLogger("solo_ext")

RECORDS = "checkpoints.json"
SUFFIXES = (".ckpt", ".pth", ".pt")
_PLACE = re.compile(r"-ep=(\d+)(?:-step=(\d+))?\.ckpt$")


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


# Writing.


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path` by what `write` puts into a binary file: all of it, on the disk, or nothing.

    Raises:
        CheckpointError: the file cannot be written (no room, no permission); the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):  # torch's zip writer turns an OSError into a RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__ or error
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            raise CheckpointError(f"{path} cannot be written: {reason}") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for a JSON value."""
    text = json.dumps(value, indent=2, default=str) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


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

    def write(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        torch.save(checkpoint, hashed)
        record.update(sha256=hashed.sha256.hexdigest(), size=hashed.size)

    recorded = records(path.parent)
    if recorded.pop(path.name, None):  # killed between the two files, the new one must not be held against the old sum
        write_json(path.with_name(RECORDS), recorded)
    write_atomic(path, write)
    write_json(path.with_name(RECORDS), {**recorded, path.name: record})


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


class CheckpointIO(TorchCheckpointIO):
    """Lightning's way to the functions of this file."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        return load_checkpoint(path)


class Checkpointer(Checkpoint):
    """Saves `<name>-<run id>-ep=N.ckpt` (N counts from 0) at the end of training epochs, after validation.

    It is a `Checkpoint`, for Lightning calls these after all other callbacks and the module: optimizer, schedulers and
    teacher have made their last step of the epoch, and the saved loops resume at the next one. On SIGTERM it saves
    `...-ep=N-step=S.ckpt` after the step of that moment, unless it is one of several accumulated batches, whose
    gradients no checkpoint holds.

    Args:
        folder: the run's folder; its name is the run id.
        name: the configuration's `name`.
        frequency: saves when N is a multiple of it, and after the last epoch.
        keep_prev: whether the older checkpoints stay; if not, each is removed once the next one is complete.

    Raises:
        CheckpointError: a checkpoint cannot be written.
        NonFiniteError: a weight is not finite; the checkpoints saved so far are.
    """

    def __init__(self, folder: Path, name: str, frequency: int = 1, keep_prev: bool = False):
        self.folder, self.name, self.frequency, self.keep_prev = Path(folder), name, frequency, keep_prev
        self.last_step = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for left_over in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                left_over.unlink()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop
        if epoch % self.frequency == 0 or last or 0 <= trainer.max_steps <= trainer.global_step:
            self._save(trainer, module, f"ep={epoch}")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException) or trainer.global_step == self.last_step:
            return
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.processed == epochs.ready:
            self._save(trainer, module, f"ep={epochs.processed - 1}")
        elif (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save(trainer, module, f"ep={epochs.processed}-step={trainer.fit_loop.batch_idx + 1}")

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, place: str) -> None:
        check_finite(module, trainer.global_step)
        path = self.folder / f"{self.name}-{self.folder.name}-{place}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self.last_step = trainer.global_step
        if trainer.is_global_zero:
            for older in self.folder.glob("*-ep=*.ckpt"):
                # one from the middle of an epoch is for resuming only, and does not stay
                if older != path and (not self.keep_prev or "-step=" in older.name):
                    older.unlink()
            write_json(self.folder / RECORDS, records(self.folder))


@torch.no_grad()
def check_finite(module: nn.Module, step: int) -> None:
    """Raises NonFiniteError if a weight or running statistic is NaN or infinite; one device sync."""
    named = list(module.named_parameters()) + [b for b in module.named_buffers() if "running_" in b[0]]
    finite = torch.stack([x.isfinite().all() for _, x in named]).tolist() if named else []
    if not all(finite):
        raise NonFiniteError(
            f"after {step} steps {finite.count(False)} of {len(finite)} tensors of the network are not finite (first: "
            f"{named[finite.index(False)][0]}); no checkpoint of it is saved, and a lower learning rate or precision "
            "32 may help"
        )


# Reading.


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint at `path` on the CPU: tensors and plain values only; nothing in the file is executed.

    Raises:
        CheckpointError: missing, damaged (the recorded SHA-256 differs, or it does not load), or not a checkpoint.
    """
    path = Path(path)
    recorded = records(path.parent).get(path.name, {}).get("sha256")
    try:
        if recorded and recorded != _sha256(path):
            raise CheckpointError(f"{path} is damaged: it differs from its SHA-256 in {RECORDS}")
        with warnings.catch_warnings():
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _diagnosis(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    if refused := re.search(r"(?i)unsupported (?:global: )?(?:global|class) (\S+)", str(error)):
        return f"is not loaded: it holds code or objects ({refused[1]}), not only weights"
    if not head:
        return "is empty"
    if head[:1] == b"<":
        return "is not a checkpoint but a web page, as a failed download leaves it"
    if head[:2] == b"PK":
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
    raise CheckpointError(f"{path} holds no checkpoint (*.ckpt){hint}")


def run_config(checkpoint: Path) -> dict[str, Any] | None:
    """The configuration (`args.json`) of the run of `checkpoint`, ours or solo-learn's; None if there is none."""
    path = Path(checkpoint).with_name("args.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a run's configuration: {error}") from error


# Loading into a network.


def explain_mismatch(have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """How the tensors of a checkpoint differ from those of a network, in counts and first examples; '' if they fit."""
    missing, unexpected = [k for k in want if k not in have], [k for k in have if k not in want]
    shapes = [k for k in want if k in have and have[k].shape != want[k].shape]
    parts = [f"{len(missing)} missing (first {missing[0]})"] if missing else []
    parts += [f"{len(unexpected)} unexpected (first {unexpected[0]})"] if unexpected else []
    if shapes:
        sizes = [list(tensors[shapes[0]].shape) for tensors in (have, want)]
        parts += [f"{len(shapes)} of another shape (first {shapes[0]}: {sizes[0]} instead of {sizes[1]})"]
    return ", ".join(parts)


def state_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The network's tensors under today's names; solo-learn's older `encoder.*` becomes `backbone.*`.

    Raises:
        CheckpointError: there are none.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{path} is not a checkpoint of a network: it has no state_dict of tensors")
    return {re.sub(r"^(momentum_)?encoder\.", r"\1backbone.", name): x for name, x in state.items()}


def load_backbone(path: str | Path, asked: Mapping[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any] | None]:
    """The trained backbone of a run.

    Args:
        path: a run folder or checkpoint file, ours or solo-learn's.
        asked: a configuration with `backbone` (and `data.dataset`, for the stem), as solo-learn's linear YAMLs have.
            The run's own `args.json` goes first; `asked` has to agree with it, and stands in where there is none.

    Returns:
        The backbone in eval mode and the run's configuration (None without `args.json`).

    Raises:
        CheckpointError: missing, damaged, or made for another network.
    """
    path = find_checkpoint(path)
    state = state_of(load_checkpoint(path), path)
    run = run_config(path)
    wanted = (asked or {}).get("backbone") or {}
    config = run if run and run.get("backbone") else asked
    if not config or not config.get("backbone"):
        raise CheckpointError(f"{path} has no args.json beside it, so backbone.name has to say which network it holds")
    name = config["backbone"]["name"]
    backbone = backbone_of(config)
    network = f"{name} (features {backbone.num_features})"
    if config is run and wanted.get("name") not in (None, name):
        raise CheckpointError(f"{path} holds a {network}, but backbone.name is {wanted['name']}")
    weights = {k.removeprefix("backbone."): x for k, x in state.items() if k.startswith("backbone.")} or state
    if difference := explain_mismatch(weights, backbone.state_dict()):
        if config is run:
            raise CheckpointError(f"{path} does not hold the {network} that its args.json names: {difference}")
        probe = state.get("classifier.weight")
        features = f" with {probe.size(1)} features" if probe is not None and probe.ndim == 2 else ""
        raise CheckpointError(f"{path} holds a network{features}, not a {network}: {difference}")
    backbone.load_state_dict(weights)
    return backbone.eval(), run
