"""`solo-ext zoo add`: a run of one's own becomes an entry."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path, PurePath

from omegaconf import OmegaConf

from solo_ext.errors import CheckpointError
from solo_ext.files import new_folder, read_json, sha256, write_text
from solo_ext.runs.checkpoints import find_checkpoint, foreign_config, run_config
from solo_ext.runs.run import WEIGHTS
from solo_ext.training.compose import compose
from solo_ext.training.recipes import derived
from solo_ext.zoo.export import RECORD, export, safetensors
from solo_ext.zoo.export.safetensors import ENVIRONMENT, LOG
from solo_ext.zoo.index import Entry, Recipe, ZooFile, editing, figures_of, markdown, read_index, short, within

# where a run lies and how it is shown, not what is trained
OF_THE_MACHINE = (
    *("checkpoint.", "auto_resume.", "wandb", "tensorboard", "enable_progress_bar", "name=", "knn_eval."),
    *("data.train_path", "data.val_path", "data.num_workers"),
)


def add(run: str | Path, zoo: Path, name: str | None = None, licence: str = "MIT") -> Entry:
    """Puts the student's backbone of `run` and its log into the folder `zoo`, and them and its results into the index.

    Args:
        run: a run folder or checkpoint, or what `export(..., "safetensors")` wrote; evaluated by `knn` or `linear`.
        zoo: gets `<dataset>/<name>/`, an entry in index.yaml, and, where a README.md has room for it, a new table.
        name: default `<method>-<dataset>-<backbone>`.

    Raises:
        CheckpointError: nothing to add, no evaluation, a name that is taken, or no place to write; the zoo is as it
            was.
    """
    checkpoint = find_checkpoint(run)
    source = checkpoint.parent
    config = run_config(checkpoint)
    if not config or "method" not in config:
        raise CheckpointError(f"{checkpoint} has no args.json of a pre-training beside it, which an entry needs")
    figures = figures_of(source, checkpoint.name)
    if not figures:
        raise CheckpointError(f"{source} has not been evaluated: solo-ext knn --run {source} does it, or linear")
    with foreign_config(checkpoint):
        dataset, backbone = config["data"]["dataset"], config["backbone"]["name"]
        name = name or f"{config['method']}-{dataset}-{short(backbone)}"
        entry = Entry(name, config["method"], backbone, dataset, config["max_epochs"], figures=figures, licence=licence)
    if checkpoint.name != WEIGHTS:
        for figure in figures:
            figure.protocol += "; before its weights were rounded to float16"
    folder = zoo / entry.folder
    with ExitStack() as on_failure:
        with editing(zoo) as known:
            if folder.exists() or (name in known and known[name].files):
                raise CheckpointError(f"the zoo in {zoo} has '{name}' already; give another --name")
            on_failure.callback(_remove, folder)
            _fill(folder, checkpoint)
            _describe(entry, folder, zoo.parent)
            known[name] = entry
        on_failure.pop_all()
    write_tables(zoo)
    return entry


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()  # only if empty


def _fill(folder: Path, checkpoint: Path) -> None:
    """Makes the folder of an entry."""
    if checkpoint.name != WEIGHTS:
        export(checkpoint, "safetensors", folder, dtype="float16")
        (folder / RECORD).unlink()  # it names the checkpoint
        return
    with new_folder(folder) as new:
        for name in safetensors.FILES:
            if (source := checkpoint.with_name(name)).is_file():
                shutil.copyfile(source, new / name)


def _describe(entry: Entry, folder: Path, root: Path) -> None:
    """Completes `entry` with what its folder holds; `root`: of the repository that its recipe may be in."""
    environment = read_json(folder / ENVIRONMENT) or {}
    entry.recipe = recipe_from(environment.get("command", []), root)
    entry.fingerprint = ((environment.get("data") or {}).get("train") or {}).get("fingerprint")
    files = sorted(folder.iterdir())
    entry.files = [ZooFile(file.stat().st_size, sha256(file), f"{entry.folder}/{file.name}") for file in files]
    names = [file.name for file in files]
    entry.log, entry.environment = (name if name in names else None for name in (LOG, ENVIRONMENT))


def recipe_from(command: Sequence[str], root: Path) -> Recipe | None:
    """The recipe of the repository at `root` that a run's command line names, and the values that it changes."""
    words = list(command)
    named = dict(pairwise(words))
    folder, name = (
        named.get(long) or named.get(brief) for long, brief in (("--config-path", "-cp"), ("--config-name", "-cn"))
    )
    for word in [str(PurePath(folder or "", name))] if name else [word for word in words if "=" not in word]:
        by_name = not word.endswith((".yaml", ".yml"))
        yaml = PurePath("scripts", "pretrain", f"{word}.yaml") if by_name else PurePath(word)
        parts = yaml.parts
        inside = PurePath(*parts[parts.index("scripts") :]) if "scripts" in parts else yaml
        if not inside.is_absolute() and ((root / inside).is_file() or derived(root / inside)):
            changed = [w for w in words if "=" in w and not w.startswith(("-", *OF_THE_MACHINE))]
            return Recipe(inside.as_posix(), recipe_sum(root / inside), changed)
    return None


def recipe_sum(path: str | Path) -> str:
    """SHA-256 of the values of a YAML, those of its defaults list included; comments and order do not matter."""
    path = Path(path)
    values = OmegaConf.to_container(compose(path.parent, path.name))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_tables(zoo: Path) -> None:
    """The tables of the zoo's index in the README.md of the repository (weights) and of the zoo (recipes)."""
    entries = read_index(zoo).values()
    for readme, weights in ((zoo.parent / "README.md", True), (zoo / "README.md", False)):
        if readme.is_file():
            text = readme.read_text(encoding="utf-8")
            if (new := within(text, markdown(entries, weights))) != text:
                write_text(readme, new)
