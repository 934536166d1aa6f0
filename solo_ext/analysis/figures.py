"""The figures of a report as data: sections of panels of curves, and what there is to say about each section."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from solo_ext.runs.comparison import IGNORED, compare, flatten, value_text, within
from solo_ext.runs.metrics import is_number
from solo_ext.runs.run import Run
from solo_ext.text import Metric
from solo_ext.training.metrics import metric_of, metrics

# Light and dark, for a white and a black page: told apart by people with any colour blindness (smallest CIELAB
# distance 19 under Machado's simulations), 3:1 against the page but for the light page's fifth.
PALETTE = (
    ("#0068ad", "#4c9ff0"),
    ("#b84300", "#f07028"),
    ("#12a37a", "#2fd3a0"),
    ("#cf6fae", "#d77fb8"),
    ("#c79a00", "#f3dc5c"),
    ("#333333", "#e8e8e8"),
)
DASHES = ((), (5, 2), (1.2, 1.4), (6, 1.6, 1.2, 1.6))  # after six runs the colours repeat, dashed
PAPER = {"ink": ("#1c1e21", "#e4e6e8"), "muted": ("#5f646a", "#9ba1a8"), "rule": ("#dfe1e4", "#34383d")}

# Section of a metric -> its heading, and metrics whose absence is worth mentioning. A report always has these, in this
# order; sections of a user's own metrics follow.
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "accuracies": ("Accuracies", ("val_acc1", "val_knn*")),
    "gap": ("Student-teacher gap", ("gap_sim", "gap_sim_feats")),
    "losses": ("Losses", ("train_loss", "train_intra_loss", "train_class_loss")),
    "weight distance": ("Weight distance per stage", ()),
    "schedules": ("Schedules and throughput", ("tau", "lr", "images_per_s")),
}
OTHER = "other"
PLACE = ("gap.place", "gap.at")  # where the gap is measured; older runs have only what was configured
SCHEDULE_FILES = {"images_per_s": "throughput", "lr-*": "lr"}  # others are named after the metric
FILES = ("accuracies", "gap", "losses", "weight_distance", "tau", "lr", "throughput", OTHER)  # .png and .pdf
# of a configuration, what no label names: what is compared nowhere, and what follows from other keys
UNTOLD = (
    *(*IGNORED, "seed", "name", "method", "optimizer.effective_lr"),
    *("data.num_classes", "data.num_large_crops", "data.num_small_crops"),
)


@dataclass(frozen=True)
class Style:
    """How a curve looks everywhere; `var` names its colour, light or dark, in the style sheet."""

    label: str
    var: str
    light: str
    dark: str
    dash: tuple[float, ...] = ()


FLOOR = Style("untrained encoder, offline kNN", "muted", *PAPER["muted"], (1, 2))


@dataclass(frozen=True)
class Curve:
    """Values over epochs, in a `band` of +- its values; behind them, faintly, `steps`: (epochs, values) of steps."""

    style: Style
    epochs: np.ndarray
    values: np.ndarray
    steps: Sequence[np.ndarray] | None = None
    band: np.ndarray | None = None


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    metric: str
    curves: list[Curve]
    floor: list[tuple[float, Style]] = field(default_factory=list)  # horizontal lines of reference
    gap_axis: bool = False  # 2 - 2 y on the right
    ylim: tuple[float, float] | None = None
    run: Style | None = None  # the only one shown

    @property
    def same(self) -> str:
        """Which curves coincide, and so hide each other; empty if none do."""
        groups = grouped((c.epochs.tobytes() + c.values.tobytes(), c.style.label) for c in self.curves)
        if len(groups) == 1 < len(self.curves):
            return "the same in both runs" if len(self.curves) == 2 else f"the same in all {len(self.curves)} runs"
        hidden = [" = ".join(names) for names in groups.values() if len(names) > 1]
        return f"the same: {'; '.join(hidden)}" if hidden else ""


@dataclass
class Section:
    """Panels under one heading."""

    name: str  # the metrics' section, which chooses the caption
    files: dict[str, list[Panel]]  # by the file that shows them
    legend: list[Style]
    facts: dict[str, Any]  # what the caption says of these runs

    def __post_init__(self) -> None:
        own = "Other metrics" if self.name == OTHER else self.name.capitalize()
        self.title = SECTIONS.get(self.name, (own, ()))[0]
        self.panels = [panel for panels in self.files.values() for panel in panels]
        ends = [float(curve.epochs[-1]) for panel in self.panels for curve in panel.curves]
        self.last_epoch = max([1.0, *filter(math.isfinite, ends)])  # of the longest curve


Shown = Sequence[tuple[Run, Style]]
K = TypeVar("K")
L = TypeVar("L")


def labels(runs: Sequence[Run], apart: bool = False) -> list[str]:
    """For each run its method, and what of its configuration differs among the runs of that method.

    Runs that differ in the seed alone have one label; `apart`: the seed, else the name, else the id tells them apart.
    """
    configs = [flatten(run.args) if run.args else {"id": run.id} for run in runs]
    names = list(dict.fromkeys(key for config in configs for key in config))
    told: list[list[str]] = [[] for _ in runs]
    for members in grouped((run.method, i) for i, run in enumerate(runs)).values():
        differing = compare([configs[i] for i in members])[1]
        keys = [key for key in differing if not within(key, UNTOLD)]
        chosen: list[str] = []

        def kinds(keys: Sequence[str], of: Mapping[str, list[str]] = differing) -> int:
            return len({*zip(*(of[key] for key in keys), strict=True)}) if keys else 1

        while kinds(chosen) < kinds(keys):  # the one that tells most runs apart, and then what else it takes
            chosen.append(max(keys, key=lambda key: kinds([*chosen, key])))
        for n, i in enumerate(members):
            told[i] = [f"{_shortest(key, names)} {differing[key][n][:24]}" for key in chosen]
    found = [" · ".join([run.method, *words]) for run, words in zip(runs, told, strict=True)]
    for members in grouped((label, i) for i, label in enumerate(found)).values() if apart else ():
        own = [[f"seed {runs[i].args.get('seed')}", runs[i].name or "-", runs[i].id] for i in members]
        telling = next(
            (words for words in zip(*own, strict=True) if len({*words}) == len(members)), [x[-1] for x in own]
        )
        for i, word in zip(members, telling, strict=True):
            found[i] += f" · {word}" * (len(members) > 1)
    return found


def _shortest(key: str, names: Sequence[str]) -> str:
    """The end of a full key that no other key has."""
    parts = key.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
    return next(end for end in ends if sum(f".{name}".endswith(f".{end}") for name in names) == 1)


def styled(runs: Sequence[Run], apart: bool = False) -> Shown:
    """The runs with a label and a colour for each label, the same in all tables and figures; see `labels`."""
    names = labels(runs, apart)
    by_label = dict(zip(dict.fromkeys(names), styles(list(dict.fromkeys(names))), strict=True))
    return [(run, by_label[name]) for run, name in zip(runs, names, strict=True)]


def by_style(shown: Shown) -> dict[Style, list[Run]]:
    """Style -> the runs that stand for it: those that have ended, or all if none has."""
    groups = grouped((style, run) for run, style in shown)
    return {style: [run for run in runs if not unfinished(run)] or runs for style, runs in groups.items()}


def unfinished(run: Run) -> str:
    """How far a run is that has not ended; empty for one that has."""
    if run.finished or run.untrained or not run.metrics or run.progress >= (run.args.get("max_epochs") or 0) > 0:
        return ""
    state = "still training" if run.running else "stopped"
    return f"{state}, epoch {run.progress:g} of {run.args.get('max_epochs', '?')}"


def styles(names: Sequence[str]) -> list[Style]:
    """A colour, and after six also a dash pattern, for each of the curves `names`."""
    n = len(PALETTE)
    return [Style(name, f"run{i}", *PALETTE[i % n], DASHES[i // n % len(DASHES)]) for i, name in enumerate(names)]


def sections(shown: Shown, untrained: Sequence[Run] = ()) -> list[Section]:
    """All figures of the trained runs `shown`; `untrained` encoders are reference lines."""
    described = {column: metric_of(column) for column in _logged(shown)}
    order = [*metrics(), *described]  # those of one pattern, or of none, stay as they were logged
    members: dict[str, dict[str, Metric]] = {name: {} for name in SECTIONS}
    for column, metric in sorted(described.items(), key=lambda item: order.index(item[1].name)):
        members.setdefault(metric.section, {})[column] = metric
    if OTHER in members:
        members[OTHER] = members.pop(OTHER)  # the last
    return [_section(name, columns, shown, untrained) for name, columns in members.items()]


def _logged(shown: Shown) -> list[str]:
    """The metrics of all runs in the order in which they were logged."""
    return list(dict.fromkeys(column for run, _ in shown for column in run.columns))


def _section(name: str, members: Mapping[str, Metric], shown: Shown, untrained: Sequence[Run]) -> Section:
    if name == "weight distance":
        return _weight_distance(members, shown)
    files: dict[str, list[Panel]] = {}
    groups = by_style(shown)
    for column, metric in members.items():
        file = SCHEDULE_FILES.get(metric.name, metric.name) if name == "schedules" else name.replace(" ", "_")
        curves = [curve_of(runs, column, style, len(groups), len(groups) <= 6) for style, runs in groups.items()]
        files.setdefault(file, []).extend(panel_of(column, curves))
    facts = {
        "missing": _missing(SECTIONS.get(name, ("", ()))[1], shown),
        "scales": by_value(shown, "method_kwargs.loss_scale"),
        "distances": by_value(shown, "knn_eval.distance_func"),
        "places": by_value(shown, *PLACE),
    }
    section = Section(name, files, [*groups], facts)
    if name == "accuracies":
        _accuracies(section, untrained)
    return section


def _accuracies(section: Section, untrained: Sequence[Run]) -> None:
    """Reference lines for the kNN, measured as it was, and one scale for each kind of accuracy."""
    knn = [panel for panel in section.panels if panel.metric.removeprefix("val_knn").isdigit()]
    if len(section.facts["distances"]) == 1:
        [distance] = section.facts["distances"]
        for panel in knn:
            results = [run.knn_result(int(panel.metric.removeprefix("val_knn")), distance) for run in untrained]
            same = [result for result in results if result and result["protocol"].get("distance") == distance]
            panel.floor = [(result["acc1"], FLOOR) for result in same if is_number(result.get("acc1"))]
    _share_y([panel for panel in section.panels if panel not in knn])
    _share_y(knn)
    if any(panel.floor for panel in knn):
        section.legend.append(FLOOR)


def _weight_distance(members: Mapping[str, Metric], shown: Shown) -> Section:
    """A panel for each label, with a curve for each stage; the colour is its depth, each head has its own dashes."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    columns = _merged([[column for column in run.columns if column in members] for run, _ in shown])
    stages = {column: column.removeprefix(members[column].name.removesuffix("*")) for column in columns}
    heads = list(dict.fromkeys(stage.partition(".")[0] for stage in stages.values() if "." in stage))
    dashes = {head: DASHES[1 + i % (len(DASHES) - 1)] for i, head in enumerate(heads)}
    ramp = {}
    for i, (column, stage) in enumerate(stages.items()):
        depth = i / max(len(stages) - 1, 1)
        light, dark = (to_hex(colormaps["viridis"](x)) for x in (0.82 * depth, 0.3 + 0.7 * depth))
        ramp[column] = Style(stage, f"stage{i}", light, dark, dashes.get(stage.partition(".")[0], ()))
    groups, panels, without = by_style(shown), [], []
    for style, runs in groups.items():
        drawn = [curve_of(runs, column, stage, len(groups)) for column, stage in ramp.items()]
        if curves := [curve for curve in drawn if curve]:
            panels.append(Panel(style.label, "", curves, run=style))
        else:
            without.append(style.label)
    _share_y(panels)
    facts = {"without": names_of(without, shown)}
    return Section("weight distance", {"weight_distance": panels}, list(ramp.values()), facts)


def _merged(rows: Sequence[Sequence[str]]) -> list[str]:
    """The items of all rows, in an order that agrees with each row's."""
    merged: list[str] = []
    for row in sorted(rows, key=len, reverse=True):
        for i, item in enumerate(row):
            if item not in merged:
                merged.insert(merged.index(row[i - 1]) + 1 if i else 0, item)
    return merged


def panel_of(column: str, curves: Sequence[Curve | None], floor: Sequence[tuple[float, Style]] = ()) -> list[Panel]:
    """The panel of a metric, if there is any curve to draw; `floor`: lines of reference."""
    metric, drawn = metric_of(column), [curve for curve in curves if curve]
    return [Panel(metric.title, column, drawn, list(floor), gap_axis=metric.section == "gap")] if drawn else []


def curve_of(runs: Sequence[Run], column: str, style: Style, labels: int = 1, steps: bool = False) -> Curve | None:
    """What the runs logged as `column`, if anything: of several the mean at the epochs that all have, in a band of
    their standard deviation (n - 1); `steps`: of a single one with its steps behind the epochs. labels: how many are
    drawn, each in as many points as a screen then shows."""
    most = min(400, max(80, 2400 // labels))
    series = [(epochs, values) for _, epochs, values in (run.series(column) for run in runs) if len(values)]
    if not series:
        return None
    if len(series) == 1:
        [run, *_] = runs
        both = steps and len(runs) == 1 and {f"{column}_step", f"{column}_epoch"} <= run.metrics.keys()
        epochs, values = thin(most, *series[0])
        return Curve(style, epochs, values, thin(most, *run.series(f"{column}_step")[1:]) if both else None)
    tables = [dict(zip(epochs.round(6), values, strict=True)) for epochs, values in series]
    if not (common := sorted(set.intersection(*map(set, tables)))):
        return None
    values = np.array([[table[epoch] for table in tables] for epoch in common])
    epochs, mean, band = thin(most, np.array(common), values.mean(axis=1), values.std(axis=1, ddof=1))
    return Curve(style, epochs, mean, band=band)


def thin(most: int, *series: np.ndarray) -> Sequence[np.ndarray]:
    """Arrays of one length, each as at most so many means of neighbouring values."""
    if len(series[0]) <= most:
        return series
    return [np.array([part.mean() for part in np.array_split(values, most)]) for values in series]


def _share_y(panels: Sequence[Panel]) -> None:
    """Gives all panels the y range of the values of all."""
    floors = [value for panel in panels for value, _ in panel.floor]
    values = np.concatenate([floors, *(curve.values for panel in panels for curve in panel.curves)])
    values = values[np.isfinite(values)]
    if len(values):
        pad = 0.05 * (values.max() - values.min()) or 0.5
        for panel in panels:
            panel.ylim = float(values.min() - pad), float(values.max() + pad)


# What a caption says of the runs.


def grouped(pairs: Iterable[tuple[K, L]]) -> dict[K, list[L]]:
    """(what, item) -> {what: its different items}."""
    groups: dict[K, dict[L, None]] = {}
    for what, item in pairs:
        groups.setdefault(what, {})[item] = None
    return {what: [*items] for what, items in groups.items()}


def by_value(shown: Shown, *keys: str) -> dict[str, list[str]]:
    """Value of a full configuration key, the first of `keys` that has one -> labels of the runs that have it."""
    found = []
    for run, style in shown:
        args = flatten(run.args)
        found += [(value_text(args[key]), style.label) for key in keys if args.get(key) is not None][:1]
    return grouped(found)


def names_of(some: Sequence[str], shown: Shown) -> str:
    """The labels `some`, or `all runs`."""
    names = dict.fromkeys(some)
    return "all runs" if len(names) == len({style for _, style in shown}) > 1 else ", ".join(names)


def _missing(expected: Sequence[str], shown: Shown) -> dict[str, list[str]]:
    """Runs -> those of the metrics `expected` that they have not logged; a `*` stands for what any run has logged."""
    names: list[str] = []
    for pattern in expected:
        names += fnmatch.filter(_logged(shown), pattern) or [pattern]
    without = {name: [style.label for run, style in shown if run.metrics and name not in run.columns] for name in names}
    return grouped((names_of(labels, shown), name) for name, labels in without.items() if labels)
