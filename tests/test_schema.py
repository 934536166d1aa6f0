"""Sections of a configuration: declared constraints hold in Python and in a YAML, and errors name the full key."""

import copy
import pickle
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import pytest
from omegaconf import OmegaConf

from solo_ext.errors import ConfigError
from solo_ext.schema import Bounds, Config, Count, Length, NonNegative, OneOf, Positive, Share, UnknownKey, build

COLOURS = {"red": 1, "green": 2}


@dataclass
class Range(Config):
    low: NonNegative = 0.0
    high: Annotated[float, Bounds(0, 5)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.low <= self.high, "low", f"at most high, {self.high:g}")


@dataclass
class Paint(Config, section="paint"):
    lr: Positive
    count: Count | None = None
    shape: Literal["round", "square"] = "round"
    colour: Annotated[str, OneOf(COLOURS)] = "red"
    triple: Annotated[list[Share], Length(3)] | None = None
    steps: list[Count] = field(default_factory=list)
    range: Range = field(default_factory=Range)
    ranges: list[Range] = field(default_factory=list)
    anything: Any = None


@dataclass
class Varnish(Paint):
    gloss: Share = 0.5


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lr": 0}, "{at}.lr must be a finite number above 0, not 0.0"),
        ({"lr": "fast"}, "{at}.lr must be a number, not 'fast'"),
        ({"lr": True}, "{at}.lr must be a number, not true"),
        ({"lr": float("nan")}, "{at}.lr must be a finite number, not nan"),
        ({"lr": "???"}, "{at}.lr is missing"),
        ({"count": 0}, "{at}.count must be a whole number of at least 1, not 0"),
        ({"count": 1.5}, "{at}.count must be a whole number or null, not 1.5"),
        ({"shape": "squar"}, "{at}.shape must be one of round, square, not 'squar'; did you mean 'square'?"),
        ({"colour": "gren"}, "{at}.colour must be one of red, green, not 'gren'; did you mean 'green'?"),
        ({"triple": [0.5]}, "{at}.triple must be a list of 3 numbers, not [0.5]"),
        ({"triple": [0, 2, 0]}, "{at}.triple.1 must be a finite number from 0 to 1, not 2.0"),
        ({"triple": 0.5}, "{at}.triple must be a list or null, not 0.5"),
        ({"steps": [3, 0]}, "{at}.steps.1 must be a whole number of at least 1, not 0"),
        ({"range": {"high": 6}}, "{at}.range.high must be a finite number from 0 to 5, not 6.0"),
        ({"range": {"low": 2}}, "{at}.range.low must be at most high, 1, not 2.0"),
        ({"range": 3}, "{at}.range must be a mapping with the keys low, high, not 3"),
        ({"ranges": [{}, {"low": -1}]}, "{at}.ranges.1.low must be a finite number of at least 0, not -1.0"),
        ({"ranges": [{}, {"low": 2}]}, "{at}.ranges.1.low must be at most high, 1, not 2.0"),
        ({"colur": "red"}, "unknown key '{at}.colur'; did you mean '{at}.colour'?"),
        ({"ranges": [{}, {"hihg": 2}]}, "unknown key '{at}.ranges.1.hihg'; did you mean '{at}.ranges.1.high'?"),
    ],
)
@pytest.mark.parametrize("cls", [Paint, Varnish])
def test_python_and_yaml_are_refused_alike(cls, values, message):
    values = {"lr": 0.1, **values}
    with pytest.raises(ConfigError) as error:
        cls(**values)
    assert str(error.value) == message.format(at="paint")
    with pytest.raises(ConfigError) as error:
        build(cls, OmegaConf.create(values), "walls.0")
    assert str(error.value) == message.format(at="walls.0")


def test_values_are_converted_and_nested_sections_built():
    paint = Varnish(lr="1e-3", count="3", steps=(1, 2), range={"low": 1}, triple="None", gloss=1)
    assert (paint.lr, paint.count, paint.steps, paint.triple) == (1e-3, 3, [1, 2], None)
    assert paint.range == Range(1.0, 1.0) and isinstance(paint.gloss, float)
    assert build(Paint, paint) is paint and Varnish(**asdict(paint)) == paint
    assert build(Varnish, asdict(paint), "elsewhere") == paint


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"^walls\.lr is missing$"):
        build(Paint, None, "walls")
    with pytest.raises(TypeError, match="'lr'"):
        Paint()


def test_copies_are_checked_too():
    paint = build(Paint, {"lr": 1}, "walls")
    assert copy.deepcopy(paint) == pickle.loads(pickle.dumps(paint)) == replace(paint) == paint
    with pytest.raises(ConfigError, match=r"paint\.count"):
        replace(paint, count=-1)
    with pytest.raises(UnknownKey, match=r"'paint\.conut'; did you mean 'paint\.count'\?$"):
        replace(paint, conut=1)
