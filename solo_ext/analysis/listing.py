"""Tables of runs on the terminal: of those in folders, as they are at this moment, and of the numbers of a report."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from solo_ext.analysis.report import COLUMNS, ONLINE, ONLINE_NOTE, cell, readable, table_rows
from solo_ext.errors import CheckpointError
from solo_ext.runs.run import METRICS, Run, find_runs, saved_at
from solo_ext.text import duration


def _progress(run: Run) -> str:
    total = run.args.get("max_epochs")
    return f"{run.progress:g}" + f"/{total}" * bool(total)


def listing(folders: Sequence[str | Path], width: int) -> Any:
    """A rich table of at most `width` characters, the run that was written to last at the top; columns without a value,
    and the last that do not fit, are left out. A run whose files are damaged is named below.

    CheckpointError if there is no run.
    """
    from rich.console import Group
    from rich.text import Text

    runs, damaged = readable([run for folder in folders for run in find_runs(folder)])
    rows: list[list[str]] = []
    for run in sorted(runs, key=lambda run: saved_at(run.dir / METRICS), reverse=True):
        [found] = table_rows([run])
        written = saved_at(run.dir / METRICS)
        age = f"{duration(time.time() - written)} ago" if written else "-"
        state = "-" if run.untrained else run.state
        rows.append([f"{run.method}/{run.id}", state, _progress(run), age, *(cell(found, key) for key in COLUMNS)])
    headings = ["run", "state", "epoch", "written", *(metric.label for metric in COLUMNS.values())]
    table, width = _table(), width - 2  # its edges
    shown = []
    for n, heading in enumerate(headings):
        texts = [row[n] for row in rows]
        wide = max(map(len, [*texts, *heading.split()]))
        if {*texts} - {"-"} and wide + 2 <= width:
            width -= wide + 2
            shown.append((n, heading, wide))
    for n, heading, wide in shown:  # what is left keeps headings in one line
        width -= (more := min(width, max(0, len(heading) - wide)))
        table.add_column(heading, justify="left" if n < 2 else "right", width=wide + more)
    for row in rows:
        table.add_row(*(Text(row[n], no_wrap=True) for n, *_ in shown))
    online = any(ONLINE in text for row in rows for text in row[4:])
    table.caption = ONLINE_NOTE if online else None
    return Group(table, *(Text(line, overflow="fold") for line in damaged))


def _table() -> Any:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")


def watch(folders: Sequence[str | Path], seconds: float | None) -> None:
    """Prints it, or shows it anew every so many seconds, until Ctrl-C, and waits for a run that is about to begin."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()

    def table() -> Any:
        try:
            return listing(folders, console.width)
        except CheckpointError as error:
            if seconds is None:
                raise
            return Text(str(error))

    with Live(console=console, auto_refresh=False) if seconds and console.is_terminal else nullcontext() as live:
        while True:
            if live:
                live.update(table(), refresh=True)
            else:
                console.print(table())
            if seconds is None:
                return
            time.sleep(seconds)


def print_table(rows: Sequence[Mapping[str, Any]], console: Any = None) -> None:
    """Prints `table_rows` to the terminal, or to another `rich.console.Console`."""
    from rich.console import Console
    from rich.text import Text

    table = _table()
    if any(row["online"] for row in rows):
        table.caption = ONLINE_NOTE
    table.add_column("method", no_wrap=True)
    for metric in COLUMNS.values():
        table.add_column(metric.label, justify="right", min_width=max(map(len, metric.label.split())))
    for row in rows:
        table.add_row(Text(row["label"]), *(cell(row, key) for key in COLUMNS))
    (console or Console()).print(table)
