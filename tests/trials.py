"""Trials of the fault battery: all of them with FAULTS=all (`make test-faults`), else a seeded sample."""

import os
import random

ALL = os.environ.get("FAULTS") == "all"


def trials(rows, share=0.1):
    """All of `rows`, or a sample of them, at least three."""
    rows = list(rows)
    return rows if ALL else random.Random(0).sample(rows, min(len(rows), max(3, round(share * len(rows)))))
