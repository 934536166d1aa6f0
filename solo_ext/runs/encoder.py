"""A trained encoder: the network that a run's configuration names, with the weights of its checkpoint."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from solo_ext.data.datasets import CUSTOM, recorded_info
from solo_ext.errors import CheckpointError
from solo_ext.files import log
from solo_ext.methods import backbone_of
from solo_ext.methods.base import DECLARED, Method
from solo_ext.networks import BackboneConfig
from solo_ext.networks.backbones import BACKBONES, of_channels
from solo_ext.runs.checkpoints import Checkpoint, foreign_config, open_checkpoint
from solo_ext.runs.foreign import find_backbones, tensors_of
from solo_ext.schema import plain
from solo_ext.text import nearest

if TYPE_CHECKING:
    from solo_ext.data.transforms import Transform

# the backbone.kwargs by which timm and torchvision fetch initial weights
FETCHING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights"}
# and those of initial values, frozen layers and images of other sizes
NEUTRAL = FETCHING | {"progress", "weight_init", "zero_init_residual", "stop_grad_conv1"}
NEUTRAL |= {"dynamic_img_size", "dynamic_img_pad", "strict_img_size"}


def explain_mismatch(state: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> str:
    """How the tensors of a checkpoint differ from a network's, in counts and first examples; '' if they fit."""
    missing, unexpected = [k for k in network if k not in state], [k for k in state if k not in network]
    shapes = [k for k in network if k in state and state[k].shape != network[k].shape]
    parts = [f"{len(missing)} missing (first {missing[0]})"] if missing else []
    parts += [f"{len(unexpected)} unexpected (first {unexpected[0]})"] if unexpected else []
    if shapes:
        sizes = [list(tensors[shapes[0]].shape) for tensors in (state, network)]
        parts += [f"{len(shapes)} of another shape (first {shapes[0]}: {sizes[0]} instead of {sizes[1]})"]
    return ", ".join(parts)


def load_encoder(
    source: str | Path | Checkpoint, config: Mapping[str, Any] | None = None, teacher: bool = False
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The trained backbone of a run in eval mode, and the run's configuration (None without args.json).

    Args:
        source: a run folder, a checkpoint file, or an export, ours or solo-learn's; or an open checkpoint.
        config: with `backbone` (and `data.dataset`, for the stem), as in solo-learn's linear YAMLs. It replaces an
            args.json that is missing; else it must agree with that, and its `backbone.kwargs` are added.
        teacher: the momentum encoder in place of the student; before its first stage it is the student.

    Raises:
        CheckpointError: missing, damaged, made for another network, or without the requested teacher.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    path, run, state = checkpoint.path, checkpoint.config, checkpoint.state
    expected = (config or {}).get("backbone") or {}
    described = bool(run and run.get("backbone"))
    if not described:  # timm has the average beside the state_dict
        state |= tensors_of({key: value for key, value in checkpoint.content.items() if key != "state_dict"})
    if not described and not expected:
        raise CheckpointError(f"{path} has no args.json beside it, so backbone.name has to say which network it holds")
    with foreign_config(path):
        whole = {**run, **network_of(run, expected)} if run and described else dict(config or {})
        name = whole["backbone"]["name"]
        if not described:
            check_heads(whole)
        backbone = bare_backbone(whole)
        sets = (part.get("data") or {} for part in (whole, {**whole, **(config or {})}))
        held, shown = ((recorded_info(data) or CUSTOM).channels for data in sets)
    network = f"{name} (features {backbone.num_features})"
    if held != shown:
        raise CheckpointError(
            f"{path} holds a {network} of {held} channels, but the images have {shown} (data.channels)"
        )
    for key in ("name", "stem", "last_norm") if described else ():
        own = whole["backbone"].get(key, False)
        if (value := expected.get(key)) not in (None, "auto", False, own):
            what = "" if key == "name" else f" with {key}={own}"
            raise CheckpointError(f"{path} holds a {network}{what}, but backbone.{key} is {value}")
    target, wants_teacher = backbone.state_dict(), teacher and branch_of(run) != "teacher"
    found = find_backbones(state, target)
    fitting = sorted((place for place in found if place.fits), key=lambda place: place.teacher != wants_teacher)
    part = _part(state, "momentum_backbone.")  # of ours, it may begin inside
    if wants_teacher and not (part or any(place.teacher for place in fitting)):
        raise CheckpointError(
            f"{path} holds no backbone of a teacher: it was left out, or the teacher begins after the backbone "
            "(momentum.stages), where its encoder is the student's"
        )
    if fitting:
        weights = fitting[0].weights | (part if wants_teacher else {})
        if not described and fitting[0].place != "backbone.":
            place, beside = fitting[0].place or "the start", ", ".join(fitting[0].beside[:3]) or "nothing"
            log.info(
                "%s: all %d tensors of %s, from %s; left out beside them: %s", path, len(target), name, place, beside
            )
    else:
        weights = found[0].tensors if found else _part(state, "backbone.") or state
    if difference := explain_mismatch(weights, target):
        if described:
            raise CheckpointError(f"{path} does not hold the {network} that its args.json names: {difference}")
        probe = state.get("classifier.weight")
        features = f" with {probe.size(1)} features" if probe is not None and probe.ndim == 2 else ""
        sizes = [tensors["conv1.weight"].shape[-1] for tensors in (weights, target) if "conv1.weight" in tensors]
        stem = {7: "imagenet", 3: "small"}.get(sizes[0]) if len({*sizes}) == 2 else None
        other = f"; backbone.stem={stem} has its first layer" if stem else ""
        raise CheckpointError(
            f"{path} holds a network{features}, not a {network}{of_channels(held)}: {difference}{other}"
        )
    backbone.load_state_dict(weights)
    return backbone.eval(), run


def network_of(run: Mapping[str, Any], added: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`backbone` and `pretrain_method` for another configuration that shall build the network of a run's args.json,
    whatever its own dataset and method; `added`: a `backbone` with further kwargs, such as dropout.

    Raises CheckpointError if one of these would make another network of the weights.
    """
    info, method = recorded_info(run.get("data") or {}), run.get("method") or run.get("pretrain_method")
    own = {field: run["backbone"][field] for field in BackboneConfig.__dataclass_fields__ if field in run["backbone"]}
    kwargs = DECLARED.get(str(method), Method).own_arguments(own["name"]) | (own.get("kwargs") or {})
    stem = own.get("stem", "auto")
    if stem == "auto":
        stem = "small" if info and info.small_images else "imagenet"
    held = {**getattr(BACKBONES.get(own["name"]), "keywords", {}), "stem": stem, **kwargs}
    for key, value in ((added or {}).get("kwargs") or {}).items():
        if not is_neutral(key) and (mine := held.get(key, "its default")) != value:
            raise CheckpointError(f"backbone.kwargs.{key} is {value}, but the encoder has {mine}")
        kwargs[key] = value
    return {"backbone": {**own, "kwargs": kwargs, "stem": stem}, "pretrain_method": method}


def is_neutral(key: str) -> bool:
    """Whether an argument of a backbone leaves alone what trained weights compute in an evaluation."""
    return key in NEUTRAL or "drop" in key


def check_heads(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a network depends on the method, and `config` does not name one that is known."""
    name, method = config["backbone"]["name"], config.get("pretrain_method")
    makers = [known for known, declared in DECLARED.items() if name in declared.backbones]
    if not makers or str(method).lower() in DECLARED or "num_heads" in (config["backbone"].get("kwargs") or {}):
        return
    given = f", not '{method}'{nearest(method, DECLARED)}" if method else ""
    raise CheckpointError(f"{name} has other heads by {', '.join(makers)}; pretrain_method has to say{given}")


def weights_sum(backbone: nn.Module) -> str:
    """SHA-256 of the weights of a network."""
    digest = hashlib.sha256()
    for name, x in backbone.state_dict().items():
        digest.update(name.encode() + x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def branch_of(config: Mapping[str, Any] | None) -> str | None:
    """Which encoder of a run an export has kept; None: those of its checkpoints."""
    return (config or {}).get("branch")


def evaluation_view(config: Mapping[str, Any]) -> dict[str, Any]:
    """The crop_size, mean and std of images as evaluations show them to the encoder of a run's args.json: as in a
    pre-training's first view, or in what a linear evaluation has under `data`, or else as the dataset has them."""
    data = config.get("data") or {}
    view, info = (config.get("augmentations") or [data.get("augmentations") or {}])[0], recorded_info(data)
    if info:
        usual = dict(zip(("crop_size", "mean", "std"), (info.image_size, *info.evaluated()), strict=True))
        view = usual | {key: value for key, value in view.items() if value is not None}
    return {key: plain(view[key]) for key in ("crop_size", "mean", "std") if view.get(key) is not None}


def eval_transform(config: Mapping[str, Any] | None) -> "Transform":
    """Pillow image, or uint8 [C, H, W], -> float32 [C, size, size], as the evaluations of a run with this args.json see
    an image."""
    from solo_ext.data.modules import DEFAULT_CROP  # with Lightning, which a run's first line does not wait for
    from solo_ext.data.transforms import build_eval_transform

    config = config or {}
    info, view = recorded_info(config.get("data") or {}) or CUSTOM, evaluation_view(config)
    size = view.get("crop_size") or info.image_size or DEFAULT_CROP
    return build_eval_transform(info, size, view.get("mean"), view.get("std"))


def bare_backbone(config: Mapping[str, Any]) -> nn.Module:
    """`backbone_of` without fetching initial weights: others follow, and an args.json may come from anywhere."""
    kwargs = config["backbone"].get("kwargs") or {}
    local = {key: value for key, value in kwargs.items() if key not in FETCHING}
    return backbone_of({**config, "backbone": {**config["backbone"], "kwargs": local}})


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
