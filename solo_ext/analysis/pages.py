"""Pages from the templates in `assets/`, and panels drawn by matplotlib, inline in a page or as PNG and SVG files."""

import html
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import solo_ext
from solo_ext.analysis.figures import FLOOR, PAPER, Panel, Style
from solo_ext.errors import ConfigError, naming, require
from solo_ext.files import replacing

INK, MUTED, RULE = (light for light, _ in PAPER.values())
SOLID = (None, None)  # dashes of matplotlib
RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.grid.axis": "y",
    "axes.formatter.limits": (-4, 6),
    "grid.color": RULE,
    "text.color": INK,
    "text.parse_math": False,  # a name may look like mathematics
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "solo_ext",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset"), False),
}


def render(template: str, styles: Iterable[Style] = (), last_epoch: float = 1.0, **values: Any) -> str:
    """A page from the template `report.html`, `study.html` or `study.md`, which shows `values`.

    styles: of all curves, whose colours the style sheet gets. last_epoch: where the panels' axes end.
    """
    palette = {**PAPER, **{style.var: (style.light, style.dark) for style in styles}}
    colours = {light: f"var(--{name})" for name, (light, _) in palette.items()}
    values |= {"palette": palette, "version": solo_ext.__version__}
    values["svg"] = lambda panel: svg(panel, last_epoch, colours)
    values["inline"] = lambda figure, label: inline(figure, colours, label)
    return _templates().get_template(f"{template}.j2").render(values)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("assets")),
        autoescape=lambda name: name is None or ".html" in name,  # all but study.md
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": breakable,
        "groups_text": lambda groups: "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items()),
        "words": lambda key: key if "." in key else key.replace("_", " "),
    }
    return environment


def breakable(text: str) -> Markup:
    """Escaped, with places for a line break after the separators of long names and paths."""
    return Markup("<wbr>").join(re.split(r"(?<=\w[_/.=-])(?=\w)", str(text)))


def house_style() -> AbstractContextManager[None]:
    """Gives matplotlib the settings that the figures need, whatever the user's own are."""
    import matplotlib.style

    return matplotlib.style.context(RC, after_reset=True)


def _draw(ax: Any, panel: Panel, last_epoch: float) -> None:
    """Draws `panel` in its light colours."""
    for curve in panel.curves:
        if curve.steps:
            ax.plot(*curve.steps, color=curve.style.light, linewidth=0.5, alpha=0.4)
        if curve.band is not None:
            edges = curve.values - curve.band, curve.values + curve.band
            ax.fill_between(curve.epochs, *edges, color=curve.style.light, alpha=0.15, linewidth=0)
        marker = {"marker": "o" if len(curve.values) <= 2 else None, "markersize": 3}
        line = {"color": curve.style.light, "dashes": curve.style.dash or SOLID}
        ax.plot(curve.epochs, curve.values, clip_on=False, **line, **marker)
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


def svg(panel: Panel, last_epoch: float, colours: Mapping[str, str]) -> Markup:
    """The panel as an inline SVG in the page's font and, by `colours` (light colour -> variable), in its colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.4))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.14, right=0.845 if panel.gap_axis else 0.975, bottom=0.18, top=0.93)
    _draw(ax, panel, last_epoch)
    ends = "; ".join(f"{curve.style.label} {curve.values[-1]:.4g}" for curve in panel.curves)
    return inline(figure, colours, f"{panel.title} {panel.metric}, last values: {ends}")


def inline(figure: Any, colours: Mapping[str, str], label: str) -> Markup:
    """A matplotlib figure as an inline SVG in the page's font, its colours replaced by `colours`; `label` names it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue().partition("<svg")[2]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]\w*_\d+"', "", text)  # axes_1 and the like, which would come once per panel
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda match: colours.get(match[0], match[0]), text)
    tag, _, rest = text.partition(">")
    box = tag[tag.index("viewBox") :].split('"')[1]
    return Markup(f'<svg role="img" aria-label="{html.escape(label)}" viewBox="{box}">{rest}')


def grid(panels: Sequence[Panel], legend: Sequence[Style], last_epoch: float) -> Any:
    """A matplotlib figure of the panels, three to a row, under one legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    wide = min(3, len(panels))
    rows = math.ceil(len(panels) / wide)
    figure = Figure(figsize=(max(4.8, 3.6 * wide), 2.7 * rows + 0.35), layout="constrained", dpi=160)
    axes = list(figure.subplots(rows, wide, squeeze=False).flat)
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, panel, last_epoch)
        every = f" ({panel.same})" if panel.same.startswith("the same in") and not panel.run else ""
        ax.set_title((panel.title or panel.metric) + every)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    keys = [Line2D([], [], color=style.light, dashes=style.dash or SOLID) for style in legend]
    ncols = 4 if wide > 1 else 2
    box = figure.legend(keys, [""] * len(keys), loc="outside upper left", ncols=ncols, frameon=False)
    for text, style in zip(box.get_texts(), legend, strict=True):  # matplotlib < 3.10 leaves out labels such as _a
        text.set_text(style.label)
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure as the PNG or SVG file `path`."""
    author = {".png": {"Software": f"solo_ext {solo_ext.__version__}"}, ".svg": {"Date": None}}[path.suffix]
    figure.savefig(path, metadata=author)


def picture_path(out: str | os.PathLike, what: str) -> Path:
    """Where a command writes a picture; ConfigError for what is no PNG or PDF, or without matplotlib."""
    require("matplotlib", what, "viz")
    path = Path(out).expanduser()
    if path.suffix not in (".png", ".pdf"):
        raise ConfigError(f"--out: '{path}' must end in .png or .pdf")
    return path


def write_picture(path: Path, draw: Callable[[], Any]) -> Path:
    """Writes the matplotlib figure that `draw` makes in the house style, whole or not at all."""
    with naming(f"--out: {path} cannot be written"), house_style():
        figure = draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, ConfigError) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=160)
    return path
