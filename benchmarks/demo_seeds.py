"""The demo over several seeds: mean and standard deviation of each figure, as a Markdown table.

for seed in 0 1 2; do solo-ext demo --out seeds/$seed seed=$seed; done
python benchmarks/demo_seeds.py seeds/0 seeds/1 seeds/2
"""

import argparse
import statistics
from pathlib import Path

from solo_ext.analysis.report import table_rows
from solo_ext.runs.run import find_runs

ACCURACIES = {"knn1": "kNN-1", "knn20": "kNN-20", "linear": "linear top-1"}


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="+", type=Path, help="--out folders of the demo, one per seed")
    demos = [find_runs(folder / "runs") for folder in parser.parse_args().demos]
    rows = [{row["method"]: row for row in table_rows(runs)} for runs in demos]

    print(f"| method | {' | '.join(ACCURACIES.values())} | least gain | similarity to teacher | teacher's stages |")
    print("|---|" + "---|" * (len(ACCURACIES) + 3))
    args = {run.method: run.args for run in demos[0]}
    for method in rows[0]:
        seeds = [row[method] for row in rows]
        cells = [spread([seed[key] for seed in seeds]) for key in ACCURACIES]
        if method == "untrained":
            cells += ["-", "-", "-"]
        else:
            gains = [max(row[method][key] - row["untrained"][key] for key in ACCURACIES) for row in rows]
            similarity = spread([seed["similarity"] for seed in seeds], 4)
            cells += [f"{min(gains):+.1f}", similarity, str(args[method]["momentum"]["stages"])]
        print(f"| `{method}` | {' | '.join(cells)} |")
    print(f"\nn = {len(rows)} seeds; mean ± sample standard deviation. Least gain: the smallest, over the seeds, of")
    print("the best gain (kNN-1, kNN-20 or linear) over the untrained encoder of the same seed, in points.")


if __name__ == "__main__":
    main()
