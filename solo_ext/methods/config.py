"""What a method is built from: solo-learn's sections, and `momentum.stages` and its companions, `intra` and `gap`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from solo_ext.data.datasets import DataConfig
from solo_ext.momentum import GapConfig, IntraMomentum, MomentumConfig
from solo_ext.networks import BackboneConfig
from solo_ext.optim import OptimizerConfig, SchedulerConfig
from solo_ext.schema import Config, Count, build


@dataclass
class PerformanceConfig(Config, section="performance"):
    """The YAML's `performance`."""

    disable_channel_last: bool = False


@dataclass(kw_only=True)
class MethodConfig(Config):
    """The configuration of a method. `method_kwargs` is the method's `Kwargs`.

    `optimizer.lr` is taken as it is (solo-learn scales it before it builds the method) and multiplied by the
    accumulated batches, unless `optimizer.effective_lr`, which is the final value, is given beside it.
    """

    method: str | None = None
    method_kwargs: Any
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    intra: IntraMomentum = field(default_factory=IntraMomentum)
    gap: GapConfig = field(default_factory=GapConfig)
    backbone: BackboneConfig
    data: DataConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    max_epochs: Count | None = None
    accumulate_grad_batches: Count | None = 1

    @classmethod
    def of(cls, method: Any, values: "MethodConfig | Mapping[str, Any]") -> "MethodConfig":
        """The configuration that `values` say for the class `method`; a typed one is returned as it is.

        solo-learn's DictConfig may have other top-level keys, which are ignored, and `method_kwargs` of other methods,
        since its scripts take any YAML with `method=`.

        Raises:
            ConfigError: a key that a section lacks, or a value that cannot work.
        """
        if isinstance(values, MethodConfig):
            return values
        given: Any = OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else dict(values)
        sections = {f.name: given[f.name] for f in dataclasses.fields(MethodConfig) if given.get(f.name) is not None}
        if OmegaConf.is_config(values) and "method_kwargs" in sections:
            others = _all_kwargs(method) - _kwargs(method)
            sections["method_kwargs"] = {k: v for k, v in sections["method_kwargs"].items() if k not in others}
        return build(MethodConfig, with_defaults(method, sections))


def _kwargs(method: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(method.Kwargs)}


def _all_kwargs(method: Any) -> set[str]:
    """The names of the `method_kwargs` of all methods."""
    classes = [cls for cls in method.__mro__ if hasattr(cls, "Kwargs")][-1:]
    for cls in classes:
        classes += cls.__subclasses__()
    return set().union(*map(_kwargs, classes))


def with_defaults(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with what `method` declares where it is silent, without keys that solo-learn's YAMLs carry unused, and
    with `method_kwargs` typed."""
    sections = dict(given)
    for name, defaults in method.defaults().items():
        node = sections.get(name)
        if node is None or isinstance(node, Mapping):
            said = {key: value for key, value in (node or {}).items() if value is not None or key not in defaults}
            sections[name] = {**defaults, **said}
    if isinstance(sections["method_kwargs"], Mapping):
        used = {k: v for k, v in sections["method_kwargs"].items() if k not in method.unused_kwargs}
        sections["method_kwargs"] = build(method.Kwargs, used, "method_kwargs")
    return sections
