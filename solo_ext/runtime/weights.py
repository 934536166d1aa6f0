"""Weights: found, read without running code, checked against their recorded SHA-256, and loaded into a network."""

import functools
import hashlib
import io
import json
import logging
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from solo_ext.errors import CheckpointError, SoloExtError, nearest
from solo_ext.files import WEIGHTS, read_json, sha256
from solo_ext.methods.base import backbone_of
from solo_ext.runtime.solo_files import STAND_INS, todays_config, todays_names

log = logging.getLogger("solo_ext")

RECORDS = "checkpoints.json"
SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")
# of backbone.kwargs, those by which timm and torchvision fetch weights to begin with
FETCHING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights"}
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


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint at `path` on the CPU: tensors and plain values only; nothing in the file is executed.

    Raises:
        CheckpointError: missing, damaged (the recorded SHA-256 differs, or it does not load), or not a checkpoint.
    """
    path = Path(path)
    recorded = records(path.parent).get(path.name, {}).get("sha256")
    try:
        if path.suffix == ".safetensors":
            data = path.read_bytes()
            _check_sum(path, recorded, hashlib.sha256(data).hexdigest())
            return {"state_dict": safetensors.torch.load(data)}
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


def run_config(checkpoint: Path) -> dict[str, Any] | None:
    """The configuration (`args.json`) of the run of `checkpoint`, ours or solo-learn's; None if there is none."""
    args = read_json(Path(checkpoint).with_name("args.json"))
    return args and todays_config(args)


@contextmanager
def foreign_config(checkpoint: Path) -> Iterator[None]:
    """Whatever is wrong with the values of the `args.json` beside `checkpoint`, which may come from anywhere, as a
    CheckpointError."""
    try:
        yield
    except SoloExtError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        path = Path(checkpoint).with_name("args.json")
        raise CheckpointError(f"{path} is not a run's configuration: {reason}") from error


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
    """The network's tensors under today's names.

    Raises:
        CheckpointError: there are none.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{path} is not a checkpoint of a network: it has no state_dict of tensors")
    return todays_names(state)


def load_encoder(
    path: str | Path, asked: Mapping[str, Any] | None = None, teacher: bool = False
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The trained backbone of a run.

    Args:
        path: a run folder, a checkpoint file, or an export; ours or solo-learn's.
        asked: a configuration with `backbone` (and `data.dataset`, for the stem), as solo-learn's linear YAMLs have.
            The run's own `args.json` goes first; `asked` has to agree with it, and stands in where there is none.
        teacher: the momentum encoder in place of the student; before its first stage it is the student.

    Returns:
        The backbone in eval mode and the run's configuration (None without `args.json`).

    Raises:
        CheckpointError: missing, damaged, made for another network, or without the teacher that is asked for.
    """
    path = find_checkpoint(path)
    state = state_of(load_checkpoint(path), path)
    run = run_config(path)
    wanted = (asked or {}).get("backbone") or {}
    config = run if run and run.get("backbone") else asked
    if not config or not config.get("backbone"):
        raise CheckpointError(f"{path} has no args.json beside it, so backbone.name has to say which network it holds")
    with foreign_config(path):
        name = config["backbone"]["name"]
        backbone = bare_backbone(config)
    network = f"{name} (features {backbone.num_features})"
    if config is run and wanted.get("name") not in (None, name):
        raise CheckpointError(f"{path} holds a {network}, but backbone.name is {wanted['name']}")
    weights = _part(state, "backbone.") or state
    if teacher:
        own = _part(state, "momentum_backbone.")
        if not own:
            raise CheckpointError(
                f"{path} holds no backbone of a teacher: it was left out, or the teacher begins after the backbone "
                "(momentum.stages), where its encoder is the student's"
            )
        weights = weights | own
    if difference := explain_mismatch(weights, backbone.state_dict()):
        if config is run:
            raise CheckpointError(f"{path} does not hold the {network} that its args.json names: {difference}")
        probe = state.get("classifier.weight")
        features = f" with {probe.size(1)} features" if probe is not None and probe.ndim == 2 else ""
        raise CheckpointError(f"{path} holds a network{features}, not a {network}: {difference}")
    backbone.load_state_dict(weights)
    return backbone.eval(), run


def bare_backbone(config: Mapping[str, Any]) -> nn.Module:
    """`backbone_of`, but nothing is fetched for it: its weights follow, and an args.json may come from anywhere."""
    kwargs = config["backbone"].get("kwargs") or {}
    kept = {key: value for key, value in kwargs.items() if key not in FETCHING}
    return backbone_of({**config, "backbone": {**config["backbone"], "kwargs": kept}})


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
