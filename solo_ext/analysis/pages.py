"""Pages from the templates in `assets/`, with curves by plotly; and the same panels by matplotlib, as PNG and PDF."""

import base64
import gzip
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

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import solo_ext
from solo_ext.analysis.figures import PAPER, Panel, Style
from solo_ext.errors import ConfigError, require
from solo_ext.files import output

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
    values |= {"palette": palette, "version": solo_ext.__version__, "kept": (kept := []), "plotly": plotly}

    def keep(item: Any) -> int:
        kept.append(item)
        return len(kept) - 1

    values |= {"keep": keep, "number_of": lambda panel: keep(figure_of(panel, last_epoch))}
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
        "packed": packed,
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
    for value, style in panel.floor:
        ax.axhline(value, color=style.light, linewidth=0.8, dashes=style.dash or SOLID)
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


def figure_of(panel: Panel, last_epoch: float) -> dict[str, Any]:
    """The panel as plotly draws it; `--name` stands for a colour of the style sheet, `--name/0.15` for a thin one."""
    traces: list[dict[str, Any]] = []
    for curve in panel.curves:
        var, label = f"--{curve.style.var}", html.escape(curve.style.label)
        common = {"mode": "lines", "name": label, "legendgroup": label, "hoverinfo": "skip"}
        dash = ",".join(f"{1.6 * x:g}px" for x in curve.style.dash)
        if curve.steps:
            traces.append(_points(*curve.steps) | common | {"line": {"color": f"{var}/0.4", "width": 0.7}})
        line, spread = _points(curve.epochs, curve.values), ""
        if curve.band is not None:
            edge = common | {"line": {"width": 0}}
            upper = _points(curve.epochs, curve.values + curve.band) | {"fill": "tonexty", "fillcolor": f"{var}/0.15"}
            traces += [_points(curve.epochs, curve.values - curve.band) | edge, upper | edge]
            line["customdata"], spread = _numbers(curve.band), " ± %{customdata:.2g}"
        if panel.gap_axis:
            line["text"], spread = _numbers(2 - 2 * curve.values), f"{spread}, gap %{{text:.4g}}"
        shape = {"mode": "lines+markers" if len(curve.values) <= 2 else "lines", "hoverinfo": "all"}
        look = {"color": var, "width": 1.8, **({"dash": dash} if dash else {})}
        traces.append(common | line | shape | {"line": look, "hovertemplate": f"%{{y:.5g}}{spread}"})
    shapes = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
        | {"line": {"color": f"--{style.var}", "width": 1, "dash": "dot"}}
        for value, style in panel.floor
    ]
    layout: dict[str, Any] = {"shapes": shapes, "xaxis": {"range": [0, last_epoch]}, "yaxis": {}}
    if panel.ylim:
        layout["yaxis"]["range"] = list(panel.ylim)
    return {"data": traces, "layout": layout}


def _points(epochs: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    return {"x": _numbers(epochs), "y": _numbers(values)}


def _numbers(values: np.ndarray) -> list[float | None]:
    """As many digits as tell a thousand heights apart; None, a hole in the curve, for what is not finite."""
    finite = values[np.isfinite(values)]
    spread = np.ptp(finite) / np.abs(finite).max() if finite.any() else 0
    digits = 4 + int(-math.log10(max(spread, 1e-5))) if spread else 6
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]


@cache
def plotly() -> str:
    """The library as the page carries it."""
    from plotly.offline import get_plotlyjs

    return packed(get_plotlyjs())


def packed(text: str) -> str:
    """Base64 of gzip."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def embedded(path: Path) -> str | None:
    """A picture as a data URI, at most 1,000 pixels wide; None if it cannot be read."""
    from PIL import Image

    out = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.thumbnail((1000, 10_000))
            image.convert("RGB").save(out, "WEBP", quality=80)
    except (OSError, ValueError):
        return None
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


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
    """Writes a matplotlib figure as the PNG or PDF file `path`."""
    author = {".png": {"Software": f"solo_ext {solo_ext.__version__}"}, ".pdf": {"CreationDate": None}}[path.suffix]
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
    with house_style():
        figure = draw()
        with output(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=160)
    return path
