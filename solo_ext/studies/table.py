"""The pages of a study: what it has given so far beside what its paper prints, in Markdown and HTML, and the plot."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solo_ext.analysis import drawing
from solo_ext.analysis.figures import Section, styles
from solo_ext.analysis.pages import render
from solo_ext.analysis.report import machine
from solo_ext.files import write_text
from solo_ext.runs.environment import environment
from solo_ext.runs.run import Run, compare
from solo_ext.studies.cells import Cell
from solo_ext.studies.jobs import Job
from solo_ext.studies.plots import bars, curves
from solo_ext.studies.printed import Row, short_labels
from solo_ext.studies.scores import Score, Scores, remarks, results_of, scores, setting, warning
from solo_ext.studies.study import Study
from solo_ext.text import markdown_table


def write_tables(study: Study, jobs: Sequence[Job], out: str | Path, failed: Mapping[str, str] | None = None) -> Path:
    """Writes `study.md`, `study.html`, `study.png` and `study.svg` into `out`, each whole or not at all.

    Args:
        failed: names of the jobs that failed -> why.

    Returns:
        The path of the HTML.

    Raises:
        CheckpointError: a file cannot be written.
    """
    out, failed = Path(out), failed or {}
    results = results_of(study, jobs)
    runs = [run for some in results.values() for run in some.values()]
    rows = scores(study, results, failed)
    facts = {
        "study": f"{study.file} ({study.source})",
        "runs": f"{len(runs)} of {len(jobs)}",
        **{name: text for name, text in setting(study).items() if text},
        "seeds": ", ".join(map(str, study.seeds)),
        "changes": shlex.join(study.changes) or "none",
        **_machines(runs),
        "command": shlex.join(["solo-ext", *environment()["command"][1:]]),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    labels = [{k: v for k, v in cell.labels.items() if k != study.readout} for cell in study.runs]
    values: dict[str, Any] = {
        "columns": [*study.rows[0].labels, *(name for _, below in _head(study) for name in below)],
        "warning": warning(study),
        "legend": _legend(study),
        "ran": facts,
        "notes": [*remarks(study, results), *(f"{name} has no result: {reason}" for name, reason in failed.items())],
        "overrides": {cell.name: _overrides(cell) for cell in study.runs},
    }
    with drawing.house_style():
        looks = dict(zip(results, styles(short_labels(labels)[1]), strict=True))
        plot = bars(study, rows, looks) if study.metrics else None
        section = curves(study, results, looks) if study.curves else None
        drawn = _draw(study, plot, section, out)
        page = render(
            "study",
            looks.values(),
            section.last_epoch if section else 1.0,
            title=f"solo_ext study: {study.source}",
            heading=study.title,
            subtitle=" · ".join([study.source, f"{facts['runs']} runs", facts["written"]]),
            parts=[
                *(("Results", "Plot") if plot else ()),
                *(("Curves",) if section else ()),
                "What ran",
                *(("Notes",) if values["notes"] else ()),
                "Overrides",
            ],
            rows=[_html_row(study, row, found, looks) for row, found in rows],
            plot=plot,
            curves=section,
            **values,
        )
    write_text(out / "study.md", _markdown(study, rows, drawn, **values))
    write_text(out / "study.html", page)
    return out / "study.html"


def _draw(study: Study, plot: Any, section: Section | None, out: Path) -> bool:
    """Writes the study's figure in the paper's form, bars or lines, if there is anything to draw."""
    if study.plot == "lines" and not (section and section.panels):
        return False
    for suffix in ("png", "svg"):
        temporary = out / f".study.tmp.{suffix}"
        if section and study.plot == "lines":
            drawing.png(section.panels, section.legend, section.last_epoch, temporary)
        else:
            drawing.save(plot, temporary)
        os.replace(temporary, out / f"study.{suffix}")
    return True


def _machines(runs: Sequence[Run]) -> dict[str, str]:
    """Versions and hardware of the runs."""
    known = [machine(run.environment) for run in runs if run.environment]
    own = ("time", "command", "host", "before")
    same, differing = compare([{k: v for k, v in facts.items() if k not in own} for facts in known])
    return {**same, **{key: "; ".join(dict.fromkeys(texts)) for key, texts in differing.items()}}


def _head(study: Study) -> list[tuple[str, list[str]]]:
    """(column of the study, headings below it)."""
    paper = [column for column in study.metrics if _decimals(study, column) is not None]
    return [(c, [f"{c}, ours", f"{c}, paper", "ours - paper"] if c in paper else [c]) for c in study.metrics]


def _decimals(study: Study, column: str) -> int | None:
    """Two, as the papers have them, for columns with printed numbers."""
    rows = study.table.printed if study.table else []
    return 2 if any(row.values.get(column) is not None for row in rows) else None


def _cells(study: Study, found: Mapping[str, Score]) -> list[str]:
    texts: list[str] = []
    for column, below in _head(study):
        texts += found[column].texts(_decimals(study, column))[: len(below)]
    return texts


def _legend(study: Study) -> str:
    text = "Ours: mean ± standard deviation (n - 1) over seeds, and in brackets the number of runs."
    return text + " In italics: printed by the paper, not run here." * any(isinstance(row, Row) for row in study.rows)


def _overrides(cell: Cell) -> str:
    return shlex.join(["/".join(cell.recipe.parts[-2:]), *cell.overrides])


def _html_row(study: Study, row: Cell | Row, found: Mapping[str, Score], looks: Mapping[str, Any]) -> dict[str, Any]:
    first, *others = row.labels.values()
    look = looks[row.name] if isinstance(row, Cell) else None
    return {
        "kind": "run" if look else "floor", "look": look, "label": first, "cells": [*others, *_cells(study, found)]
    }  # fmt: skip


def _markdown(
    study: Study,
    rows: Scores,
    drawn: bool,
    *,
    columns: Sequence[str],
    warning: str,
    legend: str,
    ran: Mapping[str, str],
    notes: Sequence[str],
    overrides: Mapping[str, str],
) -> str:
    parts = [f"# {study.title}\n"]
    if warning:
        parts.append(f"> **{warning}**\n")
    if study.metrics:
        keys = len(study.rows[0].labels)
        table = [
            [*(f"*{text}*" if isinstance(row, Row) else text for text in row.labels.values()), *_cells(study, found)]
            for row, found in rows
        ]
        parts += [markdown_table(columns, table, range(keys, len(columns))), f"{legend}\n"]
    parts += [f"![{study.title}](study.png)\n"] if drawn else []
    for heading, lines in (
        ("What ran", [f"{key}: {text}" for key, text in ran.items()]),
        ("Notes", notes),
        ("Overrides", [f"{name}: `{command}`" for name, command in overrides.items()]),
    ):
        if lines:
            parts += [f"## {heading}\n", "".join(f"- {line}\n" for line in lines)]
    return "\n".join(parts)
