"""Where the zoo's files come from and where they lie: the installed zoo or a mirror, and the cache."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

import solo_ext
from solo_ext.errors import CheckpointError
from solo_ext.files import replacing
from solo_ext.text import nearest
from solo_ext.zoo.download import download, intact
from solo_ext.zoo.index import INDEX, LIMIT, Entry, ZooFile, parse_index

log = logging.getLogger("solo_ext")

HOME = "SOLO_EXT_HOME"  # environment variables
MIRROR = "SOLO_EXT_ZOO_URL"
TIMEOUT = 10  # seconds


def cache() -> Path:
    """Where downloaded files are kept: `zoo` in $SOLO_EXT_HOME, by default in solo_ext of the user's cache folder."""
    home = os.environ.get(HOME) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "solo_ext"
    return Path(home).expanduser().absolute() / "zoo"


def installed() -> Path:
    """The zoo that came with the code: of the checkout, or else of the installed package."""
    package = Path(solo_ext.__file__).parent
    checkout = package.parent / "zoo"
    return checkout if (checkout / INDEX).is_file() else package / "zoo" / "files"


def _mirror() -> str | Path | None:
    """$SOLO_EXT_ZOO_URL: a folder, or the URL of one; None if it is not set."""
    value = os.environ.get(MIRROR)
    if not value:
        return None
    url = urlsplit(value)
    if url.scheme in ("http", "https"):
        return value.rstrip("/")
    folder = Path(unquote(url.path) if url.scheme == "file" else value).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{MIRROR}: '{value}' is neither a folder nor an http(s):// or file:// URL of one")
    return folder.absolute()


def entries() -> dict[str, Entry]:
    """Name -> entry: those that came with the code, and what the index of the mirror, if it has one, adds to them.

    Raises:
        CheckpointError: an index is damaged.
    """
    return {**_additions(), **_installed_entries()}


def _installed_entries() -> dict[str, Entry]:
    path = installed() / INDEX
    try:
        return parse_index(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _additions() -> dict[str, Entry]:
    mirror = _mirror()
    if isinstance(mirror, Path):
        path = mirror / INDEX
        return parse_index(path.read_bytes(), str(path)) if path.is_file() else {}
    if mirror is None:
        return {}
    url = f"{mirror}/{INDEX}"
    kept = cache() / f"index-{hashlib.sha256(mirror.encode()).hexdigest()[:16]}.yaml"  # for hours without network
    try:
        with requests.get(url, timeout=TIMEOUT, stream=True) as answer:
            if answer.status_code == 404:
                return {}
            answer.raise_for_status()
            text = answer.raw.read(LIMIT + 1, decode_content=True)
    except (requests.RequestException, OSError) as error:
        log.warning("%s: %s cannot be reached (%s)", MIRROR, url, type(error).__name__)
        return parse_index(kept.read_bytes(), str(kept)) if kept.is_file() else {}
    found = parse_index(text, url)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as file:
        file.write(text)
    return found


def find(name: str) -> Entry:
    """The entry `name`; the mirror is asked only for what did not come with the code.

    Raises:
        CheckpointError: there is none; the nearest name is said.
    """
    known = _installed_entries()
    if name not in known:
        known = known | _additions()
    if name not in known:
        close = nearest(name, known) or " (solo-ext zoo list says which there are)"
        raise CheckpointError(f"the zoo has no '{name}'{close}")
    return known[name]


@dataclass(frozen=True)
class State:
    """What the cache has of a file of an entry: `state` is ok, missing or damaged."""

    path: Path
    state: str


def verify(entry: Entry) -> list[State]:
    """Size and SHA-256 of all files of `entry` in the cache against the index."""
    folder = cache() / entry.folder
    return [State(folder / file.name, _state(folder / file.name, file)) for file in entry.files]


def _state(path: Path, file: ZooFile) -> str:
    if not os.path.lexists(path):
        return "missing"
    try:
        return "ok" if intact(path, file.size, file.sha256) else "damaged"
    except OSError:
        return "damaged"


def fetch(name: str) -> Path:
    """The folder of the entry `name` in the cache, with all files, downloaded if need be, each of them verified.

    It is a run folder with `model.safetensors` in place of checkpoints.

    Raises:
        CheckpointError: no such entry, an entry without weights, or a file that cannot be had as the index says.
    """
    entry = find(name)
    if not entry.files:
        train = f"; it is trained by solo-ext pretrain {entry.recipe.path}" if entry.recipe else ""
        raise CheckpointError(f"'{name}' is a recipe without weights: the paper published none{train}")
    folder = cache() / entry.folder
    missing = sum(file.size for file in entry.files if not (folder / file.name).exists())
    done = 0
    with _progress(name, missing) as show:
        for file in entry.files:
            absent = not (folder / file.name).exists()
            report = (lambda count, before=done: show(before + count)) if absent else None
            download(_source(entry, file), folder / file.name, file.size, file.sha256, report)
            done += file.size if absent else 0
    return folder


def _source(entry: Entry, file: ZooFile) -> str:
    mirror = _mirror()
    if isinstance(mirror, str):
        return "/".join([mirror, *map(quote, (entry.dataset, entry.name, file.name))])
    if mirror is not None:
        return str(mirror / entry.folder / file.name)
    return file.url or str(installed() / entry.folder / file.name)


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr, if there is anything to download; it is called with the bytes that are there."""
    console = Console(stderr=True)
    if not total or not console.is_terminal:
        yield lambda count: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.update(task, completed=count)
