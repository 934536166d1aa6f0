"""The recipes of `scripts/`: found by name from a checkout or an installed package, listed, copied.

A variant that no paper prints needs no file: `cifar10/res_dino` is `cifar10/dino` with what `_shared/variants.yaml`
puts over it. Its path is taken wherever that of a file is.
"""

import os
from pathlib import Path
from typing import Any

import yaml

import solo_ext
from solo_ext.errors import ConfigError
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
    """The YAML of the recipe `<dataset>/<recipe>`, or of the study `<paper>/<table>`.

    Args:
        kind: `pretrain`, `linear` or `studies`.

    Raises:
        ConfigError: there is none of that name.
    """
    every = _every(kind)
    by_dataset = {_plain(known): file for known, file in every.items()}
    if _plain(name) not in by_dataset:
        raise ConfigError(f"there is no recipe '{name}'{nearest(name, every) or '; solo-ext recipes lists them'}")
    return by_dataset[_plain(name)]


def _every(kind: str) -> dict[str, Path]:
    """`<dataset>/<recipe>` -> its YAML."""
    folders = sorted(place for place in (scripts() / kind).glob("[!_]*") if place.is_dir())
    return {f"{folder.name}/{name}": folder / f"{name}.yaml" for folder in folders for name in names(folder)}


def recipe_file(folder: Path, dataset: str, recipe: str) -> Path:
    """The YAML of `recipe` for `dataset` below `folder`; whether it is a file or derived is all the same.

    Raises:
        ConfigError: no recipes for that dataset, or none of that name.
    """
    places = {_plain(place.name): place for place in folder.glob("[!_]*") if place.is_dir()}
    if _plain(dataset) not in places:
        there = [place.name for place in places.values()]
        raise ConfigError(f"there are no recipes for '{dataset}'{hint(dataset, sorted(there))}")
    place = places[_plain(dataset)]
    if recipe not in names(place):
        raise ConfigError(f"there is no recipe '{recipe}' for '{dataset}'{hint(recipe, names(place))}")
    return place / f"{recipe}.yaml"


def _plain(name: str) -> str:
    return name.replace("-", "")  # the recipes of the dataset imagenet100 lie in imagenet-100, as solo-learn's do


def names(folder: Path) -> list[str]:
    """The recipes in the folder of a dataset: those with a file, then those that are derived."""
    files = sorted(file.stem for file in folder.glob("[!_]*.yaml"))
    variants = _variants(folder)
    prefixes = tuple(f"{variant}_" for variant in variants)
    derived = [prefix + file for prefix in prefixes for file in files if not file.startswith(prefixes)]
    return [*files, *(name for name in derived if name not in files)]


def derived(file: Path) -> dict[str, Any] | None:
    """The content of a recipe that has no file: a defaults list and the method. None: there is no such recipe."""
    if file.is_file() or file.stem not in names(file.parent):
        return None
    base, overlays = _parts(file)
    variant = file.stem.removesuffix(base.stem)
    defaults = [base.stem, *(f"../_shared/{overlay}@_global_" for overlay in overlays), "_self_"]
    return {"defaults": defaults} | {key: variant + method for key, method in _method(base).items()}


def _parts(file: Path) -> tuple[Path, list[str]]:
    """The YAML that a derived recipe starts from, and the names of those that lie over it."""
    for variant, overlays in _variants(file.parent).items():
        if file.stem.startswith(f"{variant}_"):
            return file.with_name(file.stem.removeprefix(f"{variant}_") + ".yaml"), overlays
    raise AssertionError(f"{file} is not derived")


def _variants(folder: Path) -> dict[str, list[str]]:
    """Variant -> the YAMLs of `_shared` that make it, for the dataset whose folder this is."""
    file = folder.parent / VARIANTS
    if not file.is_file():
        return {}
    return {variant: by_dataset.get(folder.name, by_dataset["any"]) for variant, by_dataset in _read(file).items()}


def _method(file: Path) -> dict[str, str]:
    """The key that names the method of a recipe, and the name."""
    content = _read(file)
    if own := {key: content[key] for key in METHOD_KEYS if key in content}:
        return own
    return next((method for base in reversed(_needs(file)) if (method := _method(base))), {})


def _needs(file: Path) -> list[Path]:
    """The YAMLs in the defaults list of a recipe."""
    listed = [entry for entry in _read(file).get("defaults", ()) if isinstance(entry, str) and entry != "_self_"]
    return [Path(os.path.normpath(file.parent / f"{entry.partition('@')[0]}.yaml")) for entry in listed]


def _read(file: Path) -> dict[str, Any]:
    """The content of a YAML, if it is a mapping."""
    if content := derived(file):
        return content
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error


# Listing and copying.


def summary(file: Path) -> str:
    """The first line of a YAML's header; for a derived recipe, what it is made of."""
    if not file.is_file():
        base, overlays = _parts(file)
        return f"{' + '.join([base.stem, *overlays])}: derived, no paper prints it."
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.strip("# ") if first.startswith("#") else ""


def listing(words: list[str]) -> str:
    """The recipes by dataset, and the studies by paper, whose names have all of `words` in them.

    Raises:
        ConfigError: there are none.
    """
    sections: dict[str, dict[str, Path]] = {}
    for command, kind in (("pretrain", "pretrain"), ("study", "studies")):
        for name, file in _every(kind).items():
            if all(word in name for word in words):
                sections.setdefault(f"{file.parent.name}: solo-ext {command} NAME", {})[name] = file
    if not sections:
        near = nearest(words[0], [*_every("pretrain"), *_every("studies")])
        raise ConfigError(f"no recipe has '{' '.join(words)}' in its name{near}")
    return "\n\n".join(_section(heading, files) for heading, files in sections.items())


def _section(heading: str, files: dict[str, Path]) -> str:
    width = max(map(len, files))
    return "\n".join([heading, *(f"  {name:<{width}}  {summary(file)}" for name, file in files.items())])


def copy(name: str, to: Path) -> Path:
    """Copies a recipe and the YAMLs that it is made of to the same places below `to`, where it composes by itself.

    Args:
        name: `<dataset>/<recipe>` of a pre-training, `linear/<dataset>/<recipe>` of a linear evaluation.

    Returns:
        The copied recipe.

    Raises:
        ConfigError: there is none of that name, or a file of another content lies there; then nothing is written.
    """
    kind = "linear" if name.startswith("linear/") else "pretrain"
    recipe = find(name.removeprefix(f"{kind}/"), kind)
    texts: dict[Path, str] = {}

    def take(file: Path) -> None:
        made = f"# {summary(file)}\n{yaml.safe_dump(_read(file), sort_keys=False)}"
        texts[to / file.relative_to(scripts())] = file.read_text(encoding="utf-8") if file.is_file() else made
        for other in _needs(file):
            take(other)

    take(recipe)
    for file, text in texts.items():
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise ConfigError(f"'{file}' exists, with other values; give another folder")
    try:
        for file, text in texts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
    except OSError as error:
        raise ConfigError(f"'{to}' cannot be written: {error.strerror or error}") from error
    return to / recipe.relative_to(scripts())
