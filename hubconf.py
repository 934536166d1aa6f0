"""For `torch.hub`: `backbone` with what `solo_ext.load_backbone` takes, and each entry of the zoo that has weights."""

from functools import partial as _partial

from solo_ext.zoo.model import load_backbone as backbone
from solo_ext.zoo.store import entries as _entries

dependencies = [
    *("torch", "torchvision", "numpy", "PIL", "lightning", "timm", "omegaconf", "hydra", "safetensors", "yaml"),
    *("filelock", "huggingface_hub", "rich"),
]


def _add(entry):
    load = _partial(backbone, entry.name)
    load.__doc__ = f"{entry.backbone} by {entry.method} on {entry.dataset}, {entry.epochs} epochs: see `backbone`."
    globals()[entry.name] = load


for _entry in _entries().values():
    if _entry.files:
        _add(_entry)
