"""One process at a time in a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from solo_ext.errors import ConfigError, naming
from solo_ext.files import remove


class RunLock:
    """Marks a folder as in use, so that no two jobs of one configuration write into it; ends with the process."""

    file: TextIO

    def __init__(self, folder: Path, shared: bool = False):
        self.path, self.shared = folder / ".lock", shared

    def take(self) -> bool:
        """Whether the lock is ours now; True as well where the file system has no locks."""
        self.file = open(self.path, "a")  # noqa: SIM115, held open for the run
        try:
            fcntl.flock(self.file, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            return False
        except OSError:
            pass
        return True

    def release(self) -> None:
        if not self.shared:  # else the others hold that very file
            remove(self.path)
        self.file.close()


@contextmanager
def held(folder: Path, key: str, busy_key: str, owner: str, shared: bool = False) -> Iterator[RunLock]:
    """Makes `folder`, unless it exists, and holds its lock; `shared`: together with others who share it.

    ConfigError, naming `key`, if the folder cannot be made; naming `busy_key`, if `owner` is working in it.
    """
    lock = RunLock(folder, shared)
    with naming(f"{key}: {folder} cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
        ours = lock.take()
    if not ours:
        raise ConfigError(f"{busy_key}: {folder} is in use by {owner}")
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is inside; does nothing where the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
