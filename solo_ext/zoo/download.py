"""One file from a URL or the disk: under its final name it is complete and verified, or it is not there."""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.client import responses
from pathlib import Path
from typing import BinaryIO
from urllib.request import url2pathname

import requests
import urllib3
from filelock import FileLock
from requests.exceptions import InvalidSchema, SSLError

from solo_ext import __version__, files
from solo_ext.errors import CheckpointError

log = logging.getLogger("solo_ext")

WAITS = (0.5, 1.0, 3.0, 8.0)  # seconds, after each attempt that brought nothing new; one more of these is the last
TIMEOUTS = (10, 60)  # seconds to connect, and without a byte
BLOCK = 1 << 14  # bytes; a connection that is cut loses at most so many


def download(source: str, target: Path, size: int, sha256: str, progress: Callable[[int], None] | None = None) -> None:
    """Makes `target` the file of `size` bytes and this SHA-256, unless it is already.

    The bytes are collected in `.<name>.<hash>.part` beside it, which a later call goes on with, and are hashed on the
    disk before they get their name. One process at a time downloads; the others wait, and find its file.

    Args:
        source: an https://, http:// or file:// URL, or a path.
        target: a damaged file of this name is removed, with a warning.
        sha256: in hexadecimal.
        progress: called with the number of bytes that have arrived, which falls where a source starts anew.

    Raises:
        CheckpointError: the source is not there, is another file, or falls silent; no room, no permission.
    """
    target = Path(target)
    part = target.with_name(f".{target.name}.{sha256[:16]}.part")

    try:
        if intact(target, size, sha256):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if intact(target, size, sha256):
                return
            if os.path.lexists(target):
                log.warning("%s is damaged; it is fetched again", target)
                target.unlink()
            try:
                part.touch()
                with open(part, "r+b") as file:
                    _collect(source, file, size, sha256, progress or (lambda count: None))
                os.replace(part, target)
                files.sync(target.parent)
            except OSError:
                part.unlink(missing_ok=True)
                raise
            finally:
                if part.exists() and not part.stat().st_size:
                    part.unlink()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from None


def intact(path: Path, size: int, sha256: str) -> bool:
    """Whether `path` is a file of `size` bytes and this SHA-256."""
    return path.is_file() and path.stat().st_size == size and files.sha256(path) == sha256


def _collect(source: str, file: BinaryIO, size: int, sha256: str, progress: Callable[[int], None]) -> None:
    """Brings `file` to `size` bytes of this SHA-256, all of them on the disk."""
    room, missing = shutil.disk_usage(file.name).free, size - file.seek(0, os.SEEK_END)
    if missing > room:
        raise CheckpointError(f"{file.name} needs {missing:,} bytes more, and its disk has {room:,}")
    for last in (False, True):
        at_once = _complete(source, file, size, progress)
        file.flush()
        os.fsync(file.fileno())
        if (found := files.sha256(file.name)) == sha256:
            return
        file.seek(0)
        seems = {b"<": " but seems to be a web page", b"{": " but seems to be JSON"}.get(file.read(64).lstrip()[:1], "")
        file.truncate(0)
        if at_once or last:
            raise CheckpointError(
                f"{_shown(source)} is not the file expected{seems}: SHA-256 {found[:12]}, not {sha256[:12]}"
            )
        log.warning("%s: the pieces of several attempts do not fit together; it is fetched anew", _shown(source))


def _complete(source: str, file: BinaryIO, size: int, progress: Callable[[int], None]) -> bool:
    """Appends to `file` what it lacks of `size` bytes; returns whether all of it came in one answer."""
    read = _reader(source)
    at_once, failures = False, 0
    best = have = file.seek(0, os.SEEK_END)
    while have < size:
        at_once, reason = False, "the answer ended early"
        try:
            for offset, data in read(have, size):
                at_once = at_once or not offset
                file.truncate(file.seek(offset))
                progress(offset + file.write(data[: size - offset]))
                if file.tell() == size:
                    break
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason = _reason(error)
        before, have = have, file.seek(0, os.SEEK_END)
        if have > best:
            best, failures = have, 0
        elif have <= before:  # between the two, a new start catches up
            if failures == len(WAITS):
                raise CheckpointError(
                    f"{_shown(source)}: {failures + 1} attempts brought nothing new ({reason}); "
                    f"the next download goes on after {have:,} of {size:,} bytes"
                )
            time.sleep(WAITS[failures])
            failures += 1
    return at_once


def _reader(source: str) -> Callable[[int, int], Iterator[tuple[int, bytes]]]:
    """Of `source`: (first byte wanted, size of the file) -> blocks, each with its offset, from there on or from 0."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return partial(_from_disk, Path(source))
    if scheme.lower() == "file":
        return partial(_from_disk, Path(url2pathname(rest.removeprefix("localhost"))))
    if scheme.lower() not in ("https", "http"):
        raise CheckpointError(f"{_shown(source)} is no https://, http:// or file:// URL, and no path")
    session = requests.Session()
    session.headers.update({"User-Agent": f"solo-ext/{__version__}", "Accept-Encoding": "identity"})
    if scheme.lower() == "https":
        del session.adapters["http://"]  # no redirect leads where others can listen
    return partial(_from_net, session, source)


def _from_disk(path: Path, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    try:
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        if (found := path.stat().st_size) != size:
            raise CheckpointError(f"{path} has {found:,} bytes, not the {size:,} expected")
        with open(path, "rb") as file:
            file.seek(start)
            while data := file.read(BLOCK):
                yield file.tell() - len(data), data
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _from_net(session: requests.Session, url: str, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    shown = _shown(url)
    try:
        wanted = {"Range": f"bytes={start}-"} if start else {}
        answer = session.get(url, headers=wanted, stream=True, timeout=TIMEOUTS)
    except InvalidSchema:
        raise CheckpointError(f"{shown} is redirected to an address without https, which is refused") from None
    except (OSError, ValueError) as error:
        if isinstance(error, requests.ConnectionError | requests.Timeout) and not isinstance(error, SSLError):
            raise
        raise CheckpointError(f"{shown} cannot be fetched: {_reason(error)}") from None
    with answer:
        status = f"{answer.status_code} {responses.get(answer.status_code, '')}".strip()
        if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
            raise requests.HTTPError(status)
        if answer.status_code not in (200, 206, 416):
            raise CheckpointError(f"{shown} cannot be fetched: {status}")
        length = answer.headers.get("Content-Length", "")
        encoded = answer.headers.get("Content-Encoding", "identity") != "identity"
        if answer.status_code == 200:
            start = 0
        else:
            place = re.match(rf"bytes {start}-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not place or encoded:
                yield 0, b""  # not the bytes that were asked for: the next attempt asks for all
                return
            length = place[1]
        kind = re.match(r"[\w.+/-]*", answer.headers.get("Content-Type", "").lower())[0]
        came = int(length) if re.fullmatch(r"\d{1,18}", length) and not encoded else None
        if came != size and (came is not None or "html" in kind):
            what = f"{'a web page' if 'html' in kind else 'another file'} ({kind or 'of no type'}"
            count = "" if came is None else f", {came:,} bytes"
            raise CheckpointError(f"{shown} sends {what}{count}), not the {size:,} bytes expected")
        for data in answer.iter_content(BLOCK):
            yield start, data
            start += len(data)


def _reason(error: Exception) -> str:
    """`Connection refused`, out of the errors that three libraries put around it."""
    inner = error.__cause__ or next((x for x in error.args if isinstance(x, Exception)), None)
    if inner:
        return _reason(inner)
    text = getattr(error, "strerror", None) or str(error).rstrip(".")
    sent = len(text) > 120 or not text.isprintable()  # by the server: nothing for a terminal
    return type(error).__name__ if sent else text


def _shown(source: str) -> str:
    """Without the password that a mirror's URL may hold."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)
