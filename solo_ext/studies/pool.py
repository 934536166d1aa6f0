"""Where the runs of a study are executed: on this machine, or by submitit on a cluster.

A job of submitit imports this file, so it must not import torch or Hydra at the top.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solo_ext.errors import ConfigError, naming
from solo_ext.files import cores

if TYPE_CHECKING:
    from solo_ext.runs.locks import RunLock
    from solo_ext.studies.rows import Job

LAUNCHERS = ("submitit_slurm", "submitit_local", "slurm", "local")
LAUNCHER = "hydra.launcher."  # prefix of a launcher's settings
REQUEUES = 100  # of a run that is out of time: it is resumable
STOPPED = 128 + signal.SIGTERM  # exit status of a run that was told to stop


class LocalPool:
    """Runs `jobs`, `size` at a time.

    Each process holds the study's lock as well, so that the folder stays in use while any of them lives, and has a
    session of its own, so that Ctrl-C reaches it only through `stop`.
    """

    pause = 0.1  # seconds between two polls

    def __init__(self, jobs: Sequence["Job"], size: int, lock: "RunLock"):
        self.waiting, self.total, self.lock = deque(jobs), len(jobs), lock
        self.slots: list[tuple[Job, subprocess.Popen] | None] = [None] * min(size, len(jobs))

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.slots)

    def poll(self) -> Iterator[tuple["Job", int | None]]:
        """(job, None) for each that was started, (job, exit status) for each that has ended since the last call."""
        for i, slot in enumerate(self.slots):
            if slot and (code := slot[1].poll()) is not None:
                self.slots[i] = None
                yield slot[0], code
            if self.slots[i] is None and self.waiting:
                job = self.waiting.popleft()
                process = start(job.command, job.log, env=self._environment(i), pass_fds=[self.lock.file.fileno()])
                self.slots[i] = job, process
                yield job, None

    def _environment(self, slot: int) -> dict[str, str]:
        """The environment variables of a slot, with its share of the cores and GPUs."""
        import torch

        n, gpus = len(self.slots), torch.cuda.device_count()
        variables = {"OMP_NUM_THREADS": str(max(1, cores() // n)), **os.environ}
        if n > 1 and gpus > 1:
            names = variables.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
            each = max(1, gpus // n)
            first = slot * each % gpus
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + each])
        return variables

    def stop(self, kill: bool = False) -> None:
        """Lets the processes save and end, or kills them; nothing more is started."""
        self.waiting.clear()
        for _, process in filter(None, self.slots):
            if kill:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.terminate()


class SubmititPool:
    """Hands all `jobs` to submitit at once; its own files are in `<out>/submitit`."""

    pause = 1.0

    def __init__(self, jobs: Sequence["Job"], out: Path, launcher: str, settings: Sequence[str]):
        self.cluster, self.total, self.stopped = launcher.removeprefix("submitit_"), len(jobs), False
        folder = out.absolute() / "submitit"
        shutil.rmtree(folder, ignore_errors=True)
        with naming(f"--launcher {launcher}", RuntimeError, OSError):
            executor = self._executor(folder, settings)
            commands, logs = [job.command for job in jobs], [str(job.log.absolute()) for job in jobs]
            with handling(signal.SIG_IGN, signal.SIGINT):  # local jobs inherit it: Ctrl-C means `stop` for them too
                submitted = executor.map_array(Command(), commands, logs)
        self.jobs = list(zip(submitted, jobs, strict=True))
        self.started: set[str] = set()

    def _executor(self, folder: Path, settings: Sequence[str]) -> Any:
        from submitit import AutoExecutor

        from solo_ext.schema import plain
        from solo_ext.training.compose import overlay

        defaults = {"name": "solo-ext-study", "timeout_min": 60, "tasks_per_node": 1, "max_num_timeout": REQUEUES}
        values = plain(overlay(defaults, [text.lstrip("+").removeprefix(LAUNCHER) for text in settings]))
        requeues = {f"{self.cluster}_max_num_timeout": values.pop("max_num_timeout")}
        executor, general = AutoExecutor(folder, self.cluster, **requeues), AutoExecutor._valid_parameters()
        values = {key if key in general else f"{self.cluster}_{key}": value for key, value in values.items()}
        try:  # a run saves in the last 120 seconds of its time
            executor.update_parameters(**{"slurm_signal_delay_s": 120, **values})
        except (AssertionError, NameError, ValueError) as error:
            raise ConfigError(f"{LAUNCHER}*: {str(error).splitlines()[0].rstrip('.')}") from error
        return executor

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def poll(self) -> Iterator[tuple["Job", int | None]]:
        """As `LocalPool.poll`."""
        for submitted, job in list(self.jobs):
            if submitted.job_id not in self.started and submitted.paths.stdout.exists():
                self.started.add(submitted.job_id)
                yield job, None
            if submitted.done():
                self.jobs.remove((submitted, job))
                yield job, self._status(submitted, job)

    def _status(self, submitted: Any, job: "Job") -> int:
        if self.stopped and not submitted.paths.result_pickle.exists():
            return STOPPED
        try:
            return next((code for code in submitted.results() if code), 0)
        except RuntimeError:  # submitit's UncompletedJobError: out of memory or too often out of time, cancelled
            with open(job.log, "a", encoding="utf-8") as log:
                print(f"submitit's job {submitted.job_id} ended too early; see {submitted.paths.stderr}", file=log)
            return 1

    def stop(self, kill: bool = False) -> None:
        """Cancels the jobs; those that run save and end, or are killed."""
        self.stopped = True
        ids = [submitted.job_id for submitted, _ in self.jobs]
        self.jobs = [pair for pair in self.jobs if pair[0].job_id in self.started]
        if self.cluster == "slurm" and ids:
            subprocess.run(["scancel", *(["--signal=KILL"] if kill else []), *ids], check=False)
        for process in ids if self.cluster == "local" else ():  # which watches the job; twice kills
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGTERM)


def refuse_orphans(out: Path) -> None:
    """Raises ConfigError if submitit has queued or runs a job of a study in `out` whose own process was killed."""
    for file in (out.absolute() / "submitit").glob("*_submitted.pkl"):
        from submitit import SlurmJob

        name = file.name.removesuffix("_submitted.pkl")
        if any(file.parent.glob(f"{name}_*_result.pkl")):
            continue
        state = SlurmJob(file.parent, name).state if shutil.which("sacct") else ""
        command = Path("/proc", name, "cmdline")  # of a local job's process
        local = command.is_file() and b"submitit" in command.read_bytes()
        if local or state in ("PENDING", "RUNNING", "REQUEUED", "COMPLETING"):
            raise ConfigError(f"--out: {out} is in use by submitit's job {name}, which has not ended")


def start(command: Mapping[str, Any], log: str | Path, **options: Any) -> subprocess.Popen:
    """`solo_ext.cli.job` in a process and session of its own, whose output is added to the file `log`."""
    with open(log, "a", encoding="utf-8") as file:
        words, job = shlex.join(["solo-ext", *command["pretrain"]]), {**command, "began": time.time()}
        print(f"$ {words}    # {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file, flush=True)
        options |= {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen([sys.executable, "-m", "solo_ext.cli.job", json.dumps(job)], **options)


class Command:
    """`start` as a job of submitit: told to stop, the run saves and ends; told twice, it is killed; when its time is
    nearly over, it saves and is queued again."""

    process: subprocess.Popen | None = None

    def __call__(self, command: Mapping[str, Any], log: str) -> int:
        """The exit status of the run."""
        stops: list[int] = []

        def stop(number: int, _: Any) -> None:
            stops.append(number)
            if self.process is None:
                sys.exit(STOPPED)
            if len(stops) > 1:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.terminate()

        signal.signal(signal.SIGTERM, stop)
        # SLURM sends this to all processes of a job whose time is nearly over; the run inherits that it is ignored
        with handling(signal.SIG_IGN, signal.SIGUSR2):
            self.process = start(command, log)
        return self.process.wait()

    def checkpoint(self, command: Mapping[str, Any], log: str) -> Any:
        """What submitit queues: the same command, once the run has saved."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):  # not `wait`, whose lock the interrupted `wait` holds
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Command(), command, log)


@contextlib.contextmanager
def handling(handler: Any, *signals: signal.Signals) -> Iterator[None]:
    """Gives `signals` another handler for a while."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
