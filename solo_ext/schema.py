"""Plain YAML values into typed dataclasses, strictly: errors name the full key and what would be right."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from solo_ext.errors import ConfigError
from solo_ext.text import nearest

T = TypeVar("T")
MISSING = "???"  # OmegaConf's marker for a value that has to be given
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


class UnknownKey(ConfigError):
    """A key that the schema lacks.

    Attributes:
        key: its full, dotted name.
    """

    def __init__(self, key: str):
        super().__init__(f"unknown key '{key}'")
        self.key = key


def build(cls: type[T], values: Any, at: str = "") -> T:
    """The dataclass `cls`, with those nested in it and in its lists, from the mapping found at key `at`.

    Raises:
        UnknownKey: a key that the dataclass lacks.
        ConfigError: a value of the wrong type, or one that is missing.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{at} must be {describe(cls)}, not {show(values)}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UnknownKey(join(at, key))
    given = {key: fit(hints[key], value, join(at, key)) for key, value in values.items()}
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in given and no_default and dataclasses.is_dataclass(hints[name]):
            given[name] = build(hints[name], {}, join(at, name))
        elif name not in given and (no_default or field.default == MISSING):
            raise ConfigError(f"{join(at, name)} is missing")
    try:
        return cls(**given)
    except ConfigError as error:  # the owner names its section; which item of a list it is, is known here
        section = re.sub(r"\.\d+", "", at)
        raise ConfigError(str(error).replace(section, at, 1) if section != at else str(error)) from error


def section(cls: type[T], node: Any, at: str = "") -> T:
    """The section of a configuration found at key `at` as its owner's dataclass; undeclared keys are left out.

    node: a mapping, a DictConfig, None for all defaults, or the dataclass itself. `build` is the strict twin.
    """
    if isinstance(node, cls):
        return node
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, Mapping):
        declared = {field.name for field in dataclasses.fields(cls)}
        node = {key: value for key, value in node.items() if key in declared}
    return build(cls, {} if node is None else node, at)


def fit(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`: as it stands if it can be, else converted, such as "1e-5" to a number.

    Raises:
        ConfigError: it is no such thing, or a number that is not finite.
    """
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(f"{key} is missing")
    if isinstance(value, str) and value == "None":  # solo-learn's YAMLs write None for null
        value = None
    arms = _arms(hint)
    if value is None and NoneType in arms:
        return None
    for convert in (False, True):
        for arm in arms:
            fitted = _fit_arm(arm, value, key, convert)
            if fitted is not _MISFIT:
                return fitted
    choices = [choice for arm in arms for choice in _choices(arm)]
    raise ConfigError(f"{key} must be {describe(hint)}, not {show(value)}{nearest(value, choices)}")


def _fit_arm(arm: Any, value: Any, key: str, convert: bool) -> Any:
    origin, args = get_origin(arm) or arm, get_args(arm)
    if arm is Any:
        return value
    if dataclasses.is_dataclass(arm):
        return build(arm, {} if value is None else value, key)
    if origin is Literal:
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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if arm is bool:
        words = {"true": True, "false": False}
        return value if isinstance(value, bool) else words.get(str(value).lower(), _MISFIT) if convert else _MISFIT
    if arm is str:
        return value if isinstance(value, str) else str(value) if convert and number else _MISFIT
    if arm not in (int, float):
        return _MISFIT
    if convert and isinstance(value, str):
        try:
            value, number = float(value), True
        except ValueError:
            return _MISFIT
    if not number:
        return _MISFIT
    if not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, not {value}")
    if arm is float:
        return float(value) if convert or isinstance(value, float) else _MISFIT
    return int(value) if isinstance(value, int) or (convert and value == int(value)) else _MISFIT


def check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, not '{value}'{nearest(value, choices)}")


def check_number(key: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Raises ConfigError unless `value` is a finite number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):
        bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(f"{key} must be a finite number {bounds}, not {value}")


def check_integer(key: str, value: Any, low: int) -> None:
    """Raises ConfigError unless `value` is an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{key} must be a whole number of at least {low}, not {value}")


def keys(cls: type, at: str = "") -> Iterator[str]:
    """Every full key of the dataclass `cls`; a list of dataclasses counts as its first item."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = join(at, field.name), hints[field.name]
        yield key
        for arm in _arms(hint):
            inner = get_args(arm)[0] if get_origin(arm) is list else arm
            if dataclasses.is_dataclass(inner):
                yield from keys(inner, key if inner is arm else f"{key}.0")


def nearest_key(key: str, valid: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the full key of `valid` that was most likely meant, else its siblings."""
    node, _, word = key.rpartition(".")
    shape = re.sub(r"\.\d+(?=\.|$)", ".0", node)
    siblings = [name.rpartition(".")[2] for name in valid if name.rpartition(".")[0] == shape]
    if hint := nearest(word, siblings) or nearest(word.lower(), siblings):
        return hint.replace("'", f"'{join(node, '')}", 1)
    elsewhere = [name for name in valid if name.rpartition(".")[2] == word]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    return f" (valid: {', '.join(siblings)})" if node else ""


def join(at: str, key: Any) -> str:
    """`key` below the node `at`."""
    return f"{at}.{key}" if at else str(key)


def describe(hint: Any) -> str:
    """The type `hint` in a user's words."""
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the keys {', '.join(field.name for field in dataclasses.fields(hint))}"
    words = [_WORDS.get(get_origin(arm) or arm, "") for arm in _arms(hint)]
    if choices := dict.fromkeys(str(choice) for arm in _arms(hint) for choice in _choices(arm)):
        words.append(f"one of {', '.join(choices)}")
    return " or ".join(word for word in dict.fromkeys(words) if word)


def _arms(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) is Literal else ()


def show(value: Any) -> str:
    """`value` as a YAML file would have it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
