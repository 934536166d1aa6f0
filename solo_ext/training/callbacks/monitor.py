"""A monitor: a callback that a section of the YAML switches on, and how its metrics are shown."""

from typing import Any, ClassVar

import lightning.pytorch as pl

from solo_ext.schema import Config
from solo_ext.text import Metric

MONITORS: dict[str, type["MonitorCallback"]] = {}


class MonitorCallback(pl.Callback):
    """Subclass it in a file of this folder, or in a module of your own that `--import` names.

    key: its section in the YAML of a pre-training. Config: of that section; it has `enabled`.
    metrics: what it logs.
    """

    key: ClassVar[str]
    Config: ClassVar[type[Config]]
    metrics: ClassVar[tuple[Metric, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "key" in vars(cls):
            MONITORS[cls.key] = cls

    @classmethod
    def make(cls, section: Any, cfg: Any, data: Any) -> "MonitorCallback | None":
        """The callback of a pre-training, or None where it has nothing to do.

        Args:
            section: the `Config` of the run; it is enabled.
            cfg: the whole configuration.
            data: the run's `PretrainData`; None where the images are the caller's own.
        """
        return cls(section)  # type: ignore[call-arg]  # which a subclass takes
