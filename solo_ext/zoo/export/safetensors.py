"""A run folder again, with the backbone alone in `model.safetensors`, and nothing private."""

import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

import safetensors.torch
from torch import nn

from solo_ext.errors import CheckpointError
from solo_ext.files import json_text, read_json
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.encoder import load_encoder
from solo_ext.runs.run import ARGS, ENVIRONMENT, RECORDS, WEIGHTS, Run
from solo_ext.runs.run import METRICS as LOG
from solo_ext.zoo.export import Product, Source

FILES = (WEIGHTS, ARGS, RECORDS, LOG, ENVIRONMENT)
# the last word of a key whose text names a place, a person or a secret
_PRIVATE = re.compile(
    r"(^|[._-])(path|dir|root|folder|file|checkpoint|extractor|url|entity|project|host|user|email|token|secret|password|key)$"
)
_PLACE = re.compile(r"~|/|\\\\|[A-Za-z]:[\\/]|\.\.[\\/]|[a-z0-9]+://")  # how the path of a machine begins
_INNER = re.compile(rf"(?<![\w./~-])(?:{_PLACE.pattern})[^\[\](){{}},'\"]*")  # one in a list or mapping


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """An args.json without what names this machine or person: paths, accounts, secrets; the network and data stay."""
    return {key: _public(value) for key, value in config.items() if not _is_private(key, value)}


def _is_private(key: str, value: Any) -> bool:
    return isinstance(value, str) and bool(_PRIVATE.search(str(key).lower()) or _PLACE.match(value))


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_config(value)
    if isinstance(value, list | tuple):
        return [_public(item) for item in value if not _is_private("", item)]
    return value


def public_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment.json without the host; of the paths in its commands only the last part stays.

    Of a YAML's path all stays that begins with the repository's `scripts`.
    """
    public = public_config({key: value for key, value in environment.items() if key not in ("host", "before")})
    if isinstance(command := environment.get("command"), list):
        public["command"] = [_public_word(str(word)) for word in command]
    if isinstance(before := environment.get("before"), list):  # of the processes that the run continued
        public["before"] = [public_environment(each) for each in before if isinstance(each, Mapping)]
    return public


def _public_word(word: str) -> str:
    """A word of a command line: `path`, `key=path`, `key=[path,path]`, `--option=path`, or anything else."""
    key, equals, value = word.partition("=") if "=" in word and not _PLACE.match(word) else ("", "", word)
    if _PLACE.match(value.strip("'\"")):
        value = _last_part(value.strip("'\""))
    elif _PRIVATE.search(key.lower()):
        value = "***"
    else:
        value = _INNER.sub(lambda path: _last_part(path[0]), value)
    return f"{key}{equals}{value}"


def _last_part(path: str) -> str:
    parts = PureWindowsPath(path).parts  # which takes both kinds of slashes
    if "scripts" in parts:
        return "/".join(parts[parts.index("scripts") :])
    return parts[-1] if len(parts) > 1 else "***"


def supports(backbone: nn.Module) -> str | None:
    """None: all backbones."""
    return None


def export(source: Source) -> Product:
    """`model.safetensors`, args.json, the record of its SHA-256, and the run's log and environment if there are any."""
    run = source.path.parent
    weights = safetensors.torch.save(source.tensors, {"format": "pt"})
    place = Run(run).records.get(source.path.name)
    if place is None:
        checkpoint = load_checkpoint(source.path)
        place = {"epoch": checkpoint.get("epoch"), "step": checkpoint.get("global_step")}
    record = {**place, "sha256": hashlib.sha256(weights).hexdigest(), "size": len(weights)}
    files = {
        WEIGHTS: weights,
        ARGS: _json(public_config(source.config)),
        RECORDS: _json({WEIGHTS: record}),
    }
    if environment := read_json(run / ENVIRONMENT):
        files[ENVIRONMENT] = _json(public_environment(environment))
    try:
        files[LOG] = (run / LOG).read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(f"{run / LOG} cannot be read: {error.strerror}") from error
    return Product(
        files,
        lambda folder: load_encoder(folder)[0],
        f"a run folder of {source.config['backbone']['name']}",
        have=source.tensors,
        want=list(source.backbone.state_dict()),
        load=(f"solo-ext knn --run {shlex.quote(str(source.out))}",),
    )


def _json(value: Any) -> bytes:
    return json_text(value).encode()
