"""The pages of a study: what it has given so far beside what its paper prints, in Markdown and HTML, and the plot."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solo_ext.analysis import drawing
from solo_ext.analysis.figures import Section, Style, styles
from solo_ext.analysis.pages import render
from solo_ext.analysis.report import machine
from solo_ext.files import write_text
from solo_ext.runs.comparison import compare
from solo_ext.runs.environment import environment
from solo_ext.runs.run import Run
from solo_ext.studies.cells import Cell
from solo_ext.studies.jobs import Job
from solo_ext.studies.plots import bars, curves
from solo_ext.studies.printed import Row, short_labels
from solo_ext.studies.scores import Results, Scores, remarks, results_of, scores, setting, warning
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
    rows = scores(study, results, failed)
    labels = [{k: v for k, v in cell.labels.items() if k != study.readout} for cell in study.runs]
    looks = dict(zip(results, styles(short_labels(labels)[1]), strict=True))
    with drawing.house_style():
        plot = bars(study, rows, looks) if study.metrics else None
        section = curves(study, results, looks) if study.curves else None
        values = _words(study, jobs, results, failed) | _numbers(study, rows, looks)
        parts = {"Results": plot, "Plot": plot, "Curves": section, "What ran": True, "Notes": values["notes"]}
        values |= {
            "parts": [*(name for name, there in parts.items() if there), "Overrides"],
            "plot": plot,
            "curves": section,
            "drawn": _draw(study, plot, section, out),
        }
        page = render("study.html", looks.values(), section.last_epoch if section else 1.0, **values)
    write_text(out / "study.md", render("study.md", **values))
    write_text(out / "study.html", page)
    return out / "study.html"


def _words(study: Study, jobs: Sequence[Job], results: Results, failed: Mapping[str, str]) -> dict[str, Any]:
    """What is said around the numbers."""
    runs = [run for some in results.values() for run in some.values()]
    cited = any(isinstance(row, Row) for row in study.rows)
    ran = {
        "study": f"{study.file} ({study.source})",
        "runs": f"{len(runs)} of {len(jobs)}",
        **{name: text for name, text in setting(study).items() if text},
        "seeds": ", ".join(map(str, study.seeds)),
        "changes": shlex.join(study.changes) or "none",
        **_machines(runs),
        "command": shlex.join(["solo-ext", *environment()["command"][1:]]),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    return {
        "title": f"solo_ext study: {study.source}",
        "heading": study.title,
        "subtitle": " · ".join([study.source, f"{ran['runs']} runs", ran["written"]]),
        "warning": warning(study),
        "legend": "Ours: mean ± standard deviation (n - 1) over seeds, and in brackets the number of runs."
        + " In italics: printed by the paper, not run here." * cited,
        "ran": ran,
        "notes": [*remarks(study, results), *(f"{name} has no result: {reason}" for name, reason in failed.items())],
        "overrides": {
            cell.name: shlex.join(["/".join(cell.recipe.parts[-2:]), *cell.overrides]) for cell in study.runs
        },
    }


def _numbers(study: Study, scored: Scores, looks: Mapping[str, Style]) -> dict[str, Any]:
    """The table: its columns, its rows for HTML, and the whole in Markdown. Printed numbers have two decimals."""
    printed = [row.values for row in (study.table.printed if study.table else ())]
    beside = [column for column in study.metrics if any(values.get(column) is not None for values in printed)]
    columns = list(study.rows[0].labels)
    keys = len(columns)
    for column in study.metrics:
        columns += [f"{column}, ours", f"{column}, paper", "ours - paper"] if column in beside else [column]
    rows, plain = [], []
    for row, score in scored:
        texts: list[str] = []
        for column in study.metrics:
            texts += score[column].texts(2) if column in beside else score[column].texts(None)[:1]
        first, *others = labels = list(row.labels.values())
        look = looks[row.name] if isinstance(row, Cell) else None
        rows.append({"kind": "run" if look else "floor", "look": look, "label": first, "cells": [*others, *texts]})
        plain.append([*(labels if look else (f"*{text}*" for text in labels)), *texts])
    table = markdown_table(columns, plain, range(keys, len(columns))) if study.metrics else ""
    return {"columns": columns, "rows": rows, "table": table}


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
