"""Composition: a YAML or a mapping, and overrides in Hydra's grammar, become one configuration, not yet checked."""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, grammar_parser, resolvers
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from yaml import YAMLError

from solo_ext.errors import ConfigError
from solo_ext.schema import join, plain, text_keys
from solo_ext.training import recipes


def compose(config_path: str | Path, config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The YAML `config_name` in the folder `config_path`, its defaults list and Hydra `overrides`, merged. The YAML may
    be a derived recipe, see `solo_ext.training.recipes`. A plain `key=value` also sets a key that the YAML lacks, for
    `resolve` to judge. ConfigError for a file that cannot be read, or an override that makes no sense."""
    folder = Path(config_path).expanduser()
    file = folder / (config_name if config_name.endswith((".yaml", ".yml")) else f"{config_name}.yaml")
    root, name = folder, str(file.relative_to(folder))
    if content := recipes.derived(file):
        root, name = file.parent, "solo_ext_derived"
        ConfigStore.instance().store(name, content)
    elif not file.is_file():
        kind, missing = ("file", file) if folder.is_dir() else ("folder", folder)
        raise ConfigError(f"there is no {kind} '{missing}'{_neighbour(missing)}")
    keys = {text: parse(text).key_or_group for text in overrides}
    OmegaConf.clear_resolver("oc.env")  # Hydra would look environment variables up for the defaults lists of all files
    try:
        with initialize_config_dir(str(root.absolute()), version_base="1.2"):
            is_group = GlobalHydra.instance().config_loader().repository.group_exists  # type: ignore[attr-defined]
            groups = [text for text, key in keys.items() if "@" in key or is_group(key)]
            cfg = hydra_compose(name, groups)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{file}: {sentence(error)}") from error
    finally:
        OmegaConf.register_new_resolver("oc.env", resolvers.oc.env)
    return overlay(cfg, [text for text in overrides if text not in groups])


def overlay(values: Mapping[str, Any] | DictConfig, overrides: Sequence[str] = ()) -> DictConfig:
    """A copy of `values` with `overrides`, which choose no config group; ConfigError for one that makes no sense."""
    cfg = copy.deepcopy(values) if isinstance(values, DictConfig) else OmegaConf.create(dict(values))
    refuse_resolvers(OmegaConf.to_container(cfg))
    parsed = [parse(text) for text in overrides]
    for override in parsed:
        if override.type == OverrideType.CHANGE:
            override.type = OverrideType.FORCE_ADD
    try:
        ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(sentence(error)) from error
    return cfg


def refuse_resolvers(value: Any, at: str = "") -> None:
    """Raises ConfigError for a value that calls a resolver, as `${oc.env:HOME}` does; references to keys are fine."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            refuse_resolvers(item, join(at, key))
    elif isinstance(value, str) and "${" in value:
        with suppress(GrammarParseError):  # for OmegaConf to explain
            nodes: list[Any] = [grammar_parser.parse(value)]
            while nodes:
                node = nodes.pop()
                if isinstance(node, grammar_parser.OmegaConfGrammarParser.InterpolationResolverContext):
                    raise ConfigError(f"{at}: {node.getText()} is not looked up; write what it stands for")
                nodes += getattr(node, "children", None) or ()


def to_yaml(cfg: Any) -> str:
    """The resolved `cfg` as a YAML in a reader's order, which `compose` reads back."""
    values = plain(cfg)
    first = ("name", "method", "method_kwargs", "momentum", "intra", "gap", "backbone", "data")
    return OmegaConf.to_yaml({key: values[key] for key in (*first, *values) if key in values})


def key_of(text: str) -> str:
    """The full key that an override sets."""
    return text.lstrip("+~").partition("=")[0].partition("@")[0]


def quoted(text: Any) -> str:
    """`text` in Hydra's grammar, whatever characters it has."""
    # a backslash is special only before a quote
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), str(text))
    return f"'{escaped}'"


def assign(key: str, text: Any) -> str:
    """The override that sets `key` to `text`."""
    return f"{key}={quoted(text)}"


def parse(text: str) -> Override:
    """An override. Its value is quoted where it holds a `=`, as the names of checkpoints do (`...-ep=9.ckpt`), and
    where Hydra's grammar has no place for the characters of a path (`~/images`, `set (1)`, `a,b`)."""
    key, _, value = text.partition("=")
    bare = value[:1] not in tuple("'\"[{$(")
    quoted = assign(key, value)
    is_text = bare and key_of(text) in text_keys()
    read = OverridesParser.create().parse_overrides
    try:
        [override] = read([quoted if bare and "=" in value else text])
    except (HydraException, ValueError) as error:
        if not is_text:
            exact = f', "{quoted}"' if bare and value and "'" not in value else ""
            rules = f"(lists are [1,2], odd characters need quotes{exact})"
            raise ConfigError(f"'{text}' is not an override such as key=value {rules}") from error
        [override] = read([quoted])
    if override.is_sweep_override() and is_text and (key.endswith("_path") or "/" in value):
        [override] = read([quoted])
    if override.is_sweep_override():
        advice = "" if "(" in value else f"; where {key} takes a list, it is '{key}=[{value}]'"
        raise ConfigError(f"'{text}' asks for several runs, which is not supported{advice}")
    if isinstance(override.value(), int | float) and override.key_or_group in text_keys():  # 1.10, not 1.1
        [override] = read([quoted])
    return override


def _neighbour(path: Path) -> str:
    """`; did you mean 'x'?` for the existing file or folder that `path` was most likely meant to be."""
    wrong, rest = path, Path()
    while not wrong.parent.is_dir():
        wrong, rest = wrong.parent, wrong.name / rest
    places = {entry.name: entry / rest for entry in wrong.parent.iterdir() if (entry / rest).exists()}
    if wrong == path:
        places |= {f"{name}.yaml": path.with_name(f"{name}.yaml") for name in recipes.names(path.parent)}
    close = difflib.get_close_matches(wrong.name, places, n=1)
    return f"; did you mean '{places[close[0]]}'?" if close else ""


def sentence(error: Exception) -> str:
    """A library's message of several lines as one sentence."""
    text = str(error)
    if text.startswith("Error merging override") and error.__cause__:
        text += f"\n{error.__cause__}"
    lines = [line.strip().rstrip(".;:") for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("full_key", "object_type", "See https"))]
    at = getattr(error, "full_key", None)
    return (f"{at}: " if at else "") + "; ".join(lines[:3])
