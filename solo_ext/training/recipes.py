"""The recipes of `scripts/`: found by name in a checkout or an installed package, listed, copied.

A variant that no paper prints needs no file: `cifar10/res_dino` is `cifar10/dino` under the YAMLs that
`_shared/variants.yaml` lists. Its path is accepted wherever a file's is.
"""

import os
from pathlib import Path
from typing import Any

import yaml

import solo_ext
from solo_ext.errors import ConfigError, naming
from solo_ext.files import write_text
from solo_ext.text import hint, nearest

VARIANTS = Path("_shared", "variants.yaml")  # beside the folders of the datasets
METHOD_KEYS = ("method", "pretrain_method")  # of a pre-training, of an evaluation


def scripts() -> Path:
    """The folder of the recipes: inside an installed package, beside the package in a checkout."""
    package = Path(solo_ext.__file__).parent
    inside = package / "scripts"
    return inside if inside.is_dir() else package.parent / "scripts"


def find(name: str, kind: str = "pretrain") -> Path:
    """The YAML of `<dataset>/<recipe>` for `pretrain` or `linear`, `<paper>/<table>` in `studies`; or ConfigError."""
    entries = named(kind)
    for known, file in entries.items():
        if _plain(known) == _plain(name):
            return file
    raise ConfigError(f"there is no recipe '{name}'{nearest(name, entries) or '; solo-ext recipes lists them'}")


def recipe_file(folder: Path, dataset: str, recipe: str) -> Path:
    """The YAML of `recipe` for `dataset` below `folder`, a file or derived; ConfigError if there is none."""
    places = {_plain(place.name): place for place in _folders(folder)}
    if _plain(dataset) not in places:
        raise ConfigError(f"there are no recipes for '{dataset}'{hint(dataset, places)}")
    place = places[_plain(dataset)]
    if recipe not in names(place):
        raise ConfigError(f"there is no recipe '{recipe}' for '{dataset}'{hint(recipe, names(place))}")
    return place / f"{recipe}.yaml"


def _folders(folder: Path) -> list[Path]:
    return sorted(place for place in folder.glob("[!_]*") if place.is_dir())


def named(kind: str) -> dict[str, Path]:
    """`<dataset>/<recipe>` -> its YAML."""
    folders = _folders(scripts() / kind)
    return {f"{folder.name}/{name}": folder / f"{name}.yaml" for folder in folders for name in names(folder)}


def _plain(name: str) -> str:
    return name.replace("-", "")  # the recipes of the dataset imagenet100 are in imagenet-100, as solo-learn's are


def names(folder: Path) -> list[str]:
    """The recipes in the folder of a dataset: those with a file, then those that are derived."""
    return list(_made_of(folder))


def derived(file: Path) -> dict[str, Any] | None:
    """The content of a recipe that has no file: a defaults list and the method. None: there is no such recipe."""
    if file.is_file() or not (parts := _made_of(file.parent).get(file.stem)):
        return None
    variant, base, overlays = parts
    defaults = [base, *(f"../_shared/{overlay}@_global_" for overlay in overlays), "_self_"]
    method = _method(file.with_name(f"{base}.yaml"))
    return {"defaults": defaults} | {key: f"{variant}_{name}" for key, name in method.items()}


def _made_of(folder: Path) -> dict[str, tuple[str, str, list[str]] | None]:
    """Recipe -> its variant, the recipe that this starts from, the YAMLs of `_shared` on top; None if it has a file."""
    listed = folder.parent / VARIANTS
    variants = _read(listed) if listed.is_file() else {}
    files = sorted(file.stem for file in folder.glob("[!_]*.yaml"))
    prefixes = tuple(f"{variant}_" for variant in variants)
    recipes: dict[str, tuple[str, str, list[str]] | None] = dict.fromkeys(files)
    for variant, by_dataset in variants.items():
        overlays = by_dataset.get(folder.name, by_dataset["any"])
        for base in files:
            if not base.startswith(prefixes):
                recipes.setdefault(f"{variant}_{base}", (variant, base, overlays))
    return recipes


def _method(file: Path) -> dict[str, str]:
    """The key that names the method of a recipe, and the name."""
    content = _read(file)
    if own := {key: content[key] for key in METHOD_KEYS if key in content}:
        return own
    return next((method for base in reversed(_bases(file)) if (method := _method(base))), {})


def _bases(file: Path) -> list[Path]:
    listed = [entry for entry in _read(file).get("defaults", ()) if isinstance(entry, str) and entry != "_self_"]
    return [Path(os.path.normpath(file.parent / f"{entry.partition('@')[0]}.yaml")) for entry in listed]


def _read(file: Path) -> dict[str, Any]:
    """The content of a YAML, if it is a mapping."""
    if content := derived(file):
        return content
    with naming(f"{file} cannot be read as YAML", yaml.YAMLError, OSError, UnicodeDecodeError):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def summary(file: Path) -> str:
    """The first line of a YAML's header; for a derived recipe, what it is made of."""
    if parts := _made_of(file.parent).get(file.stem):
        _, base, overlays = parts
        return f"{' + '.join([base, *overlays])}: derived, no paper prints it."
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.strip("# ") if first.startswith("#") else ""


def listing(words: list[str]) -> str:
    """The recipes by dataset, and the studies by paper, with all of `words` in their names; ConfigError if none has."""
    lines, entries = [], {"pretrain": named("pretrain"), "study": named("studies")}
    for command, files in entries.items():
        matching = {name: file for name, file in files.items() if all(word in name for word in words)}
        for folder in dict.fromkeys(file.parent for file in matching.values()):
            rows = {name: summary(file) for name, file in matching.items() if file.parent == folder}
            width = max(map(len, rows))
            lines += ["", f"{folder.name}: solo-ext {command} NAME", *(f"  {n:<{width}}  {s}" for n, s in rows.items())]
    if not lines:
        near = nearest(words[0], [*entries["pretrain"], *entries["study"]])
        raise ConfigError(f"no recipe has '{' '.join(words)}' in its name{near}")
    return "\n".join(lines[1:])


def copy(name: str, to: Path) -> Path:
    """Copies `<dataset>/<recipe>` (`linear/` before it for a linear evaluation) and the YAMLs that it is made of to the
    same places below `to`; returns the copied recipe. ConfigError without one, or if a file has other content there."""
    kind = "linear" if name.startswith("linear/") else "pretrain"
    recipe = find(name.removeprefix(f"{kind}/"), kind)
    texts: dict[Path, str] = {}

    def take(file: Path) -> None:
        made = f"# {summary(file)}\n{yaml.safe_dump(_read(file), sort_keys=False)}"
        texts[to / file.relative_to(scripts())] = file.read_text(encoding="utf-8") if file.is_file() else made
        for base in _bases(file):
            take(base)

    take(recipe)
    for file, text in texts.items():
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise ConfigError(f"'{file}' exists, with other values; give another folder")
    with naming(f"'{to}' cannot be written"):
        for file, text in texts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
    return to / recipe.relative_to(scripts())
