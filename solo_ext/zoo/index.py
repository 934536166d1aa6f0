"""The index of a zoo: what was trained, how, what it reached, and the size and SHA-256 of its files."""

import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from filelock import FileLock

from solo_ext.errors import CheckpointError, ConfigError, naming, reason
from solo_ext.files import write_text
from solo_ext.runs.run import KNN, LINEAR, WEIGHTS, Run
from solo_ext.runs.zoos import INDEX
from solo_ext.schema import Bounds, Config, build, show
from solo_ext.text import markdown_table

METRICS = ("linear top-1", "kNN-1", "kNN-20")  # in the tables
WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
CHARACTERS = "letters, digits, '.', '_' and '-'"
REPOSITORY = r"[\w.-]+/[\w.-]+"  # owner/name on the Hugging Face Hub
_HEADER = """\
# What is in the zoo. `solo-ext zoo add` adds what was trained; zoo/recipes.py writes the papers' recipes, which have no
# files: neither paper published weights. A file's path is below this folder.
"""


@dataclass(frozen=True)
class Matches:
    """A text that matches `pattern` as a whole; `description` is what an error message calls it."""

    pattern: str
    description: str

    def check(self, value: str, key: str) -> None:
        if not re.fullmatch(self.pattern, value):
            raise ConfigError(f"{key} must be {self.description}, not {show(value)}")


Word = Annotated[str, Matches(WORD, CHARACTERS)]
Sha256 = Annotated[str, Matches("[0-9a-f]{64}", "64 hexadecimal digits")]


@dataclass
class ZooFile(Config):
    """A file of an entry: its size in bytes and its path below the zoo, and in the repository on the Hub."""

    size: Annotated[int, Bounds(0)]
    sha256: Sha256
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def read(self, path: Path) -> bytes | None:
        """The content of the file at `path` if it has this size and SHA-256, else None."""
        with suppress(OSError):
            content = path.read_bytes()
            if len(content) == self.size and hashlib.sha256(content).hexdigest() == self.sha256:
                return content
        return None


@dataclass
class Recipe(Config):
    """What an entry is trained with: the YAML in the repository, SHA-256 of its values, and the overrides."""

    path: str
    sha256: Sha256
    overrides: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """By which commands know it in any folder; its path if it is none of the repository's."""
        return re.sub(r"^scripts/pretrain/(.*)\.yaml$", r"\1", self.path)


@dataclass
class Score(Config):
    """A result in percent, and the protocol of its measurement, or where it is printed."""

    metric: str
    value: float
    protocol: str


@dataclass
class Entry(Config):
    """What the zoo has of one training.

    dataset, fingerprint: of the training images. log, environment: names of two of the files.
    repository, revision: where the files are on the Hugging Face Hub, and in which commit; null: only in this zoo.
    files: empty for a recipe without weights.
    """

    name: Word
    method: str
    backbone: str
    dataset: Word
    epochs: int
    recipe: Recipe | None = None
    figures: list[Score] = field(default_factory=list)
    fingerprint: str | None = None
    log: str | None = None
    environment: str | None = None
    licence: str | None = None
    repository: Annotated[str, Matches(REPOSITORY, "owner/name")] | None = None
    revision: Annotated[str, Matches("[0-9a-f]{40}", "40 hexadecimal digits")] | None = None
    files: list[ZooFile] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.repository is None) != (self.revision is None):
            raise ConfigError(f"'{self.name}' needs both repository and revision, or neither")
        path = Matches(f"{re.escape(self.folder)}/{WORD}", f"'{self.folder}/<name>', the name of {CHARACTERS}")
        for file in self.files:
            path.check(file.path, "files.path")
        names = [file.name for file in self.files]
        if len({*names}) < len(names):
            raise ConfigError(f"files: two files of '{self.name}' have the same name")
        if names and WEIGHTS not in names:
            raise ConfigError(f"files: '{self.name}' has no {WEIGHTS}")
        for key, name in (("log", self.log), ("environment", self.environment)):
            if name is not None and name not in names:
                raise ConfigError(f"{key}: {show(name)} is none of the files of '{self.name}'")

    def check_weights(self) -> None:
        """Raises CheckpointError if it is only a recipe."""
        if not self.files:
            advice = ""
            if self.recipe:
                advice = f"; {shlex.join(['solo-ext', 'pretrain', self.recipe.name, *self.recipe.overrides])} trains it"
            raise CheckpointError(f"'{self.name}' is a recipe without weights: the paper published none{advice}")

    @property
    def folder(self) -> str:
        """Where its files lie, below the zoo and in the repository on the Hub."""
        return f"{self.dataset}/{self.name}"


@dataclass
class _Index(Config):
    entries: list[Entry]


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of them can unfold to gigabytes
            raise yaml.YAMLError("an index has no aliases")
        return super().compose_node(parent, index)


def read_index(zoo: Path) -> dict[str, Entry]:
    """Name -> entry, in the order of the index in the folder `zoo`; CheckpointError if it is unreadable or invalid."""
    path = zoo / INDEX
    with naming(f"{path} cannot be read", error=CheckpointError):
        content = path.read_bytes()
    try:
        entries = build(_Index, yaml.load(content, _Loader)).entries
        by_name = {entry.name: entry for entry in entries}
        if len(by_name) < len(entries):
            duplicate = next(entry.name for entry in entries if by_name[entry.name] is not entry)
            raise ConfigError(f"it has '{duplicate}' twice")
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is not an index of a zoo: {reason(error)[:300]}") from None
    return by_name


@contextmanager
def editing(zoo: Path) -> Iterator[dict[str, Entry]]:
    """The index in the folder `zoo`, empty if there is none, for one process at a time to change.

    It is written at the end, unless something is raised: CheckpointError if it is damaged or cannot be written.
    """
    with naming(f"{zoo} cannot be written", error=CheckpointError):
        zoo.mkdir(parents=True, exist_ok=True)
        with FileLock(zoo / ".lock"):
            entries = read_index(zoo) if (zoo / INDEX).exists() else {}
            yield entries
            write_index(zoo / INDEX, entries.values())


def write_index(path: Path, entries: Iterable[Entry]) -> None:
    """Replaces the index at `path`; entries are ordered by dataset and name, those with files first."""
    ordered = sorted(entries, key=lambda entry: (not entry.files, entry.dataset, entry.name))

    def informative(items: list[tuple]) -> dict:
        return {key: value for key, value in items if value is not None and value != []}

    values = {"entries": [asdict(entry, dict_factory=informative) for entry in ordered]}
    write_text(path, _HEADER + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))


def scores(folder: Path, checkpoint: str) -> list[Score]:
    """What the run folder has of the file `checkpoint` in it by the standard protocol on the test images: top-1, in %.

    Nothing with fine-tuning, a share of the labels or other data, nor what does not say whether it is that.
    """
    run, rows = Run(folder), []
    own: dict[str, Any] = {"sha256": run.sha256(checkpoint), "data.val_fraction": 0.0}
    with naming(f"{folder} has a damaged evaluation", LookupError, TypeError, ValueError, error=CheckpointError):
        if linear := run.standard(LINEAR, own):
            p = linear["protocol"]
            views = "random crops and flips" if p["augmented"] else "features extracted once, not augmented"
            text = f"offline linear, {p['max_epochs']} epochs, {p['optimizer.name']}, lr {p['optimizer.lr']:g}, {views}"
            recipe = f", {p['recipe']}" if p.get("recipe") else ""
            rows.append(Score("linear top-1", round(linear["acc1"], 2), f"{text}{recipe}, seed {p['seed']}"))
        for k in dict.fromkeys(result["protocol"].get("k") for result in run.evaluations[KNN]):
            if row := run.standard(KNN, own | {"k": k, "features": "backbone", "distance": "cosine", "T": 0.07}):
                rows.append(Score(f"kNN-{k}", round(row["acc1"], 2), "offline, cosine, T 0.07, not augmented"))
    return rows


def cells(entry: Entry) -> dict[str, str]:
    """What tables say about an entry, by the heading of their columns."""
    size = next((file.size for file in entry.files if file.name == WEIGHTS), None)
    measured = {score.metric: score.value for score in entry.figures if entry.files}
    printed = None if entry.files else next(iter(entry.figures), None)
    return {
        "name": entry.name,
        "method": entry.method,
        "backbone": entry.backbone,
        "data": entry.dataset,
        "epochs": str(entry.epochs),
        **{metric: f"{measured[metric]:.2f}" if metric in measured else "-" for metric in METRICS},
        "MB": "-" if size is None else f"{size / 1e6:.1f}",
        "recipe": entry.recipe.path if entry.recipe else "-",
        "printed": f"{printed.value:.2f}" if printed else "-",
        "where": printed.protocol.removeprefix("printed: ") if printed else "-",
    }


def markdown(entries: Iterable[Entry], weights: bool = True) -> str:
    """A table of the entries that have weights, or of those that have none."""
    results = ("name", "method", "backbone", "data", "epochs", *METRICS, "MB")
    columns = results if weights else ("name", "recipe", "backbone", "epochs", "printed", "where")
    code = {"name", "method", "recipe"}
    rows = [cells(entry) for entry in entries if bool(entry.files) == weights]
    return markdown_table(columns, [[f"`{row[x]}`" if x in code else row[x] for x in columns] for row in rows])


def short(backbone: str) -> str:
    """`r18` for resnet18, `r10w16` for resnet10_w16, `vit-s` for vit_small: a backbone in an entry's name."""
    if vit := re.fullmatch(r"vit_(\w)\w*", backbone):
        return f"vit-{vit[1]}"
    return re.sub(r"[^A-Za-z0-9.]", "-", re.sub(r"_?w(\d+)$", r"w\1", re.sub(r"^resnet", "r", backbone)))
