"""Typed sections of a configuration. A field's type says what it takes, and errors name the full key.

    @dataclass
    class GapConfig(Config, section="gap"):
        at: Literal["auto", "projector"] = "auto"
        every: Count = 10
        weight: Annotated[float, Bounds(0, 1)] = 1.0

`GapConfig(every=0)` in Python and `gap.every=0` in a YAML, by `build`, are refused alike: "gap.every must be a whole
number of at least 1, not 0".
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from solo_ext.errors import ConfigError
from solo_ext.text import nearest

T = TypeVar("T")
MISSING = "???"  # OmegaConf's marker for a required value
_MISFIT = object()
_WORDS = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    NoneType: "null",
}


@dataclass(frozen=True)
class Bounds:
    """A number from `low` to `high`; `above`: more than `low`."""

    low: float
    high: float = math.inf
    above: bool = False

    def check(self, value: float, key: str) -> None:
        if self.low <= value <= self.high and not (self.above and value == self.low):
            return
        kind = "a whole number" if isinstance(value, int) else "a finite number"
        low, high = f"{self.low:.10g}", f"{self.high:.10g}"
        least = f"above {low}" if self.above else f"of at least {low}"
        both = f"above {low} and at most {high}" if self.above else f"from {low} to {high}"
        raise ConfigError(f"{key} must be {kind} {least if self.high == math.inf else both}, not {value}")


@dataclass(frozen=True, eq=False)
class OneOf:
    """One of the names that `choices` has when the value is checked; fixed choices are a Literal."""

    choices: Collection[str]

    def check(self, value: str, key: str) -> None:
        if value not in self.choices:
            names = ", ".join(self.choices)
            raise ConfigError(f"{key} must be one of {names}, not {show(value)}{nearest(value, self.choices)}")


@dataclass(frozen=True)
class Length:
    """A list of `count` numbers."""

    count: int

    def check(self, value: Sequence[float], key: str) -> None:
        if len(value) != self.count:
            raise ConfigError(f"{key} must be a list of {self.count} numbers, not {show(value)}")


Count = Annotated[int, Bounds(1)]
NonNegative = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, above=True)]
Share = Annotated[float, Bounds(0, 1)]
Temperature = Annotated[float, Bounds(1e-6)]  # of a softmax


class UnknownKey(ConfigError):
    """The full, dotted `key` is none of `valid`; the message names the one most likely meant, or else its siblings."""

    def __init__(self, key: str, valid: Iterable[str]):
        self.key = key
        node, _, word = key.rpartition(".")
        names = [(name, *name.rpartition(".")[::2]) for name in valid]
        siblings = [last for _, other, last in names if _first_item(other) == _first_item(node)]
        elsewhere = [name for name, _, last in names if last == word]
        if hint := nearest(word, siblings) or nearest(word.lower(), siblings):
            hint = hint.replace("'", f"'{join(node, '')}", 1)
        elif elsewhere:
            hint = f"; did you mean '{elsewhere[0]}'?"
        elif node:
            hint = f" (valid: {', '.join(siblings)})"
        super().__init__(f"unknown key '{key}'{hint}")


class Config:
    """Base of the dataclasses that are sections of a configuration: `fit` makes their fields what their types say.

    A section that compares its values extends `__post_init__` with `require`. The class keyword `section` is its full
    key; an object made by `build` has the key where its values stood. An unknown argument raises UnknownKey, a value
    that cannot work ConfigError.
    """

    _section: ClassVar[str] = ""
    when_given: ClassVar[frozenset[str]] = frozenset()  # fields that `plain` leaves out if they are null

    def __init_subclass__(cls, section: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if section is not None:
            cls._section = section

    def __new__(cls, *args: Any, **kwargs: Any):
        _check_names(cls, kwargs, cls._section)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]  # mypy: its objects cannot be hashed
            object.__setattr__(self, name, fit(hint, getattr(self, name), join(self._section, name)))

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raises ConfigError, "<full key> must be <expected>, not <value>", unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{join(self._section, name)} must be {expected}, not {show(getattr(self, name))}")


def build(cls: type[T], values: Any, at: str = "") -> T:
    """The dataclass `cls`, with those nested in it and in its lists, from the values at key `at`: a mapping, a
    DictConfig, None for all defaults, or the finished dataclass.

    Raises UnknownKey for a key that it lacks, ConfigError for a value that is missing, misfits or cannot work.
    """
    if isinstance(values, cls):
        return values
    if OmegaConf.is_config(values):
        values = OmegaConf.to_container(values, resolve=True)
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"{at} must be {describe(cls)}, not {show(values)}")
    arguments, hints = dict(values or {}), _hints(cls)  # type: ignore[arg-type]  # nor those of a TypeVar
    _check_names(cls, arguments, at)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # a TypeVar cannot be bound to dataclasses
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            arguments.setdefault(field.name, None if dataclasses.is_dataclass(hints[field.name]) else MISSING)
    if not issubclass(cls, Config):
        return cls(**{name: fit(hints[name], value, join(at, name)) for name, value in arguments.items()})
    section = cls.__new__(cls)
    object.__setattr__(section, "_section", at)
    section.__init__(**arguments)  # type: ignore[misc]  # `cls(**arguments)` could not know where it is
    return section


def plain(x: Any) -> Any:
    """The values of a configuration, typed or not, as args.json holds them: without null fields in `when_given`, whose
    default is another library's."""
    if OmegaConf.is_config(x):
        x = OmegaConf.to_container(x, resolve=True)
    if dataclasses.is_dataclass(x):
        values = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
        omitted = getattr(x, "when_given", ())
        return {name: plain(value) for name, value in values.items() if value is not None or name not in omitted}
    if isinstance(x, Mapping):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return x if x is None or isinstance(x, str | int | float) else str(x)


def fit(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`: unchanged if it is one, else converted, such as "1e-5" to a number. ConfigError if
    that is impossible, or a number is not finite."""
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(f"{key} is missing")
    arms = _arms(hint)
    if isinstance(value, str) and value == "None":  # solo-learn's YAMLs write None for null
        value = None
    if value is None and NoneType in arms:
        return None
    for convert in (False, True):
        for arm in arms:
            fitted = _fit_arm(arm, value, key, convert)
            if fitted is not _MISFIT:
                return fitted
    raise ConfigError(f"{key} must be {describe(hint)}, not {show(value)}{nearest(value, _choices(arms))}")


def _fit_arm(arm: Any, value: Any, key: str, convert: bool) -> Any:
    origin, args = get_origin(arm) or arm, get_args(arm)
    if arm is Any:
        return value
    if origin is Annotated:
        fitted = _fit_arm(args[0], value, key, convert)
        for constraint in args[1:] if fitted is not _MISFIT else ():
            constraint.check(fitted, key)
        return fitted
    if dataclasses.is_dataclass(arm):
        return build(origin, value, key)
    if origin is Literal:
        value = "off" if value is False and "off" in args else value  # what YAML 1.1 makes of a bare off
        exact = (choice for choice in args if choice == value and type(choice) is type(value))
        return next(exact, next((choice for choice in args if convert and str(choice) == str(value)), _MISFIT))
    if origin in (list, tuple):
        if not isinstance(value, Sequence) or isinstance(value, str):
            return _MISFIT
        return [fit(args[0] if args else Any, item, f"{key}.{i}") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            return _MISFIT
        return {name: fit(args[1] if args else Any, item, join(key, name)) for name, item in value.items()}
    return _fit_scalar(arm, value, key, convert)


def _fit_scalar(arm: Any, value: Any, key: str, convert: bool) -> Any:
    if convert and arm is bool and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), _MISFIT)
    if convert and arm in (int, float) and isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if arm is str and convert and number:
        return str(value)
    if arm in (bool, str):
        return value if isinstance(value, arm) else _MISFIT
    if arm not in (int, float) or not number:
        return _MISFIT
    if not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, not {value}")
    if arm is float:
        return float(value) if convert or isinstance(value, float) else _MISFIT
    return int(value) if isinstance(value, int) or (convert and value == int(value)) else _MISFIT


def keys(cls: Any, at: str = "") -> Iterator[str]:
    """Every full key of the dataclass `cls`; a list of dataclasses counts as its first item."""
    for name, hint in _hints(cls).items():
        key = join(at, name)
        yield key
        for arm in _arms(hint):
            inner = get_args(arm)[0] if get_origin(arm) is list else arm
            if dataclasses.is_dataclass(inner):
                yield from keys(inner, key if inner is arm else f"{key}.0")


def text_keys(cls: type[Config] = Config) -> Iterator[str]:
    """Full keys of all sections, of which classes below `cls` exist, that take text and no number."""
    for section in cls.__subclasses__():
        hints: dict[str, Any] = _hints(section) if dataclasses.is_dataclass(section) else {}
        for name, hint in hints.items():
            if str in (arms := _bare_arms(hint)) and not {int, float} & {*arms}:
                yield join(section._section, name)
        yield from text_keys(section)


def join(at: str, key: Any) -> str:
    """`key` below the node `at`."""
    return f"{at}.{key}" if at else str(key)


def describe(hint: Any) -> str:
    """The type `hint` in a user's words."""
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the keys {', '.join(field.name for field in dataclasses.fields(hint))}"
    bare = _bare_arms(hint)
    words = [_WORDS.get(get_origin(arm) or arm, "") for arm in bare]
    if choices := dict.fromkeys(show(choice).strip("'") for choice in _choices(bare)):
        words.append(f"one of {', '.join(choices)}")
    return " or ".join(word for word in dict.fromkeys(words) if word)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """Field name -> type, with its constraints."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check_names(cls: type, names: Iterable[Any], at: str) -> None:
    for name in names:
        if name not in _hints(cls):
            raise UnknownKey(join(at, name), keys(cls, at))


def _first_item(key: str) -> str:
    """`key` with the first item in place of any other item of a list."""
    return re.sub(r"\.\d+(?=\.|$)", ".0", key)


def _arms(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _bare_arms(hint: Any) -> list[Any]:
    """The types that `hint` allows, without their constraints."""
    return [get_args(arm)[0] if get_origin(arm) is Annotated else arm for arm in _arms(hint)]


def _choices(arms: Iterable[Any]) -> list[Any]:
    return [choice for arm in arms if get_origin(arm) is Literal for choice in get_args(arm)]


def show(value: Any) -> str:
    """`value` as a YAML file would have it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
