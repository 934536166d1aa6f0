"""A trained encoder: the configuration of its run, its weights under today's names, and the network that they fit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from solo_ext.errors import CheckpointError, SoloExtError
from solo_ext.files import read_json
from solo_ext.methods import backbone_of
from solo_ext.runs.checkpoints import find_checkpoint, load_checkpoint
from solo_ext.runs.layouts import todays_config, todays_names

# of backbone.kwargs, those by which timm and torchvision fetch weights to begin with
FETCHING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights"}


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
    path: str | Path,
    asked: Mapping[str, Any] | None = None,
    teacher: bool = False,
    content: bytes | None = None,
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The trained backbone of a run.

    Args:
        path: a run folder, a checkpoint file, or an export; ours or solo-learn's.
        asked: a configuration with `backbone` (and `data.dataset`, for the stem), as solo-learn's linear YAMLs have.
            The run's own `args.json` goes first; `asked` has to agree with it, and stands in where there is none.
        teacher: the momentum encoder in place of the student; before its first stage it is the student.
        content: of the file, as `load_checkpoint` takes it.

    Returns:
        The backbone in eval mode and the run's configuration (None without `args.json`).

    Raises:
        CheckpointError: missing, damaged, made for another network, or without the teacher that is asked for.
    """
    path = find_checkpoint(path)
    state = state_of(load_checkpoint(path, content), path)
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
