"""Running what a study lacks: each cell and seed is a normal, resumable run in a process of its own."""

import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from solo_ext.errors import require
from solo_ext.runs.comparison import differences
from solo_ext.runs.locks import held
from solo_ext.runs.run import Run
from solo_ext.schema import OneOf
from solo_ext.studies.pool import LAUNCHERS, STOPPED, LocalPool, SubmititPool, handling, refuse_orphans
from solo_ext.studies.rows import Job
from solo_ext.studies.study import Study
from solo_ext.studies.table import write_tables
from solo_ext.text import duration, hanging


def dry_run(study: Study, out: Path, only: Sequence[str]) -> None:
    """Prints each run, of the cells that match `only`, with its recipe, what it changes there, and its state."""
    cells = study.pick(only)
    study.check(build=False)
    jobs = [job for job in study.jobs(out) if job.cell.name in cells]
    width = max(len(job.name) for job in jobs)
    for job in jobs:
        recipe = "/".join(job.cell.recipe.with_suffix("").parts[-2:])
        row = f"{job.name:<{width}}  {job.state():<7}  {recipe}  {shlex.join(job.cell.overrides)}"
        print(hanging(row.rstrip()))
    print(f"{len(jobs)} runs of {len(cells)} cells x {len(study.seeds)} seeds, in {out}")


def run_study(
    study: Study,
    out: Path,
    size: int,
    launcher: str | None,
    settings: Sequence[str],
    only: Sequence[str],
    share: tuple[int, int] = (0, 1),
) -> list[str]:
    """Runs what is missing in `out`, with the tables written anew after each run; returns the names of failed runs.

    size: local processes at a time. launcher: `submitit_slurm` or `submitit_local`, if submitit is to run the jobs.
    settings: the launcher's, such as `hydra.launcher.partition=gpu`.
    only: patterns of the cells to run, such as `byol*`; the tables show what is there of the others.
    share: (i, n): of these runs the i-th of n shares; n studies may then work in `out`.

    Raises ConfigError, before anything is trained, for a cell that cannot work or a folder that is in use; after Ctrl-C
    KeyboardInterrupt, after SIGTERM SystemExit (143), when the runs have saved and ended.
    """
    for package in ("matplotlib", "scipy"):
        require(package, "a study", "viz")
    if launcher:
        OneOf(LAUNCHERS).check(launcher, "--launcher")
        require("submitit", f"--launcher {launcher}", "slurm")
    cells = study.pick(only)
    study.check()
    caught: list[int] = []
    with held(out, "--out", "--out", "a study that has not ended, or by one of its runs", share[1] > 1) as lock:
        refuse_orphans(out)
        jobs = study.jobs(out)
        states = {job.name: job.state() for job in jobs}
        mine = [job for job in jobs if job.cell.name in cells][share[0] :: share[1]]
        todo = [job for job in mine if states[job.name] in ("begun", "missing")]
        failed = {job.name: "another process is running it" for job in mine if states[job.name] == "running"}
        done = list(states.values()).count("done")
        print(f"{len(jobs)} runs: {done} done, {len(todo)} to do; logs in {out / 'logs'}", flush=True)
        with handling(lambda number, _: caught.append(number), signal.SIGINT, signal.SIGTERM):
            if todo:
                (out / "logs").mkdir(exist_ok=True)
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
    study: Study, jobs: Sequence[Job], pool: LocalPool | SubmititPool, caught: Sequence[int], failed: dict[str, str]
) -> None:
    """Runs the pool until it is empty; adds name -> reason of what failed to `failed`."""
    began, total, ended, stops = time.monotonic(), pool.total, 0, 0
    while pool.busy:
        for job, code in pool.poll():
            stopped = bool(caught) and code in (STOPPED, -signal.SIGTERM)
            if code is None or stopped:
                print(f"{'':9} {'stopped' if stopped else 'start  '} {job.name}", flush=True)
                continue
            ended += 1
            if run := job.result() if code == 0 else None:
                what = f"done    {job.name}   {_score(study, run)}"
            else:
                failed[job.name] = _reason(job, code)
                what = f"failed  {job.name}: {failed[job.name]}"
            left = (time.monotonic() - began) / ended * (total - ended)
            rest = f"   about {duration(left)} left" if left else ""
            print(f"{f'[{ended}/{total}]':>9} {what}{rest}", flush=True)
            write_tables(study, jobs, job.out, failed)
        if len(caught) > stops:
            stops = len(caught)
            print("stopping: the runs save and end; once more kills them", flush=True)
            pool.stop(kill=stops > 1)
        time.sleep(pool.pause)


def _reason(job: Job, code: int) -> str:
    """Why an ended run left no result."""
    if code == 0:
        changed = next((differences(run.args, job.config) for run in job.tries()), [])
        return f"it ran with another configuration: {', '.join(changed[:3])}" if changed else "it left no result"
    lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n") if job.log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")
    message = last.removeprefix("solo-ext: ").removeprefix("error: ")
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (f" after: {message}" if message else "")
    return message or f"ended with exit status {code}"


def _score(study: Study, run: Run) -> str:
    """The first metrics of an ended run, and how long it took."""
    metrics = dict.fromkeys([*(reading.metric for reading in study.metrics.values()), *study.curves])
    values = {name: value for name in metrics if (value := run.last(name)) is not None}
    texts = [f"{name} {value:.4g}" for name, value in values.items()][:3]
    texts += [duration(seconds)] if (seconds := run.summary.get("seconds")) else []
    return "   ".join(texts)
