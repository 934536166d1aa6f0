"""Monitors: callbacks that a section of the YAML switches on. Each file of this folder is imported for its monitors."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, ClassVar

from solo_ext.errors import ConfigError
from solo_ext.methods import Method
from solo_ext.plugins import derived
from solo_ext.schema import Config
from solo_ext.text import Metric

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = LightningModule = Trainer = object  # until a monitor is built: Lightning takes seconds to import

MONITORS: dict[str, type["MonitorCallback"]] = {}


def is_logging_step(trainer: Any) -> bool:
    """Whether what waits on the device is logged now; an epoch's last batch counts as well."""
    return trainer.is_last_batch or trainer.global_step % trainer.log_every_n_steps == 0


def our_method(module: Any, key: str) -> Any:
    """`module`, or ConfigError, since the monitor of the section `key` looks at stages."""
    if not isinstance(module, Method):
        raise ConfigError(f"{key}.enabled: {type(module).__name__} is not one of our methods and has no stages")
    return module


class MonitorCallback(Callback):
    """Lightning's callback; subclass it in a file of this folder, or in a module of your own that `--import` names. It
    should not import Lightning at the top: the configuration reads `key` and `Config` of every monitor."""

    key: ClassVar[str]  # its section in the YAML of a pre-training; without one, the YAML does not switch it on
    Config: ClassVar[type[Config]]  # the dataclass of that section; it has `enabled`
    metrics: ClassVar[tuple[Metric, ...]] = ()  # what it logs

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "key" in vars(cls):
            MONITORS[cls.key] = cls

    def __new__(cls, *args: Any, **kwargs: Any):
        from lightning.pytorch import Callback

        return super().__new__(derived(cls, Callback))  # type: ignore[arg-type]  # classes can be hashed

    @classmethod
    def make(cls, section: Any, cfg: Any, data: Any) -> "MonitorCallback | None":
        """The callback for its `section` of `cfg`, or None if it has nothing to do. data: None if the caller's own."""
        return cls(section)  # type: ignore[call-arg]  # which a subclass takes

    def flush(self, trainer: Any, module: Any) -> None:
        """Logs what waits on the device for a logging step; all processes call it, also before a checkpoint."""


for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
