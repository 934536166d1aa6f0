"""A study file: a grid of runs, and the table or figure of a paper that they belong to, if there is one."""

import fnmatch
import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from solo_ext.errors import ConfigError, must_have, naming
from solo_ext.runs.comparison import differences, within
from solo_ext.schema import Count, build, fit, plain
from solo_ext.studies.rows import Cell, Comparison, Job, Row, Table, baselines, load_table, read_text_yaml, row_text
from solo_ext.text import nearest
from solo_ext.training import recipes
from solo_ext.training.compose import compose, key_of, overlay
from solo_ext.training.config import PretrainConfig, resolve

RESULTS = "paper_results.yaml"
EVALUATIONS = ("linear", "knn", "detect")  # the commands
READING = "Reading"  # a column that tables do not print: how a cell reads what its paper leaves open
OWN = {  # what `solo-ext study` sets in every run -> what to do instead
    "seed": "use seeds=[0,1,2]",
    "checkpoint.dir": "use --out",
    "checkpoint.enabled": "every run of a study is saved",
    "auto_resume": "every run of a study is resumable",
    "resume_from_checkpoint": "every run of a study is resumable",
}


@dataclass(frozen=True)
class Reading:
    """What fills a column: the logged `metric`, or a fact about the method, times a factor of units."""

    metric: str
    times: float = 1.0
    printed: str | None = None  # the table's column beside which it stands; default: the one of its own name


@dataclass(kw_only=True)
class CellSpec:
    """A combination of the grid, or an item of `cells`: the texts of key columns, and the overrides of its runs."""

    row: dict[str, str]
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.where = f"the cell {row_text(self.row)}"
        self.covers = [Row(self.row, {})]  # or the rows of a printed table


@dataclass(kw_only=True)
class StudyFile:
    """The content of a study's YAML; paths are relative to its folder."""

    title: str | None = None  # of the pages; default: the table's, or the YAML's first line
    table: str | None = None  # what it reproduces, if anything: a table, whose numbers are in `results`
    figure: str | None = None  # or a figure without numbers
    results: str | None = None  # a file; default: the `paper_results.yaml` beside the study or a folder above
    recipes: str | None = None  # a folder with a folder of recipes for each dataset; default: this project's
    # whose recipes are taken, where `recipe=` does not name it (`recipe=cifar10/byol`); without one, the recipes are
    # directly in the folder `recipes`
    dataset: str | None = None
    overrides: list[str] = field(default_factory=list)  # Hydra's, for all cells
    seeds: list[int] = field(default_factory=lambda: [5])  # one run of each cell per seed
    # name -> command and words, such as [detect, voc/c4], by which each run is evaluated once it has ended
    evaluate: dict[str, list[str]] = field(default_factory=dict)
    # column -> logged metric, or figure of an evaluation: `linear.acc1` of the one named linear
    metrics: dict[str, str | Reading] = field(default_factory=dict)
    target: dict[str, float] = field(default_factory=dict)  # column -> what a run has to reach
    readout: str | None = None  # the key column that says at which epoch a run is read out
    curves: list[str] = field(default_factory=list)  # metrics over epochs
    # the paper's form; filters: paths of weights, which the runs record (filters.enabled)
    plot: Literal["bars", "lines", "filters"] = "bars"
    filters: list[int] = field(default_factory=lambda: [0, 1, 2, 3])  # which ones are drawn
    # axis (one or several columns) -> label -> overrides; all combinations are run
    grid: dict[str, dict[str, list[str] | None]] = field(default_factory=dict)
    cells: list[CellSpec] = field(default_factory=list)  # further ones
    cited: list[dict[str, str]] = field(default_factory=list)  # printed rows that are not run
    compare: list[Comparison] = field(default_factory=list)  # which rows are compared with which

    def __post_init__(self) -> None:
        if self.table and self.figure:
            raise ConfigError("a study has either table or figure, not both")
        if self.plot == "lines" and not self.curves:
            raise ConfigError("plot is lines, but curves names no metric to draw")
        for column in self.target:
            must_have(column, self.metrics, "target: metrics has no column")
        if self.plot == "bars" and not self.metrics:
            raise ConfigError("metrics is empty, so there is nothing to compare")
        for name, words in self.evaluate.items():
            if not words or words[0] not in EVALUATIONS:
                raise ConfigError(f"evaluate.{name} must begin with one of {', '.join(EVALUATIONS)}, not {words}")
        for key in ("readout", "cited"):
            if getattr(self, key) and not self.table:
                raise ConfigError(f"{key} is about the rows of a printed table, and this study names no table")


@dataclass
class Study:
    """A study that fits its paper's numbers."""

    file: Path
    spec: StudyFile
    table: Table | None  # the printed numbers, if any
    rows: list[Row]  # what the table shows: cells, and cited printed rows
    seeds: list[int]
    changes: list[str]  # the user's overrides

    def __post_init__(self) -> None:
        spec = self.spec
        self.readout, self.curves, self.plot = spec.readout, spec.curves, spec.plot
        self.metrics = {column: m if isinstance(m, Reading) else Reading(m) for column, m in spec.metrics.items()}
        default = self.table.title if self.table else recipes.summary(self.file)
        self.title = spec.title or default or spec.figure or self.file.stem
        self.source = self.table.source if self.table else self.title.partition(":")[0]
        self.paper = bool(spec.table or spec.figure)  # whether it reproduces something from a paper
        self.cells = [row for row in self.rows if isinstance(row, Cell)]
        self.baselines = baselines(spec.compare, self.cells)
        self.compared = " or ".join(dict.fromkeys(row_text(comparison.against) for comparison in spec.compare))
        # one cell for each name: what has to be trained, once per seed
        self.runs = list({cell.name: cell for cell in reversed(self.cells)}.values())[::-1]

    def jobs(self, out: Path) -> list[Job]:
        """A job in the folder `out` for each run, seed by seed, so that one of each cell comes first."""
        return [Job(cell, seed, out) for seed in self.seeds for cell in self.runs]

    def pick(self, patterns: Sequence[str]) -> set[str]:
        """The names of the cells that match any of `patterns`, such as `byol*`; ConfigError if one matches none."""
        names = [cell.name for cell in self.runs]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                must_have(pattern, names, f"--only: {self.file} has no cell")
        return {name for pattern in patterns or ["*"] for name in fnmatch.filter(names, pattern)}

    def check(self, build: bool = True) -> None:
        """Raises ConfigError for cells that cannot work or are the same run; `build`: builds their networks as well,
        which takes a while and finds stages that they lack."""
        configs: dict[str, dict[str, Any]] = {}
        for cell in self.runs:
            with naming(f"{self.file}: the cell {cell.name}", ConfigError):
                values = plain(cell.config(self.seeds[0]))
                if build:
                    cell.method(self.seeds[0])
            for name, other in configs.items():
                if not differences(other, values):
                    raise ConfigError(f"{self.file}: the cells {name} and {cell.name} are the same run")
            configs[cell.name] = values


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study in the YAML `path`; ConfigError if it does not fit its paper's table, or an override does not fit it.

    Of the user's `overrides`, `seeds=[0,1]` replaces the study's, `dataset=NAME` or `data.dataset=NAME` takes that
    dataset's recipes, and all others are Hydra's, for all runs.
    """
    path = Path(path).expanduser()
    content = read_text_yaml(path, "study")
    with naming(str(path), ConfigError):
        return _study(path, build(StudyFile, content), overrides)


def _study(path: Path, spec: StudyFile, overrides: Sequence[str]) -> Study:
    own = [text for text in overrides if key_of(text) in ("seeds", "dataset")]
    changes = [text for text in overrides if text not in own]
    values = plain(overlay({"seeds": spec.seeds, "dataset": None}, own))
    seeds = fit(list[int], values["seeds"], "seeds")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be different numbers, at least one, not {seeds}")
    specs = [*_combinations(spec.grid), *spec.cells]
    if not specs:
        raise ConfigError("grid and cells are both empty")
    _check_keys(spec, specs, changes)
    folder, table = path.absolute().parent, None
    blank = {READING: "-"} if any(READING in one.row for one in specs) else {}
    if spec.table:
        near = folder if (folder / RESULTS).is_file() else folder.parent
        table = load_table(folder / spec.results if spec.results else near / RESULTS, spec.table)
        for column, metric in spec.metrics.items():
            printed = (metric.printed if isinstance(metric, Reading) else None) or column
            must_have(printed, table.values, f"metrics: {spec.table} has no column")
        if spec.readout:
            must_have(spec.readout, table.keys, f"readout: {spec.table} has no key column")
        _cover(table, spec, specs, blank)
    cells = _cells(spec, specs, folder, values["dataset"], changes)
    rows: list[Row] = [] if table else [*cells]
    for row in table.printed if table else ():  # in the paper's order
        ran = [cell for cell in cells if row.labels.items() <= cell.labels.items()]
        rows += ran or [Row(row.labels | blank, row.values)]
    return Study(path, spec, table, rows, seeds, changes)


def _check_keys(study: StudyFile, specs: Sequence[CellSpec], changes: Sequence[str]) -> None:
    """Refuses overrides of what the study varies, or what `solo-ext study` sets itself."""
    varied: dict[str, str] = {}
    for axis, points in study.grid.items():
        varied |= {key_of(text): f"the axis '{axis}'" for own in points.values() for text in own or ()}
    for spec in study.cells:
        varied |= {key_of(text): spec.where for text in spec.overrides}
    if "recipe" in varied:
        varied.setdefault("method", varied["recipe"])
    in_cells = {key: f"cannot hold for all cells: {where} sets {key}" for key, where in varied.items()}
    in_runs = {key: f"{key} is set by solo-ext study itself; {instead}" for key, instead in OWN.items()}
    everything = [*study.overrides, *(text for spec in specs for text in spec.overrides), *changes]
    for texts, reasons in ((changes, in_cells), (everything, in_runs)):
        for text, (key, reason) in itertools.product(texts, reasons.items()):
            if within(key_of(text), [key]) or within(key, [key_of(text)]):
                raise ConfigError(f"'{text}': {reason}")


def _cells(study: StudyFile, specs: list[CellSpec], here: Path, dataset: str | None, changes: list[str]) -> list[Cell]:
    """The cells in the order of `specs`; `dataset`, `changes`: the user's."""
    names = _names_of([{k: v for k, v in one.covers[0].labels.items() if k != study.readout} for one in specs])
    resolved, ours, users = _resolver(), _values(study.overrides), _values(changes)
    beside = here.parent.parent / "pretrain"  # in another checkout
    folder = beside if beside.is_dir() else recipes.scripts() / "pretrain"
    if study.recipes and not (folder := here / Path(study.recipes).expanduser()).is_dir():
        raise ConfigError(f"recipes: there is no folder '{folder}'")

    def find(recipe: str, dataset: str | None = None) -> Path:
        home, _, name = recipe.rpartition("/")
        dataset = dataset or home or study.dataset
        return recipes.recipe_file(folder, dataset, name) if dataset else folder / f"{name}.yaml"

    cells = []
    for spec, name in zip(specs, names, strict=True):
        recipe = (ours | _values(spec.overrides)).get("recipe")
        if not recipe:
            raise ConfigError(f"{spec.where} has no recipe=NAME")
        new = users.get("recipe", recipe)
        file = find(new, dataset or (users.get("data.dataset") if study.dataset or "/" in new else None))
        base = [text for text in (*study.overrides, *spec.overrides) if key_of(text) != "recipe"]
        both = [*base, *(text for text in changes if key_of(text) != "recipe")]
        last = {(key_of(text), text.startswith("~")): i for i, text in enumerate(both)}  # deletions stay
        overrides, as_printed = [both[i] for i in sorted(last.values())], (find(recipe), base)
        for row in spec.covers:
            epoch = fit(Count, row.labels[study.readout], f"readout {study.readout}") if study.readout else None
            cells.append(
                Cell(row.labels, row.values, file, overrides, name, epoch, as_printed, resolved, study.evaluate)
            )
    return cells


def _resolver() -> Callable[..., PretrainConfig]:
    """A function that resolves a recipe with overrides, and reads each recipe once."""
    composed = cache(lambda recipe: compose(recipe.parent, recipe.name))

    @cache
    def resolved(recipe: Path, *overrides: str) -> PretrainConfig:
        if any("@" in text or (recipe.parent / key_of(text)).is_dir() for text in overrides):  # config groups
            return resolve(compose(recipe.parent, recipe.name, overrides))
        return resolve(overlay(composed(recipe), overrides))

    return resolved


def _values(overrides: Sequence[str]) -> dict[str, str]:
    """Key -> the value that the last override gives it."""
    return {key_of(text): text.partition("=")[2] for text in overrides}


def _combinations(grid: dict[str, dict[str, list[str] | None]]) -> list[CellSpec]:
    """A cell for each combination of the axes."""
    specs = [CellSpec(row={})] if grid else []
    for axis, choices in grid.items():
        columns = [column.strip() for column in axis.split(", ")]
        points = []
        for label, overrides in choices.items():
            texts = [text.strip() for text in label.split(", ", len(columns) - 1)]
            if len(texts) != len(columns):
                raise ConfigError(f"grid.{axis}: the label '{label}' has {len(texts)} parts for {len(columns)} columns")
            points.append(CellSpec(row=dict(zip(columns, texts, strict=True)), overrides=overrides or []))
        specs = [
            CellSpec(row=spec.row | point.row, overrides=[*spec.overrides, *point.overrides])
            for spec, point in itertools.product(specs, points)
        ]
    return specs


def _cover(table: Table, study: StudyFile, specs: Sequence[CellSpec], blank: dict[str, str]) -> None:
    """Finds the rows of the printed table that each cell covers: one, unless they differ in the column `readout`.

    blank: labels of columns that are not printed, where a cell has none.
    """
    owners: dict[Row, dict[str, list[str]]] = {row: defaultdict(list) for row in table.printed}  # by reading
    claims = [(spec, spec.where) for spec in specs]
    claims += [(CellSpec(row=labels), f"the cited row {row_text(labels)}") for labels in study.cited]
    for spec, owner in claims:
        printed = {column: text for column, text in spec.row.items() if column != READING}
        for column in printed:
            must_have(column, table.keys, f"{owner}: {study.table} has no key column")
        covered = [row for row in table.printed if printed.items() <= row.labels.items()]
        if not covered:
            near = [row_text({column: row.labels[column] for column in printed}) for row in table.printed]
            raise ConfigError(f"{owner} matches no row of {study.table}{nearest(row_text(printed), near)}")
        for row in covered:
            owners[row][spec.row.get(READING, "-")].append(owner)
        spec.covers = [Row(row.labels | blank | spec.row, row.values) for row in covered]
    for spec in specs:
        epochs = {row.labels[study.readout] for row in spec.covers} if study.readout else [None]
        if len(spec.covers) > len(epochs):
            raise ConfigError(f"{spec.where} matches {len(spec.covers)} rows of {study.table}; name more columns")
    for row, readings in owners.items():
        text = f"the row {row_text(row.labels)} of {study.table}"
        if not readings:
            raise ConfigError(f"no cell covers {text}; add one, or put it under cited")
        for names in readings.values():
            if len(names) > 1:
                raise ConfigError(f"{text} is covered by {' and by '.join(names)}")


def _names_of(rows: Sequence[dict[str, str]]) -> list[str]:
    """A short name of letters, digits and `.-_` for each cell; those that would be alike get a hash."""
    if twice := [row for i, row in enumerate(rows) if row in rows[:i]]:
        raise ConfigError(f"the cell {row_text(twice[0])} comes twice")

    def slug(text: str) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "no"

    names = ["_".join(map(slug, row.values())) for row in rows]
    counts = Counter(names)
    hashes = [hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()[:6] for row in rows]
    return [name if counts[name] == 1 else f"{name}-{tail}" for name, tail in zip(names, hashes, strict=True)]
