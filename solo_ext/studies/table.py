"""What a study has found so far, beside what its paper prints: numbers, a Markdown page and an HTML page."""

import html
import math
import os
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from solo_ext.analysis import figures
from solo_ext.analysis.report import key_svg, machine, page, section_html
from solo_ext.errors import ConfigError
from solo_ext.files import write_text
from solo_ext.runs.environment import environment
from solo_ext.runs.run import Run, compare, flatten, show
from solo_ext.schema import plain
from solo_ext.studies.plots import bars, curves
from solo_ext.studies.study import Cell, Metric, Row, Study, short_labels
from solo_ext.text import nearest

FACTS = ("teacher_layers", "parameters_millions", "forwards_per_view")  # of the method, whatever the run did
MINUTES = "minutes_per_epoch"
SETTING = {  # where these differ from the paper's, the numbers do not compare
    "data.dataset": "data set",
    "max_epochs": "epochs",
    "backbone.name": "backbone",
    "data.fraction": "share of the data",
    "limit_train_batches": "steps an epoch",
}


@dataclass(frozen=True)
class Score:
    """The values of a cell's runs, one per seed, for one printed column; failed: the runs that have none."""

    values: tuple[float, ...] = ()
    paper: float | None = None
    failed: int = 0
    fact: bool = False

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """The standard deviation between seeds, by n - 1; None for one run."""
        finite = all(map(math.isfinite, self.values))
        return (statistics.stdev(self.values) if finite else math.nan) if self.n > 1 else None

    @property
    def difference(self) -> float | None:
        return None if self.mean is None or self.paper is None else self.mean - self.paper

    def texts(self, decimals: int | None) -> tuple[str, str, str]:
        """Ours, the paper's, and the difference, as the tables show them; `decimals` None: four digits."""
        form = "{:.4g}" if decimals is None else f"{{:.{decimals}f}}"
        ours = "-"
        if self.mean is not None:
            ours = form.format(self.mean)
            ours += f" ± {form.format(self.std)}" if self.std is not None else ""
            ours += "" if self.fact else f" ({self.n})"
        if self.failed:
            ours = "failed" if self.mean is None else f"{ours}, {self.failed} failed"
        sign = form.replace("{:", "{:+")
        return (
            ours,
            "-" if self.paper is None else form.format(self.paper),
            "-" if self.difference is None else sign.format(self.difference),
        )


Scores = list[tuple[Cell | Row, dict[str, Score]]]


def scores(study: Study, jobs: Sequence[Any], failed: Mapping[str, str] | None = None) -> Scores:
    """The study's rows, each with {printed column: Score}; a cited row has no values of ours.

    Args:
        jobs: with `cell`, `seed`, `name` and `result()`, which is the finished run or None.
        failed: the names of those that failed.
    """
    return _scores(study, _results(study, jobs), failed or {})


Results = dict[str, dict[str, Run]]  # name of the cell's runs -> name of the job -> run


def _results(study: Study, jobs: Sequence[Any]) -> Results:
    results: Results = {cell.name: {} for cell in study.runs}
    for job in jobs:
        if run := job.result():
            results[job.cell.name][job.name] = run
    return results


def _scores(study: Study, results: Results, failed: Mapping[str, str]) -> Scores:
    rows: Scores = []
    for row in study.rows:
        printed = row.printed if isinstance(row, Cell) else row.values
        found = {}
        for column, metric in study.metrics.items():
            paper = printed.get(column)
            if isinstance(row, Row):
                found[column] = Score(paper=paper)
            elif metric.metric in FACTS:
                found[column] = Score((metric.times * row.anatomy[metric.metric],), paper, fact=True)
            else:
                values = [read(run, metric, row) for run in results[row.name].values()]
                lost = sum(name.startswith(f"{row.name}-seed") for name in failed)
                found[column] = Score(tuple(v for v in values if v is not None), paper, lost)
        rows.append((row, found))
    return rows


def read(run: Run, metric: Metric, cell: Cell) -> float | None:
    """The value of `metric` at the end of the run, or at the cell's epoch; None if it was not logged until then.

    The epoch is the paper's share of the run: with half the epochs, half of the printed one.
    """
    if metric.metric == MINUTES:
        seconds = (run.summary or {}).get("seconds")
        whole = seconds is not None and not (run.environment or {}).get("before")  # not resumed
        return metric.times * seconds / 60 / run.args["max_epochs"] if whole else None
    _, epochs, values = run.series(metric.metric)
    if cell.epoch is not None:
        values = values[epochs <= scaled_epoch(cell, run.args["max_epochs"]) + 1e-6]
    return metric.times * float(values[-1]) if len(values) else None


def scaled_epoch(cell: Cell, max_epochs: int) -> int:
    """The epoch of a run of `max_epochs` that stands for the one at which the paper reads out."""
    return max(1, round(cell.epoch * max_epochs / cell.printed_config.max_epochs))


# The pages.


def check_matplotlib() -> None:
    """Raises ConfigError without it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "a study's plot needs matplotlib, which is not installed: pip install 'solo-ext[viz]'"
        ) from None


def write_tables(study: Study, jobs: Sequence[Any], out: str | Path, failed: Mapping[str, str] | None = None) -> Path:
    """Writes `study.md`, `study.html`, `study.png` and `study.svg` into `out`, each whole or not at all.

    Returns:
        The path of the HTML.

    Raises:
        CheckpointError: a file cannot be written.
    """
    import matplotlib

    out, failed = Path(out), failed or {}
    results = _results(study, jobs)
    runs = [run for some in results.values() for run in some.values()]
    rows = _scores(study, results, failed)
    facts = {
        "study": f"{study.file} ({study.source})",
        "runs": f"{len(runs)} of {len(jobs)}",
        **_setting(study),
        "seeds": ", ".join(map(str, study.seeds)),
        "changes": shlex.join(study.changes) or "none",
        **_machines(runs),
        "command": shlex.join(["solo-ext", *environment()["command"][1:]]),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    notes = [*_notes(study, results), *(f"{name} has no result: {reason}" for name, reason in failed.items())]
    style = {**matplotlib.rcParamsDefault, **figures.RC}
    style.pop("backend", None)
    with matplotlib.rc_context(style):
        looks = dict(zip(results, figures.styles(_run_labels(study)), strict=True))
        drawing = bars(study, rows, looks) if study.metrics else None
        section = curves(study, results, looks) if study.curves else None
        drawn = _draw(study, drawing, section, out)
        texts = {
            "study.md": _markdown(study, rows, facts, notes, drawn),
            "study.html": _html(study, rows, facts, notes, drawing, section, looks),
        }
    for name, text in texts.items():
        write_text(out / name, text)
    return out / "study.html"


def _run_labels(study: Study) -> list[str]:
    rows = [{k: v for k, v in cell.labels.items() if k != study.readout} for cell in study.runs]
    return short_labels(rows)[1]


def _draw(study: Study, drawing: Any, section: figures.Section | None, out: Path) -> bool:
    """Writes the study's figure in the paper's form, bars or lines, if there is anything to draw."""
    lines = study.plot == "lines"
    if lines and not section.panels:
        return False
    for suffix in ("png", "svg"):
        temporary = out / f".study.tmp.{suffix}"
        if lines:
            figures.png(section.panels, section.legend, _last(section), temporary)
        else:
            figures.save(drawing, temporary)
        os.replace(temporary, out / f"study.{suffix}")
    return True


def _last(section: figures.Section) -> float:
    return max(curve.epochs[-1] for panel in section.panels for curve in panel.curves)


def _setting(study: Study) -> dict[str, str]:
    """What the runs have in the keys of `SETTING`, as far as they have them."""
    values = {name: _values([cell.config(study.seeds[0]) for cell in study.runs], key) for key, name in SETTING.items()}
    return {name: text for name, text in values.items() if text}


def warning(study: Study) -> str:
    """How the setting differs from the paper's; empty if it does not."""
    ours, paper = [cell.config(study.seeds[0]) for cell in study.runs], [cell.printed_config for cell in study.runs]
    parts = []
    for key, name in SETTING.items():
        here, there = _values(ours, key), _values(paper, key)
        if here != there:
            parts.append(f"{name} {here or 'all'} instead of {there or 'all'}")
    return f"Another setting than the paper's: {'; '.join(parts)}. Only directions compare." if parts else ""


def _values(configs: Sequence[DictConfig], key: str) -> str:
    values = [flatten(plain(cfg)).get(key) for cfg in configs]
    trivial = {"data.fraction": (None, -1, 1.0)}.get(key, (None,))
    return ", ".join(dict.fromkeys(show(value) for value in values if value not in trivial))


def _machines(runs: Sequence[Run]) -> dict[str, str]:
    """Versions and hardware of the runs."""
    known = [machine(run.environment) for run in runs if run.environment]
    own = ("time", "command", "host", "before")
    same, differing = compare([{k: v for k, v in facts.items() if k not in own} for facts in known])
    return {**same, **{key: "; ".join(dict.fromkeys(texts)) for key, texts in differing.items()}}


def _notes(study: Study, results: Results) -> Iterator[str]:
    runs = [run for some in results.values() for run in some.values()]
    logged = dict.fromkeys(column for run in runs for column in run.columns)
    for metric in dict.fromkeys(m.metric for m in study.metrics.values()):
        if metric == MINUTES:
            if any((run.environment or {}).get("before") for run in runs):
                yield f"{MINUTES} is left out for runs that were resumed: their seconds are the last part's."
        elif metric not in FACTS:
            without = [name for some in results.values() for name, run in some.items() if metric not in run.columns]
            if without:
                yield f"{metric} was not logged by {', '.join(without)}{nearest(metric, logged)}"
    if study.readout:
        at = {cell.epoch: scaled_epoch(cell, cell.config(study.seeds[0]).max_epochs) for cell in study.cells}
        moved = {printed: epoch for printed, epoch in at.items() if printed != epoch}
        if moved:
            yield f"{study.readout} read out at: {', '.join(f'{k} at {v}' for k, v in moved.items())}."
    for note in study.table.notes if study.table else ():
        yield f"In print: {note}"


def _head(study: Study) -> list[tuple[str, list[str]]]:
    """(heading, columns below it) of the results."""
    paper = [column for column in study.metrics if _decimals(study, column) is not None]
    return [(c, [f"{c}, ours", f"{c}, paper", "ours - paper"] if c in paper else [c]) for c in study.metrics]


def _decimals(study: Study, column: str) -> int | None:
    """Two, as the papers have them, for columns with printed numbers."""
    rows = study.table.printed if study.table else []
    return 2 if any(row.values.get(column) is not None for row in rows) else None


def _cells(study: Study, found: Mapping[str, Score]) -> list[str]:
    texts = []
    for column, below in _head(study):
        texts += found[column].texts(_decimals(study, column))[: len(below)]
    return texts


def _legend(study: Study) -> str:
    text = "Ours: mean ± standard deviation (n - 1) over seeds, and in brackets the number of runs."
    return text + " In italics: printed by the paper, not run here." * any(isinstance(row, Row) for row in study.rows)


def _markdown(study: Study, rows: Scores, facts: Mapping[str, str], notes: Sequence[str], drawn: bool) -> str:
    def cells(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    keys = list(study.rows[0].labels)
    columns = [name for _, below in _head(study) for name in below]
    lines = [f"# {study.title}", ""]
    if text := warning(study):
        lines += [f"> **{text}**", ""]
    if study.metrics:
        lines += [cells(keys + columns), cells(["---"] * len(keys) + ["---:"] * len(columns))]
        for row, found in rows:
            cited = isinstance(row, Row)
            lines.append(cells([*(f"*{x}*" if cited else x for x in row.labels.values()), *_cells(study, found)]))
        lines += ["", _legend(study), ""]
    lines += [f"![{study.title}](study.png)", ""] if drawn else []
    lines += ["## What ran", "", *(f"- {key}: {text}" for key, text in facts.items()), ""]
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    lines += ["## Overrides", "", *(f"- {cell.name}: `{_overrides(cell)}`" for cell in study.runs), ""]
    return "\n".join(lines)


def _overrides(cell: Cell) -> str:
    return shlex.join(["/".join(cell.recipe.parts[-2:]), *cell.overrides])


def _html(
    study: Study,
    rows: Scores,
    facts: Mapping[str, str],
    notes: Sequence[str],
    drawing: Any,
    section: figures.Section | None,
    looks: Mapping[str, figures.Style],
) -> str:
    esc = html.escape
    palette = {**figures.PAPER, **{look.var: (look.light, look.dark) for look in looks.values()}}
    colours = {light: f"var(--{var})" for var, (light, _) in palette.items()}
    parts: dict[str, str] = {}
    alarm = f'<p class="caption"><strong>{esc(text)}</strong></p>\n' if (text := warning(study)) else ""
    if study.metrics:
        parts["Results"] = alarm + _html_table(study, rows, looks)
        width, text = drawing.get_size_inches()[0], figures.inline(drawing, colours, f"{study.title}: bars")
        parts["Plot"] = f'<figure style="max-width: {1.6 * width * 72:.0f}px">{text}</figure>'
    if section:
        drawn = section_html(section, _last(section), colours) if section.panels else '<p class="caption">-</p>'
        parts["Curves"] = drawn if parts else alarm + drawn
    ran = "\n".join(f"<div><dt>{esc(key)}</dt><dd>{esc(text)}</dd></div>" for key, text in facts.items())
    parts["What ran"] = f'<dl class="facts">{ran}</dl>'
    if notes:
        parts["Notes"] = "<ul>" + "\n".join(f"<li>{esc(note)}</li>" for note in notes) + "</ul>"
    text = "\n".join(f"{cell.name}: {_overrides(cell)}" for cell in study.runs)
    parts["Overrides"] = f"<pre>{esc(text)}</pre>"
    line = esc(" · ".join([study.source, f"{facts['runs']} runs", facts["written"]]))
    files = "The table lies beside this page as Markdown, the plot as PNG and SVG."
    return page(f"solo_ext study: {study.source}", study.title, line, parts, palette, files)


def _html_table(study: Study, rows: Scores, looks: Mapping[str, figures.Style]) -> str:
    esc = html.escape
    keys = list(study.rows[0].labels)
    columns = [name for _, below in _head(study) for name in below]
    headings = "".join(f'<th scope="col">{esc(name)}</th>' for name in (*keys, *columns))
    body = []
    for row, found in rows:
        cited = isinstance(row, Row)
        first, *others = row.labels.values()
        key = '<span class="key"></span>' if cited else key_svg(looks[row.name])
        name = f"<em>{esc(first)}</em>" if cited else esc(first)
        cells = [f'<th scope="row"><div>{key}<span>{name}</span></div></th>']
        cells += [
            f'<td data-label="{esc(column)}">{esc(text).replace(" ± ", "&nbsp;±&nbsp;")}</td>'
            for column, text in zip((*keys[1:], *columns), (*others, *_cells(study, found)), strict=True)
        ]
        body.append(f'<tr class="{"floor" if cited else "run"}">{"".join(cells)}</tr>')
    rows_html = "\n".join(body)
    return f"""<div class="scroll"><table class="results">
<thead><tr>{headings}</tr></thead><tbody>
{rows_html}
</tbody></table></div>
<p class="caption">{esc(_legend(study))}</p>"""
