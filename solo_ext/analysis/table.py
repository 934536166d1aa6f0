"""Runs as rows of numbers, for the page and for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from solo_ext.analysis.figures import labels
from solo_ext.runs.run import Run
from solo_ext.text import Metric
from solo_ext.training.metrics import metric_of

COLUMNS = {  # key of a row -> what it is
    "knn1": metric_of("val_knn1"),
    "knn20": metric_of("val_knn20"),
    "linear": Metric("linear", "Offline linear evaluation, top-1 (%)", "linear top-1", "{:.2f}"),
    "similarity": metric_of("gap_sim"),
    "images_per_s": metric_of("images_per_s"),
    "seconds": Metric("seconds", "Wall-clock time of the training", "seconds", "{:,.0f}"),
}
ONLINE = "*"  # marks an accuracy of the online kNN, where there is no offline one


def table_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run, untrained encoders last.

    Returns:
        Dictionaries of method, name, id, the keys of `COLUMNS` (None for what is missing) and `online`, the keys whose
        values are the last epoch's online kNN, as there is no offline one. Accuracies in %; similarity is the cosine of
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
    return COLUMNS[key].form.format(value) + ONLINE * (key in row["online"])


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
    for metric in COLUMNS.values():
        table.add_column(metric.label, justify="right", min_width=max(map(len, metric.label.split())))
    names = labels([(row["method"], row["name"], row["id"]) for row in rows]) if rows else []
    for row, name in zip(rows, names, strict=True):
        table.add_row(Text(name), *(cell(row, key) for key in COLUMNS))
    (console or Console()).print(table)
