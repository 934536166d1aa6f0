"""One run of a study in a process of its own, also as a job of submitit, which imports nothing else of this project."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STOPPED = 128 + signal.SIGTERM  # exit status of a run that was told to stop


def start(words: Sequence[str], log: str | Path, **options: Any) -> subprocess.Popen:
    """`solo-ext` with `words` in a process and session of its own, whose output is added to the file `log`."""
    command = [sys.executable, "-m", "solo_ext", *words]
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        print(f"$ {shlex.join(['solo-ext', *words])}    # {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file, flush=True)
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options
        )


class Command:
    """`start` as a job of submitit: told to stop, the run saves and ends; told twice, it is killed; when its time is
    nearly over, it saves and is queued again."""

    process: subprocess.Popen | None = None

    def __call__(self, words: Sequence[str], log: str) -> int:
        """The exit status of the run."""
        told: list[int] = []

        def stop(number: int, _: Any) -> None:
            told.append(number)
            if self.process is None:
                sys.exit(STOPPED)
            if len(told) > 1:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.terminate()

        signal.signal(signal.SIGTERM, stop)
        self.process = start(words, log)
        return self.process.wait()

    def checkpoint(self, words: Sequence[str], log: str) -> Any:
        """What submitit queues: the same command, once the run has saved."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):  # not `wait`, whose lock the interrupted `wait` holds
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Command(), words, log)
