"""The run folder, `<dir>/<method>/<run id>`: its files, reading and writing them. Imports no torch."""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from solo_ext.errors import CheckpointError, SoloExtError, naming
from solo_ext.files import log, read_json, sha256, write_json
from solo_ext.runs.comparison import flatten
from solo_ext.runs.evaluations import Result, departures, read_results
from solo_ext.runs.layouts import current_config
from solo_ext.runs.locks import RunLock, held, one_at_a_time
from solo_ext.runs.metrics import Metrics, is_number
from solo_ext.text import nearest

ARGS, METRICS, RESULT, ENVIRONMENT = "args.json", "metrics.csv", "result.json", "environment.json"
EVALUATIONS = LINEAR, KNN, DETECTION, QUALITY = "linear.json", "knn.json", "detection.json", "quality.json"
COMMAND = "SOLO_EXT_COMMAND"  # in the environment of a study's process: what it runs, as somebody would type it
WALL = "wall_seconds"  # in result.json: of the process of a study that did all of a run
FILTERS = "filters.csv"  # single filters, step by step
RECORDS = "checkpoints.json"  # epoch, step, SHA-256 and size of the checkpoints beside it
WEIGHTS = "model.safetensors"  # in place of checkpoints, in the folder of an exported run

UNTRAINED = "untrained"  # <dir>/untrained/<id>: the evaluations of an encoder as it was initialised
CLASSIFIERS, DETECTORS = "linear", "detection"  # <dir>/linear/<id>, whose results are in their encoder's linear.json
_PLACE = re.compile(r"-ep=(\d+)(?:-step=(\d+))?\.ckpt$")


@dataclass(frozen=True)
class RunResult:
    """What a run left behind in its folder `dir`: the last value of everything logged, and, of this process only, the
    wall-clock time, the median training throughput, and the seconds that each part of the training took."""

    dir: Path
    checkpoint: Path | None
    metrics: dict[str, float]
    seconds: float
    images_per_s: float | None
    parts: dict[str, float] = field(default_factory=dict)


def _json(name: str, **parts: type) -> cached_property[dict[str, Any]]:
    return cached_property(lambda run: read_json(run.dir / name, **parts) or {})


class Run:
    """One run folder. Its files are read when they are first used; a damaged one raises CheckpointError."""

    def __init__(self, folder: str | Path):
        self.dir = Path(folder)
        self.id = self.dir.name
        self.untrained = self.dir.parent.name == UNTRAINED

    @classmethod
    def new(cls, base: Path) -> "Run":
        """A run below `base` with an unused id; its folder is not made yet."""
        while (folder := base / secrets.token_hex(4)).exists():  # unseeded: two runs of one seed are two runs
            pass
        return cls(folder)

    @property
    def method(self) -> str:
        """`untrained`, or the configuration's `method`, or else the name of the folder above."""
        return UNTRAINED if self.untrained else str(self.args.get("method") or self.dir.parent.name)

    @property
    def name(self) -> str | None:
        name = self.args.get("name")
        return None if name is None else str(name)

    # What the files say: {} without a file.

    args = _json(ARGS)  # the resolved configuration
    environment = _json(ENVIRONMENT)  # what the last process ran on; `before`: those that it continued
    summary = _json(RESULT)  # seconds, images_per_s, ... of a run that has ended

    @property
    def config(self) -> dict[str, Any] | None:
        """`args` under the current keys, also for solo-learn's older runs; None without args.json."""
        return current_config(self.args) if self.args else None

    @property
    def resumed(self) -> bool:
        return bool(self.environment.get("before"))

    @property
    def finished(self) -> bool:
        return (self.dir / RESULT).is_file()

    @property
    def running(self) -> bool:
        """Whether a process is working in it."""
        lock = RunLock(self.dir)
        if not lock.path.exists():
            return False
        ours = lock.take()
        lock.file.close()
        return not ours

    @property
    def state(self) -> str:
        """`finished`, `running`, or `stopped`, which has a checkpoint to go on from, or `began`, which has none."""
        if self.finished:
            return "finished"
        return "running" if self.running else "stopped" if self.checkpoints else "began"

    @property
    def progress(self) -> float:
        """How many epochs have begun."""
        return max(self.metrics.epoch_ends, default=-1) + 1

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(self.dir / METRICS)

    @cached_property
    def columns(self) -> list[str]:
        """The names of the logged metrics, without Lightning's `_step` and `_epoch`."""
        return list(dict.fromkeys(c.removesuffix("_step").removesuffix("_epoch") for c in self.metrics))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three arrays [n] of what was logged as `name`, or else as `name_epoch`, or else as `name_step`.

        These are the steps, counted from 0; the epochs done after these steps, with fractions (NaN if no epoch was
        logged); and the values.
        """
        column = next((c for c in (name, f"{name}_epoch", f"{name}_step") if c in self.metrics), name)
        steps, values = np.array(self.metrics.get(column, []), dtype=float).reshape(-1, 2).T
        if not self.metrics.epoch_ends:
            return steps, np.full_like(steps, np.nan), values
        epochs = sorted(self.metrics.epoch_ends)
        ends = np.maximum.accumulate([self.metrics.epoch_ends[epoch] + 1 for epoch in epochs])
        return steps, np.interp(steps + 1, [0, *ends], [0, *(epoch + 1 for epoch in epochs)]), values

    def means(self, names: Sequence[str], epochs: Sequence[int]) -> np.ndarray:
        """The mean of what was logged as any of `names` in each of `epochs`, counted from 1; NaN where nothing was."""
        series = [self.series(name)[1:] for name in names]
        logged = [[v[(e > epoch - 1 + 1e-9) & (e <= epoch + 1e-9)] for e, v in series] for epoch in epochs]
        together = [np.concatenate([np.zeros(0), *parts]) for parts in logged]
        return np.array([values.mean() if len(values) else np.nan for values in together])

    @property
    def last_metrics(self) -> dict[str, float]:
        """The last value of everything logged."""
        return {name: value for name in self.columns if (value := self.last(name)) is not None}

    def last(self, name: str) -> float | None:
        """The last value of `series(name)`, which may be NaN; None if there is none."""
        values = self.series(name)[2]
        return float(values[-1]) if len(values) else None

    # Evaluations.

    @cached_property
    def evaluations(self) -> dict[str, list[Result]]:
        """File name -> all results in it, the latest last."""
        return {name: read_results(self.dir / name) for name in EVALUATIONS}

    def standard(self, name: str, wanted: Mapping[str, Any] | None = None, distance: str = "cosine") -> Result:
        """The result in the file `name` that stands for the run: by the standard protocol, on the run's own data, and
        with `wanted` in it; {} if there is none.

        Of several, that of the newest checkpoint; of those by kNN, of backbone features, by `distance`, with T near
        0.07; then by the method's own recipe, with augmentation, and the latest.
        """
        facts = flatten([self.config or {}, self.environment])
        own, share = (facts.get(f"0.data.{key}") for key in ("dataset", "val_fraction"))
        images = None if share else facts.get("1.data.val.fingerprint")

        def stands(protocol: dict[str, Any]) -> bool:
            away, theirs = departures(protocol), protocol.get("data.val.fingerprint")
            away = {key: value for key, value in away.items() if key != "data.val_fraction" or value != share}
            same = protocol.get("data.dataset", own) == own or own is None
            if own == "custom" and theirs and images:  # elsewhere the name says which images
                same = theirs == images
            return same and not away and all(protocol.get(key) == value for key, value in (wanted or {}).items())

        def rank(result: Result) -> tuple:
            protocol = result["protocol"]
            T = protocol.get("T")
            near = -abs(T - 0.07) if is_number(T) else -float("inf")
            knn = protocol.get("features", "backbone") == "backbone", protocol.get("distance") == distance, near
            place = place_of(Path(str(protocol.get("checkpoint"))))
            return place, knn, bool(protocol.get("recipe")), bool(protocol.get("augmented"))

        return max((x for x in reversed(self.evaluations[name]) if stands(x["protocol"])), key=rank, default={})

    def evaluated(self, name: str) -> Result:
        """The latest result of the evaluation `name` of the newest checkpoint; {} if there is none."""
        rows = [row for rows in self.evaluations.values() for row in rows if row.get("name") == name]
        newest = self.checkpoints[0].name if self.checkpoints else WEIGHTS
        return next((row for row in reversed(rows) if row["protocol"].get("checkpoint") == newest), {})

    def knn_result(self, k: int, distance: str = "cosine") -> Result:
        """The standard result for k neighbours."""
        return self.standard(KNN, {"k": k}, distance)

    # Checkpoints.

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoint files, newest first."""
        return sorted(self.dir.glob("*.ckpt"), key=lambda file: (place_of(file), saved_at(file)), reverse=True)

    def checkpoint_path(self, name: str, epoch: int, step: int | None = None) -> Path:
        """The path of the checkpoint at the end of an epoch, counted from 0, or after step `step` of it."""
        return self.dir / f"{name}-{self.id}-ep={epoch}{'' if step is None else f'-step={step}'}.ckpt"

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """File name -> {epoch, step, sha256, size} of the recorded checkpoints that exist."""
        path = self.dir / RECORDS
        try:
            recorded = read_json(path) or {}
            return {name: dict(entry) for name, entry in recorded.items() if (self.dir / name).is_file()}
        except (ValueError, TypeError):
            log.warning("%s is damaged; the checkpoints beside it are read without their checksums", path)
            return {}

    @records.setter
    def records(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        write_json(self.dir / RECORDS, entries)

    def sha256(self, name: str) -> str:
        """That of the checkpoint `name`, recorded or computed."""
        return self.records.get(name, {}).get("sha256") or sha256(self.dir / name)

    # Writing.

    @contextmanager
    def in_use(
        self, args: Mapping[str, Any], environment: Mapping[str, Any], begun: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Makes the folder unless it exists, locks it as `held` does, and writes what it holds from the start.

        A new folder is removed if the run fails before `begun()`, or by a user's mistake before a checkpoint.
        """
        new_folders = [path for path in (self.dir, *self.dir.parents) if not path.exists()]
        with held(self.dir, "checkpoint.dir", "resume_from_checkpoint", "a run that has not ended"):
            try:
                with suppress(CheckpointError):
                    if last := read_json(self.dir / ENVIRONMENT):  # of the process that this one continues
                        environment = {**environment, "before": [*last.pop("before", []), last]}
                write_json(self.dir / ARGS, args)
                write_json(self.dir / ENVIRONMENT, environment)
                (self.dir / RESULT).unlink(missing_ok=True)
                yield
            except BaseException as error:
                # a user's mistake leaves nothing that cannot be resumed; other failures leave their metrics
                if new_folders and not (begun() and (self.checkpoints or not isinstance(error, SoloExtError))):
                    shutil.rmtree(self.dir, ignore_errors=True)
                    with suppress(OSError):
                        for parent in new_folders[1:]:
                            parent.rmdir()
                raise

    def finish(self, result: RunResult) -> None:
        """Marks the run as finished."""
        write_json(self.dir / RESULT, asdict(result))

    def add_results(self, name: str, results: Sequence[Result], args: Mapping[str, Any] | None = None) -> None:
        """Adds to the file `name`, one of `EVALUATIONS`, in the place of results of the very same protocol only.

        With `args`, of which args.json is made, the folder may be new. CheckpointError if it cannot be written.
        """
        protocols = [result["protocol"] for result in results]
        with naming(f"{self.dir} cannot be written", error=CheckpointError):
            if args is not None:
                self.dir.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(self.dir):
                if args is not None:
                    write_json(self.dir / ARGS, args)
                others = (old for old in read_results(self.dir / name) if old["protocol"] not in protocols)
                write_json(self.dir / name, {"results": [*others, *results]})


def place_of(path: Path) -> tuple[int, float]:
    """(N, step inside the epoch) of `...-ep=N.ckpt` (the end of epoch N: step infinity) or `...-ep=N-step=S.ckpt`."""
    match = _PLACE.search(path.name)
    return (int(match[1]), float(match[2] or "inf")) if match else (-1, 0.0)


def saved_at(path: Path) -> float:
    """The time at which the file was written, in seconds; 0 if it has been removed in the meantime."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def find_run(path: str | Path) -> Run:
    """The one run at or below `path`; CheckpointError if there is none, or several."""
    run, *others = find_runs(path)
    if others:
        raise CheckpointError(f"{path} holds {1 + len(others)} runs; name one of them, such as {run.dir}")
    return run


def find_runs(path: str | Path) -> list[Run]:
    """The run in the folder `path`, else those below it, by name, without linear classifiers; if there are none, a
    CheckpointError names the nearest."""
    path = Path(path)
    heads = CLASSIFIERS, DETECTORS
    if folders := [folder for folder in _walk(path) if folder == path or folder.parent.name not in heads]:
        return [Run(folder) for folder in folders]
    if path.is_file():
        problem = "is a file, not a run folder"
    elif path.is_dir():
        problem = f"holds no run folder, which would have {ARGS} and {METRICS}"
    else:
        problem = "does not exist"
    above = next((parent for parent in path.parents if parent.is_dir()), path)
    near = list(islice(_walk(above, depth=3), 1000)) if above != Path(above.anchor) else []
    raise CheckpointError(
        f"{path} {problem}{nearest(str(path), near) or (f'; the nearest run is {near[0]}' if near else '')}"
    )


def _walk(root: Path, depth: int | None = None) -> Iterator[Path]:
    """The run folders at or below `root`, at most `depth` levels down; nothing below a run is one."""
    for folder, children, files in os.walk(root):
        here = Path(folder)
        children[:] = sorted(child for child in children if not child.startswith("."))
        is_run = ARGS in files or METRICS in files
        if is_run:
            yield here
        if is_run or len(here.relative_to(root).parts) == depth:
            children.clear()
