"""Text for people: the nearest name, durations, tables, and how a metric is shown."""

import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


def nearest(word: Any, choices: Iterable[Any]) -> str:
    """`; did you mean 'x'?` for the choice closest to `word`, or the empty string if none is close."""
    close = difflib.get_close_matches(str(word), list(map(str, choices)), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def hint(word: Any, choices: Iterable[Any]) -> str:
    """`nearest`, or else ` (one of a, b, c)`."""
    names = list(map(str, choices))
    return nearest(word, names) or f" (one of {', '.join(names)})"


def duration(seconds: float) -> str:
    """340 ms, 45 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.3g} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def line_width() -> int:
    """Characters that a line of the terminal holds; no limit where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def hanging(text: str, width: int | None = None) -> str:
    """`text` in lines of at most `width` characters, by default the terminal's; words, and what "\\xa0" joins, stay
    whole. The rest of a line goes below the last column, known by two spaces before it, that leaves room."""
    width, lines = width or line_width(), []
    for line in text.splitlines():
        if len(line) > width:
            longest = max(map(len, line.split(" ")))
            columns = [gap.end() for gap in re.finditer("^ +|  +", line)]
            place = max((x for x in columns if x <= width * 2 // 3 and x + longest <= width), default=0)
            wrapper = textwrap.TextWrapper(width, "", " " * place, break_long_words=False, break_on_hyphens=False)
            line = wrapper.fill(line)
        lines.append(line)
    return "\n".join(lines).replace("\xa0", " ")


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table, with a line break at its end; `right`: the columns that are aligned to the right."""
    aligned = set(right)
    rule = ["---:" if i in aligned else "---" for i in range(len(headings))]
    lines = (" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in (headings, rule, *rows))
    return "".join(f"| {line} |\n" for line in lines)


def between_marks(text: str, mark: str, content: str) -> str:
    """`text` with `content` between `<!-- mark -->`, in a line of its own, and `<!-- /mark -->`; unchanged without."""
    before, begin, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    return before + begin + content + end + after if end else text


@dataclass(frozen=True)
class Metric:
    """How a logged metric is shown everywhere; defined in the file that computes the metric.

    In `name`, a `*` stands for anything (`val_knn*`, `weight_distance/*`), and in `label` for what it stood for.
    """

    name: str  # as it is logged
    title: str  # of its plot
    label: str = ""  # in tables and on the progress line; empty: it is only plotted
    form: str = "{:.4g}"  # of its values
    section: str = "other"  # of the report: losses, accuracies, gap, schedules, or one with a heading of its own
    progress: bool = False  # whether the progress line shows it
