"""The figures of a report: first as data (sections of panels of curves), then drawn, as inline SVG and as PNG."""

import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import solo_ext
from solo_ext.runs.run import Run, flatten, is_number, show

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
INK, MUTED, RULE = (light for light, _ in PAPER.values())

FILES = ("losses", "accuracies", "gap", "weight_distance", "tau", "lr", "throughput", "other")  # .png
LOSSES = {
    "train_loss": "Total loss",
    "train_neg_cos_sim": "Framework loss: negative cosine",
    "train_contrastive_loss": "Framework loss: contrastive",
    "train_intra_loss": "Intra-momentum loss, unweighted",
    "train_class_loss": "Online classifier, cross-entropy",
}
CLASSIFIERS = {
    "val_acc1": "Online classifier, top-1 (%)",
    "momentum_val_acc1": "Teacher's online classifier, top-1 (%)",
}
GAPS = {"gap_sim": "Outputs, cosine similarity", "gap_sim_feats": "Backbone features, cosine similarity"}
DISTANCE = "weight_distance/"
STAGES = ("conv1", "block1", "block2", "block3", "block4", "backbone", "projector", "predictor")


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

    floor: values of horizontal lines of reference. gap_axis: 2 - 2 y on the right. run: whose panel it is, if one's.
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
        """Which curves hide each other, being the same; empty if none do."""
        groups: dict[bytes, list[str]] = {}
        for curve in self.curves:
            groups.setdefault(curve.epochs.tobytes() + curve.values.tobytes(), []).append(curve.style.label)
        if len(groups) == 1 < len(self.curves):
            return "the same in both runs" if len(self.curves) == 2 else f"the same in all {len(self.curves)} runs"
        hidden = [" = ".join(names) for names in groups.values() if len(names) > 1]
        return f"the same: {'; '.join(hidden)}" if hidden else ""


@dataclass
class Section:
    """Figures under one heading: file name -> panels. The caption is HTML; a folded section opens on request."""

    title: str
    caption: str
    figures: dict[str, list[Panel]]
    legend: list[Style]
    folded: bool = False

    @property
    def panels(self) -> list[Panel]:
        return [panel for panels in self.figures.values() for panel in panels]


Shown = Sequence[tuple[Run, Style]]


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
    made = [
        _losses(shown),
        _accuracies(shown, untrained),
        _gap(shown),
        _weight_distance(shown),
        _schedules(shown),
    ]
    drawn = {panel.metric for section in made for panel in section.panels}
    rest = sorted({c for c in _columns(shown) if c not in drawn and not c.startswith(DISTANCE)})
    other = _panels(shown, dict.fromkeys(rest, ""))
    caption = "Whatever else <code>metrics.csv</code> holds, as it was logged."
    return made + [Section("Other metrics", caption, {"other": other}, _looks(shown), folded=True)] * bool(other)


def _losses(shown: Shown) -> Section:
    frameworks = sorted(c for c in _columns(shown) if c not in LOSSES and _is_framework_loss(c))
    first, *rest = LOSSES.items()
    metrics = dict([first, *((c, f"Framework loss: {c}") for c in frameworks), *rest])
    caption = (
        "Training losses: means over each epoch; faint, for up to six runs, single steps. Total = framework loss + "
        "<code>intra.weight</code> &times; intra-momentum loss + cross-entropy of the online classifier. "
        "Losses of different frameworks have different scales and do not compare."
    )
    scales = by_value(shown, "method_kwargs.loss_scale")
    if len(scales) > 1:
        caption += f" <strong>Loss scales differ</strong> (<code>method_kwargs.loss_scale</code>): {say(scales)}."
    caption += _not_logged(shown, ("train_loss", "train_intra_loss", "train_class_loss"))
    return Section("Losses", caption, {"losses": _panels(shown, metrics)}, _looks(shown))


def _is_framework_loss(column: str) -> bool:
    probes = "class_loss", "momentum_class_loss"
    name = re.fullmatch(r"(?:train_)?(\w+_loss|\w+_sim)", column)
    return bool(name) and name[1] not in probes and not name[1].startswith(("val_", "gap_", "momentum_val_"))


def _accuracies(shown: Shown, untrained: Sequence[Run]) -> Section:
    ks = sorted(int(c[7:]) for c in _columns(shown) if re.fullmatch(r"val_knn\d+", c))
    knn = {f"val_knn{k}": f"Online kNN, k = {k} (%)" for k in ks}
    classifier_panels, knn_panels = _panels(shown, CLASSIFIERS), _panels(shown, knn)
    distances = by_value(shown, "knn_eval.distance_func")
    if len(distances) == 1:  # the untrained encoder's accuracy compares if it was measured in the same way
        distance = next(iter(distances))
        for panel in knn_panels:
            results = [run.knn_result(int(panel.metric[7:]), distance) or {} for run in untrained]
            scores = [result.get("acc1") for result in results if result.get("distance") == distance]
            panel.floor = [score for score in scores if is_number(score)]
    _share_y(classifier_panels)
    _share_y(knn_panels)
    caption = (
        "Top-1 on the validation set, one view without augmentation. The online classifier is a linear layer trained "
        "along on the student's features, without gradient to them. kNN: training images vote, by features of the "
        "student's backbone in eval mode, without augmentation"
    )
    if len(distances) == 1:
        caption += f"; distance {next(iter(distances))}"
    elif distances:
        caption += f"; <strong>distances differ</strong>: {say(distances)}"
    caption += "; a cosine vote weighs exp(cos / 0.07)." if "cosine" in distances else "."
    legend = _looks(shown)
    if any(panel.floor for panel in knn_panels):
        legend.append(Style("untrained encoder, offline kNN", "muted", *PAPER["muted"], FLOOR))
    caption += _not_logged(shown, ("val_acc1", *(knn or ("val_knn1", "val_knn20"))))
    return Section("Accuracies", caption, {"accuracies": classifier_panels + knn_panels}, legend)


def _gap(shown: Shown) -> Section:
    panels = _panels(shown, GAPS)
    for panel in panels:
        panel.gap_axis = True
    caption = (
        "Cosine similarity of the student's and the teacher's outputs on the same view, mean over training batches; "
        "lines are means over each epoch; faint, for up to six runs, single steps. Right axis: the gap as paper B "
        f"measures it, 2 &minus; 2 cos (Eq. 5).{gap_place(shown)}{_not_logged(shown, GAPS)}"
    )
    return Section("Student-teacher gap", caption, {"gap": panels}, _looks(shown))


def gap_place(shown: Shown) -> str:
    """A sentence, as HTML, on where `gap_sim` was measured; empty if no configuration says it."""
    places = by_value(shown, "gap.at")
    if not places:
        return ""
    text = f" Measured at <code>gap.at</code> = {next(iter(places))}"
    if len(places) > 1:
        text = f" <strong>Measured at different places</strong> (<code>gap.at</code>), not comparable: {say(places)}"
    auto = "; auto is the predictor where the intra-momentum term gives the teacher one, else the projector"
    return text + auto * ("auto" in places) + "."


def _weight_distance(shown: Shown) -> Section:
    order = {stage: i for i, stage in enumerate(STAGES)}
    names = {c.removeprefix(DISTANCE) for c in _columns(shown) if c.startswith(DISTANCE)}
    stages = sorted(names, key=lambda name: (order.get(name.split(".")[0], len(order)), name))
    dashes = {"projector": DASHES[1], "predictor": DASHES[2]}
    ramp = [
        Style(stage, f"stage{i}", *_depth_colours(i, len(stages)), dashes.get(stage.split(".")[0], ()))
        for i, stage in enumerate(stages)
    ]
    panels = []
    for run, look in shown:
        series = [(stage, *run.series(DISTANCE + stage.label)[1:]) for stage in ramp]
        curves = [Curve(stage, *thin(epochs, values)) for stage, epochs, values in series if len(values)]
        panels += [Panel(look.label, "", curves, run=look)] if curves else []
    _share_y(panels)
    caption = (
        "&Vert;student &minus; teacher&Vert; / &Vert;student&Vert; over the parameters of each stage that the "
        "teacher owns, at the end of each epoch. One panel per run, one scale; colours go with depth, heads are dashed."
    )
    owners = [panel.run for panel in panels]
    without = [html.escape(look.label) for _, look in shown if look not in owners]
    caption += f" Not logged by {names_of(without, shown)}." if without else ""
    return Section("Weight distance per stage", caption, {"weight_distance": panels}, ramp)


def _depth_colours(i: int, n: int) -> tuple[str, str]:
    """Sequential colours of stage i of n, for a light and a dark page."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    x = i / max(n - 1, 1)
    return to_hex(colormaps["viridis"](0.82 * x)), to_hex(colormaps["viridis"](0.3 + 0.7 * x))


def _schedules(shown: Shown) -> Section:
    # `lr` is the backbone's; Lightning's LearningRateMonitor calls it lr-<optimizer>[/<group>]
    rates = sorted(c for c in _columns(shown) if c == "lr" or c.startswith("lr-"))[:1] or ["lr"]
    metrics = {
        "tau": {"tau": "EMA coefficient of the teacher"},
        "lr": {rates[0]: "Learning rate of the backbone"},
        "throughput": {"images_per_s": "Training throughput (images/s)"},
    }
    figures = {file: _panels(shown, names) for file, names in metrics.items()}
    caption = "As used by the step that it was logged at; throughput is the mean over each epoch's training steps."
    caption += _not_logged(shown, [name for names in metrics.values() for name in names])
    return Section("Schedules and throughput", caption, figures, _looks(shown))


def _panels(shown: Shown, metrics: Mapping[str, str]) -> list[Panel]:
    """One panel per metric -> title that any run has logged."""
    panels = []
    for metric, title in metrics.items():
        curves = []
        for run, look in shown:
            _, epochs, values = run.series(metric)
            if len(values):
                both = len(shown) <= 6 and {f"{metric}_step", f"{metric}_epoch"} <= run.metrics.keys()
                steps = thin(*run.series(f"{metric}_step")[1:]) if both else None
                curves.append(Curve(look, *thin(epochs, values), steps))
        panels += [Panel(title, metric, curves)] if curves else []
    return panels


def thin(epochs: np.ndarray, values: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means of neighbouring ones."""
    if len(values) <= most:
        return epochs, values
    return tuple(np.array([part.mean() for part in np.array_split(x, most)]) for x in (epochs, values))


def _share_y(panels: Sequence[Panel]) -> None:
    """Gives all panels the y range of the values of all."""
    values = [np.concatenate([*(c.values for c in panel.curves), panel.floor]) for panel in panels]
    values = np.concatenate([*values, []])
    values = values[np.isfinite(values)]
    if len(values):
        pad = 0.05 * (values.max() - values.min()) or 0.5
        for panel in panels:
            panel.ylim = float(values.min() - pad), float(values.max() + pad)


def _columns(shown: Shown) -> set[str]:
    return {column for run, _ in shown for column in run.columns}


def _looks(shown: Shown) -> list[Style]:
    return [look for _, look in shown]


def by_value(shown: Shown, key: str) -> dict[str, list[str]]:
    """Value of a full configuration key -> labels of the runs that have it; both as HTML."""
    groups: dict[str, list[str]] = {}
    for run, look in shown:
        args = flatten(run.args)
        if key in args:
            groups.setdefault(html.escape(show(args[key])), []).append(html.escape(look.label))
    return groups


def say(groups: Mapping[str, Sequence[str]]) -> str:
    """`value: run, run; value: run`."""
    return "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())


def names_of(some: Sequence[str], shown: Shown) -> str:
    """The labels `some`, or `all runs`."""
    return "all runs" if len(some) == len(shown) > 1 else ", ".join(some)


def _not_logged(shown: Shown, metrics: Iterable[str]) -> str:
    groups: dict[str, list[str]] = {}
    for name in metrics:
        without = [html.escape(look.label) for run, look in shown if run.metrics and name not in run.columns]
        if without:
            groups.setdefault(names_of(without, shown), []).append(f"<code>{html.escape(name)}</code>")
    parts = [f"{', '.join(names)} by {runs}" for runs, names in groups.items()]
    return f" Not logged: {'; '.join(parts)}." if parts else ""


# Drawing.

RC = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.color": INK,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "solo_ext",
}


def _draw(ax: Any, panel: Panel, last_epoch: float) -> None:
    """Draws `panel` in its light colours."""
    for curve in panel.curves:
        if curve.steps:
            ax.plot(*curve.steps, color=curve.style.light, linewidth=0.5, alpha=0.4)
        if curve.band is not None:
            edges = curve.values - curve.band, curve.values + curve.band
            ax.fill_between(curve.epochs, *edges, color=curve.style.light, alpha=0.15, linewidth=0)
        marker = "o" if len(curve.values) <= 2 else None
        dashes = curve.style.dash or (None, None)
        look = {"color": curve.style.light, "dashes": dashes, "marker": marker, "markersize": 3}
        ax.plot(curve.epochs, curve.values, clip_on=False, **look)
    for value in panel.floor:
        ax.axhline(value, color=MUTED, linewidth=1.0, dashes=FLOOR)
    ax.set_xlim(0, last_epoch)
    ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    ax.yaxis.get_major_locator().set_params(nbins=5)
    ax.set_xlabel("epoch")
    if panel.ylim:
        ax.set_ylim(*panel.ylim)
    if panel.gap_axis:
        right = ax.secondary_yaxis("right", functions=(lambda sim: 2 - 2 * sim, lambda gap: 1 - gap / 2))
        right.yaxis.get_major_locator().set_params(nbins=5)
        right.set_ylabel("gap  2 − 2 cos")
        right.spines["right"].set_visible(False)


def svg(panel: Panel, last_epoch: float, colours: Mapping[str, str]) -> str:
    """The panel as an inline SVG in the page's font and, by `colours` (light colour -> variable), in its colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.4))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.14, right=0.845 if panel.gap_axis else 0.975, bottom=0.18, top=0.93)
    _draw(ax, panel, last_epoch)
    ends = "; ".join(f"{curve.style.label} {curve.values[-1]:.4g}" for curve in panel.curves)
    return inline(figure, colours, f"{panel.title} {panel.metric}, last values: {ends}")


def inline(figure: Any, colours: Mapping[str, str], label: str) -> str:
    """A matplotlib figure as an inline SVG in the page's font, its colours replaced by `colours`; `label` names it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]\w*_\d+"', "", text)  # axes_1 and the like, which would come once per panel
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda match: colours.get(match[0], match[0]), text)
    box = re.search(r'viewBox="[^"]*"', text)[0]
    return re.sub(r"<svg[^>]*>", lambda _: f'<svg role="img" aria-label="{html.escape(label)}" {box}>', text, count=1)


def png(panels: Sequence[Panel], legend: Sequence[Style], last_epoch: float, path: Path) -> None:
    """The panels, three to a row, under one legend, as the PNG or SVG file `path`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    wide = min(3, len(panels))
    rows = math.ceil(len(panels) / wide)
    figure = Figure(figsize=(max(4.8, 3.6 * wide), 2.7 * rows + 0.35), layout="constrained", dpi=160)
    axes = list(figure.subplots(rows, wide, squeeze=False).flat)
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, panel, last_epoch)
        every = f" ({panel.same})" if panel.same.startswith("the same in") and not panel.run else ""
        ax.set_title((panel.title or panel.metric) + every, parse_math=False)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    keys = [Line2D([], [], color=look.light, dashes=look.dash or (None, None)) for look in legend]
    ncols = 4 if wide > 1 else 2
    box = figure.legend(keys, [""] * len(keys), loc="outside upper left", ncols=ncols, frameon=False)
    for text, look in zip(box.get_texts(), legend, strict=True):  # a name may look like mathematics
        text.set_parse_math(False)
        text.set_text(look.label)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure as the PNG or SVG file `path`."""
    author = {".png": {"Software": f"solo_ext {solo_ext.__version__}"}, ".svg": {"Date": None}}[path.suffix]
    out = io.BytesIO()
    figure.savefig(out, format=path.suffix[1:], metadata=author)
    path.write_bytes(out.getvalue())
