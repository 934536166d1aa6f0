"""The index of a zoo: what was trained, how, what it reached, and the size and SHA-256 of its files."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import read_json, write_text
from solo_ext.runs.run import WEIGHTS
from solo_ext.schema import build
from solo_ext.text import markdown_table

INDEX = "index.yaml"
LIMIT = 10 << 20  # bytes of an index; ours has 32 KiB
METRICS = ("linear top-1", "kNN-1", "kNN-20")  # in the table
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name on the Hugging Face Hub
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEADER = """\
# What is in the zoo. `solo-ext zoo add` adds what was trained; zoo/recipes.py writes the papers' recipes, which have no
# files: neither paper published weights. A file's path is below this folder.
"""


def _check(key: str, value: str, pattern: str | re.Pattern[str], what: str) -> None:
    if not re.fullmatch(pattern, value):
        raise ConfigError(f"{key} must be {what}, not '{value[:200]}'")


def _check_word(key: str, word: str) -> None:
    _check(key, word, _WORD, "letters, digits, '.', '_' and '-'")


def _check_hash(key: str, digest: str, digits: int = 64) -> None:
    _check(key, digest, rf"[0-9a-f]{{{digits}}}", f"{digits} hexadecimal digits")


@dataclass
class ZooFile:
    """A file of an entry: its size in bytes and its path below the zoo, and in the repository on the Hub."""

    size: int
    sha256: str
    path: str

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError(f"files.size must be at least 0, not {self.size}")
        _check_hash("files.sha256", self.sha256)
        _check_word("the last part of files.path", self.name)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def read(self, path: Path) -> bytes | None:
        """The content of the file at `path`, if it has this size and SHA-256."""
        try:
            if path.stat().st_size == self.size:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == self.sha256:
                    return content
        except OSError:
            pass
        return None


@dataclass
class Recipe:
    """What an entry is trained with: the YAML in the repository, SHA-256 of its values, and what was changed in it."""

    path: str
    sha256: str
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_hash("recipe.sha256", self.sha256)


@dataclass
class Figure:
    """A result in percent, and by which protocol it was measured, or where it is printed."""

    metric: str
    value: float
    protocol: str


@dataclass
class Entry:
    """What the zoo has of one training.

    dataset, fingerprint: of the images that it was trained on. log, environment: names of files of the entry.
    repository, revision: where the files are on the Hugging Face Hub, and in which commit; null: only in this zoo.
    files: empty for a recipe without weights.
    """

    name: str
    method: str
    backbone: str
    dataset: str
    epochs: int
    recipe: Recipe | None = None
    figures: list[Figure] = field(default_factory=list)
    fingerprint: str | None = None
    log: str | None = None
    environment: str | None = None
    licence: str | None = None
    repository: str | None = None
    revision: str | None = None
    files: list[ZooFile] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_word("name", self.name)
        _check_word("dataset", self.dataset)
        if (self.repository is None) != (self.revision is None):
            raise ConfigError(f"'{self.name}' needs both repository and revision, or neither")
        if self.repository is not None and self.revision is not None:
            _check("repository", self.repository, REPOSITORY, "owner/name")
            _check_hash("revision", self.revision, digits=40)
        for file in self.files:
            if file.path != f"{self.folder}/{file.name}":
                raise ConfigError(f"files.path must be '{self.folder}/<name>', not '{file.path[:200]}'")
        names = [file.name for file in self.files]
        if len({*names}) < len(names):
            raise ConfigError(f"files: two files of '{self.name}' have the same name")
        if names and WEIGHTS not in names:
            raise ConfigError(f"files: '{self.name}' has no {WEIGHTS}")
        for key, name in (("log", self.log), ("environment", self.environment)):
            if name is not None and name not in names:
                raise ConfigError(f"{key}: '{name[:200]}' is none of the files of '{self.name}'")

    @property
    def folder(self) -> str:
        """Where its files lie, below the zoo and in the repository on the Hub."""
        return f"{self.dataset}/{self.name}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def figure(self, metric: str) -> float | None:
        return next((figure.value for figure in self.figures if figure.metric == metric), None)


@dataclass
class _Index:
    entries: list[Entry]


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of them can unfold to gigabytes
            raise yaml.YAMLError("an index has no aliases")
        return super().compose_node(parent, index)


def parse_index(text: str | bytes, where: str) -> dict[str, Entry]:
    """Name -> entry, in the order of the YAML `text` found at `where`.

    Raises:
        CheckpointError: it is not an index, or an entry in it is not what it should be.
    """
    try:
        if len(text) > LIMIT:
            raise ConfigError(f"it has more than {LIMIT >> 20} MiB")
        values = yaml.load(text, _Loader)
        entries = build(_Index, values, "").entries
        named = {entry.name: entry for entry in entries}
        if len(named) < len(entries):
            twice = next(e.name for e in entries if named[e.name] is not e)
            raise ConfigError(f"it has '{twice}' twice")
    except (yaml.YAMLError, ConfigError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where} is not an index of a zoo: {' '.join(str(error).split())[:300]}") from None
    return named


def read_index(zoo: Path) -> dict[str, Entry]:
    """`parse_index` of the index in the folder `zoo`."""
    path = zoo / INDEX
    try:
        return parse_index(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def editing(zoo: Path) -> Iterator[dict[str, Entry]]:
    """The index in the folder `zoo`, empty if there is none, to be changed; it is written at the end.

    One process at a time has it. If anything is raised, it stays as it was.

    Raises:
        CheckpointError: it is damaged, or cannot be written.
    """
    try:
        zoo.mkdir(parents=True, exist_ok=True)
        with FileLock(zoo / ".lock"):
            entries = read_index(zoo) if (zoo / INDEX).exists() else {}
            yield entries
            write_index(zoo / INDEX, entries.values())
    except OSError as error:
        raise CheckpointError(f"{zoo} cannot be written: {error.strerror or error}") from error


def write_index(path: Path, entries: Iterable[Entry]) -> None:
    """Replaces the index at `path`, entries in order of dataset and name, those with files first."""
    ordered = sorted(entries, key=lambda entry: (not entry.files, entry.dataset, entry.name))
    values = {"entries": [_plain(asdict(entry)) for entry in ordered]}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    write_text(path, _HEADER + text)


def _plain(value: Any) -> Any:
    """Without what says nothing: null and empty lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None and item != []}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def figures_of(run: Path, checkpoint: str) -> list[Figure]:
    """What `knn` and `linear` found in the folder `run` for the file `checkpoint` in it: top-1, in percent."""
    results = {name: read_json(run / f"{name}.json") or {} for name in ("knn", "linear")}
    for name, result in results.items():  # a run that is continued leaves results of an older checkpoint behind
        if result.get("protocol", {}).get("checkpoint") != checkpoint:
            results[name] = {}
    figures = []
    if linear := results["linear"]:
        protocol, optimizer = linear["protocol"], linear["protocol"]["optimizer"]
        views = "random crops and flips" if protocol["augmented"] else "features extracted once, not augmented"
        text = f"offline linear, {linear['epochs']} epochs, {optimizer['name']}, lr {optimizer['lr']:g}, {views}"
        figures.append(Figure("linear top-1", round(linear["acc1"], 2), f"{text}, seed {protocol['seed']}"))
    for row in results["knn"].get("results", []):
        if row["distance"] == "cosine" and row["T"] == 0.07:
            text = "offline, cosine, T 0.07, not augmented"
            figures.append(Figure(f"kNN-{row['k']}", round(row["acc1"], 2), text))
    return figures


def markdown(entries: Iterable[Entry], weights: bool = True) -> str:
    """A table of the entries that have weights, or of those that have none."""
    chosen = [entry for entry in entries if bool(entry.files) == weights]
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]] = []
    if weights:
        headings = ("name", "method", "backbone", "data", "epochs", *METRICS, "MB")
        for e in chosen:
            scores = [percent(e.figure(metric)) for metric in METRICS]
            size = f"{next(file.size for file in e.files if file.name == WEIGHTS) / 1e6:.1f}"
            rows.append((f"`{e.name}`", f"`{e.method}`", e.backbone, e.dataset, str(e.epochs), *scores, size))
    else:
        headings = ("name", "recipe", "backbone", "epochs", "printed", "where")
        for e in chosen:
            printed = [(percent(f.value), f.protocol.removeprefix("printed: ")) for f in e.figures] or [("-", "-")]
            recipe = f"`{e.recipe.path}`" if e.recipe else "-"
            rows.append((f"`{e.name}`", recipe, e.backbone, str(e.epochs), *printed[0]))
    return markdown_table(headings, rows)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def within(text: str, table: str) -> str:
    """`text` with `table` between its lines `<!-- zoo -->` and `<!-- /zoo -->`, if it has them."""
    return re.sub(r"(<!-- zoo -->\n).*?(<!-- /zoo -->)", lambda match: match[1] + table + match[2], text, flags=re.S)


def short(backbone: str) -> str:
    """`r18` for resnet18, `r10w16` for resnet10_w16, `vit-s` for vit_small: a backbone in an entry's name."""
    vit = re.fullmatch(r"vit_(\w)\w*", backbone)
    if vit:
        return f"vit-{vit[1]}"
    return re.sub(r"[^A-Za-z0-9.]", "-", re.sub(r"_?w(\d+)$", r"w\1", re.sub(r"^resnet", "r", backbone)))
