"""A folder that one process works in at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from solo_ext.errors import ConfigError, reason


class RunLock:
    """Marks a folder as in use, so that no two jobs of one configuration write into it; ends with the process."""

    file: TextIO

    def __init__(self, folder: Path):
        self.path = folder / ".lock"

    def take(self) -> bool:
        """Whether the lock is ours now; True as well where the file system has no locks."""
        self.file = open(self.path, "a")  # noqa: SIM115, held open for the run
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            return False
        except OSError:
            pass
        return True

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()

    def free(self) -> bool:
        """Whether no process holds it."""
        if not self.path.exists():
            return True
        free = self.take()
        self.file.close()
        return free


@contextmanager
def held(folder: Path, key: str, busy_key: str, owner: str) -> Iterator[RunLock]:
    """Makes `folder`, unless it exists, and holds its lock.

    ConfigError, naming `key`, if the folder cannot be made; naming `busy_key`, if `owner` is working in it.
    """
    lock = RunLock(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = lock.take()
    except OSError as error:
        raise ConfigError(f"{key}: {folder} cannot be made: {reason(error)}") from error
    if not ours:
        raise ConfigError(f"{busy_key}: {folder} is in use by {owner}")
    try:
        yield lock
    finally:
        lock.release()
