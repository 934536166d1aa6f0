"""What the tests know of each framework: its `SPEC` in `tests/methods/<name>.py`, and the tables made from all."""

import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from solo_ext.methods import METHODS

FOLDER = Path(__file__).parent / "methods"
GOLDEN = FOLDER / "golden"
FIRST = {cls: name for name, cls in reversed(METHODS.declared.items())}
NAMES = [name for name, cls in METHODS.declared.items() if FIRST[cls] == name]  # without aliases
TWICE = [True, True]


@dataclass
class Framework:
    """A framework, said without its code. `changes` are those of `conftest.method_config`.

    kwargs: small `method_kwargs` beside proj_hidden_dim and proj_output_dim.
    defaults: numbers of the formula that `kwargs` leaves to the class.
    loss: the scalar loss of (numbers, queries [V, B, D], targets [V, B, D]). The numbers are the `method_kwargs` with
        `loss_scale`, the name of the `method`, and what `memory` holds.
    cases: further (method, changes) for which the loss equals the formula, alone; beside `solo` and `paper` scale.
    memory: the tensors of the model that the formula reads: `queue`, keys as rows, and `center`.
    heads: the projector's stages, and which modules they are. head: the projector's attribute.
    predictor, teacher: whether it has one of its own. own_targets: without a teacher, its queries are its targets.
    one_direction: it takes one query, of the first view, and one target, of the second.
    loss_scale: the default of variants, where it is not `solo`.
    steps: further (method, changes) for the whole step by hand.
    passes: (method, changes, the student's backbone passes (with gradient?), the teacher's backbone passes and head
        passes), beside those of every framework or, with one_direction, instead of them.
    refused: (method, changes, what the sentence says).
    ranks: (method, changes) of whole runs on two ranks. None: the framework as it is.
    solo_learn: changes under which whole runs equal solo-learn's. None: solo-learn has no framework by that name.
    """

    kwargs: Mapping[str, Any]
    loss: Callable[[SimpleNamespace, Any, Any], Tensor]
    heads: Mapping[str, list[str]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    cases: list[tuple] = field(default_factory=list)
    memory: Callable[[nn.Module], dict[str, Tensor]] = lambda model: {}
    head: str = "projector"
    predictor: bool = False
    teacher: bool = True
    own_targets: bool = False
    one_direction: bool = False
    loss_scale: Mapping[str, str] = field(default_factory=dict)
    steps: list[tuple] = field(default_factory=list)
    passes: list[tuple] = field(default_factory=list)
    refused: list[tuple] = field(default_factory=list)
    ranks: list[tuple] | None = None
    solo_learn: Mapping[str, Any] | None = None

    def numbers(self, method: str, changes: Mapping[str, Any], model: nn.Module, **drawn) -> SimpleNamespace:
        """What `loss` reads, with values from the configuration and clones of the model's memory."""
        prefix = "method_kwargs__"
        changed = {key.removeprefix(prefix): value for key, value in changes.items() if key.startswith(prefix)}
        scale = {"loss_scale": self.loss_scale.get(method, "solo")}
        memory = {name: tensor.clone() for name, tensor in self.memory(model).items()}
        return SimpleNamespace(**{**self.defaults, **self.kwargs, **scale, **drawn, **changed, **memory}, method=method)


def registered_bases(method: str) -> list[str]:
    """Its own name without aliases, and those of the registered classes that it inherits from."""
    return [name for cls in METHODS.declared[method].__mro__ for name in NAMES if METHODS.declared[name] is cls]


def framework_of(method: str) -> str:
    """`byol` of `projector_ema_byol` and `res_byol`: the nearest base that has a file; else the last one."""
    bases = registered_bases(method)
    return next((name for name in bases if (FOLDER / f"{name}.py").is_file()), bases[-1])


REGISTERED = [name for name in NAMES if framework_of(name) == name]
SPECS: dict[str, Framework] = {
    name: runpy.run_path(str(file))["SPEC"] for name in REGISTERED if (file := FOLDER / f"{name}.py").is_file()
}
FRAMEWORKS = list(SPECS)
METHODS_TESTED = [name for name in NAMES if framework_of(name) in SPECS]
SOLO_FRAMEWORKS = [name for name, spec in SPECS.items() if spec.solo_learn is not None]


def missing(framework: str) -> str:
    """What to add for a framework without a spec."""
    return (
        f"there is no tests/methods/{framework}.py: add one with SPEC = Framework(kwargs=..., loss=..., heads=...), "
        f"as in tests/methods/byol.py, and then its golden losses by python tests/recapture_golden.py {framework}"
    )


def spec_of(method: str) -> Framework:
    framework = framework_of(method)
    if framework not in SPECS:
        raise LookupError(missing(framework))
    return SPECS[framework]


def ids(rows) -> list[str]:
    """`ressl-weak_probe=False` of (method, changes, ...)."""
    return [
        "-".join([method, *(f"{k.split('__')[1]}={v}" for k, v in changes.items())]) for method, changes, *_ in rows
    ]


def variants(prefix: str) -> list[str]:
    """The registered variants by that prefix, of frameworks with a spec."""
    return [name for name in METHODS_TESTED if name.startswith(prefix) and name not in FRAMEWORKS]


def gathered(attribute: str) -> list[tuple]:
    """The rows of a table of all specs."""
    return [row for spec in SPECS.values() for row in getattr(spec, attribute)]
