"""The runs of a study: each cell with each seed, where it lies, and how far it is."""

import contextlib
import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.runs.comparison import differences
from solo_ext.runs.run import ARGS, Run, saved_at
from solo_ext.schema import plain
from solo_ext.studies.rows import Cell, must_have
from solo_ext.studies.study import Study
from solo_ext.training.compose import assign

SETTINGS = (  # of every run
    "checkpoint.enabled=True",
    "auto_resume.enabled=True",
    "auto_resume.max_hours=1000000.0",  # however old it is
    "enable_progress_bar=False",
)


@dataclass
class Job:
    """One run of a study: a cell with a seed."""

    cell: Cell
    seed: int
    out: Path

    def __post_init__(self) -> None:
        self.name = f"{self.cell.name}-seed{self.seed}"
        self.folder = self.out / "runs" / self.name  # the run's checkpoint.dir
        self.log = self.out / "logs" / f"{self.name}.log"

    @property
    def words(self) -> list[str]:
        """What follows `solo-ext`."""
        own = [assign("checkpoint.dir", self.folder), f"seed={self.seed}", *SETTINGS]
        return ["pretrain", str(self.cell.recipe), *self.cell.overrides, *own]

    @cached_property
    def config(self) -> dict[str, Any]:
        return plain(self.cell.config(self.seed))

    def differs(self, run: Run) -> list[str]:
        """The keys in which a run is not this job."""
        return differences(run.args, self.config)

    def tries(self) -> list[Run]:
        """The runs in its folder, newest first, including those of another configuration."""
        readable = []
        for file in sorted(self.folder.glob(f"*/*/{ARGS}"), key=saved_at, reverse=True):
            with contextlib.suppress(CheckpointError):
                readable += [run] if (run := Run(file.parent)).args else []
        return readable

    def runs(self) -> Iterator[Run]:
        """The runs of this very configuration, newest first."""
        return (run for run in self.tries() if not self.differs(run))

    def state(self) -> str:
        """`done`, `running` (in another process), `begun` or `missing`."""
        runs = list(self.runs())
        if any(run.finished for run in runs):
            return "done"
        if any(run.running for run in runs):
            return "running"
        return "begun" if any(run.checkpoints for run in runs) else "missing"

    def result(self) -> Run | None:
        """The finished run, if there is one."""
        return next((run for run in self.runs() if run.finished), None)


def jobs_of(study: Study, out: Path) -> list[Job]:
    """A job for each run of the study, seed by seed, so that one of each cell comes first."""
    return [Job(cell, seed, out) for seed, cell in itertools.product(study.seeds, study.runs)]


def pick(study: Study, patterns: Sequence[str]) -> set[str]:
    """The names of the cells that match one of `patterns`, such as `byol*`; ConfigError for one that matches none."""
    names = [cell.name for cell in study.runs]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            must_have(pattern, names, f"--only: {study.file} has no cell")
    return {name for pattern in patterns or ["*"] for name in fnmatch.filter(names, pattern)}


def check(study: Study, build: bool = True) -> None:
    """Raises ConfigError, before anything is trained, for cells that cannot work or are the same run.

    build: build each cell's network as well, which takes a while and finds stages that it lacks.
    """
    configs: dict[str, dict[str, Any]] = {}
    for cell in study.runs:
        try:
            values = plain(cell.config(study.seeds[0]))
            if build:
                cell.method(study.seeds[0])
        except ConfigError as error:
            raise ConfigError(f"{study.file}: the cell {cell.name}: {error}") from error
        for name, other in configs.items():
            if not differences(other, values):
                raise ConfigError(f"{study.file}: the cells {name} and {cell.name} are the same run")
        configs[cell.name] = values
