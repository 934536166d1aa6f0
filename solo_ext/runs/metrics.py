"""`metrics.csv`: a row for each logged optimizer step, and a column for each metric."""

import codecs
import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from solo_ext.errors import CheckpointError, naming
from solo_ext.files import log, read_bytes, replacing


def read_table(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The names of the columns, and the rows as they are taken; both empty without a file. CheckpointError if it is no
    table.

    Rows that were cut, by a machine that lost its power, are left out with a warning.
    """
    # NUL bytes are what such a machine may leave; Python 3.10's reader refuses them
    text = (read_bytes(path) or b"").decode("utf-8", "replace").replace("\0", "")
    *_, rest = text.rpartition("\n")
    reader = csv.DictReader(io.StringIO(text.removesuffix(rest), newline=""))
    table = partial(naming, f"{path} is damaged: it is not a table", csv.Error, error=CheckpointError)

    def rows() -> Iterator[dict[str, Any]]:
        cut = half = int(bool(rest))
        with table():
            for row in reader:
                if None in row.values():
                    cut += 1
                else:
                    yield row
        if cut:
            log.warning("%s: %d of %d rows were cut, and are left out", path, cut, reader.line_num - 1 + half)

    with table():
        return list(reader.fieldnames or ()), rows()


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], append: bool = False) -> None:
    """Replaces the whole file, or appends to it."""
    with (
        naming(f"{path} cannot be written", error=CheckpointError),
        open(path, "ab") if append else replacing(path) as file,
    ):
        writer = csv.DictWriter(codecs.getwriter("utf-8")(file), columns, "", "ignore", lineterminator="\n")
        if not append:
            writer.writeheader()
        writer.writerows(rows)


class Metrics(dict[str, list[tuple[float, float]]]):
    """The file: column -> [(step, value), ...], steps ascending; cells without a number are left out.

    epoch_ends: epoch -> the last step logged in it; both count from 0.
    """

    def __init__(self, path: Path):
        points: dict[str, dict[float, float]] = {}
        self.epoch_ends: dict[float, float] = {}
        for number, row in enumerate(read_table(path)[1]):
            epoch, step = _number(row.pop("epoch", None)), _number(row.pop("step", None))
            if not is_number(step):
                step = float(number)
            if is_number(epoch):
                self.epoch_ends[epoch] = max(step, self.epoch_ends.get(epoch, step))
            for column, cell in row.items():
                if column and (value := _number(cell)) is not None:
                    points.setdefault(column, {})[step] = value  # a resumed run may log a step again
        super().__init__({column: sorted(values.items()) for column, values in points.items()})


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(cell: Any) -> float | None:
    """A number, also NaN or infinity, so that a diverged run shows; None for anything else."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
