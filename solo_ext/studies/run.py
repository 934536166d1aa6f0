"""Running what a study lacks: each cell and seed is a normal, resumable run in a process of its own."""

import contextlib
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from solo_ext.analysis.drawing import require_matplotlib
from solo_ext.errors import ConfigError
from solo_ext.runs.lock import RunLock, held
from solo_ext.studies.jobs import Job, check, jobs_of, pick
from solo_ext.studies.pool import STOPPED, LocalPool, SubmititPool, check_launcher, orphans
from solo_ext.studies.study import Study
from solo_ext.studies.table import write_tables
from solo_ext.text import duration


def dry_run(study: Study, out: str | Path, only: Sequence[str] = ()) -> None:
    """Prints each run, of the cells that match `only`, with its recipe, what it changes there, and its state."""
    chosen = pick(study, only)
    check(study, build=False)
    jobs = [job for job in jobs_of(study, Path(out)) if job.cell.name in chosen]
    width = max((len(job.name) for job in jobs), default=0)
    for job in jobs:
        recipe = "/".join(job.cell.recipe.with_suffix("").parts[-2:])
        print(f"{job.name:<{width}}  {job.state():<7}  {recipe}  {shlex.join(job.cell.overrides)}".rstrip())
    print(f"{len(jobs)} runs of {len(chosen)} cells x {len(study.seeds)} seeds, in {out}")


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
        launcher: `submitit_slurm` or `submitit_local`, to let submitit run the jobs instead.
        settings: the launcher's, such as `hydra.launcher.partition=gpu`.
        only: patterns of the cells to run, such as `byol*`; the tables show what is there of the others.

    Returns:
        The names of the runs that failed.

    Raises:
        ConfigError: a cell that cannot work, or a folder that is in use; nothing has been trained then.
        KeyboardInterrupt, SystemExit: after Ctrl-C, after SIGTERM (143); the runs have saved and ended.
    """
    require_matplotlib("a study's plot")
    if launcher:
        check_launcher(launcher)
    chosen = pick(study, only)
    check(study)
    out = Path(out)
    with _lock(out) as lock:
        jobs = jobs_of(study, out)
        states = {job.name: job.state() for job in jobs}
        todo = [job for job in jobs if states[job.name] in ("begun", "missing") and job.cell.name in chosen]
        failed = {job.name: "another process is running it" for job in jobs if states[job.name] == "running"}
        done = list(states.values()).count("done")
        print(f"{len(jobs)} runs: {done} done, {len(todo)} to do; logs in {out / 'logs'}", flush=True)
        with _signals() as caught:
            if todo:
                pool = SubmititPool(todo, out, launcher, settings) if launcher else LocalPool(todo, size, lock)
                try:
                    _work(study, jobs, pool, caught, failed)
                except BaseException:
                    pool.stop()
                    raise
            page = write_tables(study, jobs, out, failed)
        print(page.with_suffix(".md").read_text(encoding="utf-8").partition("\n![")[0])
        print(f"table and plot: {page.resolve()}", flush=True)
    if caught:
        print("stopped; the same command continues from here", flush=True)
        raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(STOPPED)
    return list(failed)


def _work(
    study: Study,
    jobs: Sequence[Job],
    pool: LocalPool | SubmititPool,
    caught: Sequence[int],
    failed: dict[str, str],
) -> None:
    """Runs the pool until it is empty; adds name -> reason of what failed to `failed`."""
    began, total, ended, stops = time.monotonic(), pool.total, 0, 0
    while pool.busy:
        for job, code in pool.poll():
            if code is None:
                print(f"{'':9} start   {job.name}", flush=True)
                continue
            if caught and code in (STOPPED, -signal.SIGTERM):
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
        if len(caught) > stops:
            stops = len(caught)
            print("stopping: the runs save and end; once more kills them", flush=True)
            pool.stop(kill=stops > 1)
        time.sleep(pool.pause)


def _reason(job: Job, code: int) -> str:
    """Why an ended run failed; empty if it did not."""
    if code == 0:
        if job.state() == "done":
            return ""
        changed = next(map(job.differs, job.tries()), [])
        return f"it ran with another configuration: {', '.join(changed[:3])}" if changed else "it left no result"
    lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n") if job.log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")
    message = last.removeprefix("solo-ext: ").removeprefix("error: ")
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (f" after: {message}" if message else "")
    return message or f"ended with exit status {code}"


def _score(study: Study, job: Job) -> str:
    run = job.result()
    if run is None:
        return ""
    metrics = [*(reading.metric for reading in study.metrics.values()), *study.curves]
    values = {name: run.last(name) for name in dict.fromkeys(metrics)}
    shown = [f"{name} {value:.4g}" for name, value in values.items() if value is not None]
    seconds = (run.summary or {}).get("seconds")
    return "   ".join([*shown[:3], *([duration(seconds)] if seconds else [])])


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[RunLock]:
    with held(out, "--out", "--out", "a study that has not ended, or by one of its runs") as lock:
        for job in orphans(out):
            raise ConfigError(f"--out: {out} is in use by submitit's job {job}, which has not ended")
        yield lock


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, instead of being ended by them."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
