"""Where the runs of a study are processed: on this machine, or by Hydra's submitit launcher on a cluster."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from solo_ext.errors import ConfigError
from solo_ext.files import write_json
from solo_ext.runs.lock import RunLock
from solo_ext.schema import check_choice
from solo_ext.studies.sweep import JOBS, STOP, start
from solo_ext.training.compose import assign

LAUNCHERS = ("submitit_slurm", "submitit_local")
NFS = 60  # seconds until a shared file system shows what another machine has written


class LocalPool:
    """Runs `jobs` (with `words` and `log`), `size` at a time.

    A process holds the study's lock as well, so that the folder stays in use while any of them lives; and it has a
    session of its own, so that Ctrl-C reaches it only through `stop`.
    """

    def __init__(self, jobs: Sequence[Any], size: int, lock: RunLock):
        self.total, self.waiting, self.lock = len(jobs), deque(jobs), lock
        self.slots: list[tuple[Any, subprocess.Popen] | None] = [None] * min(size, len(jobs))

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.slots)

    def poll(self) -> Iterator[tuple[Any, int | None]]:
        """(job, None) for each that was started, (job, exit status) for each that has ended since the last call."""
        for i, slot in enumerate(self.slots):
            if slot and (code := slot[1].poll()) is not None:
                self.slots[i] = None
                yield slot[0], code
            if self.slots[i] is None and self.waiting:
                job = self.waiting.popleft()
                environment = {**os.environ, **self._share(i)}
                process = start(job.words, job.log, env=environment, pass_fds=[self.lock.file.fileno()])
                self.slots[i] = job, process
                yield job, None

    def _share(self, slot: int) -> dict[str, str]:
        """The cores and GPUs of a slot, as environment variables."""
        n = len(self.slots)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // n))}
        gpus = torch.cuda.device_count()
        if n > 1 and gpus > 1:
            names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
            each = max(1, gpus // n)
            first = slot * each % gpus
            share["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + each])
        return share

    def stop(self, kill: bool = False) -> None:
        """Lets the processes save and end, or kills them; nothing is started any more."""
        self.waiting.clear()
        for _, process in filter(None, self.slots):
            if kill:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.terminate()


class ClusterPool:
    """Hands all `jobs` to Hydra's launcher at once: `solo_ext.studies.sweep`, whose parameter is the job's number."""

    def __init__(self, jobs: Sequence[Any], out: Path, lock: RunLock, launcher: str, settings: Sequence[str]):
        self.total, self.jobs, self.launcher = len(jobs), dict(enumerate(jobs)), launcher
        self.folder = out.absolute() / "sweep"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.started: set[int] = set()
        self.patience: float | None = None
        write_json(self.folder / JOBS, [{"words": job.words, "log": str(job.log.absolute())} for job in jobs])
        # runs are resumable, so one that is out of time is queued again
        again = ["hydra.launcher.max_num_timeout=100"] if launcher == "submitit_slurm" else []
        words = [
            "--multirun",
            f"hydra/launcher={launcher}",
            assign("hydra.sweep.dir", self.folder),
            assign("folder", self.folder),
            *again,
            *settings,
            f"job={','.join(map(str, self.jobs))}",
        ]
        self.log = self.folder / "launcher.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "solo_ext.studies.sweep", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.file.fileno()],
            )

    @property
    def busy(self) -> bool:
        return bool(self.jobs) or self.process.poll() is None

    def poll(self) -> Iterator[tuple[Any, int | None]]:
        """As `LocalPool.poll`."""
        over = self.process.poll()
        said = {path.name for path in self.folder.iterdir()}
        for i, job in list(self.jobs.items()):
            if f"{i}.json" not in said:
                continue
            if i not in self.started:
                self.started.add(i)
                yield job, None
            code = json.loads((self.folder / f"{i}.json").read_text(encoding="utf-8"))
            if code is not None:
                del self.jobs[i]
                yield job, code
        if over is not None and self.jobs:
            if over and not self.started and not (self.folder / STOP).exists():
                raise ConfigError(f"--launcher {self.launcher}: {self._said()} (see {self.log})")
            now = time.monotonic()
            self.patience = self.patience or now + (NFS if over == 0 else 0)
            if now >= self.patience:  # the launcher waits for its jobs, so nobody will finish these
                yield from ((job, self._lost(job)) for job in self.jobs.values())
                self.jobs.clear()

    def _lost(self, job: Any) -> int:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a", encoding="utf-8") as log:
            log.write(f"the launcher ended before this run did, and said in {self.log}: {self._said()}\n")
        return 143 if (self.folder / STOP).exists() else 1

    def _said(self) -> str:
        """What the launcher said last, without Hydra's advice and the details of its messages."""
        lines = reversed(self.log.read_text(encoding="utf-8", errors="replace").split("\n"))
        told = (x for x in lines if x.strip() and not x.startswith((" ", "Set the environment variable")))
        return next(told, "nothing").strip().rstrip(".")

    def stop(self, kill: bool = False) -> None:
        """Cancels the jobs; those that run save and end."""
        (self.folder / STOP).touch()
        self.jobs = {i: job for i, job in self.jobs.items() if i in self.started}
        folder = self.folder / ".submitit"  # a folder for each job
        ids = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        if self.launcher == "submitit_slurm" and ids:
            subprocess.run(["scancel", *(["--signal=KILL"] if kill else []), *ids], check=False)
        elif self.launcher == "submitit_local":
            for name in filter(str.isdigit, ids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(name), signal.SIGKILL if kill else signal.SIGTERM)
        if kill or not ids:
            self.process.terminate()


def check_launcher(launcher: str) -> None:
    """Raises ConfigError unless `launcher` is one that is installed."""
    check_choice("--launcher", launcher, LAUNCHERS)
    try:
        metadata.version("hydra-submitit-launcher")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"--launcher {launcher} needs hydra-submitit-launcher, not installed here: pip install 'solo-ext[slurm]'"
        ) from None
