"""Run folders read back, as far as their files are there: configuration, metrics, evaluations, environment."""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from solo_ext.errors import CheckpointError, DataError
from solo_ext.text import nearest

RUN_FILES = ("args.json", "metrics.csv")
UNTRAINED = "untrained"  # <dir>/untrained/<id>: the evaluations of an encoder as it was initialised
LINEAR = "linear"  # <dir>/linear/<id>: linear classifiers, whose accuracies are in their encoder's linear.json


@dataclass
class Run:
    """One run folder, `<dir>/<method>/<run id>`.

    Attributes:
        dir: the folder.
        args: the resolved configuration (`args.json`); empty if it is missing.
        metrics: column of `metrics.csv` -> [(step, value), ...], steps ascending; cells without a number left out.
        epoch_ends: epoch -> the last step logged in it; both count from 0.
        linear: `linear.json`: {"protocol", "acc1", ...}, accuracies in %.
        knn: `knn.json`: {"protocol", "results": [{"features", "distance", "k", "T", "acc1", ...}, ...]}.
        environment: `environment.json`.
        summary: `summary.json`, or `result.json`: {"seconds", "images_per_s", ...}.
    """

    dir: Path
    args: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    epoch_ends: dict[float, float] = field(default_factory=dict)
    linear: dict[str, Any] | None = None
    knn: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return self.dir.name

    @property
    def untrained(self) -> bool:
        return self.dir.parent.name == UNTRAINED

    @property
    def method(self) -> str:
        """The configuration's `method`, else the name of the folder above; `untrained` for such an encoder."""
        return UNTRAINED if self.untrained else str(self.args.get("method") or self.dir.parent.name)

    @property
    def name(self) -> str | None:
        name = self.args.get("name")
        return None if name is None else str(name)

    @cached_property
    def columns(self) -> list[str]:
        """The logged metrics by their own names, without Lightning's `_step` and `_epoch`."""
        return list(dict.fromkeys(c.removesuffix("_step").removesuffix("_epoch") for c in self.metrics))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What was logged as `name`, or else as `name_epoch`, or else as `name_step`.

        Returns:
            Three arrays [n]: steps, counted from 0; the epochs done after these steps, with fractions (NaN if no
            epoch was logged); values. Empty if there are none.
        """
        column = next((c for c in (name, f"{name}_epoch", f"{name}_step") if c in self.metrics), None)
        steps, values = np.array(self.metrics.get(column, []), dtype=float).reshape(-1, 2).T
        if not self.epoch_ends:
            return steps, np.full_like(steps, np.nan), values
        epochs = sorted(self.epoch_ends)
        ends = np.maximum.accumulate([self.epoch_ends[epoch] + 1 for epoch in epochs])
        return steps, np.interp(steps + 1, [0, *ends], [0, *(epoch + 1 for epoch in epochs)]), values

    def last(self, name: str) -> float | None:
        """The last value of `series(name)`, which may be NaN; None if there is none."""
        values = self.series(name)[2]
        return float(values[-1]) if len(values) else None

    def knn_result(self, k: int, distance: str = "cosine") -> dict[str, Any] | None:
        """The result of `knn.json` for k neighbours: backbone features, `distance`, T = 0.07, if there is a choice."""

        def strangeness(result: Mapping[str, Any]) -> tuple[bool, bool, float]:
            T = result.get("T")
            far = abs(T - 0.07) if is_number(T) else math.inf
            return result.get("features", "backbone") != "backbone", result.get("distance") != distance, far

        results = [x for x in (self.knn or {}).get("results", []) if isinstance(x, dict) and x.get("k") == k]
        return min(results, key=strangeness, default=None)


def load_run(path: str | Path) -> Run:
    """The run in the folder `path`.

    Raises:
        CheckpointError: `path` is not a run folder.
        DataError: one of its files is damaged.
    """
    path = Path(path)
    if not _is_run(path):
        raise CheckpointError(_no_run(path))
    metrics, epoch_ends = _read_metrics(path / "metrics.csv")
    summary = _read_json(path / "summary.json")
    return Run(
        dir=path,
        args=_read_json(path / "args.json") or {},
        metrics=metrics,
        epoch_ends=epoch_ends,
        linear=_read_json(path / "linear.json", protocol=dict),
        knn=_read_json(path / "knn.json", protocol=dict, results=list),
        environment=_read_json(path / "environment.json"),
        summary=_read_json(path / "result.json") if summary is None else summary,
    )


def find_runs(path: str | Path) -> list[Path]:
    """`path` if it is a run folder, else the run folders below it, by name; those of linear classifiers are left out.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    found = [path] if _is_run(path) else [run for run in _walk(path) if run.parent.name != LINEAR]
    if not found:
        raise CheckpointError(_no_run(path))
    return found


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in RUN_FILES)


def _walk(root: Path, depth: int | None = None) -> Iterator[Path]:
    """The run folders below `root`, at most `depth` levels down; nothing below a run is one."""
    for folder, children, files in os.walk(root):
        here = Path(folder)
        children[:] = sorted(child for child in children if not child.startswith("."))
        if any(name in files for name in RUN_FILES):
            yield here
            children.clear()
        elif len(here.relative_to(root).parts) == depth:
            children.clear()


def _no_run(path: Path) -> str:
    near = next((parent for parent in path.parents if parent.is_dir()), path)
    if path.is_file():
        what = "is a file, not a run folder"
    elif path.is_dir():
        what = "holds no run folder, which would have args.json and metrics.csv"
    else:
        what = "does not exist"
    runs = list(islice(_walk(near, depth=3), 1000)) if near != Path(near.anchor) else []
    return f"{path} {what}{nearest(str(path), runs) or (f'; the nearest run is {runs[0]}' if runs else '')}"


def _read_json(path: Path, **parts: type) -> dict[str, Any] | None:
    """The object in `path`, in which `parts`, where they are given, have these types; None without the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: it is not JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    for key, kind in parts.items():
        if key in content and not isinstance(content[key], kind):
            found = type(content[key]).__name__
            raise DataError(f"{path} is damaged: its {key} is a {found}, not a {kind.__name__}")
    return content


def _read_metrics(path: Path) -> tuple[dict[str, list[tuple[float, float]]], dict[float, float]]:
    metrics: dict[str, dict[float, float]] = {}
    epoch_ends: dict[float, float] = {}
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            # a machine that lost its power leaves NUL bytes, which Python 3.10's reader refuses
            for number, row in enumerate(csv.DictReader(line.replace("\0", "") for line in file)):
                epoch, step = _number(row.pop("epoch", None)), _number(row.pop("step", None))
                if not is_number(step):
                    step = float(number)
                if is_number(epoch):
                    epoch_ends[epoch] = max(step, epoch_ends.get(epoch, step))
                for column, cell in row.items():
                    if column and (value := _number(cell)) is not None:
                        metrics.setdefault(column, {})[step] = value  # a resumed run may log a step again
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise DataError(f"{path} is damaged: it is not a table ({error})") from error
    return {column: sorted(points.items()) for column, points in metrics.items()}, epoch_ends


def _number(cell: Any) -> float | None:
    """A number, NaN and infinity included, for a diverged run has to show; None for anything else."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Configurations side by side.


def flatten(config: Any, at: str = "") -> dict[str, Any]:
    """{full key: value} of nested dictionaries and lists of dictionaries; other lists are values."""
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        config = dict(enumerate(config))
    if not isinstance(config, dict) or not config:
        return {at: config} if at else {}
    items = (flatten(item, f"{at}.{name}" if at else str(name)) for name, item in config.items())
    return {key: value for item in items for key, value in item.items()}


def compare(configs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What nested dictionaries have alike and where they differ, by full key.

    Returns:
        ({key: value}, {key: [value of each, `-` where it has no such key]}), values as text.
    """
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    values = {key: [show(config[key]) if key in config else "-" for config in flat] for key in keys}
    same = {key: texts[0] for key, texts in values.items() if len(set(texts)) == 1}
    return same, {key: texts for key, texts in values.items() if key not in same}


def show(value: Any) -> str:
    """A value as a YAML file has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
