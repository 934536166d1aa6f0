"""Pages from the templates in `assets/`; those in HTML escape all that they are given."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import solo_ext
from solo_ext.analysis import drawing
from solo_ext.analysis.figures import PAPER, Panel, Style


def render(template: str, styles: Iterable[Style] = (), last_epoch: float = 1.0, **values: Any) -> str:
    """A self-contained page.

    Args:
        template: `report.html`, `study.html` or `study.md`.
        styles: of all curves; each gives the style sheet a colour for a light and for a dark page.
        last_epoch: where the panels' axes end.
        values: what the template shows.
    """
    palette = {**PAPER, **{style.var: (style.light, style.dark) for style in styles}}
    colours = {light: f"var(--{name})" for name, (light, _) in palette.items()}

    def svg(panel: Panel) -> Markup:
        return Markup(drawing.svg(panel, last_epoch, colours))

    def inline(figure: Any, label: str) -> Markup:
        return Markup(drawing.inline(figure, colours, label))

    page = _templates().get_template(f"{template}.j2")
    return page.render(palette=palette, svg=svg, inline=inline, version=solo_ext.__version__, **values)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("assets")),
        autoescape=lambda name: name is None or ".html" in name,
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
