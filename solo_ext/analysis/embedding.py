"""Features in two dimensions, by UMAP or t-SNE, as a picture and as a page in which each point says its image."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from solo_ext.analysis.features import features_of, names_of
from solo_ext.analysis.pages import picture_path, write_picture
from solo_ext.errors import ConfigError, require
from solo_ext.files import output
from solo_ext.runs.checkpoints import Checkpoint

FEWEST = 4  # images: with fewer there is nothing to lay out
NAMED = 20  # classes at most that have a colour and a name each
Method = Literal["umap", "tsne"]


def draw_map(
    sources: Sequence[tuple[str, Checkpoint]],
    images: str | None,
    out: str | os.PathLike,
    method: Method = "umap",
    teacher: bool = False,
    count: int = 2000,
) -> tuple[Path, Path]:
    """Lays out the features of `count` images, evenly taken, one panel for each encoder, and colours them by class.

    images: as of `features_of`. Writes the PNG or PDF `out` and, beside it, an .html; returns both paths. Distances are
    cosines. Raises CheckpointError and DataError, as evaluations do; ConfigError for fewer than `FEWEST` images.
    """
    path = picture_path(out, method)
    require("umap", method, "pictures")  # brings scikit-learn, which has t-SNE
    require("plotly", method, "viz")
    panels = []
    for label, source in sources:
        features, shown = features_of(source, images, teacher, count=count)
        if len(shown) < FEWEST:
            raise ConfigError(f"--images: {len(shown)} images are too few for a map; use at least {FEWEST}")
        panels.append((label, laid_out(features, method)))
    labels, names = shown.targets, names_of(shown)  # the same for all
    classes = [shown.classes[i] if i < len(shown.classes) else str(i) for i in range(labels.max(initial=-1) + 1)]
    groups = [(name, np.flatnonzero(labels == i)) for i, name in enumerate(classes)]
    groups = [("no label", np.flatnonzero(labels < 0)), *groups]
    groups = [(name, rows) for name, rows in groups if len(rows)]
    page = path.with_suffix(".html")
    with output(page) as file:
        file.write(_page(panels, groups, names).encode())
    return write_picture(path, lambda: _picture(panels, groups)), page


def laid_out(features: np.ndarray, method: Method) -> np.ndarray:
    """[N, D] -> [N, 2], the same for the same features."""
    n = len(features)
    if method == "umap":
        from umap import UMAP

        threads = torch.get_num_threads()
        try:
            return UMAP(n_neighbors=min(15, n - 1), metric="cosine", random_state=0, n_jobs=1).fit_transform(features)
        finally:
            torch.set_num_threads(threads)  # numba has set those of OpenMP, which are PyTorch's too
    from sklearn.manifold import TSNE

    return TSNE(perplexity=min(30, (n - 1) / 3), metric="cosine", random_state=0).fit_transform(features)


def _colours(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    named = colormaps["tab10" if count <= 10 else "tab20"].colors  # type: ignore[attr-defined]  # a list of colours
    return [to_hex(named[i] if count <= NAMED else colormaps["hsv"](i / count)) for i in range(count)]


def _picture(panels: Sequence[tuple[str, np.ndarray]], groups: Sequence[tuple[str, np.ndarray]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 4.4), layout="constrained")
    for ax, (label, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (name, rows), colour in zip(groups, _colours(len(groups)), strict=True):
            ax.scatter(*points[rows].T, s=4, color=colour, linewidths=0, label=name if ax is figure.axes[0] else None)
        ax.set(xticks=[], yticks=[], title=label)
        ax.grid(False)
    if 1 < len(groups) <= NAMED:
        figure.legend(loc="outside lower center", ncols=min(5 * len(panels), 10), frameon=False, markerscale=3)
    return figure


def _page(panels: Sequence[tuple[str, np.ndarray]], groups: Sequence[tuple[str, np.ndarray]], names: list[str]) -> str:
    from plotly.graph_objects import Scattergl
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=len(panels), subplot_titles=[html.escape(label) for label, _ in panels])
    for column, (_, points) in enumerate(panels, 1):
        for (name, rows), colour in zip(groups, _colours(len(groups)), strict=True):
            x, y = points[rows].T
            label = html.escape(name)
            look = {"mode": "markers", "marker": {"size": 4, "color": colour}, "name": label, "legendgroup": label}
            told = {"text": [html.escape(names[i]) for i in rows], "hovertemplate": "%{text}"}
            figure.add_trace(Scattergl(x=x, y=y, showlegend=column == 1, **look, **told), 1, column)
    figure.update_xaxes(visible=False).update_yaxes(visible=False).update_layout(template="plotly_white")
    return figure.to_html(include_plotlyjs=True)
