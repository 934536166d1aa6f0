"""Trained backbones for other code: `load_backbone`, and `solo_ext_backbone`, which timm knows by this import."""

import os
from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import nn

from solo_ext.errors import ConfigError
from solo_ext.runs.checkpoints import foreign_config
from solo_ext.runs.encoder import bare_backbone, eval_transform, load_encoder
from solo_ext.zoo.store import open_source


def load_backbone(source: str | os.PathLike, teacher: bool = False) -> nn.Module:
    """A trained backbone, ready to use.

    Args:
        source: an entry of the zoo (`solo-ext zoo list`), downloaded once if it is not here; `hf://owner/name[@revision]`
            on the Hugging Face Hub; or a path, which takes precedence over an entry of the same name: run folder,
            checkpoint file or export, ours or solo-learn's.
        teacher: the momentum encoder instead of the student.

    Returns:
        A module [B, C, H, W] -> [B, num_features] in eval mode, on the CPU, with the attributes `num_features`;
        `transform`: Pillow image of any mode and size, or uint8 [C, H, W] -> float32 [C, size, size], as the run's
        evaluations see it (C 3, if the run says no other);
        `config`: the run's args.json.

    Raises:
        CheckpointError: no such entry or file, a damaged one, one of another network, or one without the teacher.
        ConfigError: the run's args.json names something that does not exist.
    """
    checkpoint = open_source(source)
    backbone: Any  # nn.Module's own attributes are tensors and modules
    backbone, backbone.config = load_encoder(checkpoint, teacher=teacher)
    with foreign_config(checkpoint.path):
        backbone.transform = eval_transform(backbone.config)
    return backbone


def _build(config: Mapping[str, Any], num_classes: int = 0, in_chans: int = 3, global_pool: str = "avg") -> nn.Module:
    backbone: Any = bare_backbone(config)
    bare = isinstance(getattr(backbone, "fc", None), nn.Identity)
    if in_chans != 3 or global_pool != "avg" or (num_classes and not bare):
        raise ConfigError(
            "solo_ext_backbone takes in_chans=3, global_pool='avg' and, if it ends with a BatchNorm, num_classes=0, "
            f"not {in_chans}, '{global_pool}' and {num_classes}"
        )
    if num_classes:
        backbone.fc = nn.Linear(backbone.num_features, num_classes)
    backbone.num_classes, backbone.global_pool = num_classes, global_pool
    return backbone


@register_model
def solo_ext_backbone(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The ResNets that timm lacks, for `timm.create_model`; `config` has the key `backbone` of an args.json."""
    return build_model_with_cfg(_build, "solo_ext_backbone", pretrained, **kwargs)
