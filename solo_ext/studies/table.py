"""The pages of a study: its results so far beside what its paper prints, in Markdown and HTML, and the plot."""

import dataclasses
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solo_ext.analysis import pages
from solo_ext.analysis.figures import PLACE, Panel, Section, Style, by_value, curve_of, panel_of, styles
from solo_ext.analysis.report import machine
from solo_ext.analysis.trajectories import trajectories
from solo_ext.files import write_text
from solo_ext.runs.comparison import compare
from solo_ext.runs.environment import environment
from solo_ext.runs.locks import one_at_a_time
from solo_ext.studies.rows import Cell, Job
from solo_ext.studies.scores import Results, Scores, remarks, results_of, scores, setting, warning
from solo_ext.studies.study import Study
from solo_ext.text import markdown_table

OF_SINGLE_RUNS = ("time", "command", "host", "before")  # facts in environment.json that the page leaves out
PALE = 0.35  # opacity of the paper's bars
PRINTED = (1.0, 2.0)  # dashes of its values among curves
LEGEND = "Ours: mean ± standard deviation (n - 1) over seeds, and in brackets the number of runs."
COMPARED = " Difference: from {}, over the same seeds; mean, 95% interval (Student's t), and how many seeds."
CITED = " In italics: printed by the paper, not run here."


def write_tables(study: Study, jobs: Sequence[Job], out: Path, failed: Mapping[str, str] | None = None) -> Path:
    """Writes `study.md`, `.html`, `.png` and `.pdf` into `out`, each whole or not at all; returns the path of the HTML.
    `failed`: names of the jobs that failed -> why."""
    with one_at_a_time(out):  # of the tasks of a job array
        failed = failed or {}
        results = results_of(study, jobs)
        rows = scores(study, results, failed)
        labels = [{k: v for k, v in cell.labels.items() if k != study.readout} for cell in study.runs]
        by_cell = dict(zip(results, styles(short_labels(labels)[1]), strict=True))
        with pages.house_style():
            section = curves(study, results, rows, by_cell)
            figure = plot = bars(study, rows, by_cell) if study.metrics else None
            if study.plot == "lines":
                figure = pages.grid(section.panels, section.legend, section.last_epoch) if section.panels else None
            elif study.plot == "filters":
                shown = [(run, by_cell[name]) for name, by_job in results.items() for run in list(by_job.values())[:1]]
                figure = trajectories(shown, study.spec.filters) if shown else None
            for suffix in ("png", "pdf") if figure else ():
                pages.save(figure, temporary := out / f".study.tmp.{suffix}")
                os.replace(temporary, out / f"study.{suffix}")
            values = _words(study, jobs, results, failed) | _numbers(study, rows, by_cell)
            values |= {"study": study, "plot": plot, "curves": section, "drawn": figure is not None}
            page = pages.render("study.html", by_cell.values(), section.last_epoch, **values)
        write_text(out / "study.md", pages.render("study.md", **values))
        write_text(out / "study.html", page)
        return out / "study.html"


def short_labels(rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    """The columns that tell the rows apart, and a label for each row, made of them."""
    columns = list(rows[0]) if rows else []
    for column in columns[:0:-1]:
        rest = [name for name in columns if name != column]
        if len({tuple(row[name] for name in rest) for row in rows}) == len(rows):
            columns = rest
    return columns, [" · ".join(row[name] for name in columns) for row in rows]


def _words(study: Study, jobs: Sequence[Job], results: Results, failed: Mapping[str, str]) -> dict[str, Any]:
    """The text around the numbers."""
    runs = [run for by_job in results.values() for run in by_job.values()]
    facts = [machine(run.environment) for run in runs if run.environment]
    same, differing = compare([{k: v for k, v in fact.items() if k not in OF_SINGLE_RUNS} for fact in facts])
    ran = {
        "study": f"{study.file} ({study.source})",
        "runs": f"{len(runs)} of {len(jobs)}",
        **{name: text for name, text in setting(study).items() if text},
        "seeds": ", ".join(map(str, study.seeds)),
        "changes": shlex.join(study.changes) or "none",
        **same,
        **{key: "; ".join(dict.fromkeys(texts)) for key, texts in differing.items()},
        "command": shlex.join(["solo-ext", *environment()["command"][1:]]),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    compared = [COMPARED.format(study.compared)] if study.baselines else []
    cited = [CITED] if len(study.cells) < len(study.rows) else []
    return {
        "warning": warning(study),
        "legend": "".join([LEGEND, *compared, *cited]),
        "ran": ran,
        "notes": [*remarks(study, results), *(f"{name} has no result: {reason}" for name, reason in failed.items())],
        "overrides": {
            cell.name: shlex.join(["/".join(cell.recipe.parts[-2:]), *cell.overrides]) for cell in study.runs
        },
    }


def _numbers(study: Study, rows: Scores, by_cell: Mapping[str, Style]) -> dict[str, Any]:
    """The table: its columns, its rows for HTML, and the whole in Markdown. Printed numbers have two decimals."""
    keys = list(study.rows[0].labels)
    both = [column for column in study.metrics if any(scores[column].paper is not None for _, scores in rows)]
    columns = list(keys)
    for column in study.metrics:
        columns += [f"{column}, ours", f"{column}, paper", "ours - paper"] if column in both else [column]
        columns += [f"{column}, difference"] if study.baselines else []
    cells, lines = [], []
    for row, by_column in rows:
        texts: list[str] = []
        for column in study.metrics:
            texts += by_column[column].texts(".2f") if column in both else by_column[column].texts(".4g")[:1]
            texts += [by_column[column].compared(".2f" if column in both else ".3g")] if study.baselines else []
        first, *others = labels = list(row.labels.values())
        style = by_cell[row.name] if isinstance(row, Cell) else None
        cells.append({"style": style, "floor": not style, "label": first, "cells": [*others, *texts]})
        lines.append([*(labels if style else (f"*{text}*" for text in labels)), *texts])
    table = markdown_table(columns, lines, range(len(keys), len(columns))) if study.metrics else ""
    return {"columns": columns, "rows": cells, "table": table}


# The figure in the paper's form: bars of ours beside the paper's, or curves over epochs.


def bars(study: Study, rows: Scores, by_cell: Mapping[str, Style]) -> Any:
    """A matplotlib figure: for each row ours, with standard deviation, above the paper's, paler; a panel per metric."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns, names = short_labels([row.labels for row, _ in rows])
    n, panels = len(rows), list(study.metrics)
    figure = Figure(figsize=(3.2 + 2.4 * len(panels), 0.9 + 0.34 * n), layout="constrained", dpi=160)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = [by_cell[row.name].light if isinstance(row, Cell) else pages.MUTED for row, _ in rows]
    whiskers = {"ecolor": pages.MUTED, "elinewidth": 0.9, "capsize": 2}
    for ax, column in zip(axes, panels, strict=True):
        numbers = [(score[column].mean, score[column].std or None, score[column].paper) for _, score in rows]
        means, spreads, papers = np.array(numbers, dtype=float).T
        for offset, values, opacity, errors in ((-0.19, means, 1.0, spreads), (0.19, papers, PALE, None)):
            ends = np.where(np.isfinite(values), values, np.nan)
            paint = {"color": colours, "alpha": opacity, "linewidth": 0, "error_kw": whiskers}
            container = ax.barh(np.arange(n) + offset, ends, 0.36, xerr=errors, **paint)
            texts = [f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}" for value in ends]
            ax.bar_label(container, texts, padding=3, fontsize=6.5)
        ax.set_title(column)
        ax.grid(axis="x")
        ax.grid(visible=False, axis="y")
        ax.set_xlim(0, 1.2 * max(ax.dataLim.x1, 0) or 1)
        ax.xaxis.get_major_locator().set_params(nbins=5)
    axes[0].set_yticks(range(n), names)
    axes[0].set_ylim(n - 0.4, -0.6)
    axes[0].set_ylabel(" · ".join(columns))
    keys = [Patch(color=pages.MUTED, linewidth=0, label="ours")]
    if any(score.paper is not None for _, by_column in rows for score in by_column.values()):
        keys.append(Patch(color=pages.MUTED, alpha=PALE, linewidth=0, label="paper"))
    figure.legend(handles=keys, loc="outside upper left", ncols=2, frameon=False)
    return figure


def curves(study: Study, results: Results, rows: Scores, by_cell: Mapping[str, Style]) -> Section:
    """`study.curves` over epochs: for each cell the mean over its finished runs, in a band of their deviation, and as
    a pale line what the paper prints."""
    panels: list[Panel] = []
    for column in study.curves:
        drawn = [curve_of([*results[name].values()], column, style, len(by_cell)) for name, style in by_cell.items()]
        printed = [
            (score.paper / reading.times, dataclasses.replace(by_cell[row.name], dash=PRINTED))
            for row, by_column in rows
            for name, score in by_column.items()
            if isinstance(row, Cell) and (reading := study.metrics[name]).metric == column and score.paper is not None
        ]
        panels += panel_of(column, drawn, printed)
    shown = [(run, by_cell[name]) for name, runs in results.items() for run in runs.values()]
    places = by_value(shown, *PLACE) if any(panel.gap_axis for panel in panels) else {}
    return Section("curves", {"curves": panels}, list(by_cell.values()), {"places": places})
