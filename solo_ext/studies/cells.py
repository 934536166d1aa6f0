"""The cells of a study: the rows of its table that are run, each a recipe with overrides."""

import copy
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from solo_ext.errors import ConfigError
from solo_ext.methods import METHODS
from solo_ext.studies.printed import Row, Table, must_exist, say
from solo_ext.text import hint, nearest
from solo_ext.training import recipes
from solo_ext.training.compose import compose, overridden
from solo_ext.training.config import PretrainConfig, resolve

if TYPE_CHECKING:
    from solo_ext.methods.module import LightningMethod


@dataclass(kw_only=True)
class CellSpec:
    """A combination of the grid, or an item of `cells`: the texts of key columns, and the overrides of its runs."""

    row: dict[str, str]
    overrides: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"the cell {say(self.row)}"


@dataclass(frozen=True, eq=False)
class Cell:
    """A row of the study's table, and the runs behind it.

    Attributes:
        labels: column -> text.
        printed: printed column -> the paper's number, or None; empty where nothing is printed.
        recipe: the YAML of its runs.
        overrides: what its runs change in the recipe: the study's, the cell's own and the user's, in this order.
        name: of its runs; letters that a folder can have. Cells of one name read out the same runs.
        epoch: the epoch at which the paper reads the run out; None: the last.
        as_printed: recipe and overrides of the paper's setting, without the user's changes.
    """

    labels: dict[str, str]
    printed: dict[str, float | None]
    recipe: Path
    overrides: list[str]
    name: str
    epoch: int | None
    as_printed: tuple[Path, list[str]]
    _recipes: dict[Path, DictConfig] = field(repr=False)  # composed once for all cells
    _configs: dict[int, PretrainConfig] = field(default_factory=dict, repr=False)

    def config(self, seed: int) -> PretrainConfig:
        """The resolved configuration of its run with this seed, shared by all who ask: not to be changed.

        Raises:
            ConfigError: an override or value that cannot work.
        """
        if seed not in self._configs:
            self._configs[seed] = self._resolved(self.recipe, [*self.overrides, f"seed={seed}"])
        return self._configs[seed]

    @cached_property
    def printed_config(self) -> PretrainConfig:
        """The resolved configuration of the paper's setting."""
        return self._resolved(*self.as_printed)

    def _resolved(self, recipe: Path, overrides: Sequence[str]) -> PretrainConfig:
        if any("@" in text or (recipe.parent / key_of(text)).is_dir() for text in overrides):  # config groups
            return resolve(compose(recipe.parent, recipe.name, overrides))
        if recipe not in self._recipes:
            self._recipes[recipe] = compose(recipe.parent, recipe.name)
        return resolve(overridden(self._recipes[recipe], overrides))

    def method(self, seed: int) -> "LightningMethod":
        """The method of that run, freshly built; where the data has to be read to know its classes, with two."""
        cfg = copy.deepcopy(self.config(seed))
        if cfg.data.num_classes is None:
            cfg.data.num_classes = 2
        return METHODS[cfg.method](cfg)

    @cached_property
    def anatomy(self) -> dict[str, Any]:
        """What its method consists of: `solo_ext.planning.anatomy`."""
        from solo_ext.planning.anatomy import anatomy

        return anatomy(self.method(0))


# From the study's file to its cells.


def combinations(grid: dict[str, dict[str, list[str] | None]]) -> Iterator[CellSpec]:
    """A cell for each combination of the axes."""
    axes = []
    for axis, choices in grid.items():
        columns = [column.strip() for column in axis.split(", ")]
        points = []
        for label, overrides in choices.items():
            texts = [text.strip() for text in label.split(", ", len(columns) - 1)]
            if len(texts) != len(columns):
                raise ConfigError(f"grid.{axis}: the label '{label}' has {len(texts)} parts for {len(columns)} columns")
            points.append(CellSpec(row=dict(zip(columns, texts, strict=True)), overrides=overrides or []))
        axes.append(points)
    for combination in itertools.product(*axes) if axes else ():
        row = {column: text for point in combination for column, text in point.row.items()}
        yield CellSpec(row=row, overrides=[text for point in combination for text in point.overrides])


def cover(
    table: Table, name: str, readout: str | None, specs: Sequence[CellSpec], cited: Sequence[dict[str, str]]
) -> list[list[Row]]:
    """The rows of the printed table that each cell covers: one, unless they differ in the column `readout`.

    Raises:
        ConfigError: a cell or citation without a row, or a row that is not covered exactly once.
    """

    def matching(labels: dict[str, str], where: str) -> list[int]:
        for column in labels:
            must_have(column, table.keys, f"{where}: {name} has no key column")
        matches = [i for i, row in enumerate(table.printed) if labels.items() <= row.labels.items()]
        if not matches:
            near = nearest(say(labels), [say({k: row.labels[k] for k in labels}) for row in table.printed])
            raise ConfigError(f"{where} ({say(labels)}) matches no row of {name}{near}")
        return matches

    covered: dict[int, str] = {}
    placed = []
    for spec in specs:
        matches = matching(spec.row, "a cell")
        apart = {table.printed[i].labels[readout] for i in matches} if readout else {""}
        if len(matches) != len(apart):
            raise ConfigError(f"{spec.where} matches {len(matches)} rows of {name}; name more columns")
        for i in matches:
            if i in covered:
                raise ConfigError(f"the row {say(table.printed[i].labels)} is covered by two cells")
            covered[i] = "a cell"
        placed.append([table.printed[i] for i in matches])
    for labels in cited:
        for i in matching(labels, "cited"):
            if i in covered:
                raise ConfigError(f"the row {say(table.printed[i].labels)} is cited but covered by {covered[i]} too")
            covered[i] = "another citation"
    for i, row in enumerate(table.printed):
        if i not in covered:
            raise ConfigError(f"no cell covers the row {say(row.labels)} of {name}; add one, or put it under cited")
    return placed


def must_have(name: str, names: Sequence[str], what: str) -> None:
    """Raises ConfigError, `what` followed by the name and the nearest one, unless it is one of `names`."""
    if name not in names:
        raise ConfigError(f"{what} '{name}'{hint(name, names)}")


def recipe_of(overrides: Sequence[str], where: str) -> str:
    """The recipe that the last `recipe=NAME` of the overrides chooses."""
    named = [text.partition("=")[2] for text in overrides if key_of(text) == "recipe"]
    if not named:
        raise ConfigError(f"{where} has no recipe=NAME")
    return named[-1]


def recipe_file(folder: Path, dataset: str | None, recipe: str) -> Path:
    """The YAML of the recipe for a dataset, which has a folder in `folder`; or, without one, right in `folder`."""
    if not folder.is_dir():
        raise ConfigError(f"recipes: there is no folder '{folder}'")
    if dataset is not None:
        return recipes.recipe_file(folder, dataset, recipe)
    must_exist(folder / f"{recipe}.yaml", "recipe")
    return folder / f"{recipe}.yaml"


def names_of(rows: Sequence[dict[str, str]]) -> list[str]:
    """A short name of letters, digits and `.-_` for each cell; those that would be alike get a hash."""
    if len({tuple(row.items()) for row in rows}) < len(rows):
        twice = next(row for i, row in enumerate(rows) if row in rows[:i])
        raise ConfigError(f"the cell {say(twice)} comes twice")
    names = ["_".join(_slug(text) for text in row.values()) for row in rows]
    counts = Counter(names)
    hashes = [hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()[:6] for row in rows]
    return [name if counts[name] == 1 else f"{name}-{tail}" for name, tail in zip(names, hashes, strict=True)]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "no"


def key_of(text: str) -> str:
    """The full key that an override sets."""
    return text.lstrip("+~").partition("=")[0].partition("@")[0]


def effective(overrides: Sequence[str]) -> list[str]:
    """Without those that a later one of the same key makes void."""
    later = {key_of(text): i for i, text in enumerate(overrides) if not text.startswith("~")}
    return [text for i, text in enumerate(overrides) if later.get(key_of(text), i) <= i]
