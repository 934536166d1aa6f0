"""The runs of a study as CSV: cell, seed, and what each logged last.

    python benchmarks/study_runs.py studies/residual-table2 val_acc1 val_knn1 > runs.csv

Without columns it takes the accuracies, the gap and the seconds.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from solo_ext.runs.run import Run, find_runs

COLUMNS = ("val_acc1", "val_acc5", "val_knn1", "val_knn20", "gap_sim", "train_z_std", "seconds")


def finished(study: Path) -> Iterator[tuple[str, str, Run]]:
    """Cell, seed and run of each that has ended."""
    for folder in sorted((study / "runs").iterdir()):
        cell, _, seed = folder.name.rpartition("-seed")
        yield from ((cell, seed, run) for run in find_runs(folder) if run.summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of its results")
    parser.add_argument("columns", nargs="*", default=COLUMNS)
    args = parser.parse_args()
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["cell", "seed", *args.columns])
    for cell, seed, run in finished(args.study):
        last = {name: run.series(name)[2] for name in args.columns if name in run.columns}
        values = {name: f"{column[-1]:.4g}" for name, column in last.items() if len(column)}
        values.setdefault("seconds", f"{run.summary['seconds']:.0f}")
        table.writerow([cell, seed, *(values.get(name, "") for name in args.columns)])


if __name__ == "__main__":
    main()
