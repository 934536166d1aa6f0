"""Files and folders that are written whole or not at all, JSON, SHA-256, and the processor's cores."""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from solo_ext.errors import CheckpointError, ConfigError, SoloExtError, naming, reason

log = logging.getLogger("solo_ext")


@contextmanager
def replacing(
    path: Path,
    error: type[SoloExtError] = CheckpointError,
    opener: Callable[[Path], BinaryIO] = lambda path: open(path, "w+b"),  # noqa: SIM115
) -> Iterator[BinaryIO]:
    """A file beside `path`, opened by `opener`, that becomes `path` once it is complete and on the disk.

    If anything fails it is removed, and `path` is unchanged; `error` is raised if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with opener(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as failure:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(failure, OSError):
            raise error(f"{path} cannot be written: {reason(failure)}") from failure
        raise


@contextmanager
def output(path: Path) -> Iterator[BinaryIO]:
    """`replacing` for what a command's --out names, in a folder that is made where there is none."""
    with naming(f"--out: {path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, ConfigError) as file:
            yield file


@contextmanager
def new_folder(path: Path, error: type[SoloExtError] = CheckpointError) -> Iterator[Path]:
    """An empty folder beside `path` that becomes `path` once it is complete and on the disk; removed if anything fails.

    `error` is raised if it cannot be written, or if `path` has appeared in the meantime.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    made = [parent for parent in path.parents if not os.path.lexists(parent)]
    try:
        with naming(f"{path} cannot be written", error=error):
            temporary.mkdir(parents=True)
            yield temporary
            for file in (*temporary.iterdir(), temporary):
                sync(file)
            os.rename(temporary, path)
            sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def remove(path: Path) -> None:
    """Removes a file that is in the way of nobody: where that fails, it stays, with a warning."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, reason(error))


def sync(path: Path) -> None:
    """Flushes the content of a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text`, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def json_text(value: Any) -> str:
    """`value` as our JSON files have it."""
    return json.dumps(value, indent=2, default=str) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by the JSON of `value`, as `replacing` does."""
    write_text(path, json_text(value))


def read_bytes(path: Path) -> bytes | None:
    """The content of the file `path`, None without one; CheckpointError if it cannot be read."""
    with naming(f"{path} cannot be read", error=CheckpointError):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def read_json(path: Path, **parts: type) -> dict[str, Any] | None:
    """The JSON object in the file `path`, None without a file; `parts`: the types of keys that it may have.

    Raises CheckpointError if it cannot be read, or is not such an object.
    """
    if (text := read_bytes(path)) is None:
        return None
    with naming(f"{path} is damaged: it is not JSON", ValueError, RecursionError, error=CheckpointError):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    for key, kind in parts.items():
        if key in content and not isinstance(content[key], kind):
            actual = type(content[key]).__name__
            raise CheckpointError(f"{path} is damaged: its {key} is a {actual}, not a {kind.__name__}")
    return content


def cores() -> int:
    """Of the processor, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sha256(source: str | Path | BinaryIO, size: int = sys.maxsize) -> str:
    """SHA-256, in hexadecimal, of the first `size` bytes of a file; of an open one, from its current position."""
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return sha256(file, size)
    digest = hashlib.sha256()
    while block := source.read(min(1 << 20, size)):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
