"""The rows of a study's table: what a paper prints, the cells that are run, what they are compared with, their runs."""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from solo_ext.errors import CheckpointError, ConfigError, must_have, naming
from solo_ext.methods import METHODS
from solo_ext.runs.comparison import differences
from solo_ext.runs.run import ARGS, Run, saved_at
from solo_ext.schema import build, fit, plain
from solo_ext.text import nearest
from solo_ext.training.compose import assign
from solo_ext.training.config import PretrainConfig

if TYPE_CHECKING:
    from solo_ext.methods.module import LightningMethod

SETTINGS = (  # of every run
    "checkpoint.enabled=True",
    "auto_resume.enabled=True",
    "auto_resume.max_hours=1000000.0",  # however old it is
    "enable_progress_bar=False",
)


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a table: column -> text, and printed column -> the paper's number, None where nothing is printed."""

    labels: dict[str, str]
    values: dict[str, float | None]


@dataclass(kw_only=True)
class Table:
    """A table, or a figure with numbers, as a paper prints it."""

    title: str
    source: str
    keys: list[str]  # the columns that name a row
    values: list[str]  # the columns with results
    rows: list[list[Any]]  # a list per row, keys first; `printed` has them as `Row`s
    notes: list[str] = field(default_factory=list)  # what is odd in print

    def __post_init__(self) -> None:
        self.printed: list[Row] = []
        n = len(self.keys)
        for i, row in enumerate(self.rows):
            if len(row) != n + len(self.values):
                raise ConfigError(f"rows.{i} has {len(row)} entries for {n + len(self.values)} columns")
            labels = dict(zip(self.keys, map(str, row[:n]), strict=True))
            numbers = fit(list[float | None], row[n:], f"rows.{i}")
            self.printed.append(Row(labels, dict(zip(self.values, numbers, strict=True))))


def load_table(path: Path, name: str) -> Table:
    """The table `name` of a file of printed results; ConfigError if there is none or it is malformed."""
    tables = read_text_yaml(path, "file of printed results")
    must_have(name, tables, f"{path.name} has no table")
    with naming(f"{path.name}, {name}", ConfigError):
        return build(Table, tables[name])


class _Text(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        counts = Counter(key.value for key, _ in node.value)
        if twice := [name for name, n in counts.items() if n > 1]:
            problem = f"the key '{twice[0]}' comes twice in one mapping"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def read_text_yaml(path: Path, what: str = "file") -> dict[str, Any]:
    """The mapping in a YAML file in which all but null is text, as it is printed: 0.90 stays 0.90.

    ConfigError if there is no such file, a `what`, if it holds anything but a mapping, or has a key twice.
    """
    if not path.is_file():
        near = nearest(path.stem, [other.stem for other in path.parent.glob("*.yaml")])
        raise ConfigError(f"there is no {what} '{path}'{near}")
    errors = yaml.YAMLError, UnicodeDecodeError, OSError
    with naming(f"{path} cannot be read as YAML", *errors), open(path, encoding="utf-8") as file:
        content = yaml.load(file, _Text)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping")
    return content


@dataclass(frozen=True, eq=False)
class Cell(Row):
    """A row of the study's table, and the runs behind it."""

    recipe: Path
    overrides: list[str]  # of the recipe: the study's, the cell's own and the user's, in this order
    name: str  # of its runs, fit for a folder; cells of one name read out the same runs
    epoch: int | None  # at which the paper reads the run out; None: the last
    as_printed: tuple[Path, list[str]]  # recipe and overrides of the paper's setting, without the user's changes
    resolved: Callable[..., PretrainConfig] = field(repr=False)  # its results are shared: nobody may change them
    evaluations: dict[str, list[str]] = field(default_factory=dict)  # name -> command and words

    def config(self, seed: int) -> PretrainConfig:
        """The configuration of the run with this seed."""
        return self.resolved(self.recipe, *self.overrides, f"seed={seed}")

    @property
    def printed_config(self) -> PretrainConfig:
        return self.resolved(self.as_printed[0], *self.as_printed[1])

    def method(self, seed: int) -> "LightningMethod":
        """The method of that run, freshly built; with two classes where only the data could tell how many there are."""
        cfg = copy.deepcopy(self.config(seed))
        if cfg.data.num_classes is None:
            cfg.data.num_classes = 2
        return METHODS[cfg.method](cfg)

    @cached_property
    def anatomy(self) -> dict[str, Any]:
        """What its method consists of: `solo_ext.planning.plan.anatomy`."""
        from solo_ext.planning.plan import anatomy

        return anatomy(self.method(0))


@dataclass
class Job:
    """One run of a study: a cell with a seed."""

    cell: Cell
    seed: int
    out: Path

    def __post_init__(self) -> None:
        self.name = f"{self.cell.name}-seed{self.seed}"
        self.folder = self.out / "runs" / self.name  # the run's checkpoint.dir
        self.log = self.out / "logs" / f"{self.name}.log"

    @property
    def command(self) -> dict[str, Any]:
        """What `solo_ext.cli.job` runs."""
        own = [assign("checkpoint.dir", self.folder), f"seed={self.seed}", *SETTINGS]
        words = ["pretrain", str(self.cell.recipe), *self.cell.overrides, *own]
        others = [run.id for run in self.tries() if differences(run.args, self.config)]
        return {"folder": str(self.folder), "others": others, "pretrain": words, "evaluations": self.cell.evaluations}

    @cached_property
    def config(self) -> dict[str, Any]:
        return plain(self.cell.config(self.seed))

    def tries(self) -> list[Run]:
        """The runs in its folder, newest first, including those of another configuration."""
        readable = []
        for file in sorted(self.folder.glob(f"*/*/{ARGS}"), key=saved_at, reverse=True):
            with contextlib.suppress(CheckpointError):
                readable += [run] if (run := Run(file.parent)).args else []
        return readable

    def runs(self) -> Iterator[Run]:
        """The runs of this very configuration, newest first."""
        return (run for run in self.tries() if not differences(run.args, self.config))

    def state(self) -> str:
        """`done`, `running` (in another process), `begun` or `missing`."""
        runs = list(self.runs())
        if self.result():
            return "done"
        if any(run.running for run in runs):
            return "running"
        return "begun" if any(run.checkpoints or run.finished for run in runs) else "missing"

    def result(self) -> Run | None:
        """The finished and evaluated run, if there is one."""
        finished = (run for run in self.runs() if run.finished)
        return next((run for run in finished if all(map(run.evaluated, self.cell.evaluations))), None)


@dataclass(kw_only=True)
class Comparison:
    """Rows with these labels are compared, seed by seed, with those that have the labels `against`: each with the one
    that agrees in most of the other columns, the first of them first."""

    rows: dict[str, str] = field(default_factory=dict)
    against: dict[str, str]


def baselines(comparisons: Sequence[Comparison], cells: Sequence[Cell]) -> dict[Row, Cell]:
    """Cell -> the cell that it is compared with."""

    def having(labels: dict[str, str]) -> list[Cell]:
        found = [cell for cell in cells if labels.items() <= cell.labels.items()]
        if not found:
            raise ConfigError(f"compare: no cell has {row_text(labels)}")
        return found

    baselines: dict[Row, Cell] = {}
    for comparison in comparisons:
        others = having(comparison.against)
        for cell in having(comparison.rows):
            if cell not in others:
                baselines[cell] = max(others, key=lambda other: [other.labels[k] == v for k, v in cell.labels.items()])
    return baselines


def row_text(labels: dict[str, str]) -> str:
    """`column text, column text`."""
    return ", ".join(f"{column} {text}" for column, text in labels.items())
