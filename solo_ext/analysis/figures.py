"""The figures of a report as data: sections of panels of curves, and what there is to say about each section."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from solo_ext.runs.comparison import flatten, show
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
DASHES = ((), (5, 2), (1.2, 1.4), (6, 1.6, 1.2, 1.6))  # after six runs the colours come again, dashed
FLOOR = (1, 2)  # dashes of a line of reference
PAPER = {"ink": ("#1c1e21", "#e4e6e8"), "muted": ("#5f646a", "#9ba1a8"), "rule": ("#dfe1e4", "#34383d")}

# section of a metric -> its heading; these are always in a report, in this order, then those of a user's own metrics
HEADINGS = {
    "losses": "Losses",
    "accuracies": "Accuracies",
    "gap": "Student-teacher gap",
    "weight distance": "Weight distance per stage",
    "schedules": "Schedules and throughput",
}
EXPECTED = {  # section -> metrics whose absence is worth a word
    "losses": ("train_loss", "train_intra_loss", "train_class_loss"),
    "accuracies": ("val_acc1", "val_knn*"),
    "gap": ("gap_sim", "gap_sim_feats"),
    "schedules": ("tau", "lr", "images_per_s"),
}
OTHER = "other"
SCHEDULE_FILES = {"images_per_s": "throughput", "lr-*": "lr"}  # else named as the metric
FILES = ("losses", "accuracies", "gap", "weight_distance", "tau", "lr", "throughput", OTHER)  # .png


@dataclass(frozen=True)
class Style:
    """How a curve looks everywhere; `var` names its colour in the style sheet, which knows light and dark."""

    label: str
    var: str
    light: str
    dark: str
    dash: tuple[float, ...] = ()


@dataclass(frozen=True)
class Curve:
    """Values over epochs; behind them, faintly, `steps`: (epochs, values) of steps, and a `band` of +- its values."""

    style: Style
    epochs: np.ndarray
    values: np.ndarray
    steps: tuple[np.ndarray, np.ndarray] | None = None
    band: np.ndarray | None = None


@dataclass
class Panel:
    """One pair of axes.

    floor: values of horizontal lines of reference. gap_axis: 2 - 2 y on the right. run: of the run that has it alone.
    """

    title: str
    metric: str
    curves: list[Curve]
    floor: list[float] = field(default_factory=list)
    gap_axis: bool = False
    ylim: tuple[float, float] | None = None
    run: Style | None = None

    @property
    def same(self) -> str:
        """Which curves are the same, and so hide each other; empty if none are."""
        groups: dict[bytes, list[str]] = {}
        for curve in self.curves:
            groups.setdefault(curve.epochs.tobytes() + curve.values.tobytes(), []).append(curve.style.label)
        if len(groups) == 1 < len(self.curves):
            return "the same in both runs" if len(self.curves) == 2 else f"the same in all {len(self.curves)} runs"
        hidden = [" = ".join(names) for names in groups.values() if len(names) > 1]
        return f"the same: {'; '.join(hidden)}" if hidden else ""


@dataclass
class Section:
    """Figures under one heading: file name -> panels.

    name: the metrics' section, which chooses the caption. facts: what the caption says of these runs.
    """

    name: str
    figures: dict[str, list[Panel]]
    legend: list[Style]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return HEADINGS.get(self.name, "Other metrics" if self.name == OTHER else self.name.capitalize())

    @property
    def panels(self) -> list[Panel]:
        return [panel for panels in self.figures.values() for panel in panels]

    @property
    def last_epoch(self) -> float:
        """At which the curves end, 1 at least."""
        ends = [curve.epochs[-1] for panel in self.panels for curve in panel.curves]
        return max([1.0, *(float(end) for end in ends if np.isfinite(end))])


Shown = Sequence[tuple[Run, Style]]
K = TypeVar("K")


def labels(runs: Sequence[tuple[str, str | None, str]]) -> list[str]:
    """For each (method, name, id) the first of method, name, and method with id that no other run has."""
    columns = list(zip(*runs, strict=True))[:2]
    unique = [[w for w, c in zip(run, columns, strict=False) if w and c.count(w) == 1] for run in runs]
    return [own[0] if own else f"{method} {i}" for (method, _, i), own in zip(runs, unique, strict=True)]


def styled(runs: Sequence[Run]) -> Shown:
    """The runs with a label and a colour each, kept through all tables and figures."""
    names = labels([(run.method, run.name, run.id) for run in runs])
    return list(zip(runs, styles(names), strict=True))


def styles(names: Sequence[str]) -> list[Style]:
    """A colour, and after six a dash pattern too, for each of the curves `names`."""
    looks = [(*PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]) for i in range(len(names))]
    return [Style(name, f"run{i}", *look) for i, (name, look) in enumerate(zip(names, looks, strict=True))]


def sections(shown: Shown, untrained: Sequence[Run] = ()) -> list[Section]:
    """All figures of the trained runs `shown`; `untrained` encoders are lines of reference."""
    logged = _logged(shown)
    known: dict[str, dict[str, Metric]] = {name: {} for name in HEADINGS}
    for column in sorted(logged, key=_rank):
        metric = metric_of(column)
        known.setdefault(metric.section, {})[column] = metric
    rest = known.pop(OTHER, None)
    drawn = [_section(name, members, shown, untrained) for name, members in known.items()]
    return [*drawn, _section(OTHER, rest, shown)] if rest else drawn


def _logged(shown: Shown) -> list[str]:
    """The metrics of all runs in the order in which they were logged."""
    return list(dict.fromkeys(column for run, _ in shown for column in run.columns))


def _rank(column: str) -> float:
    """The place of a metric among all; equal for those of one pattern, and of none, which stay as they were logged."""
    order = {name: i for i, name in enumerate(metrics())}
    return order.get(metric_of(column).name, len(order))


def _section(name: str, members: Mapping[str, Metric], shown: Shown, untrained: Sequence[Run] = ()) -> Section:
    if name == "weight distance":
        return _weight_distance(members, shown)
    panels = _panels(shown, members)
    section = Section(name, {name.replace(" ", "_"): panels}, [look for _, look in shown])
    section.facts["missing"] = _missing(EXPECTED.get(name, ()), shown)
    if name == "losses":
        section.facts["scales"] = by_value(shown, "method_kwargs.loss_scale")
    elif name == "accuracies":
        _accuracies(section, shown, untrained)
    elif name == "gap":
        section.facts["places"] = by_value(shown, "gap.at")
        for panel in panels:
            panel.gap_axis = True
    elif name == "schedules":
        section.figures = {}
        for panel in panels:
            name = members[panel.metric].name
            section.figures.setdefault(SCHEDULE_FILES.get(name, name), []).append(panel)
    return section


def _accuracies(section: Section, shown: Shown, untrained: Sequence[Run]) -> None:
    """Lines of reference for the kNN, measured as it was, and one scale for each kind of accuracy."""
    knn = [panel for panel in section.panels if panel.metric.removeprefix("val_knn").isdigit()]
    section.facts["distances"] = distances = by_value(shown, "knn_eval.distance_func")
    if len(distances) == 1:
        distance = next(iter(distances))
        for panel in knn:
            results = [run.knn_result(int(panel.metric.removeprefix("val_knn")), distance) or {} for run in untrained]
            scores = [result.get("acc1", math.nan) for result in results if result.get("distance") == distance]
            panel.floor = [score for score in scores if is_number(score)]
    _share_y([panel for panel in section.panels if panel not in knn])
    _share_y(knn)
    if any(panel.floor for panel in knn):
        section.legend.append(Style("untrained encoder, offline kNN", "muted", *PAPER["muted"], FLOOR))


def _weight_distance(members: Mapping[str, Metric], shown: Shown) -> Section:
    """A panel for each run, with a curve for each stage; the colour is its depth, and each head has its own dashes."""
    columns = _merged([[column for column in run.columns if column in members] for run, _ in shown])
    stages = {column: column.removeprefix(members[column].name.removesuffix("*")) for column in columns}
    heads = list(dict.fromkeys(stage.partition(".")[0] for stage in stages.values() if "." in stage))
    dashes = {head: DASHES[1 + i % (len(DASHES) - 1)] for i, head in enumerate(heads)}
    ramp = {
        column: Style(stage, f"stage{i}", *_depth_colours(i, len(stages)), dashes.get(stage.partition(".")[0], ()))
        for i, (column, stage) in enumerate(stages.items())
    }
    panels = []
    for run, look in shown:
        series = [(stage, *run.series(column)[1:]) for column, stage in ramp.items()]
        curves = [Curve(stage, *thin(epochs, values)) for stage, epochs, values in series if len(values)]
        panels += [Panel(look.label, "", curves, run=look)] if curves else []
    _share_y(panels)
    owners = [panel.run for panel in panels]
    without = [look.label for _, look in shown if look not in owners]
    facts = {"without": names_of(without, shown)}
    return Section("weight distance", {"weight_distance": panels}, list(ramp.values()), facts)


def _merged(rows: Sequence[Sequence[str]]) -> list[str]:
    """What stands in any of the rows, in an order that agrees with each."""
    merged: list[str] = []
    for row in sorted(rows, key=len, reverse=True):
        at = next((merged.index(item) for item in row if item in merged), len(merged))
        for item in row:
            if item in merged:
                at = merged.index(item)
            else:
                merged.insert(at, item)
            at += 1
    return merged


def _depth_colours(i: int, n: int) -> tuple[str, str]:
    """Sequential colours of stage i of n, for a light and a dark page."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    x = i / max(n - 1, 1)
    return to_hex(colormaps["viridis"](0.82 * x)), to_hex(colormaps["viridis"](0.3 + 0.7 * x))


def _panels(shown: Shown, members: Mapping[str, Metric]) -> list[Panel]:
    """One panel for each metric that any run has logged."""
    panels = []
    for column, metric in members.items():
        curves = []
        for run, look in shown:
            _, epochs, values = run.series(column)
            if len(values):
                both = len(shown) <= 6 and {f"{column}_step", f"{column}_epoch"} <= run.metrics.keys()
                steps = thin(*run.series(f"{column}_step")[1:]) if both else None
                curves.append(Curve(look, *thin(epochs, values), steps))
        panels += [Panel(metric.title, column, curves)] if curves else []
    return panels


def thin(epochs: np.ndarray, values: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means of neighbouring ones."""
    if len(values) <= most:
        return epochs, values
    thinned = [np.array([part.mean() for part in np.array_split(x, most)]) for x in (epochs, values)]
    return thinned[0], thinned[1]


def _share_y(panels: Sequence[Panel]) -> None:
    """Gives all panels the y range of the values of all."""
    values = np.concatenate([[], *(v for panel in panels for v in (*(c.values for c in panel.curves), panel.floor))])
    values = values[np.isfinite(values)]
    if len(values):
        pad = 0.05 * (values.max() - values.min()) or 0.5
        for panel in panels:
            panel.ylim = float(values.min() - pad), float(values.max() + pad)


# What a caption says of the runs.


def grouped(pairs: Iterable[tuple[K, str]]) -> dict[K, list[str]]:
    """(what, label) -> {what: labels}."""
    groups: dict[K, list[str]] = {}
    for what, label in pairs:
        groups.setdefault(what, []).append(label)
    return groups


def by_value(shown: Shown, key: str) -> dict[str, list[str]]:
    """Value of a full configuration key -> labels of the runs that have it."""
    flat = [(flatten(run.args), look.label) for run, look in shown]
    return grouped((show(args[key]), label) for args, label in flat if key in args)


def names_of(some: Sequence[str], shown: Shown) -> str:
    """The labels `some`, or `all runs`."""
    return "all runs" if len(some) == len(shown) > 1 else ", ".join(some)


def _missing(expected: Sequence[str], shown: Shown) -> dict[str, list[str]]:
    """Runs -> those of the metrics `expected` that they have not logged; a `*` stands for what any run has logged."""
    names: list[str] = []
    for pattern in expected:
        names += fnmatch.filter(_logged(shown), pattern) or [pattern]
    without = {name: [look.label for run, look in shown if run.metrics and name not in run.columns] for name in names}
    return grouped((names_of(labels, shown), name) for name, labels in without.items() if labels)
