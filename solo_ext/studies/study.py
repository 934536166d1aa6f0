"""A study file: which runs make a table or figure of a paper, and which printed figures belong to them."""

import copy
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf

from solo_ext.errors import ConfigError
from solo_ext.methods import METHODS, Method
from solo_ext.planning.anatomy import anatomy
from solo_ext.schema import UnknownKey, build, fit, keys
from solo_ext.text import nearest
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.recipes import recipe_file

T = TypeVar("T")
RESULTS = "paper_results.yaml"  # beside the folders of the studies
OWN = {  # what `solo-ext study` sets in every run
    "seed": "use seeds=[0,1,2]",
    "checkpoint.dir": "use --out",
    "checkpoint.enabled": "every run of a study is saved",
    "auto_resume": "every run of a study is resumable",
    "resume_from_checkpoint": "every run of a study is resumable",
}


@dataclass(frozen=True)
class Metric:
    """What fills a printed column: the logged `metric`, or a fact about the method, `times` a factor of units."""

    metric: str
    times: float = 1.0


@dataclass(frozen=True)
class Row:
    """A printed row: the texts of the key columns, and the numbers of the others, None where nothing is printed."""

    labels: dict[str, str]
    values: dict[str, float | None]


@dataclass(kw_only=True)
class Table:
    """A table, or a figure with numbers, as a paper prints it; an entry of `paper_results.yaml`.

    keys, values: the columns that name a row, and those with results. rows: a list per row, keys first.
    deltas: how printed differences follow from the rows. notes: what is odd in print.
    """

    title: str
    source: str
    keys: list[str]
    values: list[str]
    rows: list[list[Any]]
    deltas: Any = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        for i, row in enumerate(self.rows):
            if len(row) != len(self.keys) + len(self.values):
                raise ConfigError(f"rows.{i} has {len(row)} entries for {len(self.keys) + len(self.values)} columns")

    @cached_property
    def printed(self) -> list[Row]:
        """The rows, in the paper's order."""
        rows, n = [], len(self.keys)
        for i, row in enumerate(self.rows):
            numbers = [fit(float | None, value, f"rows.{i}") for value in row[n:]]
            labels = dict(zip(self.keys, map(str, row[:n]), strict=True))
            rows.append(Row(labels, dict(zip(self.values, numbers, strict=True))))
        return rows


@dataclass(kw_only=True)
class CellSpec:
    """An item of `cells`: enough key columns to name one printed row, and the overrides of its runs."""

    row: dict[str, str]
    overrides: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class StudyFile:
    """The content of a study's YAML.

    table, figure: what it reproduces; the first has printed figures in `paper_results.yaml`.
    dataset: whose recipes are taken. overrides: Hydra's, for all cells. seeds: one run of each cell per seed.
    metrics: printed column -> logged metric. readout: the key column that says at which epoch a run is read out.
    curves: metrics over epochs. plot: the paper's form.
    grid: axis (one or several columns) -> label -> overrides; all combinations are run. cells: single ones besides.
    cited: printed rows that are not run.
    """

    table: str | None = None
    figure: str | None = None
    dataset: str
    overrides: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [5])
    metrics: dict[str, str | Metric] = field(default_factory=dict)
    readout: str | None = None
    curves: list[str] = field(default_factory=list)
    plot: Literal["bars", "lines"] = "bars"
    grid: dict[str, dict[str, list[str] | None]] = field(default_factory=dict)
    cells: list[CellSpec] = field(default_factory=list)
    cited: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self):
        if (self.table is None) == (self.figure is None):
            raise ConfigError("a study has either table or figure")
        if self.plot == "lines" and not self.curves:
            raise ConfigError("plot is lines, but curves names no metric to draw")
        if self.plot == "bars" and not self.metrics:
            raise ConfigError("metrics is empty, so there is nothing to compare")
        if self.readout and not self.table:
            raise ConfigError("readout is a key column of a table, and a figure has none")


@dataclass(frozen=True, eq=False)
class Cell:
    """A row of the study's table, and the runs behind it.

    Attributes:
        labels: column -> text.
        printed: printed column -> the paper's number, or None; empty for a figure.
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
    _configs: dict[int, DictConfig] = field(default_factory=dict, repr=False)

    def config(self, seed: int) -> DictConfig:
        """The resolved configuration of its run with this seed.

        Raises:
            ConfigError: an override or value that cannot work.
        """
        if seed not in self._configs:
            self._configs[seed] = resolve({**OmegaConf.to_container(self._composed), "seed": seed})
        return copy.deepcopy(self._configs[seed])

    @cached_property
    def _composed(self) -> DictConfig:
        cfg = compose(self.recipe.parent, self.recipe.name, self.overrides)
        OmegaConf.set_struct(cfg, False)
        return cfg

    def method(self, seed: int) -> Method:
        """The method of that run, freshly built; where the data has to be read to know its classes, with two."""
        cfg = self.config(seed)
        if cfg.data.num_classes is None:
            cfg.data.num_classes = 2
        return METHODS[cfg.method](cfg)

    @cached_property
    def anatomy(self) -> dict[str, Any]:
        """What its method consists of: `solo_ext.planning.anatomy`."""
        return anatomy(self.method(0))

    @cached_property
    def printed_config(self) -> DictConfig:
        """The resolved configuration of the paper's setting."""
        recipe, overrides = self.as_printed
        return resolve(compose(recipe.parent, recipe.name, overrides))


@dataclass(frozen=True)
class Study:
    """A study that fits its paper's figures.

    Attributes:
        file: its YAML. title: the table's, or the first line of the YAML. dataset: whose recipes are run.
        table: the paper's; None for a figure without printed values.
        rows: the rows to show: cells, and cited printed rows.
        changes: the user's overrides.
    """

    file: Path
    title: str
    dataset: str
    table: Table | None
    rows: list[Cell | Row]
    seeds: list[int]
    metrics: dict[str, Metric]
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

    Its recipes are `../../pretrain/<data set>/<recipe>.yaml`, and `../paper_results.yaml` holds the printed figures.

    Args:
        overrides: `seeds=[0,1]`; `dataset=NAME` takes that data set's recipes, and so does `data.dataset=NAME`; all
            others are Hydra's, for all runs.

    Raises:
        ConfigError: the study does not fit its paper's figures, or an override does not fit the study.
    """
    path = Path(path).expanduser()
    _exists(path, "study")
    try:
        content = read_text_yaml(path)
        study = _build(StudyFile, content, "")
        wanted, changes = _users(overrides, study)
        return _study(path, study, wanted, changes)
    except ConfigError as error:
        raise error if str(error).startswith(str(path)) else ConfigError(f"{path}: {error}") from error


def load_table(path: str | Path, name: str) -> Table:
    """The table `name` of a `paper_results.yaml`.

    Raises:
        ConfigError: no such file or table, or one that is not well-formed.
    """
    path = Path(path)
    _exists(path, "file of printed results")
    tables = read_text_yaml(path)
    if name not in tables:
        raise ConfigError(f"{path.name} has no table '{name}'{nearest(name, tables) or f' (it has {_list(tables)})'}")
    try:
        table = _build(Table, tables[name], "")
        assert table.printed is not None  # which reads the numbers
        return table
    except ConfigError as error:
        raise ConfigError(f"{path.name}, {name}: {error}") from error


# YAML in which everything is text, as it is printed: 0.90 stays 0.90.


class _Text(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        names = Counter(key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
        if twice := [name for name, n in names.items() if n > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{twice[0]}' comes twice in one mapping", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_text_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, in which all but null is text.

    Raises:
        ConfigError: it is not YAML, not a mapping, or has a key twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is not readable YAML{where}: {getattr(error, 'problem', error)}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping")
    return content


def _build(cls: type[T], content: Any, at: str) -> T:
    try:
        return build(cls, content, at)
    except UnknownKey as error:
        raise UnknownKey(error.key, keys(cls)) from error


def short_labels(rows: Sequence[Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """The columns that tell the rows apart, and a label for each row, made of them."""
    columns = list(rows[0]) if rows else []
    for column in columns[:0:-1]:
        rest = [name for name in columns if name != column]
        if len({tuple(row[name] for name in rest) for row in rows}) == len(rows):
            columns = rest
    return columns, [" · ".join(row[name] for name in columns) for row in rows]


# The parts of `load_study`.


def _users(overrides: Sequence[str], study: StudyFile) -> tuple[str, list[str]]:
    """The folder of recipes that the user wants, and the overrides that go to the runs; sets the seeds of `study`."""
    asked: dict[str, str] = {}
    changes = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in ("seeds", "dataset"):
            asked[key] = value
        else:
            changes.append(override)
    if "seeds" in asked:
        try:
            study.seeds = fit(list[int], yaml.load(asked["seeds"], _Text), "seeds")
        except yaml.YAMLError as error:
            raise ConfigError(f"seeds must be a list such as [0,1,2], not {asked['seeds']}") from error
    chosen = [value for key, _, value in (c.lstrip("+").partition("=") for c in changes) if key == "data.dataset"]
    return asked.get("dataset") or (chosen[-1] if chosen else study.dataset), changes


def _study(path: Path, study: StudyFile, dataset: str, changes: list[str]) -> Study:
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ConfigError(f"seeds must be different numbers, at least one, not {study.seeds}")
    scripts = path.absolute().parents[2] / "pretrain"
    table = load_table(path.absolute().parents[1] / RESULTS, study.table) if study.table else None
    specs = [*_grid(study), *((spec.row, spec.overrides, f"the cell {_say(spec.row)}") for spec in study.cells)]
    _check_keys(study, specs, changes)
    if table:
        placed, rows = _cover(table, study, [labels for labels, _, _ in specs])
    else:
        placed, rows = [[(labels, {})] for labels, _, _ in specs], []
        if not specs:
            raise ConfigError("grid and cells are both empty")
    names = _names([_without(matches[0][0], study.readout) for matches in placed])
    cells: list[Cell] = []
    for (_, own, where), matches, name in zip(specs, placed, names, strict=True):
        recipe, printed = _recipe([*study.overrides, *own], where), [*study.overrides, *own]
        plain = [override for override in printed if _key(override) != "recipe"]
        home = recipe_file(scripts, study.dataset, recipe)
        there = recipe_file(scripts, dataset, _recipe([*printed, *changes], where))
        user = [change for change in changes if _key(change) != "recipe"]
        for labels, values in matches:
            epoch = _epoch(labels[study.readout]) if study.readout else None
            cells.append(Cell(labels, values, there, _last([*plain, *user]), name, epoch, (home, plain)))
    if table:  # in the paper's order
        by_row = {tuple(cell.labels.values()): cell for cell in cells}
        rows = [by_row.get(tuple(row.labels.values()), row) for row in rows]
    metrics = {column: m if isinstance(m, Metric) else Metric(m) for column, m in study.metrics.items()}
    title = table.title if table else _first_comment(path) or f"figure {study.figure}"
    return Study(
        path, title, dataset, table, rows if table else cells, study.seeds, metrics,
        study.readout, study.curves, study.plot, changes,
    )  # fmt: skip


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.strip("# ") if first.startswith("#") else ""


def _grid(study: StudyFile) -> Iterator[tuple[dict[str, str], list[str], str]]:
    """Labels, overrides and a name for errors of each combination of the axes."""
    axes = []
    for axis, choices in study.grid.items():
        columns = [column.strip() for column in axis.split(", ")]
        points = []
        for label, overrides in choices.items():
            texts = [text.strip() for text in label.split(", ", len(columns) - 1)]
            if len(texts) != len(columns):
                raise ConfigError(f"grid.{axis}: the label '{label}' has {len(texts)} parts for {len(columns)} columns")
            points.append((dict(zip(columns, texts, strict=True)), overrides or []))
        axes.append(points)
    for combination in itertools.product(*axes) if axes else ():
        labels = {column: text for point, _ in combination for column, text in point.items()}
        yield labels, [override for _, own in combination for override in own], f"the cell {_say(labels)}"


def _check_keys(study: StudyFile, specs: Sequence[tuple[dict, list[str], str]], changes: Sequence[str]) -> None:
    """Refuses overrides of what the study varies, or what `solo-ext study` sets itself."""
    varied: dict[str, str] = {}
    for axis, points in study.grid.items():
        varied |= {_key(override): f"the axis '{axis}'" for own in points.values() for override in own or ()}
    for spec in study.cells:
        varied |= {_key(override): f"the cell {_say(spec.row)}" for override in spec.overrides}
    if "recipe" in varied:
        varied.setdefault("method", varied["recipe"])
    for override in changes:
        for key, where in varied.items():
            if _overlap(_key(override), key):
                raise ConfigError(f"'{override}' cannot hold for all cells, for {where} sets {key}")
    for override in (*study.overrides, *(o for _, own, _ in specs for o in own), *changes):
        for key, instead in OWN.items():
            if _overlap(_key(override), key):
                raise ConfigError(f"'{override}': {key} is set by solo-ext study itself; {instead}")


def _cover(
    table: Table, study: StudyFile, wanted: Sequence[dict[str, str]]
) -> tuple[list[list[tuple[dict, dict]]], list[Row]]:
    """(labels, printed values) of the rows that each wanted cell covers, one but for `readout`; and all the rows."""
    for column in study.metrics:
        if column not in table.values:
            hint = nearest(column, table.values) or f" (it has {_list(table.values)})"
            raise ConfigError(f"metrics: {study.table} has no column '{column}'{hint}")
    if study.readout and study.readout not in table.keys:
        hint = nearest(study.readout, table.keys) or f" (it has {_list(table.keys)})"
        raise ConfigError(f"readout: {study.table} has no key column '{study.readout}'{hint}")

    def matching(labels: Mapping[str, str], where: str) -> list[int]:
        for column in labels:
            if column not in table.keys:
                hint = nearest(column, table.keys) or f" (it has {_list(table.keys)})"
                raise ConfigError(f"{where}: {study.table} has no key column '{column}'{hint}")
        found = [i for i, row in enumerate(table.printed) if labels.items() <= row.labels.items()]
        if not found:
            near = nearest(_say(labels), [_say({k: row.labels[k] for k in labels}) for row in table.printed])
            raise ConfigError(f"{where} ({_say(labels)}) matches no row of {study.table}{near}")
        return found

    covered: dict[int, str] = {}
    placed = []
    for labels in wanted:
        found = matching(labels, "a cell")
        apart = {table.printed[i].labels[study.readout] for i in found} if study.readout else {""}
        if len(found) != len(apart):
            raise ConfigError(f"the cell {_say(labels)} matches {len(found)} rows of {study.table}; name more columns")
        for i in found:
            if i in covered:
                raise ConfigError(f"the row {_say(table.printed[i].labels)} is covered by two cells")
            covered[i] = "a cell"
        placed.append([(table.printed[i].labels, table.printed[i].values) for i in found])
    for labels in study.cited:
        for i in matching(labels, "cited"):
            if i in covered:
                raise ConfigError(f"the row {_say(table.printed[i].labels)} is cited but covered by {covered[i]} too")
            covered[i] = "another citation"
    for i, row in enumerate(table.printed):
        if i not in covered:
            raise ConfigError(
                f"no cell covers the row {_say(row.labels)} of {study.table}; add one, or put it under cited"
            )
    return placed, table.printed


def _recipe(overrides: Sequence[str], where: str) -> str:
    named = [override.partition("=")[2] for override in overrides if _key(override) == "recipe"]
    if not named:
        raise ConfigError(f"{where} has no recipe=NAME")
    return named[-1]


def _exists(file: Path, what: str) -> None:
    if not file.is_file():
        near = nearest(file.stem, [other.stem for other in file.parent.glob("*.yaml")])
        raise ConfigError(f"there is no {what} '{file}'{near}")


def _epoch(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"readout: '{text}' is not an epoch")
    return int(text)


def _names(cells: Sequence[Mapping[str, str]]) -> list[str]:
    """A short name of letters, digits and `.-_` for each cell; those that would be alike get a hash."""
    if len({tuple(labels.items()) for labels in cells}) < len(cells):
        twice = next(labels for i, labels in enumerate(cells) if labels in cells[:i])
        raise ConfigError(f"the cell {_say(twice)} comes twice")
    names = ["_".join(_slug(text) for text in labels.values()) for labels in cells]
    counts = Counter(names)
    hashes = [hashlib.sha256(repr(sorted(labels.items())).encode()).hexdigest()[:6] for labels in cells]
    return [name if counts[name] == 1 else f"{name}-{tail}" for name, tail in zip(names, hashes, strict=True)]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "no"


def _without(labels: Mapping[str, str], column: str | None) -> dict[str, str]:
    return {key: text for key, text in labels.items() if key != column}


def _key(override: str) -> str:
    """The full key that an override sets."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _last(overrides: Sequence[str]) -> list[str]:
    """Without those that a later one of the same key makes void."""
    later = {_key(override): i for i, override in enumerate(overrides) if not override.startswith("~")}
    return [override for i, override in enumerate(overrides) if later.get(_key(override), i) <= i]


def _overlap(one: str, other: str) -> bool:
    """Whether the keys are the same, or one holds the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _say(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{column} {text}" for column, text in labels.items())


def _list(names: Any) -> str:
    return ", ".join(map(str, names))
