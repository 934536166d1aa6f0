"""What was compared, and the page that says so."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One value and its bound.

    images: what was rendered. part: drawn, rendered, chain or decoded. format: `all formats` where they share it.
    measure: `difference` and `bias` in levels of 255, at most `bound` (None: reported only); or `p`, at least `bound`.
    effect: for p, the KS distance, or the largest difference of mean images in levels.
    """

    images: str
    part: str
    format: str
    operation: str
    measure: str
    value: float
    bound: float | None = None
    effect: float | None = None

    @property
    def ok(self) -> bool:
        if self.bound is None:
            return True
        return self.value >= self.bound if self.measure == "p" else abs(self.value) <= self.bound


@dataclass(frozen=True)
class Certificate:
    """checks: all that was compared. settings: what it was made with. left_out: formats and why."""

    checks: tuple[Check, ...]
    settings: dict[str, Any]
    left_out: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        checks = [{**asdict(check), "ok": check.ok} for check in self.checks]
        return {"ok": self.ok, "settings": self.settings, "left_out": self.left_out, "checks": checks}

    def __str__(self) -> str:
        """Markdown."""
        parts = [_HEAD]
        for images in dict.fromkeys(check.images for check in self.checks):
            parts.append(f"## {images[0].upper()}{images[1:]}")
            for (part, measure), (title, cell) in _TABLES.items():
                found = [c for c in self.checks if (c.images, c.part, c.measure) == (images, part, measure)]
                if found:
                    parts.append(f"{title}:\n\n{_table(found, cell)}")
        parts += [f"Left out: {reason}" for reason in self.left_out]
        bounded = [check for check in self.checks if check.bound is not None]
        good = sum(check.ok for check in bounded)
        parts.append(_SETTINGS.format_map(self.settings))
        verdict = "Certified" if self.ok else "FAILED"
        parts.append(f"{verdict}: {good} of {len(bounded)} values are inside their bounds.")
        return "\n\n".join(parts)


def _levels(check: Check) -> str:
    bound = "" if check.bound is None else f" ({check.bound:g})"
    return f"{check.value:{'+' if check.measure == 'bias' else ''}.2f}{bound}{'' if check.ok else ' FAILED'}"


def _test(check: Check) -> str:
    return f"{check.effect:.3f}, p {check.value:.2g}{'' if check.ok else ' FAILED'}"


_HEAD = """\
# Data certificate

Every data format gives the views of solo-learn's chain of Pillow and torchvision. Differences are in levels of 255.
Sizes of differences and biases have a bound each, in brackets; p values have one for all."""
_SETTINGS = """\
{draws} views per operation and format, {chain} of the whole chain, {parameters} draws of each parameter, seed {seed},
on {device}. No p may be below {alpha:g} / {tests}, for {tests} tests. {packages}."""
_TABLES = {
    ("drawn", "p"): ("Parameters as drawn, against torchvision's: KS distance, p", _test),
    ("rendered", "difference"): (
        "Views against Pillow's by the same numbers: mean absolute difference (bound)",
        _levels,
    ),
    ("decoded", "difference"): ("Decoded values against those written: largest difference (bound)", _levels),
    ("rendered", "bias"): ("Mean signed difference (bound of its size)", _levels),
    ("chain", "p"): (
        "Whole chain against torchvision's by other numbers: levels (mean image) or KS distance, p",
        _test,
    ),
}


def _table(checks: Iterable[Check], cell: Callable[[Check], str]) -> str:
    cells = {(check.operation, check.format): cell(check) for check in checks}
    columns, operations = (list(dict.fromkeys(key[i] for key in cells)) for i in (1, 0))
    rows = [["", *columns], *([name, *(cells.get((name, c), "-") for c in columns)] for name in operations)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
