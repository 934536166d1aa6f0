"""A study's figure in its paper's form: bars of ours beside the paper's, or curves over epochs."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from solo_ext.analysis.drawing import MUTED
from solo_ext.analysis.figures import Curve, Panel, Section, Style, by_value, thin
from solo_ext.runs.run import Run
from solo_ext.studies.cells import Cell
from solo_ext.studies.printed import short_labels
from solo_ext.studies.scores import Results, Scores
from solo_ext.studies.study import Study
from solo_ext.training.metrics import metric_of

PALE = 0.35  # opacity of the paper's bars


def bars(study: Study, rows: Scores, looks: Mapping[str, Style]) -> Any:
    """A matplotlib figure: for each row ours, with standard deviation, above the paper's, paler; a panel per metric."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns, names = short_labels([row.labels for row, _ in rows])
    n, panels = len(rows), list(study.metrics)
    size = (3.2 + 2.4 * len(panels), 0.9 + 0.34 * n)
    figure = Figure(figsize=size, layout="constrained", dpi=160)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, column in zip(axes, panels, strict=True):
        most = 0.0
        for i, (row, scored) in enumerate(rows):
            score = scored[column]
            colour = looks[row.name].light if isinstance(row, Cell) else MUTED
            ours, paper = (-0.19, score.mean, 1.0, score.std), (0.19, score.paper, PALE, None)
            for offset, value, opacity, spread in (ours, paper):
                if value is None or not np.isfinite(value):
                    continue
                ax.barh(i + offset, value, 0.36, color=colour, alpha=opacity, linewidth=0)
                end = value + (spread or 0)
                if spread:
                    ax.errorbar(value, i + offset, xerr=spread, color=MUTED, linewidth=0.9, capsize=2)
                ax.annotate(
                    f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}",
                    (max(end, 0), i + offset),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=6.5,
                )
                most = max(most, end)
        ax.set_title(column, parse_math=False)
        ax.grid(axis="x")
        ax.grid(visible=False, axis="y")
        ax.set_xlim(0, most * 1.2 or 1)
        ax.xaxis.get_major_locator().set_params(nbins=5)
    for text in axes[0].set_yticks(range(n), names):
        text.label1.set_parse_math(False)
    axes[0].set_ylim(n - 0.4, -0.6)
    axes[0].set_ylabel(" · ".join(columns), parse_math=False)
    keys = [Patch(color=MUTED, linewidth=0, label="ours")]
    if any(score.paper is not None for _, scored in rows for score in scored.values()):
        keys.append(Patch(color=MUTED, alpha=PALE, linewidth=0, label="paper"))
    figure.legend(handles=keys, loc="outside upper left", ncols=2, frameon=False)
    return figure


def curves(study: Study, results: Results, looks: Mapping[str, Style]) -> Section:
    """`study.curves` over epochs: for each cell the mean over its finished runs, in a band of their deviation."""
    panels = []
    for column in study.curves:
        metric = metric_of(column)
        means = [curve for name, look in looks.items() if (curve := _mean(results[name].values(), column, look))]
        panels += [Panel(metric.title, column, means, gap_axis=metric.section == "gap")] if means else []
    shown = [(run, looks[name]) for name, runs in results.items() for run in runs.values()]
    places = by_value(shown, "gap.at") if any(panel.gap_axis for panel in panels) else {}
    return Section("curves", {"curves": panels}, list(looks.values()), {"places": places})


def _mean(runs: Iterable[Run], metric: str, look: Style) -> Curve | None:
    """The mean of `metric` over `runs` at the epochs that all of them have."""
    series = [dict(zip(epochs.round(6), values, strict=True)) for _, epochs, values in (r.series(metric) for r in runs)]
    epochs = sorted(set.intersection(*(set(one) for one in series))) if series else []
    if not epochs:
        return None
    values = np.array([[one[epoch] for one in series] for epoch in epochs])
    band = values.std(axis=1, ddof=1) if len(series) > 1 else None
    mean = thin(np.array(epochs), values.mean(axis=1))
    return Curve(look, *mean, band=None if band is None else thin(band, band)[1])
