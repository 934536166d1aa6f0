"""Backbones in files of any program, found by the names and shapes of their tensors, whatever precedes the names."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# what the names of a momentum encoder have: of MoCo, DINO, BYOL, timm's EMA, solo-learn
TEACHER = re.compile(r"momentum|teacher|target|encoder_k|(^|[._])ema([._]|$)")
ABSENT = "num_batches_tracked"  # which files of old PyTorch versions lack


@dataclass
class Found:
    """A place in a file where a network's first tensor is: what stands before its name, and the tensors there."""

    place: str
    tensors: dict[str, Tensor]
    network: Mapping[str, Tensor]  # which is looked for

    @property
    def teacher(self) -> bool:
        """Whether it is a momentum encoder."""
        return bool(TEACHER.search(self.place))

    @property
    def beside(self) -> list[str]:
        """The tops of the names of tensors that the network has not, such as `fc`."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.tensors if name not in self.network))

    @property
    def fits(self) -> bool:
        """Whether all of the network's tensors are there, and it is no part of a larger one."""
        wanted = [(name, x) for name, x in self.network.items() if not name.endswith(ABSENT)]
        larger = {*self.beside} & {name.partition(".")[0] for name in self.network}
        return not larger and all(name in self.tensors and self.tensors[name].shape == x.shape for name, x in wanted)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's tensors; its own where they may be absent."""
        return {name: self.tensors.get(name, x) for name, x in self.network.items()}


def tensors_of(content: Mapping[Any, Any], at: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of all tensors in nested dictionaries whose keys are texts, as in `state_dict` or `teacher`."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{at}{key}", value
        elif isinstance(value, Mapping) and isinstance(key, str):
            yield from tensors_of(value, f"{at}{key}.")


def find_backbones(held: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> list[Found]:
    """Where the tensors of a file (path -> tensor) may hold a `network` (name -> tensor)."""
    first = next(iter(network))
    places = [path.removesuffix(first) for path in held if f".{path}".endswith(f".{first}")]
    return [
        Found(place, {path.removeprefix(place): x for path, x in held.items() if path.startswith(place)}, network)
        for place in places
    ]
