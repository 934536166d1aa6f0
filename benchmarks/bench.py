"""What is claimed of speed, measured on this machine.

    python benchmarks/bench.py
    SOLO_LEARN=~/solo-learn CIFAR=cifar10_jpeg python benchmarks/bench.py --only trainer_cost,end_to_end

Each part is a command that writes its JSON to docs/results; from those that are there, docs/results/bench.md and tables
of README.md and docs/data.md are then written anew (`--only ''`: nothing else). Two CPU cores take under 15 minutes for
all but those two.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pieces
import step_time
from timing import origin, shown

from solo_ext.text import between_marks, markdown_table

ROOT = Path(__file__).resolve().parents[1]
STEP = ["step_time.py", "--batch", "64", "--steps"]
PARTS = {  # name of the JSON -> command
    "step_time": [*STEP, "5"],
    "step_time_bf16": [*STEP, "7", "--bf16", "--method", "mocov3", "--scopes", "full,projector"],
    "data": ["data.py", "--rounds", "7"],
    "pieces": ["pieces.py"],
}
LONG = {
    "trainer_cost": ["trainer_cost.py"],
    "end_to_end": ["end_to_end.py", "$SOLO_LEARN", "$CIFAR"],
}
COMMANDS = PARTS | LONG
STEP_HEAD = [
    "teacher",
    "ms a step (quartiles)",
    "against `full`",
    "against its floor",
    "the teacher's parameters",
    "MiB",
]
LOADER_HEAD = ["format", "images/s", "against Pillow (quartiles)"]
PHOTOS, SMALL = "two views of 224 px from 500 x 375 px JPEGs", "two views of 32 px from memory (CIFAR)"
PAGES = ("README.md", "docs/data.md")
STEP_IS = "forward, backward, SGD, EMA. A floor is what no implementation can leave out: the passes, and SGD."


def caption(name: str, report: dict[str, Any], rounds: Any) -> str:
    command = " ".join(COMMANDS[name])
    return f"\n{origin(report['environment'])}; medians of n = {rounds} interleaved rounds (`benchmarks/{command}`).\n"


def steps(name: str, report: dict[str, Any]) -> str:
    s = report["setting"]
    what = f"{s['method']}, {s['backbone']}, {s['size']} px, two views of {s['batch']} images"
    what = f"\n{what}, {'bfloat16' if s['bf16'] else 'float32'}: {STEP_IS}"
    rows = [[f"`{row[0]}`" if " " not in row[0] else row[0], *row[1:]] for row in step_time.cells(report["rows"])]
    cut = slice(None) if any(row[-1] for row in rows) else slice(-1)  # only GPUs say what memory is taken
    table = markdown_table(STEP_HEAD[cut], [row[cut] for row in rows], range(1, 6))
    return table + what + "\n" + caption(name, report, report["n"])


def views(report: dict[str, Any], kind: str, title: str) -> str:
    rows = [
        [f"`{name}`" if name[0] != "p" else name, f"{row['images/s']['median']:,.0f}", shown(row["ratio"], 2, "x")]
        for name, row in report[kind].items()
    ]
    return markdown_table([title, *LOADER_HEAD[1:]], rows, (1, 2)) + caption("data", report, report["rounds"])


def waiting(report: dict[str, Any]) -> str:
    rows = [[name, shown(row["batch ms"], 2), shown(row["share %"], 2)] for name, row in report["step"].items()]
    head = ["a training step (BYOL, `tensor`)", "ms for its batch (quartiles)", "% of the step"]
    return markdown_table(head, rows, (1, 2)) + caption("data", report, report["rounds"])


def around(report: dict[str, Any]) -> str:
    rows = [[part, *row] for part, found in report["rows"].items() for row in pieces.cells(found)]
    head = ["", "", "ms (quartiles)", "against the loop", "rate"]
    return markdown_table(head, rows, (2, 3, 4)) + caption("pieces", report, "3 to 20")


def added(report: dict[str, Any]) -> str:
    rows = report["rows"]
    first = next(iter(rows.values()))
    head = ["BYOL, ResNet-18 at 32 px", *rows]
    lines = [
        ["ms a step of a training (quartiles)", *(shown(row["ms"], 0) for row in rows.values())],
        ["ms a step of its floor", *(shown(row["floor"], 0) for row in rows.values())],
        ["against its floor", *(shown(row["ratio"], 3, "x") for row in rows.values())],
    ]
    for part in first["shares"]:
        lines.append([f"of its time: {part}", *(f"{row['shares'][part]:.2%}" for row in rows.values())])
    return markdown_table(head, lines, (1, 2)) + caption("trainer_cost", report, first["ratio"]["n"])


def whole(report: dict[str, Any]) -> str:
    rows = [[name, shown(row["images/s"], 1), shown(row["ratio"], 2, "x")] for name, row in report["rows"].items()]
    head = ["ResNet-18, CIFAR-10, batches of 256", "images/s (quartiles)", "against solo-learn"]
    return markdown_table(head, rows, (1, 2)) + caption("end_to_end", report, report["rounds"])


def tables(results: Path) -> Iterator[tuple[str, str, str]]:
    """Mark, title and content of each table whose figures are there."""
    reports = {name: json.loads(file.read_text()) for name in COMMANDS if (file := results / f"{name}.json").exists()}
    for name, title in (("step_time", "A training step"), ("step_time_bf16", "A training step in bfloat16")):
        if name in reports:
            yield name, title, steps(name, reports[name])
    if "data" in reports:
        for kind, title in (("photos", PHOTOS), ("cifar", SMALL)):
            yield kind, title[0].upper() + title[1:], views(reports["data"], kind, title)
        yield "waiting", "What waiting for images costs a step", waiting(reports["data"])
    if "trainer_cost" in reports:
        yield "trainer_cost", "What a training adds to the passes", added(reports["trainer_cost"])
    if "end_to_end" in reports:
        yield "end_to_end", "Whole trainings", whole(reports["end_to_end"])
    if "pieces" in reports:
        yield "pieces", "Around the step, and before it", around(reports["pieces"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(COMMANDS)}")
    for name in filter(None, parser.parse_args().only.split(",")):
        script, *words = map(os.path.expandvars, COMMANDS[name])
        command = [sys.executable, "-W", "ignore", f"benchmarks/{script}", *words]
        subprocess.run([*command, "--out", f"docs/results/{name}.json"], check=True, cwd=ROOT)
    results = ROOT / "docs" / "results"
    found = list(tables(results))
    lines = ["# Performance\n\nWritten by `make bench`. No GPU has been measured yet: `make gpu` will.\n"]
    lines += [f"## {title}\n\n{content}" for _, title, content in found]
    (results / "bench.md").write_text("\n".join(lines), encoding="utf-8")
    for page in (ROOT / name for name in PAGES):
        text = page.read_text(encoding="utf-8")
        for mark, _, content in found:
            text = between_marks(text, mark, content)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
