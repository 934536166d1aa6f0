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
from solo_ext.studies.printed import short_labels
from solo_ext.studies.scores import remarks, results_of, scores, setting, warning
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
    found = scores(study, results, failed)
    cited = any(not isinstance(row, Cell) for row in study.rows)
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
    keys, heads = list(study.rows[0].labels), _heads(study)
    columns = [*keys, *(heading for below, _ in heads.values() for heading in below)]
    texts = [
        [text for column, (below, decimals) in heads.items() for text in score[column].texts(decimals)[: len(below)]]
        for _, score in found
    ]
    values = {
        "heading": study.title,
        "warning": warning(study),
        "legend": "Ours: mean ± standard deviation (n - 1) over seeds, and in brackets the number of runs."
        + " In italics: printed by the paper, not run here." * cited,
        "ran": facts,
        "notes": [*remarks(study, results), *(f"{name} has no result: {reason}" for name, reason in failed.items())],
        "overrides": {cell.name: _overrides(cell) for cell in study.runs},
    }
    labels = [{k: v for k, v in cell.labels.items() if k != study.readout} for cell in study.runs]
    with drawing.house_style():
        looks = dict(zip(results, styles(short_labels(labels)[1]), strict=True))
        plot = bars(study, found, looks) if study.metrics else None
        section = curves(study, results, looks) if study.curves else None
        drawn = _draw(study, plot, section, out)
        parts = {"Results": plot, "Plot": plot, "Curves": section, "What ran": True, "Notes": values["notes"]}
        page = render(
            "study.html",
            looks.values(),
            section.last_epoch if section else 1.0,
            title=f"solo_ext study: {study.source}",
            subtitle=" · ".join([study.source, f"{facts['runs']} runs", facts["written"]]),
            parts=[*(name for name, there in parts.items() if there), "Overrides"],
            columns=columns,
            rows=[_html_row(row, own, looks) for row, own in zip(study.rows, texts, strict=True)],
            plot=plot,
            curves=section,
            **values,
        )
    rows = [[*_emphasised(row), *own] for row, own in zip(study.rows, texts, strict=True)]
    table = markdown_table(columns, rows, range(len(keys), len(columns))) if study.metrics else ""
    write_text(out / "study.md", render("study.md", table=table, drawn=drawn, **values))
    write_text(out / "study.html", page)
    return out / "study.html"


def _heads(study: Study) -> dict[str, tuple[list[str], int | None]]:
    """Column of the study -> headings below it, and decimals: two, as the papers have them, beside printed numbers."""
    printed = [row.values for row in (study.table.printed if study.table else ())]
    return {
        column: ([f"{column}, ours", f"{column}, paper", "ours - paper"], 2)
        if any(values.get(column) is not None for values in printed)
        else ([column], None)
        for column in study.metrics
    }


def _emphasised(row: Any) -> list[str]:
    return list(row.labels.values()) if isinstance(row, Cell) else [f"*{text}*" for text in row.labels.values()]


def _html_row(row: Any, texts: Sequence[str], looks: Mapping[str, Any]) -> dict[str, Any]:
    first, *others = row.labels.values()
    look = looks[row.name] if isinstance(row, Cell) else None
    return {"kind": "run" if look else "floor", "look": look, "label": first, "cells": [*others, *texts]}


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


def _overrides(cell: Cell) -> str:
    return shlex.join(["/".join(cell.recipe.parts[-2:]), *cell.overrides])
