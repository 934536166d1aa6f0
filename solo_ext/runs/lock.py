"""A folder that one process works in at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from solo_ext.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """Marks a folder as in use, so that no two jobs of one configuration write into it; ends with the process."""

    def __init__(self, folder: Path):
        self.path = Path(folder) / ".lock"
        self.file: TextIO

    def take(self) -> bool:
        """Whether the lock is ours now; True as well where the file system has no locks."""
        self.file = open(self.path, "a")  # noqa: SIM115, held open for the run
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            return False
        except OSError:
            pass
        return True

    def release(self) -> None:
        """Lets others take it."""
        self.path.unlink(missing_ok=True)
        self.file.close()

    def free(self) -> bool:
        """Whether no process holds it."""
        if not self.path.exists():
            return True
        free = self.take()
        if free:
            self.file.close()
        return free


@contextmanager
def held(folder: Path, key: str, busy_key: str, busy: str) -> Iterator[RunLock]:
    """Makes `folder`, or takes the one that is there, and holds its lock.

    key, busy_key: what the user would change if it cannot be made, and if it is in use. busy: by whom it then is.

    Raises:
        ConfigError: it cannot be made, or another process works in it.
    """
    lock = RunLock(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = lock.take()
    except OSError as error:
        raise ConfigError(f"{key}: {folder} cannot be made: {error.strerror}") from error
    if not ours:
        raise ConfigError(f"{busy_key}: {folder} is in use by {busy}")
    try:
        yield lock
    finally:
        lock.release()
