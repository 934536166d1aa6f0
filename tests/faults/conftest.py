"""With FAULTS=all, the outcome of every trial goes to docs/reliability.md."""

import platform
from collections import Counter

import lightning
import torch
from conftest import ROOT
from trials import ALL

OUTCOMES: dict[str, Counter] = {}  # test -> how many trials failed (True) and passed


def pytest_runtest_logreport(report):
    """Where the outcomes of all workers arrive."""
    if report.when == "call" or report.failed:
        OUTCOMES.setdefault(report.nodeid.partition("[")[0], Counter())[report.failed] += 1


def pytest_sessionfinish(session):
    if not ALL or hasattr(session.config, "workerinput") or not OUTCOMES:
        return
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    lines = ["# What holds under faults", "", f"Written by `make test-faults` ({platform.machine()}, {versions}).", ""]
    lines += ["| what | trials | failures |", "|---|---|---|"]
    for test, count in OUTCOMES.items():
        what = test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        lines.append(f"| {what} | {count.total()} | {count[True]} |")
    (ROOT / "docs" / "reliability.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
