"""Whether measures without labels foretell the linear accuracy: Spearman's correlation over the runs in folders.

    python benchmarks/quality_correlation.py FOLDER ... [--picture FILE]

Each run that lacks them gets `quality` and a linear evaluation on cached features first; both stay in its folder.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from solo_ext.analysis.pages import write_picture
from solo_ext.errors import SoloExtError
from solo_ext.runs.run import LINEAR, QUALITY, Run, find_runs
from solo_ext.text import markdown_table
from solo_ext.training.config import resolve, run_values
from solo_ext.training.evaluate import linear, quality

MEASURES = ("rankme", "lidar", "alignment", "uniformity", "spread")
CACHED = ["cache_features=true", "data.num_workers=0", "max_epochs=20"]
SMALL = ["images=300", "views=6", "data.num_workers=0"]


def measured(folder: Path) -> tuple[dict[str, float], float]:
    """What `quality` says of a run, and the accuracy of a linear classifier on its cached features."""
    if not Run(folder).evaluations[QUALITY]:
        quality(resolve(run_values(folder, "quality", SMALL), "quality"))
    if not any(row["protocol"].get("cache_features") for row in Run(folder).evaluations[LINEAR]):
        linear(resolve(run_values(folder, "linear", [*CACHED, f"checkpoint.dir={folder / 'linear'}"]), "linear"))
    run = Run(folder)
    cached = next(row for row in reversed(run.evaluations[LINEAR]) if row["protocol"].get("cache_features"))
    return run.evaluations[QUALITY][-1], cached["acc1"]


def picture(names: list[str], values: np.ndarray, accuracies: np.ndarray):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(MEASURES), 2.6), layout="constrained")
    for ax, name, column in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES, values.T, strict=True):
        for method in sorted({*names}):
            mine = [i for i, other in enumerate(names) if other == method]
            ax.scatter(column[mine], accuracies[mine], s=7, label=method if name == MEASURES[0] else None)
        ax.set(xlabel=name)
    figure.axes[0].set_ylabel("linear accuracy (%)")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path, help="a .png or .pdf with a point for each run")
    args = parser.parse_args()
    names, rows = [], []
    for run in (run for folder in args.folders for run in find_runs(folder) if run.finished):
        try:
            found, accuracy = measured(run.dir)
        except SoloExtError as error:
            print(f"{run.dir}: {error}")
            continue
        names.append(run.method.split("_")[-1])
        rows.append([*(found[name] for name in MEASURES), accuracy])
    values = np.array(rows)
    print(f"{len(values)} runs, linear accuracies from {values[:, -1].min():.1f} to {values[:, -1].max():.1f}\n")
    frameworks = [name for name in sorted({*names}) if names.count(name) >= 8]
    lines = []
    for i, measure in enumerate(MEASURES):
        groups = [np.arange(len(names)), *(np.flatnonzero(np.array(names) == name) for name in frameworks)]
        lines.append([measure, *(f"{spearmanr(values[rows, i], values[rows, -1])[0]:+.2f}" for rows in groups)])
    counts = [f"{name} ({names.count(name)})" for name in frameworks]
    print(markdown_table(["measure", f"all ({len(names)})", *counts], lines, range(1, len(counts) + 2)))
    if args.picture:
        write_picture(args.picture, lambda: picture(names, values[:, :-1], values[:, -1]))


if __name__ == "__main__":
    main()
