"""The index of the zoo: what was trained, how, what it reached, and what its files have to sum up to."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import read_json, replacing
from solo_ext.runs.run import KNN, LINEAR, WEIGHTS
from solo_ext.schema import build

INDEX = "index.yaml"
LIMIT = 10 << 20  # bytes of an index; ours has a few hundred KiB
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEADER = """\
# What is in the zoo. `solo-ext zoo add` adds what was trained; zoo/recipes.py writes the papers' recipes, which have no
# files: neither paper published weights. A file's path is below this folder.
"""


def _check_word(key: str, word: str) -> None:
    if not _WORD.fullmatch(word):
        raise ConfigError(f"{key} must be letters, digits, '.', '_' and '-', not '{word[:200]}'")


def _check_sum(key: str, digest: str) -> None:
    if not _SHA256.fullmatch(digest):
        raise ConfigError(f"{key} must be 64 hexadecimal digits, not '{digest[:200]}'")


@dataclass
class ZooFile:
    """A file of an entry. size: in bytes. Either path: below the zoo, or url: https. Its name is the last part."""

    size: int
    sha256: str
    path: str | None = None
    url: str | None = None

    def __post_init__(self):
        if self.size < 0:
            raise ConfigError(f"files.size must be at least 0, not {self.size}")
        _check_sum("files.sha256", self.sha256)
        if (self.path is None) == (self.url is None):
            raise ConfigError("files: a file has either a path or a url")
        if self.url is not None:
            try:
                secure = urlsplit(self.url).scheme == "https" and bool(urlsplit(self.url).hostname)
            except ValueError:
                secure = False
            if not secure:
                raise ConfigError(f"files.url must begin with https://, not '{self.url[:200]}'")
        _check_word("the last part of files.path and files.url", self.name)

    @property
    def name(self) -> str:
        return (self.path or urlsplit(self.url).path).rpartition("/")[2]


@dataclass
class Recipe:
    """What an entry is trained with: the YAML in the repository, SHA-256 of its values, and what was changed in it."""

    path: str
    sha256: str
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self):
        _check_sum("recipe.sha256", self.sha256)


@dataclass
class Figure:
    """A result in percent, and by which protocol it was measured, or where it is printed."""

    metric: str
    value: float
    protocol: str


@dataclass
class Entry:
    """What the zoo has of one training.

    dataset, fingerprint: of the images that it was trained on. log, environment: files of the entry.
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
    files: list[ZooFile] = field(default_factory=list)

    def __post_init__(self):
        _check_word("name", self.name)
        _check_word("dataset", self.dataset)
        for file in self.files:
            if file.path is not None and file.path != f"{self.folder}/{file.name}":
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
        """Where its files lie, below the zoo and in the cache."""
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
    def compose_node(self, parent, index):
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
    except (yaml.YAMLError, ConfigError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where} is not an index of a zoo: {' '.join(str(error).split())[:300]}") from None
    named = {entry.name: entry for entry in entries}
    if len(named) < len(entries):
        twice = next(e.name for e in entries if sum(other.name == e.name for other in entries) > 1)
        raise CheckpointError(f"{where} is not an index of a zoo: it has '{twice}' twice")
    return named


def write_index(path: Path, entries: Iterable[Entry]) -> None:
    """Replaces the index at `path`, entries in order of data set and name, those with files first."""
    ordered = sorted(entries, key=lambda entry: (not entry.files, entry.dataset, entry.name))
    values = {"entries": [_plain(asdict(entry)) for entry in ordered]}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    with replacing(path) as file:
        file.write((_HEADER + text).encode())


def _plain(value: Any) -> Any:
    """Without what says nothing: null and empty lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None and item != []}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def figures_of(run: Path, checkpoint: str) -> list[Figure]:
    """What `knn` and `linear` found in the folder `run` for the file `checkpoint` in it: top-1, in percent."""
    figures, results = [], {}
    for name in (KNN, LINEAR):
        result = read_json(run / name) or {}  # a run that goes on leaves results of an older one behind
        results[name] = result if result.get("protocol", {}).get("checkpoint") == checkpoint else {}
    if linear := results[LINEAR]:
        protocol, optimizer = linear["protocol"], linear["protocol"]["optimizer"]
        views = "random crops and flips" if protocol["augmented"] else "features extracted once, not augmented"
        text = f"offline linear, {linear['epochs']} epochs, {optimizer['name']}, lr {optimizer['lr']:g}, {views}"
        figures.append(Figure("linear top-1", round(linear["acc1"], 2), f"{text}, seed {protocol['seed']}"))
    for row in results[KNN].get("results", []):
        if row["distance"] == "cosine" and row["T"] == 0.07:
            text = "offline, cosine, T 0.07, not augmented"
            figures.append(Figure(f"kNN-{row['k']}", round(row["acc1"], 2), text))
    return figures


def markdown(entries: Iterable[Entry], weights: bool = True) -> str:
    """A table of the entries that have weights, or of those that have none."""
    chosen = [entry for entry in entries if bool(entry.files) == weights]
    if weights:
        rows = [("name", "method", "backbone", "data", "epochs", "linear top-1", "kNN-1", "kNN-20", "MB")]
        for e in chosen:
            scores = [_percent(e.figure(metric)) for metric in ("linear top-1", "kNN-1", "kNN-20")]
            size = f"{next(file.size for file in e.files if file.name == WEIGHTS) / 1e6:.1f}"
            rows.append((f"`{e.name}`", f"`{e.method}`", e.backbone, e.dataset, str(e.epochs), *scores, size))
    else:
        rows = [("name", "recipe", "backbone", "epochs", "printed", "where")]
        for e in chosen:
            printed = [(_percent(f.value), f.protocol.removeprefix("printed: ")) for f in e.figures] or [("-", "-")]
            recipe = f"`{e.recipe.path}`" if e.recipe else "-"
            rows.append((f"`{e.name}`", recipe, e.backbone, str(e.epochs), *printed[0]))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def within(text: str, table: str, marker: str = "zoo") -> str:
    """`text` with `table` between its lines `<!-- zoo -->` and `<!-- /zoo -->`, if it has them."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.S)
    return pattern.sub(lambda match: match[1] + table + match[2], text)


def short(backbone: str) -> str:
    """`r18` for resnet18, `r10w16` for resnet10_w16, `vit-s` for vit_small: a backbone in an entry's name."""
    vit = re.fullmatch(r"vit_(\w)\w*", backbone)
    if vit:
        return f"vit-{vit[1]}"
    return re.sub(r"[^A-Za-z0-9.]", "-", re.sub(r"_?w(\d+)$", r"w\1", re.sub(r"^resnet", "r", backbone)))
