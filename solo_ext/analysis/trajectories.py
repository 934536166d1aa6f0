"""The paths of filters over training, in two dimensions or with the steps as a third (ProjectorEMA, Fig. 2, App. E)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solo_ext.analysis.figures import Style, styled
from solo_ext.analysis.pages import picture_path, write_picture
from solo_ext.errors import ConfigError
from solo_ext.runs.metrics import read_table
from solo_ext.runs.run import FILTERS, Run

MOST = 4000  # steps that are drawn; of more, each n-th
OWNERS = {"student": "-", "teacher": "--"}  # how their lines are drawn


def draw_trajectories(runs: Sequence[Run], out: str | os.PathLike, filters: Sequence[int], dimensions: int = 3) -> Path:
    """Draws the first two weights of `filters` in each of the runs, a panel for each filter, into the PNG or PDF `out`.

    dimensions: 3: the step is the first axis. ConfigError for a run that has not recorded them (filters.enabled).
    """
    path = picture_path(out, "trajectories")
    return write_picture(path, lambda: trajectories(styled(runs, apart=True), filters, dimensions))


def trajectories(runs: Sequence[tuple[Run, Style]], filters: Sequence[int], dimensions: int = 3) -> Any:
    """The figure, as a matplotlib one; each path has a mark where it starts (a dot) and where it ends (a cross)."""
    from matplotlib.figure import Figure

    wide = min(4, len(filters))
    high = -(-len(filters) // wide)
    figure = Figure(figsize=(3 * wide, 3 * high + 0.4), layout="constrained")
    kind = {"projection": "3d"} if dimensions == 3 else {}
    axes = figure.subplots(high, wide, squeeze=False, subplot_kw=kind).flat
    tables = [(_table(run), style) for run, style in runs]
    for ax, number in zip(axes, filters, strict=False):
        ax.set_title(f"filter {number:03}")
        for table, style in tables:
            for owner, line in OWNERS.items():
                if (path := _path(table, owner, number)) is not None:
                    points = path if dimensions == 3 else path[1:]
                    label = f"{style.label} ({owner})" if number == filters[0] else None
                    ax.plot(*points, line, color=style.light, linewidth=0.8, label=label)
                    for place, mark in ((0, "o"), (-1, "x")):
                        ax.plot(*points[:, [place]], mark, color=style.light, markersize=4)
    for ax in list(axes)[len(filters) :]:
        ax.set_axis_off()
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return figure


def _table(run: Run) -> dict[str, np.ndarray]:
    columns, steps = read_table(run.dir / FILTERS)
    if not (rows := [*steps]):
        raise ConfigError(f"{run.dir} has no {FILTERS}: filters.enabled=true records them while it trains")
    rows = rows[:: -(-len(rows) // MOST)]
    return {column: np.array([row[column] for row in rows], float) for column in columns}


def _path(table: dict[str, np.ndarray], owner: str, number: int) -> np.ndarray | None:
    """Step, and two weights: [3, steps]."""
    names = ["step", *(f"{owner}/{number}/{weight}" for weight in (0, 1))]
    if f"student/{number}/1" not in table:
        raise ConfigError(f"--filters: {number} is not recorded, or has one weight only (filters.count)")
    return np.stack([table[name] for name in names]) if names[1] in table else None
