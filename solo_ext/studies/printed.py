"""What a paper prints: its tables, in a YAML in which every value is the text that is printed."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from solo_ext.errors import ConfigError
from solo_ext.schema import build, fit
from solo_ext.text import hint, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A printed row: the texts of the key columns, and the numbers of the others, None where nothing is printed."""

    labels: dict[str, str]
    values: dict[str, float | None]


@dataclass(kw_only=True)
class Table:
    """A table, or a figure with numbers, as a paper prints it.

    keys, values: the columns that name a row, and those with results. rows: a list per row, keys first.
    notes: what is odd in print.
    """

    title: str
    source: str
    keys: list[str]
    values: list[str]
    rows: list[list[Any]]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
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


def load_table(path: str | Path, name: str) -> Table:
    """The table `name` of a file of printed results.

    Raises:
        ConfigError: no such file or table, or one that is not well-formed.
    """
    path = Path(path)
    must_exist(path, "file of printed results")
    tables = read_text_yaml(path)
    if name not in tables:
        raise ConfigError(f"{path.name} has no table '{name}'{hint(name, tables)}")
    try:
        table = build(Table, tables[name])
        assert table.printed is not None  # which reads the numbers
        return table
    except ConfigError as error:
        raise ConfigError(f"{path.name}, {name}: {error}") from error


class _Text(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
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


def text_yaml(text: str) -> Any:
    """YAML in which all but null is text, as it is printed: 0.90 stays 0.90."""
    return yaml.load(text, _Text)


def read_text_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, in which all but null is text.

    Raises:
        ConfigError: it is not YAML, not a mapping, or has a key twice.
    """
    try:
        content = text_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is not readable YAML{where}: {getattr(error, 'problem', error)}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping")
    return content


def must_exist(file: Path, what: str) -> None:
    """Raises ConfigError, with the nearest YAML in the folder, unless the file is there."""
    if not file.is_file():
        near = nearest(file.stem, [other.stem for other in file.parent.glob("*.yaml")])
        raise ConfigError(f"there is no {what} '{file}'{near}")


def short_labels(rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    """The columns that tell the rows apart, and a label for each row, made of them."""
    columns = list(rows[0]) if rows else []
    for column in columns[:0:-1]:
        rest = [name for name in columns if name != column]
        if len({tuple(row[name] for name in rest) for row in rows}) == len(rows):
            columns = rest
    return columns, [" · ".join(row[name] for name in columns) for row in rows]


def say(labels: dict[str, str]) -> str:
    """`column text, column text`."""
    return ", ".join(f"{column} {text}" for column, text in labels.items())
