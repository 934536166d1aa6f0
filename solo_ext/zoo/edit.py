"""`solo-ext zoo add` turns a run into an entry; `solo-ext zoo publish` uploads entries to the Hugging Face Hub."""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path, PurePath

from omegaconf import OmegaConf

from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import write_text
from solo_ext.runs.checkpoints import find_checkpoint, foreign_config
from solo_ext.runs.encoder import branch_of
from solo_ext.runs.reference import FOLDER, Reference
from solo_ext.runs.run import ENVIRONMENT, METRICS, Run, find_run
from solo_ext.runs.zoos import installed
from solo_ext.text import between_marks
from solo_ext.training.compose import compose
from solo_ext.training.recipes import derived
from solo_ext.zoo.export import RECORD, export
from solo_ext.zoo.index import WORD, Entry, Recipe, ZooFile, editing, markdown, read_index, scores, short
from solo_ext.zoo.store import check_upload, find, upload

# overrides that concern the machine and the display, not what is trained
MACHINE_KEYS = (
    *("checkpoint.", "auto_resume.", "wandb", "tensorboard", "enable_progress_bar", "name=", "knn_eval."),
    *("data.train_path", "data.val_path", "data.num_workers"),
)


def add(run: str | Path, zoo: Path, name: str | None = None, licence: str = "MIT") -> Entry:
    """Adds the student's backbone, log and results of a run to the folder `zoo`, its index and the tables of READMEs.

    `run` is a run folder, a checkpoint, or what `export(..., "safetensors")` wrote, evaluated by `knn` or `linear`;
    `name`, of the entry, is by default `<method>-<dataset>-<backbone>`.

    Nothing to add, no evaluation, a taken name, a zoo that cannot be written: a CheckpointError, and nothing changes.
    """
    checkpoint = find_checkpoint(run)
    config = Run(checkpoint.parent).config
    if not config or "method" not in config:
        raise CheckpointError(f"{checkpoint} has no args.json of a pre-training beside it, which an entry needs")
    figures = scores(checkpoint.parent, checkpoint.name)
    if not figures:
        folder = checkpoint.parent
        command = shlex.join(["solo-ext", "knn", "--run", str(folder)])
        other = any(Run(folder).evaluations.values())
        why = f" by the standard protocol, with {checkpoint.name} on its own data" if other else ""
        raise CheckpointError(f"{folder} has not been evaluated{why}: {command} does it, or linear")
    with foreign_config(checkpoint):
        dataset, backbone = config["data"]["dataset"], config["backbone"]["name"]
        teacher = branch_of(config) == "teacher"  # of an export
        for figure in figures if teacher else ():
            figure.protocol += "; of the teacher"
        name = name or f"{config['method']}-{dataset}-{short(backbone)}{'-teacher' * teacher}"
        entry = Entry(name, config["method"], backbone, dataset, config["max_epochs"], figures=figures, licence=licence)
    folder = zoo / entry.folder
    with ExitStack() as on_failure:
        with editing(zoo) as entries:
            for place, known in ((zoo, entries), (installed(), read_index(installed()))):
                if (place / entry.folder).exists() or (name in known and known[name].files):
                    raise CheckpointError(f"the zoo in {place} has '{name}' already; give another --name")
            on_failure.callback(shutil.rmtree, folder, ignore_errors=True)
            report = export(checkpoint, "safetensors", folder, dtype="float16")
            (folder / RECORD).unlink()  # it names the checkpoint, and is none of the report's files
            rounding, files = report.record["rounding"], report.record["files"]
            if rounding and rounding["difference"]:
                for figure in entry.figures:
                    figure.protocol += "; before its weights were rounded to float16"
            environment = Run(folder).environment
            entry = entries[name] = replace(
                entry,
                recipe=recipe_from(environment.get("command", []), zoo.parent),
                fingerprint=((environment.get("data") or {}).get("train") or {}).get("fingerprint"),
                log=METRICS if METRICS in files else None,
                environment=ENVIRONMENT if ENVIRONMENT in files else None,
                files=[ZooFile(**file, path=f"{entry.folder}/{name}") for name, file in files.items()],
            )
        on_failure.pop_all()
    write_tables(zoo)
    return entry


def add_reference(runs: Sequence[str | Path], zoo: Path, name: str | None = None) -> Path:
    """Writes the reference curves of runs of one recipe, each with another seed, to `<zoo>/references/<name>.json`.

    `name` is by default that of the recipe, such as `cifar10/byol`. ConfigError for runs that are none of one recipe.
    """
    found = [find_run(run) for run in runs]
    recipe = recipe_from(found[0].environment.get("command", []), zoo.parent)
    if recipe:
        name = name or recipe.name
    if not re.fullmatch(f"{WORD}(/{WORD})*", name or ""):
        raise ConfigError(f"--name {name or 'is missing: the runs do not say which recipe they are of'}")
    path = zoo / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, Reference.of(str(name), found).text)
    return path


def recipe_from(command: Sequence[str], root: Path) -> Recipe | None:
    """The recipe, of the repository at `root`, that a run's command line names, and its overrides."""
    options = dict(pairwise(command))
    folder = options.get("--config-path") or options.get("-cp") or ""
    name = options.get("--config-name") or options.get("-cn")
    for word in [str(PurePath(folder, name))] if name else [word for word in command if "=" not in word]:
        by_path = word.endswith((".yaml", ".yml"))
        yaml = PurePath(word) if by_path else PurePath("scripts", "pretrain", f"{word}.yaml")
        inside = PurePath(*yaml.parts[yaml.parts.index("scripts") :]) if "scripts" in yaml.parts else yaml
        if not inside.is_absolute() and ((root / inside).is_file() or derived(root / inside)):
            overrides = [w for w in command if "=" in w and not w.startswith(("-", *MACHINE_KEYS))]
            return Recipe(inside.as_posix(), recipe_sum(root / inside), overrides)
    return None


def recipe_sum(path: Path) -> str:
    """SHA-256 of the values of a YAML, including those of its defaults list; comments and order do not matter."""
    values = OmegaConf.to_container(compose(path.parent, path.name))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_tables(zoo: Path) -> None:
    """Updates the README.md of the repository (weights) and of the zoo (recipes), between `<!-- zoo -->` marks."""
    for readme, weights in ((zoo.parent / "README.md", True), (zoo / "README.md", False)):
        if readme.is_file():
            old = readme.read_text(encoding="utf-8")
            new = between_marks(old, "zoo", markdown(read_index(zoo).values(), weights))
            if new != old:
                write_text(readme, new)


def publish(zoo: Path, repository: str, names: Sequence[str]) -> str:
    """Uploads entries of the zoo in the folder `zoo` in one commit, and writes repository and revision to its index.

    The `repository`, owner/name, is created if need be, and gets `<dataset>/<name>/` for each entry. Returns the URL of
    the commit's tree. A failure (ConfigError: name or token; CheckpointError: entries, files, Hub) changes nothing.
    """
    check_upload("--repo", repository)
    with editing(zoo) as entries:
        uploads, paths = [find(name, entries) for name in names], {}
        for entry in uploads:
            entry.check_weights()
            for file in entry.files:
                paths[file.path] = path = zoo / file.path
                if file.read(path) is None:
                    raise CheckpointError(f"{path} is missing or damaged, so nothing is published")
        message = f"Entries of solo-ext's zoo: {', '.join(names)}"
        url, revision = upload(repository, paths, message, "nothing is published")
        entries.update((entry.name, replace(entry, repository=url.repo_id, revision=revision)) for entry in uploads)
    return f"{url}/tree/{revision}"
