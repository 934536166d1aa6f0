"""Where the time of a training goes."""

import re
import time
from collections import defaultdict
from functools import cache

from lightning.pytorch.profilers import Profiler

START = "start-up"
_ACTIONS = (  # of Lightning's profiling, and what each belongs to
    (r"run_training_batch", "steps"),
    (r".*\.train_dataloader_next", "waiting for images"),
    (r".*\.val_next|.*\.validation_step", "validation"),
    (r"\[Callback\](\w+).*", r"\1"),
)


@cache
def _part(action: str) -> str | None:
    return next((re.sub(pattern, part, action) for pattern, part in _ACTIONS if re.fullmatch(pattern, action)), None)


class Shares(Profiler):
    """Adds up the seconds of the host by part of a training: start-up, steps, waiting for images, validation, and each
    callback by its class, without those nested in it; on a GPU, work counts where the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)  # of each part
        self._open: list[str | None] = []  # the parts of the actions that are going on
        self._began = self._since = time.perf_counter()

    def start(self, action_name: str) -> None:
        part = _part(action_name)
        self._count()
        if part == "steps" and part not in self.seconds:
            self.seconds[START] = self._since - self._began - sum(self.seconds.values())
        self._open.append(part or (self._open[-1] if self._open else None))

    def stop(self, action_name: str) -> None:
        self._count()
        self._open.pop()

    def _count(self) -> None:
        """Gives the time since the last action to the innermost part."""
        now = time.perf_counter()
        if self._open and self._open[-1]:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
