"""The report: one self-contained HTML page about a set of runs, and its curves as PNG files."""

import contextlib
import html
import json
import os
import re
import shlex
import shutil
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import solo_ext
from solo_ext.analysis import figures
from solo_ext.analysis.figures import Panel, Section, Shown, Style, say
from solo_ext.errors import ConfigError
from solo_ext.runs.run import Run, compare, find_runs, flatten, load_run, show

COLUMNS = {  # key of a row -> (heading, format)
    "knn1": ("kNN-1", "{:.2f}"),
    "knn20": ("kNN-20", "{:.2f}"),
    "linear": ("linear top-1", "{:.2f}"),
    "similarity": ("similarity to teacher", "{:.4f}"),
    "images_per_s": ("images/s", "{:,.0f}"),
    "seconds": ("seconds", "{:,.0f}"),
}
ONLINE = "*"  # marks an accuracy of the online kNN, where there is no offline one


# The table, for the page and for the terminal.


def table_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run, untrained encoders last.

    Returns:
        Dictionaries of method, name, id, the keys of `COLUMNS` (None for what is missing) and `online`, the keys whose
        values are the last epoch's online kNN for want of an offline one. Accuracies in %; similarity is the cosine of
        the outputs on the same view, mean over the last epoch.
    """
    return [_row(run) for run in sorted(runs, key=lambda run: run.untrained)]


def _row(run: Run) -> dict[str, Any]:
    offline = {f"knn{k}": (run.knn_result(k) or {}).get("acc1") for k in (1, 20)}
    knn = {key: run.last(f"val_{key}") if acc is None else acc for key, acc in offline.items()}
    speeds = run.series("images_per_s")[2]
    summary = run.summary or {}
    speed = summary.get("images_per_s")
    return {
        "method": run.method,
        "name": run.name,
        "id": run.id,
        **knn,
        "linear": (run.linear or {}).get("acc1"),
        "similarity": run.last("gap_sim"),
        "images_per_s": float(np.median(speeds)) if speed is None and len(speeds) else speed,
        "seconds": summary.get("seconds"),
        "online": [key for key, acc in offline.items() if acc is None and knn[key] is not None],
    }


def cell(row: Mapping[str, Any], key: str) -> str:
    """A number of a row as the tables show it; `-` where there is none."""
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return COLUMNS[key][1].format(value) + ONLINE * (key in row["online"])


def print_table(rows: Sequence[Mapping[str, Any]], console: Any = None) -> None:
    """Prints `table_rows` to the terminal, or to the given `rich.console.Console`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    if any(row["online"] for row in rows):
        table.caption = f"{ONLINE} online kNN of the last epoch; there is no offline one"
    table.add_column("method", no_wrap=True)
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    names = figures.labels([(row["method"], row["name"], row["id"]) for row in rows]) if rows else []
    for row, name in zip(rows, names, strict=True):
        table.add_row(Text(name), *(cell(row, key) for key in COLUMNS))
    (console or Console()).print(table)


# The report.


def main_report(run_dirs: Sequence[str | Path], out: str | Path = "report") -> Path:
    """Writes `<out>/report.html` and its PNG files.

    Args:
        run_dirs: run folders, or folders with runs below them.
        out: a folder; what it holds besides an earlier report stays.

    Returns:
        The path of the HTML.

    Raises:
        CheckpointError: a folder has no run.
        DataError: a file of a run is damaged.
        ConfigError: matplotlib is not installed, or `out` cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("a report needs matplotlib, which is not installed: pip install 'solo-ext[viz]'") from None
    out = Path(out)
    if out.is_file() or out.suffix == ".html":
        raise ConfigError(f"--out is a folder, not a file like {out}; did you mean '{out.with_suffix('')}'?")
    folders = {path.resolve(): path for given in run_dirs for path in find_runs(given)}
    runs = sorted(map(load_run, folders.values()), key=lambda run: run.untrained)
    if not runs:
        raise ConfigError("a report needs at least one run folder, <checkpoint.dir>/<method>/<run id>")
    style = {**matplotlib.rcParamsDefault, **figures.RC}
    style.pop("backend", None)
    with matplotlib.rc_context(style), _whole_folder(out) as folder:
        _write(runs, folder)
    return out / "report.html"


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place, or whose files take theirs in it, once all is written."""
    final = Path(os.path.abspath(out))
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if final.exists():
            written = sorted(temporary.iterdir(), key=lambda file: file.suffix == ".html")
            for file in written:
                os.replace(file, final / file.name)
            for name in {f"{name}.png" for name in figures.FILES} - {file.name for file in written}:
                (final / name).unlink(missing_ok=True)  # an earlier report's
        else:
            os.replace(temporary, final)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(runs: Sequence[Run], folder: Path) -> None:
    shown = figures.styled(runs)
    trained = [(run, look) for run, look in shown if not run.untrained]
    sections = figures.sections(trained, [run for run in runs if run.untrained])
    ends = [curve.epochs[-1] for section in sections for panel in section.panels for curve in panel.curves]
    last_epoch = max([1.0, *(end for end in ends if np.isfinite(end))])
    for section in sections:
        for name, panels in section.figures.items():
            if panels:
                figures.png(panels, section.legend, last_epoch, folder / f"{name}.png")

    styles = [*(look for _, look in trained), *(look for section in sections for look in section.legend)]
    palette = {**figures.PAPER, **{look.var: (look.light, look.dark) for look in styles}}
    colours = {light: f"var(--{var})" for var, (light, _) in palette.items()}
    parts = {
        "Results": _results(shown),
        "Environment": _environment(shown),
        "Configuration": _configuration(shown),
        **{section.title: section_html(section, last_epoch, colours) for section in sections},
    }
    methods = ", ".join(dict.fromkeys(run.method for run in runs))
    title, facts = f"solo_ext report: {methods}", _facts([run for run, _ in trained or shown])
    files = "The curves lie beside this page as PNG files."
    text = page(title, "Pre-training report", facts, parts, palette, files)
    (folder / "report.html").write_text(text, encoding="utf-8")


def page(
    title: str, heading: str, facts: str, parts: Mapping[str, str], palette: Mapping[str, tuple[str, str]], files: str
) -> str:
    """A self-contained HTML page.

    Args:
        title, heading: text. facts, files: HTML of the line below the heading, and of that at the end of the page.
        parts: heading -> HTML of its section.
        palette: name of a colour in the style sheet -> (light, dark).
    """
    body = [f'<section id="{_slug(heading)}"><h2>{heading}</h2>\n{text}</section>' for heading, text in parts.items()]
    template = string.Template(Path(__file__).with_name("assets").joinpath("report.html").read_text("utf-8"))
    return template.substitute(
        title=_esc(title),
        heading=_esc(heading),
        light=" ".join(f"--{var}: {light};" for var, (light, _) in palette.items()),
        dark=" ".join(f"--{var}: {dark};" for var, (_, dark) in palette.items()),
        facts=facts,
        nav=" ".join(f'<a href="#{_slug(heading)}">{heading}</a>' for heading in parts),
        body="\n".join(body),
        version=_esc(solo_ext.__version__),
        files=files,
    )


def _facts(runs: Sequence[Run]) -> str:
    """One line on what all runs have alike."""
    words = [f"{len(runs)} run{'s' * (len(runs) > 1)}"]
    for key, form in (("data.dataset", "{}"), ("backbone.name", "{}"), ("max_epochs", "{} epochs")):
        values = {show(flatten(run.args).get(key)) for run in runs}
        words += [form.format(value) for value in values if len(values) == 1 and value != "null"]
    return _esc(" · ".join([*words, time.strftime("%Y-%m-%d")]))


# The parts of the page. Whatever comes from a file passes through `_esc` or `_breakable`.


def _results(shown: Shown) -> str:
    rows = []
    for (run, look), row in zip(shown, table_rows([run for run, _ in shown]), strict=True):
        key = '<span class="key"></span>' if run.untrained else key_svg(look)
        name = f"{_breakable(look.label)}<small>{_breakable(run.name or '-')}</small>"
        cells = [f'<td data-label="{heading}">{cell(row, k)}</td>' for k, (heading, _) in COLUMNS.items()]
        cells = "".join(cells).replace(ONLINE, f"<sup>{ONLINE}</sup>")
        head = f'<th scope="row"><div>{key}<span>{name}</span></div></th>'
        rows.append(f'<tr class="{"floor" if run.untrained else "run"}">{head}{cells}</tr>')
    headings = "".join(f'<th scope="col">{heading}</th>' for heading, _ in COLUMNS.values())
    notes = "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in _notes(shown))
    return f"""<table class="results">
<thead><tr><th scope="col">method</th>{headings}</tr></thead><tbody>
{_lines(rows)}
</tbody></table>
<dl class="notes">{notes}</dl>"""


def _notes(shown: Shown) -> Iterator[tuple[str, str]]:
    """(term, HTML): how each number of the table was obtained, and what is missing."""
    rows = table_rows([run for run, _ in shown])
    if given := [(look, _knn_protocol(run)) for run, look in shown if run.knn]:
        yield "kNN", _protocol(given)
    if online := [pair for pair, row in zip(shown, rows, strict=True) if row["online"]]:
        distances = figures.by_value(online, "knn_eval.distance_func")
        how = f", distance {next(iter(distances))}" if len(distances) == 1 else f", distance {say(distances)}"
        how = f"<code>val_knn1</code> and <code>val_knn20</code> of the last epoch{how if distances else ''}"
        yield f"kNN {ONLINE}", f"online: {how}; there is no offline evaluation."
    if given := [(look, _linear_protocol(run)) for run, look in shown if run.linear]:
        yield "linear top-1", _protocol(given)
    if any(row["similarity"] is not None for row in rows):
        place = figures.gap_place([(run, look) for run, look in shown if not run.untrained])
        what = "cosine of the student's and the teacher's outputs on the same view"
        yield "similarity", f"{what}, mean over the last epoch that measured it.{place}"
    yield "images/s", "training images per second, whatever the number of views; the median over epochs."
    resumed = [_esc(look.label) for run, look in shown if (run.environment or {}).get("before")]
    since = f"; of {', '.join(resumed)} since the last resumption" if resumed else ""
    yield "seconds", f"wall-clock time of the training with its validation{since}."
    yield "spread", "each row is one run with one seed; differences below the spread between seeds say nothing."
    wanted = ("args.json", "metrics.csv", "knn.json", "linear.json", "environment.json")
    gaps: dict[str, list[str]] = {}
    for run, look in shown:
        never = ("metrics.csv", "environment.json") if run.untrained else ()
        absent = [_code(name) for name in wanted if name not in never and not (run.dir / name).is_file()]
        if absent:
            gaps.setdefault(", ".join(absent), []).append(_esc(look.label))
    if gaps:
        who = {files: [figures.names_of(some, shown)] for files, some in gaps.items()}
        yield "missing", f"<code>-</code> in the table. {say(who)}."


def _knn_protocol(run: Run) -> dict[str, Any]:
    results = [result for k in (1, 20) if (result := run.knn_result(k))]
    same, differing = compare([{key: x.get(key) for key in ("features", "distance", "T")} for x in results])
    how = {**same, **{key: " and ".join(texts) for key, texts in differing.items()}}
    return {"k": " and ".join(show(x["k"]) for x in results), **how, **run.knn.get("protocol", {})}


def _linear_protocol(run: Run) -> dict[str, Any]:
    protocol = {"epochs": run.linear.get("epochs"), **run.linear.get("protocol", {})}
    return {"features": "cached", **protocol} if protocol.get("augmented") is False else protocol


def _protocol(given: Sequence[tuple[Style, Mapping[str, Any]]]) -> str:
    """The protocol that all have, and a remark for each key in which they differ; without places and what is off."""

    def tells(key: str, value: Any) -> bool:
        off = value is None or value is False or value in ({}, [])
        return key == "augmented" or (key not in ("checkpoint", "run") and not off)

    same, differing = compare([{k: v for k, v in flatten(x).items() if tells(k, v)} for _, x in given])
    if (augmented := same.pop("augmented", None)) in ("true", "false"):
        same["images"] = "augmented" if augmented == "true" else "not augmented"
    text = f"offline: {', '.join(f'{_words(k)} {_esc(v)}' for k, v in same.items()) or 'protocol not recorded'}."
    for key, texts in differing.items():
        groups: dict[str, list[str]] = {}
        for (look, _), value in zip(given, texts, strict=True):
            groups.setdefault(_esc(value), []).append(_esc(look.label))
        text += f" <strong>Differs</strong>: {_words(key)} {say(groups)}."
    return text


def _environment(shown: Shown) -> str:
    known = [(machine(run.environment), look) for run, look in shown if run.environment]
    if not known:
        return '<p class="caption">- (no <code>environment.json</code>)</p>'
    same, differing = compare([machine for machine, _ in known])
    facts = _lines(f"<div><dt>{_words(key)}</dt><dd>{_esc(value)}</dd></div>" for key, value in same.items())
    return f'<dl class="facts">{facts}</dl>\n{_differences([look for _, look in known], differing)}'


def machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """`environment.json` in fewer words."""
    facts = dict(environment)
    packages, commit, command, gpus, before = map(facts.get, ("packages", "commit", "command", "gpus", "before"))
    if isinstance(commit, dict):
        facts["commit"] = str(commit.get("hash"))[:12] + ", with local changes" * bool(commit.get("dirty"))
    if isinstance(command, list):
        facts["command"] = shlex.join(map(str, command))
    if isinstance(gpus, list):
        facts["gpus"] = ", ".join(map(str, gpus)) or "none"
    if isinstance(before, list):
        facts["before"] = f"resumed {len(before)} times"
    if isinstance(packages, dict):
        facts |= {"packages": None, **packages}
    return {key: value for key, value in facts.items() if value is not None}


def _configuration(shown: Shown) -> str:
    known = [(run, look) for run, look in shown if run.args and not run.untrained]
    same, differing = compare([run.args for run, _ in known])
    caption = "One configuration: nothing to compare." if known else "- (no <code>args.json</code>)"
    if len(known) > 1:
        caption = (
            f"{len(differing)} of {len(same) + len(differing)} keys differ between the trained runs; "
            "<code>-</code> where a run has no such key."
        )
    whole = _lines(
        f"<details><summary>{_esc(look.label)} <small>{_breakable(str(run.dir))}</small></summary>"
        f"<pre>{_esc(json.dumps(run.args, indent=2, ensure_ascii=False))}</pre></details>"
        for run, look in shown
        if run.args
    )
    return f'<p class="caption">{caption}</p>\n{_differences([look for _, look in known], differing)}\n{whole}'


def _differences(looks: Sequence[Style], differing: Mapping[str, Sequence[str]]) -> str:
    """A table of the keys that differ, a column for each run."""
    if not differing:
        return ""
    names = [_breakable(look.label) for look in looks]
    rows = []
    for key, texts in differing.items():
        cells = [
            f'<td data-label="{_esc(look.label)}">{_breakable(text)}</td>'
            for look, text in zip(looks, texts, strict=True)
        ]
        rows.append(f'<tr><th scope="row">{_breakable(key)}</th>{"".join(cells)}</tr>')
    headings = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"""<div class="scroll"><table class="differences">
<thead><tr><th scope="col">key</th>{headings}</tr></thead><tbody>
{_lines(rows)}
</tbody></table></div>"""


def section_html(section: Section, last_epoch: float, colours: Mapping[str, str]) -> str:
    legend = "".join(f"<li>{key_svg(look)}{_esc(look.label)}</li>" for look in section.legend)
    drawn = _lines(
        f"<figure><figcaption>{_panel_caption(panel)}</figcaption>{figures.svg(panel, last_epoch, colours)}</figure>"
        for panel in section.panels
    )
    figure = f'<ul class="legend">{legend}</ul>\n<div class="panels">{drawn}</div>'
    content = f'<p class="caption">{section.caption}</p>\n{figure if drawn else "<p>-</p>"}'
    if section.folded:
        return f"<details><summary>{len(section.panels)} figures</summary>{content}</details>"
    return content


def _panel_caption(panel: Panel) -> str:
    if panel.run:
        return f"{key_svg(panel.run)}{_esc(panel.title)}"
    same = f", {_esc(panel.same)}" if panel.same else ""
    return f"{_esc(panel.title)}<span>{_code(panel.metric)}{same}</span>"


def key_svg(look: Style) -> str:
    """The line that stands for a curve in tables and legends."""
    dash = f' stroke-dasharray="{" ".join(f"{1.4 * x:.2g}" for x in look.dash)}"' if look.dash else ""
    line = f'<path d="M1 4H21" stroke="var(--{look.var})"{dash}/>'
    return f'<svg class="key" viewBox="0 0 22 8" aria-hidden="true">{line}</svg>'


def _esc(text: Any) -> str:
    return html.escape(str(text))


def _breakable(text: str) -> str:
    """Escaped, with places for a line break after the separators of long names and paths."""
    return "<wbr>".join(_esc(part) for part in re.split(r"(?<=\w[_/.=-])(?=\w)", text))


def _code(text: str) -> str:
    return f"<code>{_esc(text)}</code>"


def _words(key: str) -> str:
    return _esc(key if "." in key else key.replace("_", " "))


def _slug(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _lines(parts: Any) -> str:
    return "\n".join(parts)
