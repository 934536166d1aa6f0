"""The report: one self-contained HTML page about a set of runs, its curves as PNG and PDF, and its table by itself."""

import json
import math
import os
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solo_ext.analysis import figures, pages
from solo_ext.analysis.figures import Shown, by_style, grouped, labels, names_of, unfinished
from solo_ext.errors import CheckpointError, ConfigError, naming, require
from solo_ext.files import log
from solo_ext.runs.comparison import OFF, compare, flatten, value_text, within
from solo_ext.runs.evaluations import departures
from solo_ext.runs.metrics import is_number
from solo_ext.runs.run import ARGS, DETECTION, ENVIRONMENT, EVALUATIONS, KNN, LINEAR, METRICS, QUALITY, Run, find_runs
from solo_ext.text import Metric
from solo_ext.training.callbacks.collapse import LEAST_RANK
from solo_ext.training.metrics import metric_of

COLUMNS = {  # key of a row -> what it is
    "knn1": metric_of("val_knn1"),
    "knn20": metric_of("val_knn20"),
    "linear": Metric("linear", "Offline linear evaluation, top-1 (%)", "linear top-1", "{:.2f}"),
    "similarity": metric_of("gap_sim"),
    "images_per_s": metric_of("images_per_s"),
    "seconds": Metric("seconds", "Wall-clock time of the training", "seconds", "{:,.0f}"),
}
# what a sentence about a protocol leaves out: files, hashes, and what is said of the run elsewhere
UNSAID = (
    *("checkpoint", "sha256", "pretrain_method", "untrained", "backbone", "performance", "strategy", "cache_features"),
    *("data.format", "data.train", "data.val", "data.corrupt", "data.corrupt_limit", "data.num_classes"),
)
TELLING = ("checkpoint", "data.dataset", "optimizer.lr", "distance", "k", "T")  # of what the table does not show
FIGURES = {DETECTION: "ap", QUALITY: "rankme"}  # of an evaluation that has no accuracy
FORMATS = (".png", ".pdf")
HASHES = ("sha256", "fingerprint")
ONLINE = "*"  # marks an accuracy in training, of the last epoch, where there is no offline one
ONLINE_NOTE = f"{ONLINE} online, of the last epoch: there is no offline evaluation"
PROBES = {"knn1": "val_knn1", "knn20": "val_knn20", "linear": "val_acc1"}  # accuracy -> what stands in for it
BEST: dict[str, Callable] = {**dict.fromkeys([*PROBES, "images_per_s"], max), "seconds": min}
PICTURES = "pictures"  # in a run folder: what the commands have drawn of it
MOST_PICTURES = 16


def main_report(run_dirs: Sequence[str | Path], out: str | Path = "report", reload: float | None = None) -> Path:
    """Writes `<out>/report.html`, whose path it returns, and its PNG and PDF files; what else `out` holds stays.

    run_dirs: run folders, or folders with runs below them. A run with a damaged file is named and left out. reload:
    seconds after which a browser loads the page again. Raises CheckpointError if a folder has no run, or all are
    damaged; ConfigError if matplotlib or plotly is not installed, or `out` cannot be written.
    """
    for name in ("matplotlib", "plotly"):
        require(name, "a report", "viz")
    out = Path(out)
    if out.is_file() or out.suffix == ".html":
        raise ConfigError(f"--out is a folder, not a file like {out}; did you mean '{out.with_suffix('')}'?")
    folders = {run.dir.resolve(): run for folder in run_dirs for run in find_runs(folder)}
    if not folders:
        raise ConfigError("a report needs at least one run folder, <checkpoint.dir>/<method>/<run id>")
    runs, damaged = readable(sorted(folders.values(), key=lambda run: run.untrained))
    for text in damaged:
        log.warning("%s; the run is left out", text)
    folder = Path(os.path.abspath(out))
    with naming(f"--out: {out} cannot be written"), pages.house_style():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            _write(runs, damaged, Path(temporary), reload)
            folder.mkdir(exist_ok=True)
            written = sorted(Path(temporary).iterdir(), key=lambda file: file.suffix == ".html")  # the page last
            for file in written:
                os.replace(file, folder / file.name)
        earlier = {f"{name}{suffix}" for name in figures.FILES for suffix in FORMATS}
        for name in earlier - {file.name for file in written}:
            (folder / name).unlink(missing_ok=True)
    return out / "report.html"


def readable(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs whose files can be read, and a sentence about each of the others; CheckpointError if none can."""
    whole, damaged = [], []
    for run in runs:
        try:
            _ = run.args, run.environment, run.summary, run.evaluations, run.metrics
            whole.append(run)
        except CheckpointError as error:
            damaged.append(str(error))
    if not whole:
        raise CheckpointError(damaged[0])
    return whole, damaged


def watch_report(run_dirs: Sequence[str | Path], out: str | Path, seconds: float) -> None:
    """Writes the report anew every so many seconds, until Ctrl-C, for a browser that follows it."""
    try:
        while True:
            time.sleep(seconds)
            main_report(run_dirs, out, seconds)
    finally:
        main_report(run_dirs, out)  # it stays as it is


def _write(runs: Sequence[Run], damaged: Sequence[str], folder: Path, reload: float | None) -> None:
    shown = figures.styled(runs)
    trained = [(run, style) for run, style in shown if not run.untrained]
    sections = figures.sections(trained, [run for run in runs if run.untrained])
    last_epoch = max(section.last_epoch for section in sections)
    for section in sections:
        for name, panels in section.files.items():
            if panels:
                figure = pages.grid(panels, section.legend, last_epoch)
                for suffix in FORMATS:
                    pages.save(figure, folder / f"{name}{suffix}")
    single = list(zip(runs, labels(runs, apart=True), strict=True))
    configs = {style: run for run, style in reversed(shown) if run.args and not run.untrained}
    machines = [(label, machine(run.environment) | _times(run)) for run, label in single if run.environment]
    text = pages.render(
        "report.html",
        [*dict.fromkeys(style for _, style in trained), *(style for section in sections for style in section.legend)],
        last_epoch,
        methods=list(dict.fromkeys(run.method for run in runs)),
        subtitle=_subtitle([run for run, _ in trained or shown]),
        sections=sections,
        headings=[metric.label for metric in COLUMNS.values()],
        **_results(shown),
        pictures=_pictures(single),
        damaged=damaged,
        reload=reload,
        machines=_side_by_side(machines) if machines else None,
        configs=_side_by_side([(style.label, run.args) for style, run in reversed(configs.items())]),
        whole=[
            (label, str(run.dir), json.dumps(run.args, indent=2, ensure_ascii=False))
            for run, label in single
            if run.args
        ],
    )
    (folder / "report.html").write_text(text, encoding="utf-8")


def _subtitle(runs: Sequence[Run]) -> str:
    """What all runs have in common, in one line."""
    words = [f"{len(runs)} run{'s' * (len(runs) > 1)}"]
    for key, form in (("data.dataset", "{}"), ("backbone.name", "{}"), ("max_epochs", "{} epochs")):
        values = {value_text(flatten(run.args).get(key)) for run in runs}
        words += [form.format(value) for value in values if len(values) == 1 and value != "null"]
    return " · ".join([*words, time.strftime("%Y-%m-%d")])


def _pictures(single: Sequence[tuple[Run, str]]) -> dict[str, Any]:
    """What the commands have drawn into the run folders, as (heading, data URI), and how many more there are."""
    files = [(run, label, file) for run, label in single for file in sorted((run.dir / PICTURES).glob("*.png"))]
    drawn = [(f"{label}: {file.stem}", pages.embedded(file)) for _, label, file in files[:MOST_PICTURES]]
    return {"drawn": [pair for pair in drawn if pair[1]], "more": max(0, len(files) - MOST_PICTURES)}


def _rows(shown: Shown, numbers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each label, with the mean and the standard deviation (n - 1) over its runs, and below it these."""
    of = dict(zip((run.dir for run, _ in shown), numbers, strict=True))
    rows: list[dict[str, Any]] = []
    for style, counted in by_style(shown).items():
        members = [run for run, other in shown if other == style]
        cells = {key: _mean([of[run.dir] for run in counted], key) for key in COLUMNS}
        seeds = [
            {
                "head": f"seed {run.args.get('seed', '-')}",
                "note": unfinished(run),
                "cells": [cell(of[run.dir], key) for key in COLUMNS],
            }
            for run in members
        ]
        own = {"note": seeds[0]["note"] or members[0].name or "-", "seeds": []}
        left = len(members) - len(counted)
        several = {"note": f"{len(counted)} runs" + f", {left} unfinished not counted" * bool(left), "seeds": seeds}
        head = {"style": style, "floor": members[0].untrained, "best": set(), "values": cells}
        texts = [_text(key, *cells[key]) for key in COLUMNS]
        rows.append(head | {"cells": texts} | (own if len(members) == 1 else several))
    trained = [row for row in rows if not row["floor"]]
    for n, (key, best) in enumerate((key, BEST.get(key)) for key in COLUMNS):
        found = [row["values"][key] for row in trained]
        offline = [value for value, _, online in found if value is not None and not online]
        counted = offline or [value for value, *_ in found if value is not None]
        if best and len(trained) > 1 and counted:
            for row, (value, _, online) in zip(trained, found, strict=True):
                row["best"] |= {n} if value == best(counted) and not (online and offline) else set()
    return rows


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float | None, float | None, bool]:
    """Mean and standard deviation of a column, and whether they are of online accuracies; offline ones come first."""
    online = all(key in row["online"] or row[key] is None for row in rows)
    values = [row[key] for row in rows if is_number(row[key]) and (online or key not in row["online"])]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values) if values else None, spread, online and bool(values) and key in PROBES


def _results(shown: Shown) -> dict[str, Any]:
    """The table, and how each of its numbers was obtained."""
    numbers = table_rows([run for run, _ in shown])
    online = [pair for pair, row in zip(shown, numbers, strict=True) if any("knn" in key for key in row["online"])]
    measured = any(row["similarity"] is not None for row in numbers)
    return {
        "rows": _rows(shown, numbers),
        "stand_in": any("linear" in row["online"] for row in numbers),
        "knn": _protocol(shown, _knn_protocol),
        "online": figures.by_value(online, "knn_eval.distance_func") if online else None,
        "linear": _protocol(shown, _linear_protocol),
        "others": [other for run, style in shown for other in _others(run, style.label)],
        "places": figures.by_value([s for s in shown if not s[0].untrained], *figures.PLACE) if measured else None,
        "resumed": list(dict.fromkeys(style.label for run, style in shown if run.resumed)),
        "collapsed": [(style.label, told) for run, style in shown if (told := _collapse(run))],
        "missing": _missing_files(shown),
    }


def _collapse(run: Run) -> str:
    """After which epoch the outputs had collapsed first; nothing if they never had."""
    _, epochs, ranks = run.series("train_rankme")
    low = np.flatnonzero(ranks < LEAST_RANK)[:1]
    return "".join(f"after epoch {math.ceil(epochs[i])} (effective rank {ranks[i]:.2f})" for i in low)


def _missing_files(shown: Shown) -> dict[tuple[str, ...], str]:
    """Files that runs lack -> which runs."""
    absent = []
    for run, style in shown:
        files = (ARGS, KNN, LINEAR) if run.untrained else (ARGS, METRICS, KNN, LINEAR, ENVIRONMENT)
        absent.append((tuple(name for name in files if not (run.dir / name).is_file()), style.label))
    return {files: names_of(some, shown) for files, some in grouped(absent).items() if files}


def _knn_protocol(run: Run) -> dict[str, Any]:
    found = [result["protocol"] for k in (1, 20) if (result := run.knn_result(k))]
    how = {key: value for protocol in found[:1] for key, value in protocol.items()}
    how |= {key: " and ".join(dict.fromkeys(texts)) for key, texts in compare(found)[1].items()}
    return {key: how[key] for key in ("k", "features", "distance", "T", *how) if key in how}


def _linear_protocol(run: Run) -> dict[str, Any]:
    protocol = dict(run.standard(LINEAR).get("protocol", {}))
    if "max_epochs" in protocol:
        protocol = {"epochs": protocol.pop("max_epochs"), **protocol}
    return {"features": "cached", **protocol} if protocol.get("augmented") is False else protocol


def _others(run: Run, label: str) -> Iterator[dict[str, Any]]:
    """Rows of the evaluations that the table does not show: what they reached, and by which protocol."""
    table = {LINEAR: [run.standard(LINEAR)], KNN: [run.knn_result(1), run.knn_result(20)], DETECTION: [], QUALITY: []}
    for name in EVALUATIONS:
        usual = next(filter(None, table[name]), {}).get("protocol", {})
        for result in run.evaluations[name]:
            if any(result is shown for shown in table[name]):
                continue
            protocol = result["protocol"]
            keys = [*TELLING, *departures(protocol), *(key for key in usual if protocol.get(key) != usual[key])]
            told = {key: protocol[key] for key in dict.fromkeys(keys) if protocol.get(key) is not None}
            texts = [
                f"{key} {value_text(value)[: 12 if key.endswith(HASHES) else None]}" for key, value in told.items()
            ]
            figure = result.get(FIGURES.get(name, "acc1"))
            cells = [name.removesuffix(".json"), f"{figure:.2f}" if is_number(figure) else "-", ", ".join(texts)]
            yield {"label": label, "cells": cells}


def _protocol(shown: Shown, of: Callable[[Run], dict[str, Any]]) -> tuple[dict[str, str], dict[str, Any]] | None:
    """What the protocols `of` runs have in common, and key -> value -> runs where they differ, both without paths and
    what is switched off; None without protocols."""
    protocols = [(style.label, how) for run, style in shown if (how := of(run))]
    if not protocols:
        return None

    def informative(key: str, value: Any) -> bool:
        return key in ("augmented", "seed") or not (value in OFF or within(key, UNSAID))

    same, differing = compare([{k: v for k, v in flatten(x).items() if informative(k, v)} for _, x in protocols])
    if (augmented := same.pop("augmented", None)) in ("true", "false"):
        same["images"] = "augmented" if augmented == "true" else "not augmented"
    labels = [label for label, _ in protocols]
    return same, {key: grouped(zip(texts, labels, strict=True)) for key, texts in differing.items()}


def _times(run: Run) -> dict[str, str]:
    """The shares of the parts of a training in its time, those of 1% or more."""
    seconds, parts = run.summary.get("seconds"), run.summary.get("parts") or {}
    shares = {part: value / seconds for part, value in parts.items()} if seconds else {}
    told = [f"{part} {share:.0%}" for part, share in sorted(shares.items(), key=lambda x: -x[1]) if share >= 0.005]
    return {"time": ", ".join([*told, f"other {max(0, 1 - sum(shares.values())):.0%}"])} if told else {}


def machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """`environment.json` in short."""
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


def _side_by_side(columns: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The labels of the columns, what all have in common, and a row for each key in which they differ."""
    same, differing = compare([values for _, values in columns])
    rows = [{"head": key, "cells": texts} for key, texts in differing.items()]
    return {"labels": [label for label, _ in columns], "same": same, "rows": rows}


def table_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run, untrained encoders last: label, method, name, id, and the keys of `COLUMNS`, None for what is
    missing.

    `online` are the keys whose values are accuracies in training, of the last epoch, as there is no offline one.
    Accuracies in %; similarity is the cosine of the outputs on the same view, mean over the last epoch.
    """
    rows = []
    ordered = sorted(runs, key=lambda run: run.untrained)
    for run, label in zip(ordered, labels(ordered, apart=True), strict=True):
        offline = {f"knn{k}": run.knn_result(k).get("acc1") for k in (1, 20)} | {
            "linear": run.standard(LINEAR).get("acc1")
        }
        accuracies = {key: run.last(PROBES[key]) if acc is None else acc for key, acc in offline.items()}
        speed, speeds = run.summary.get("images_per_s"), run.series("images_per_s")[2]
        row = {
            "label": label,
            "method": run.method,
            "name": run.name,
            "id": run.id,
            **accuracies,
            "similarity": run.last("gap_sim"),
            "images_per_s": float(np.median(speeds)) if speed is None and len(speeds) else speed,
            "seconds": run.summary.get("seconds"),
            "online": [key for key, acc in offline.items() if acc is None and accuracies[key] is not None],
        }
        rows.append(row)
    return rows


def cell(row: Mapping[str, Any], key: str) -> str:
    """A number of a row as the tables show it; `-` where there is none."""
    return _text(key, row[key], None, key in row["online"])


def _text(key: str, value: Any, spread: float | None = None, online: bool = False) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    form = COLUMNS[key].form
    return form.format(value) + (f" ± {form.format(spread)}" if spread is not None else "") + ONLINE * online
