"""The runs of the studies on photographs as CSV, and what they show of the claims in photographs.yaml.

    python benchmarks/photographs.py studies/photographs-residual studies/photographs-stages

adds the finished runs in these folders to runs.csv and curves.csv in docs/results/photographs, in place of rows of the
same cell and seed, and writes the tables of docs/results/photographs.md, and its pictures, from all rows there.
"""

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import yaml
from study_runs import finished

from solo_ext.analysis import pages
from solo_ext.analysis.figures import Curve, Panel, Style, styles
from solo_ext.runs.metrics import read_table, write_table
from solo_ext.studies.scores import Score, half_width
from solo_ext.text import between_marks, markdown_table

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "results" / "photographs"
LAST = ("val_acc1", "val_knn1", "val_knn20", "gap_sim", "val_gap_sim_q", "train_z_std", "train_rankme")
CURVES = ("val_acc1", "val_knn20", "gap_sim", "val_gap_sim_q", "train_z_std", "train_rankme", "intra_on")
FACTS = ("linear", "seconds", "cpu", "torch", "commit")
NAMES = {"val_acc1": "linear, online", "linear": "linear, offline", "val_knn1": "kNN-1", "val_knn20": "kNN-20"}
NAMES |= {"gap_sim": "similarity", "train_rankme": "RankMe"}


def collect(folder: Path) -> tuple[list[dict], list[dict]]:
    """A row for each finished run of a study's folder, and one for every second and every fifth epoch of it."""
    ends, curves = [], []
    for cell, seed, run in finished(folder):
        if not (linear := run.evaluated("linear")):
            continue
        key = {"study": folder.name.removeprefix("photographs-"), "cell": cell, "seed": seed}
        about = run.environment
        facts = {
            "linear": f"{linear['acc1']:.2f}",
            "seconds": "" if run.resumed else f"{run.summary['seconds']:.0f}",
            "cpu": about["cpu"],
            "torch": about["packages"]["torch"],
            "commit": about["commit"]["hash"][:8],
        }
        ends.append(key | {name: f"{run.last(name):.5g}" for name in LAST if name in run.columns} | facts)
        epochs = [epoch for epoch in range(1, run.args["max_epochs"] + 1) if not epoch % 2 or not epoch % 5]
        means = {name: run.means([name], epochs) for name in CURVES if name in run.columns}
        for i, epoch in enumerate(epochs):
            row = {name: f"{values[i]:.5g}" for name, values in means.items() if math.isfinite(values[i])}
            curves.append(key | {"epoch": str(epoch)} | row)
    return ends, curves


def merge(path: Path, columns: tuple[str, ...], new: list[dict]) -> list[dict]:
    """The rows of a CSV with `new` ones, in its order; written back."""
    changed = {(row["study"], row["cell"], row["seed"]) for row in new}
    rows = [row for row in read_table(path)[1] if (row["study"], row["cell"], row["seed"]) not in changed] + new
    rows.sort(key=lambda row: (row["study"], row["cell"], int(row["seed"]), int(row.get("epoch", 0))))
    write_table(path, columns, rows)
    return [*read_table(path)[1]]


def results(rows: list[dict]) -> str:
    """Mean, standard deviation and number of seeds of each cell."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["study"], row["cell"]].append(row)
    lines = []
    for (study, cell), members in cells.items():
        values = {name: {int(row["seed"]): float(row[name]) for row in members if row[name]} for name in NAMES}
        texts = [Score(x).texts(".4f" if name == "gap_sim" else ".1f")[0] for name, x in values.items()]
        lines.append([f"`{study}/{cell}`", *texts])
    return markdown_table(["cell", *NAMES.values()], lines, range(1, 1 + len(NAMES)))


def verdict(differences: list[float], margin: float) -> tuple[str, str]:
    """The mean difference with its interval, and what it says."""
    if not differences:
        return "-", "not run yet"
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return f"{mean:+.2f} (1)", "one seed"
    half = half_width(differences)
    said = "holds" if mean - half > -margin else "does not hold" if mean + half < -margin else "cannot be told"
    form = "+.2f" if abs(mean) >= 0.1 else "+.4f"
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}] ({n})", said


def claims(rows: list[dict]) -> str:
    by_cell: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        by_cell[f"{row['study']}/{row['cell']}"][row["seed"]] = row
    content = yaml.load((HERE / "photographs.yaml").read_text(encoding="utf-8"), yaml.BaseLoader)
    lines = []
    for claim in content["claims"]:
        metric, margin = claim.get("metric", content["metric"]), float(claim.get("margin", 0))
        for row in claim["rows"]:
            more, less = by_cell[row["more"]], by_cell[row["less"]]
            pairs = [float(more[seed][metric]) - float(less[seed][metric]) for seed in sorted({*more} & {*less})]
            title = claim["title"] + (f" (within {margin:g})" if margin else "")
            lines.append(
                [title, row["name"], claim.get("paper", "-"), row.get("printed", "-"), *verdict(pairs, margin)]
            )
    return markdown_table(["claim", "in", "paper", "printed", "ours", ""], lines)


def panel(rows: list[dict], study: str, cells: dict[str, Style], metric: str, title: str) -> Panel:
    """Mean curves of cells of a study, in bands of the standard deviation over their seeds."""
    curves = []
    for cell, style in cells.items():
        by_epoch = defaultdict(list)
        for row in rows:
            if (row["study"], row["cell"]) == (study, cell) and row[metric]:
                by_epoch[int(row["epoch"])].append(float(row[metric]))
        if by_epoch:
            values = list(by_epoch.values())
            band = np.array([statistics.stdev(v) if len(v) > 1 else 0.0 for v in values])
            curves.append(Curve(style, np.array([*by_epoch]), np.array([*map(statistics.fmean, values)]), band=band))
    return Panel(title, metric, curves)


def draw(rows: list[dict]) -> None:
    """projector_only.png: accuracy by what has momentum; residual.png: gap and accuracy by kind of momentum."""
    scopes = ["all", "backbone", "projector", "nothing"]
    kinds = ["inter", "intra", "inter-and-intra", "none", "inter-intra-on-and-off"]
    readings = {"gap_sim": "similarity, training", "val_gap_sim_q": "similarity, validation"}
    accuracy = {"val_acc1": "linear, online (%)"}
    frameworks = {"byol": "BYOL", "dino": "DINO", "ressl": "ReSSL", "moco-v2": "MoCo v2"}
    for study, parts, names, metrics in (
        ("projector_only", scopes, frameworks, accuracy),
        ("residual", kinds, {"moco-v3": "MoCo v3", "byol": "BYOL"}, readings | accuracy),
    ):
        legend = styles(parts)
        drawn = [
            panel(rows, study, {f"{name}_{style.label}": style for style in legend}, metric, f"{title}, {what}")
            for name, title in names.items()
            for metric, what in metrics.items()
        ]
        with pages.house_style():
            pages.save(pages.grid(drawn, legend, 50), OUT / f"{study}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="*", help="folders of results")
    found = [collect(folder) for folder in parser.parse_args().studies]
    OUT.mkdir(parents=True, exist_ok=True)
    key = ("study", "cell", "seed")
    rows = merge(OUT / "runs.csv", (*key, *LAST, *FACTS), [row for ends, _ in found for row in ends])
    draw(merge(OUT / "curves.csv", (*key, "epoch", *CURVES), [row for _, curves in found for row in curves]))
    page = OUT.with_suffix(".md")
    text = page.read_text(encoding="utf-8")
    for name, table in (("claims", claims(rows)), ("results", results(rows))):
        text = between_marks(text, name, table)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
