"""One run of a study as a job of Hydra's launcher: `python -m solo_ext.studies.sweep --multirun folder=X job=0,1`."""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

JOBS = "jobs.json"  # [{"words": command line after `solo-ext`, "log": file}, ...]
STOP = "stop"  # while it is there, no job starts


@dataclass
class Config:
    """folder: where `jobs.json` is. job: the number of one of them."""

    folder: str = MISSING
    job: int = MISSING


ConfigStore.instance().store("study_sweep", Config)


def start(words: Sequence[str], log: str | Path, **options: Any) -> subprocess.Popen:
    """`solo-ext` with `words` in a process and session of its own, whose output is added to the file `log`."""
    command = [sys.executable, "-m", "solo_ext", *words]
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        print(f"$ {shlex.join(['solo-ext', *words])}    # {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file, flush=True)
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options
        )


def work(folder: Path, number: int) -> None:
    """Runs a job and says so in `<number>.json`: null while it runs, then its exit status.

    A SIGTERM is passed on to the run, which saves and ends. So is the end of the job's time, after which the launcher
    may queue the job again; it has no exit status then.
    """
    process: subprocess.Popen | None = None

    def stop(*_: Any) -> None:
        if process:
            process.terminate()

    def say(code: int | None) -> None:
        temporary = folder / f".{number}.tmp"
        temporary.write_text(json.dumps(code), encoding="utf-8")
        temporary.replace(folder / f"{number}.json")

    signal.signal(signal.SIGTERM, stop)
    job = json.loads((folder / JOBS).read_text(encoding="utf-8"))[number]
    say(None)
    process = start(job["words"], job["log"])
    try:
        if (folder / STOP).exists():
            stop()
        say(process.wait())
    except SystemExit:  # queued again
        raise
    except BaseException:  # out of time for good
        stop()
        say(process.wait())
        raise
    finally:
        stop()
        process.wait()


@hydra.main(version_base="1.2", config_path=None, config_name="study_sweep")
def main(cfg: Config) -> None:
    from solo_ext.studies import sweep  # by its own name, for the launcher pickles it

    sweep.work(Path(cfg.folder), cfg.job)


if __name__ == "__main__":
    main()
