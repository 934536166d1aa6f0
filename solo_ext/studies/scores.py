"""The results of a study so far beside what its paper prints, and how the two settings differ."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from solo_ext.runs.comparison import flatten, value_text
from solo_ext.runs.metrics import is_number
from solo_ext.runs.run import WALL, Run
from solo_ext.schema import plain
from solo_ext.studies.rows import Cell, Job, Row
from solo_ext.studies.study import Reading, Study
from solo_ext.text import nearest

FACTS = ("teacher_layers", "parameters_millions", "forwards_per_view")  # of the method, whatever the run did
MINUTES = "minutes_per_epoch"
WHOLE = "wall_minutes"  # of a run that one process did, from its start to the last evaluation
SETTING = {  # where these differ from the paper's, the numbers are not comparable
    "data.dataset": "data set",
    "max_epochs": "epochs",
    "backbone.name": "backbone",
    "data.fraction": "share of the data",
    "limit_train_batches": "steps an epoch",
}


@dataclass
class Score:
    """What a row has in one printed column: ours and the paper's."""

    values: Mapping[int, float] = field(default_factory=dict)  # seed -> that of the run
    paper: float | None = None
    failed: int = 0  # runs without a value
    fact: bool = False  # about the method, whatever the runs did
    against: "Score | None" = None  # the same column of the row that this one is compared with

    def __post_init__(self) -> None:
        values = list(self.values.values())
        finite = all(map(math.isfinite, values))
        self.mean = statistics.fmean(values) if values else None
        self.std = (statistics.stdev(values) if finite else math.nan) if len(values) > 1 else None  # n - 1
        self.difference = None if self.mean is None or self.paper is None else self.mean - self.paper

    def compared(self, form: str) -> str:
        """The mean difference from `against` over the seeds that both have, its 95% interval by Student's t, and n."""
        theirs = self.against.values if self.against else {}
        pairs = [value - theirs[seed] for seed, value in self.values.items() if seed in theirs]
        if not pairs or self.fact:
            return "-"
        mean, n = statistics.fmean(pairs), len(pairs)
        if n == 1 or not math.isfinite(mean):
            return f"{mean:+{form}} ({n})"
        half = half_width(pairs)
        return f"{mean:+{form}} [{mean - half:+{form}}, {mean + half:+{form}}] ({n})"

    def texts(self, form: str) -> tuple[str, str, str]:
        """Ours, the paper's, and the difference, as the tables show them; `form`: the format of a number, as `.2f`."""
        ours = "-" if self.mean is None else f"{self.mean:{form}}"
        ours += "" if self.std is None else f" ± {self.std:{form}}"
        ours += f" ({len(self.values)})" if self.values and not self.fact else ""
        if self.failed:
            ours = f"{ours}, {self.failed} failed" if self.values else "failed"
        paper = "-" if self.paper is None else f"{self.paper:{form}}"
        return ours, paper, "-" if self.difference is None else f"{self.difference:+{form}}"


def half_width(differences: Sequence[float]) -> float:
    """Of the 95% interval of their mean, by Student's t, of two or more."""
    from scipy.stats import t

    n = len(differences)
    return float(t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n))


Results = dict[str, dict[str, Run]]  # name of the cell's runs -> name of the job -> run
Scores = list[tuple[Row, dict[str, Score]]]


def results_of(study: Study, jobs: Sequence[Job]) -> Results:
    """The finished runs."""
    results: Results = {cell.name: {} for cell in study.runs}
    for job in jobs:
        if run := job.result():
            results[job.cell.name][job.name] = run
    return results


def scores(study: Study, results: Results, failed: Mapping[str, str] | None = None) -> Scores:
    """The study's rows, each with {column: Score}; a cited row has no values of ours. `failed`: jobs that failed."""

    def score(row: Row, column: str, reading: Reading) -> Score:
        paper = row.values.get(reading.printed or column)
        if not isinstance(row, Cell):
            return Score(paper=paper)
        if reading.metric in FACTS:
            return Score({0: reading.times * row.anatomy[reading.metric]}, paper, fact=True)
        runs = {int(run.args["seed"]): run for run in results[row.name].values()}
        values = {seed: value for seed, run in runs.items() if (value := read(run, reading, row)) is not None}
        lost = sum(name.startswith(f"{row.name}-seed") for name in failed or ())
        baseline = study.baselines.get(row)
        return Score(values, paper, lost, against=score(baseline, column, reading) if baseline else None)

    return [(row, {column: score(row, column, r) for column, r in study.metrics.items()}) for row in study.rows]


def read(run: Run, reading: Reading, cell: Cell) -> float | None:
    """The value at the end of the run, or at the cell's epoch, or of its evaluation, scaled; None if there is none."""
    name, _, figure = reading.metric.partition(".")
    if name in cell.evaluations:
        value = run.evaluated(name).get(figure)
        return reading.times * float(value) if is_number(value) else None
    if reading.metric == WHOLE:
        seconds = run.summary.get(WALL)
        return None if seconds is None else reading.times * seconds / 60
    if reading.metric == MINUTES:
        seconds = run.summary.get("seconds")
        if seconds is None or run.resumed:
            return None
        return reading.times * seconds / 60 / run.args["max_epochs"]
    _, epochs, values = run.series(reading.metric)
    if cell.epoch is not None:
        values = values[epochs <= scaled_epoch(cell, run.args["max_epochs"]) + 1e-6]
    return reading.times * float(values[-1]) if len(values) else None


def scaled_epoch(cell: Cell, max_epochs: int) -> int:
    """The epoch of a run of `max_epochs` that is the same share of it as the paper's readout is of the paper's run."""
    epochs = cell.printed_config.max_epochs
    return max(1, round((cell.epoch or epochs) * max_epochs / epochs))


def setting(study: Study, printed: bool = False) -> dict[str, str]:
    """What the runs have in the keys of `SETTING`, or with `printed` the paper's; empty where they have nothing."""
    configs = [flatten(plain(cell.printed_config if printed else cell.config(study.seeds[0]))) for cell in study.runs]
    everything = {"data.fraction": (None, -1, 1.0)}
    texts = {}
    for key, name in SETTING.items():
        values = [config.get(key) for config in configs]
        texts[name] = ", ".join(dict.fromkeys(value_text(v) for v in values if v not in everything.get(key, (None,))))
    return texts


def warning(study: Study) -> str:
    """How the setting differs from the paper's, or from the study's own; empty if it does not."""
    ours, theirs = setting(study), setting(study, printed=True)
    parts = [f"{k} {ours[k] or 'all'} instead of {theirs[k] or 'all'}" for k in ours if ours[k] != theirs[k]]
    whose = "the paper's" if study.paper else "the study's"
    return f"Another setting than {whose}: {'; '.join(parts)}. Only directions compare." if parts else ""


def remarks(study: Study, results: Results) -> Iterator[str]:
    """What a reader of the table has to know."""
    runs = {name: run for by_job in results.values() for name, run in by_job.items()}
    logged = dict.fromkeys(column for run in runs.values() for column in run.columns)
    for metric in dict.fromkeys(reading.metric for reading in study.metrics.values()):
        if metric.partition(".")[0] in study.spec.evaluate:
            continue
        without = [name for name, run in runs.items() if metric not in run.columns]
        if metric == MINUTES:
            if any(run.resumed for run in runs.values()):
                yield f"{MINUTES} is left out for runs that were resumed: their seconds are the last part's."
        elif metric not in (*FACTS, WHOLE) and without:
            yield f"{metric} was not logged by {', '.join(without)}{nearest(metric, logged)}"
    for column, least in study.spec.target.items():
        for cell in study.runs:
            values = [read(run, study.metrics[column], cell) for run in results[cell.name].values()]
            known = [value for value in values if value is not None]
            reached = f"{sum(value >= least for value in known)} of {len(known)} runs"
            yield f"{column} of {least:g}: reached by {reached}{f' of {cell.name}' if len(study.runs) > 1 else ''}."
    if study.readout:
        at = {cell.epoch: scaled_epoch(cell, cell.config(study.seeds[0]).max_epochs) for cell in study.cells}
        if moved := [f"{printed} at {epoch}" for printed, epoch in at.items() if printed != epoch]:
            yield f"{study.readout} read out at: {', '.join(moved)}."
    for note in study.table.notes if study.table else ():
        yield f"In print: {note}"
