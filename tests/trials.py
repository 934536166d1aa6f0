"""Trials of the fault battery: all of them with FAULTS=all, else a seeded sample. `make test-faults` has the outcomes
written to the file that PAGE names."""

import ast
import os
import platform
import random
from collections import Counter
from pathlib import Path

import lightning
import torch

ALL = os.environ.get("FAULTS") == "all"
OUTCOMES: dict[str, Counter] = {}  # test -> how many trials failed (True) and passed
ROOT = Path(__file__).parents[1]
PAGE = os.environ.get("PAGE")


def trials(rows, share=0.1):
    """All of `rows`, or a sample of them, at least three."""
    rows = list(rows)
    return rows if ALL else random.Random(0).sample(rows, min(len(rows), max(3, round(share * len(rows)))))


def pytest_runtest_logreport(report):
    """Where the outcomes of all workers arrive."""
    if report.failed or (report.when == "call" and report.passed):
        OUTCOMES.setdefault(report.nodeid.partition("[")[0], Counter())[report.failed] += 1


def pytest_sessionfinish(session):
    if not PAGE or hasattr(session.config, "workerinput"):
        return
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    lines = ["# What holds under faults", "", f"Written by `make test-faults` ({platform.machine()}, {versions})."]
    for file in dict.fromkeys(test.partition("::")[0] for test in OUTCOMES):
        about = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        title = f"## {about.partition(chr(10))[0].rstrip('.')}"
        lines += ["", title, "", "| what | trials | failures |", "|---|---|---|"]
        for test, count in OUTCOMES.items():
            if test.startswith(f"{file}::"):
                what = test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
                lines.append(f"| {what} | {count.total()} | {count[True]} |")
    (ROOT / PAGE).write_text("\n".join([*lines, ""]), encoding="utf-8")
