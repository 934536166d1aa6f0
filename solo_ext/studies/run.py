"""Running what a study lacks: each cell and seed is a normal, resumable run in a process of its own."""

import contextlib
import fnmatch
import itertools
import shlex
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.runs.comparison import differences, plain
from solo_ext.runs.lock import RunLock
from solo_ext.runs.run import ARGS, Run, saved_at
from solo_ext.studies.pool import ClusterPool, LocalPool, check_launcher
from solo_ext.studies.study import Cell, Study
from solo_ext.studies.table import check_matplotlib, write_tables
from solo_ext.text import hint
from solo_ext.training.compose import assign

STOPPED = (143, -signal.SIGTERM)  # exit statuses of a run that was told to stop
FOREVER = 1e6  # hours


@dataclass
class Job:
    """One run of a study: a cell with a seed."""

    cell: Cell
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.cell.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The `checkpoint.dir` of the run."""
        return self.out / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"

    @property
    def words(self) -> list[str]:
        """What follows `solo-ext`."""
        own = {
            "seed": self.seed,
            "checkpoint.enabled": True,
            "auto_resume.enabled": True,
            "auto_resume.max_hours": FOREVER,
            "enable_progress_bar": False,
        }
        settings = [assign("checkpoint.dir", self.folder), *(f"{key}={value}" for key, value in own.items())]
        return ["pretrain", str(self.cell.recipe), *self.cell.overrides, *settings]

    @cached_property
    def config(self) -> dict[str, Any]:
        return plain(self.cell.config(self.seed))

    def differs(self, args: dict[str, Any]) -> list[str]:
        """The keys in which a run with these `args.json` is not this job."""
        return differences(args, self.config)

    def begun(self) -> list[Run]:
        """The runs in this job's folder, newest first."""
        files = sorted(self.folder.glob(f"*/*/{ARGS}"), key=saved_at, reverse=True)
        return [Run(file.parent) for file in files]

    def runs(self) -> Iterator[Run]:
        """Those of this very configuration."""
        for run in self.begun():
            with contextlib.suppress(CheckpointError):
                if not self.differs(run.args):
                    yield run

    def state(self) -> str:
        """`done`, `running` (by another process), `begun` or `missing`."""
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
    """The names of the cells that match one of `patterns`, in which * stands for anything; all without patterns.

    Raises:
        ConfigError: a pattern that matches no cell.
    """
    names = [cell.name for cell in study.runs]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"--only: {study.file} has no cell '{pattern}'{hint(pattern, names)}")
    return {name for name in names if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)}


def check(study: Study) -> None:
    """Refuses, before anything is trained, cells that cannot work and cells that are the same run.

    Raises:
        ConfigError: with the cell.
    """
    configs: dict[str, dict[str, Any]] = {}
    for cell in study.runs:
        try:
            values = plain(cell.config(study.seeds[0]))
            cell.method(study.seeds[0])
        except ConfigError as error:
            raise ConfigError(f"{study.file}: the cell {cell.name}: {error}") from error
        for name, other in configs.items():
            if not differences(other, values):
                raise ConfigError(f"{study.file}: the cells {name} and {cell.name} are the same run")
        configs[cell.name] = values


def dry_run(study: Study, out: str | Path, only: Sequence[str] = ()) -> None:
    """Prints each run, of the cells that match `only`, with its recipe, what it changes there, and its state."""
    wanted = pick(study, only)
    check(study)
    jobs = [job for job in jobs_of(study, Path(out)) if job.cell.name in wanted]
    width = max((len(job.name) for job in jobs), default=0)
    for job in jobs:
        recipe = "/".join(job.cell.recipe.with_suffix("").parts[-2:])
        print(f"{job.name:<{width}}  {job.state():<7}  {recipe}  {shlex.join(job.cell.overrides)}".rstrip())
    print(f"{len(jobs)} runs of {len(wanted)} cells x {len(study.seeds)} seeds, in {out}")


def run_study(
    study: Study,
    out: str | Path,
    size: int = 1,
    launcher: str | None = None,
    settings: Sequence[str] = (),
    only: Sequence[str] = (),
) -> list[str]:
    """Runs what is missing in `out` and writes the study's tables there, anew after each run.

    Args:
        out: a folder: `runs/`, `logs/`, `study.md`, `study.html`, `study.png`, `study.svg`.
        size: local processes at a time.
        launcher: `submitit_slurm` or `submitit_local`, to let Hydra's launcher run the jobs instead.
        settings: the launcher's, such as `hydra.launcher.partition=gpu`.
        only: patterns of the cells to run, such as `byol*`; the tables show what is there of the others.

    Returns:
        The names of the runs that failed.

    Raises:
        ConfigError: a cell that cannot work, or a folder that is in use; nothing has been trained then.
        KeyboardInterrupt, SystemExit: after Ctrl-C, after SIGTERM (143); the runs have saved and ended.
    """
    check_matplotlib()
    if launcher:
        check_launcher(launcher)
    wanted = pick(study, only)
    check(study)
    out = Path(out)
    with _lock(out) as lock:
        jobs = jobs_of(study, out)
        states = {job.name: job.state() for job in jobs}
        todo = [job for job in jobs if states[job.name] in ("begun", "missing") and job.cell.name in wanted]
        failed = {job.name: "another process is running it" for job in jobs if states[job.name] == "running"}
        done = list(states.values()).count("done")
        print(f"{len(jobs)} runs: {done} done, {len(todo)} to do; logs in {out / 'logs'}", flush=True)
        with _signals() as caught:
            if todo:
                pool = ClusterPool(todo, out, lock, launcher, settings) if launcher else LocalPool(todo, size, lock)
                try:
                    _work(study, jobs, pool, caught, failed)
                except BaseException:
                    pool.stop()
                    raise
            page = write_tables(study, jobs, out, failed)
        print(page.with_suffix(".md").read_text(encoding="utf-8").partition("\n![")[0])
        print(f"table and plot: {page.resolve()}", flush=True)
    if caught:
        print("stopped; the same command goes on from here", flush=True)
        raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(143)
    return list(failed)


def _work(study: Study, jobs: Sequence[Job], pool: Any, caught: Sequence[int], failed: dict[str, str]) -> None:
    """Runs the pool until it is empty; adds name -> reason of what failed to `failed`."""
    began, total, ended, told = time.monotonic(), pool.total, 0, 0
    while pool.busy:
        for job, code in pool.poll():
            if code is None:
                print(f"{'':9} start   {job.name}", flush=True)
                continue
            if caught and code in STOPPED:
                print(f"{'':9} stopped {job.name}", flush=True)
                continue
            ended += 1
            reason = _reason(job, code)
            if reason:
                failed[job.name] = reason
            left = (time.monotonic() - began) / ended * (total - ended)
            rest = f"   about {duration(left)} left" if ended < total else ""
            what = f"failed  {job.name}: {reason}" if reason else f"done    {job.name}   {_score(study, job)}"
            print(f"{f'[{ended}/{total}]':>9} {what}{rest}", flush=True)
            write_tables(study, jobs, job.out, failed)
        if len(caught) > told:
            told = len(caught)
            print("stopping: the runs save and end; once more kills them", flush=True)
            pool.stop(kill=told > 1)
        time.sleep(0.1)


def _reason(job: Job, code: int) -> str:
    """Why an ended run failed; empty if it did not."""
    if code == 0:
        if job.state() == "done":
            return ""
        changed = job.differs(job.begun()[0].args) if job.begun() else []
        return f"it ran with another configuration: {', '.join(changed[:3])}" if changed else "it left no result"
    lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n") if job.log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")
    said = last.removeprefix("solo-ext: ").removeprefix("error: ")
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (f" after: {said}" if said else "")
    return said or f"ended with exit status {code}"


def _score(study: Study, job: Job) -> str:
    run = job.result()
    metrics = [*(metric.metric for metric in study.metrics.values()), *study.curves]
    values = {name: run.last(name) for name in dict.fromkeys(metrics)}
    shown = [f"{name} {value:.4g}" for name, value in values.items() if value is not None]
    seconds = (run.summary or {}).get("seconds")
    return "   ".join([*shown[:3], *([duration(seconds)] if seconds else [])])


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 5 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[RunLock]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = RunLock(out)
        free = lock.take()
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error.strerror}") from error
    if not free:
        raise ConfigError(f"--out: {out} is in use by a study that has not ended, or by one of its runs")
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, instead of being ended by them."""
    caught: deque[int] = deque()
    before = {
        number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
