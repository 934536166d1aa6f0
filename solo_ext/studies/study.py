"""A study file: a grid of runs, and the table or figure of a paper that they belong to, if there is one."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from omegaconf import DictConfig

from solo_ext.errors import ConfigError
from solo_ext.schema import build, fit
from solo_ext.studies.cells import (
    Cell,
    CellSpec,
    combinations,
    cover,
    effective,
    key_of,
    must_have,
    names_of,
    recipe_file,
    recipe_of,
)
from solo_ext.studies.printed import Row, Table, load_table, must_exist, read_text_yaml, text_yaml
from solo_ext.training import recipes

RESULTS = "paper_results.yaml"
OWN = {  # what `solo-ext study` sets in every run
    "seed": "use seeds=[0,1,2]",
    "checkpoint.dir": "use --out",
    "checkpoint.enabled": "every run of a study is saved",
    "auto_resume": "every run of a study is resumable",
    "resume_from_checkpoint": "every run of a study is resumable",
}


@dataclass(frozen=True)
class Reading:
    """What fills a column: the logged `metric`, or a fact about the method, `times` a factor of units."""

    metric: str
    times: float = 1.0


@dataclass(kw_only=True)
class StudyFile:
    """The content of a study's YAML; paths are seen from its folder.

    title: of the pages; else the table's, or the YAML's first line.
    table, figure: what it reproduces, if anything; a table's figures are printed in the file `results`, else in the
        nearest `paper_results.yaml`, beside the study or a folder above.
    recipes: a folder with a folder of recipes for each dataset; else the one of this project.
    dataset: whose recipes are taken, where `recipe=` does not say it (`recipe=cifar10/byol`); without one, the recipes
        lie in the folder `recipes` itself.
    overrides: Hydra's, for all cells. seeds: one run of each cell per seed.
    metrics: column -> logged metric. readout: the key column that says at which epoch a run is read out.
    curves: metrics over epochs. plot: the paper's form.
    grid: axis (one or several columns) -> label -> overrides; all combinations are run. cells: single ones besides.
    cited: printed rows that are not run.
    """

    title: str | None = None
    table: str | None = None
    figure: str | None = None
    results: str | None = None
    recipes: str | None = None
    dataset: str | None = None
    overrides: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [5])
    metrics: dict[str, str | Reading] = field(default_factory=dict)
    readout: str | None = None
    curves: list[str] = field(default_factory=list)
    plot: Literal["bars", "lines"] = "bars"
    grid: dict[str, dict[str, list[str] | None]] = field(default_factory=dict)
    cells: list[CellSpec] = field(default_factory=list)
    cited: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.table and self.figure:
            raise ConfigError("a study has either table or figure, not both")
        if self.plot == "lines" and not self.curves:
            raise ConfigError("plot is lines, but curves names no metric to draw")
        if self.plot == "bars" and not self.metrics:
            raise ConfigError("metrics is empty, so there is nothing to compare")
        for key in ("readout", "cited"):
            if getattr(self, key) and not self.table:
                raise ConfigError(f"{key} is about the rows of a printed table, and this study names no table")


@dataclass(frozen=True)
class Study:
    """A study that fits its paper's figures.

    Attributes:
        file: its YAML.
        paper: whether it reproduces something from a paper.
        table: the paper's; None where no values are printed.
        rows: the rows to show: cells, and cited printed rows.
        changes: the user's overrides.
    """

    file: Path
    title: str
    paper: bool
    table: Table | None
    rows: list[Cell | Row]
    seeds: list[int]
    metrics: dict[str, Reading]
    readout: str | None
    curves: list[str]
    plot: str
    changes: list[str]

    @property
    def cells(self) -> list[Cell]:
        return [row for row in self.rows if isinstance(row, Cell)]

    @property
    def source(self) -> str:
        return self.table.source if self.table else self.title.partition(":")[0]

    @property
    def runs(self) -> list[Cell]:
        """One cell for each name: what has to be trained, once per seed."""
        return list({cell.name: cell for cell in reversed(self.cells)}.values())[::-1]


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study in the YAML `path`, with the user's `overrides`.

    Args:
        overrides: `seeds=[0,1]`; `dataset=NAME` takes that dataset's recipes, and so does `data.dataset=NAME`; all
            others are Hydra's, for all runs.

    Raises:
        ConfigError: the study does not fit its paper's figures, or an override does not fit the study.
    """
    path = Path(path).expanduser()
    must_exist(path, "study")
    try:
        return _study(path, build(StudyFile, read_text_yaml(path)), overrides)
    except ConfigError as error:
        raise error if str(error).startswith(str(path)) else ConfigError(f"{path}: {error}") from error


def _study(path: Path, study: StudyFile, overrides: Sequence[str]) -> Study:
    own = {key: value for key, _, value in (o.partition("=") for o in overrides) if key in ("seeds", "dataset")}
    changes = [change for change in overrides if key_of(change) not in ("seeds", "dataset")]
    seeds = _seeds(own["seeds"]) if "seeds" in own else study.seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be different numbers, at least one, not {seeds}")
    specs = [*combinations(study.grid), *study.cells]
    if not specs:
        raise ConfigError("grid and cells are both empty")
    _check_keys(study, specs, changes)
    table = load_table(_results(path, study), study.table) if study.table else None
    if table:
        for column in study.metrics:
            must_have(column, table.values, f"metrics: {study.table} has no column")
        if study.readout:
            must_have(study.readout, table.keys, f"readout: {study.table} has no key column")
        placed = cover(table, str(study.table), study.readout, specs, study.cited)
    else:
        placed = [[Row(spec.row, {})] for spec in specs]
    cells = _cells(study, specs, placed, _recipes(path, study), own.get("dataset"), changes)
    rows: list[Cell | Row] = list(cells)
    if table:  # in the paper's order
        by_row = {tuple(cell.labels.values()): cell for cell in cells}
        rows = [by_row.get(tuple(row.labels.values()), row) for row in table.printed]
    metrics = {column: m if isinstance(m, Reading) else Reading(m) for column, m in study.metrics.items()}
    title = study.title or (table.title if table else _first_comment(path)) or study.figure or path.stem
    paper = bool(study.table or study.figure)
    return Study(path, title, paper, table, rows, seeds, metrics, study.readout, study.curves, study.plot, changes)


def _seeds(text: str) -> list[int]:
    try:
        return fit(list[int], text_yaml(text), "seeds")
    except yaml.YAMLError as error:
        raise ConfigError(f"seeds must be a list such as [0,1,2], not {text}") from error


def _check_keys(study: StudyFile, specs: Sequence[CellSpec], changes: Sequence[str]) -> None:
    """Refuses overrides of what the study varies, or what `solo-ext study` sets itself."""
    varied: dict[str, str] = {}
    for axis, points in study.grid.items():
        varied |= {key_of(text): f"the axis '{axis}'" for own in points.values() for text in own or ()}
    for spec in study.cells:
        varied |= {key_of(text): spec.where for text in spec.overrides}
    if "recipe" in varied:
        varied.setdefault("method", varied["recipe"])
    for change, (key, where) in itertools.product(changes, varied.items()):
        if _overlap(key_of(change), key):
            raise ConfigError(f"'{change}' cannot hold for all cells: {where} sets {key}")
    everything = [*study.overrides, *(text for spec in specs for text in spec.overrides), *changes]
    for text, (key, instead) in itertools.product(everything, OWN.items()):
        if _overlap(key_of(text), key):
            raise ConfigError(f"'{text}': {key} is set by solo-ext study itself; {instead}")


def _overlap(one: str, other: str) -> bool:
    """Whether the keys are the same, or one holds the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _results(path: Path, study: StudyFile) -> Path:
    """The file of printed results."""
    folder = path.absolute().parent
    if study.results:
        return folder / study.results
    near = [place / RESULTS for place in (folder, folder.parent)]
    return next((file for file in near if file.is_file()), near[-1])


def _recipes(path: Path, study: StudyFile) -> Path:
    """The folder of the recipes: the study's, those beside a checkout's studies, or this project's."""
    if study.recipes:
        return path.absolute().parent / Path(study.recipes).expanduser()
    beside = path.absolute().parents[min(2, len(path.absolute().parents) - 1)] / "pretrain"
    return beside if beside.is_dir() else recipes.scripts() / "pretrain"


def _cells(
    study: StudyFile,
    specs: Sequence[CellSpec],
    placed: Sequence[Sequence[Row]],
    recipes: Path,
    dataset: str | None,
    changes: Sequence[str],
) -> list[Cell]:
    """The cells, in the order of `specs`; `placed`: the rows that each stands for."""
    data = [value for key, _, value in (c.lstrip("+").partition("=") for c in changes) if key == "data.dataset"]
    names = names_of([{k: v for k, v in rows[0].labels.items() if k != study.readout} for rows in placed])
    composed: dict[Path, DictConfig] = {}

    def find(overrides: Sequence[str], where: str, wish: str | None) -> Path:
        home, _, recipe = recipe_of(overrides, where).rpartition("/")
        own = home or study.dataset
        return recipe_file(recipes, wish if wish and (own or dataset) else own, recipe)

    cells = []
    for spec, rows, name in zip(specs, placed, names, strict=True):
        printed = [*study.overrides, *spec.overrides]
        home = find(printed, spec.where, None)
        there = find([*printed, *changes], spec.where, dataset or (data[-1] if data else None))
        plain, user = ([text for text in texts if key_of(text) != "recipe"] for texts in (printed, changes))
        for row in rows:
            epoch = _epoch(row.labels[study.readout]) if study.readout else None
            changed = effective([*plain, *user])
            cells.append(Cell(row.labels, row.values, there, changed, name, epoch, (home, plain), composed))
    return cells


def _epoch(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"readout: '{text}' is not an epoch")
    return int(text)


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.strip("# ") if first.startswith("#") else ""
