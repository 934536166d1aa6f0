"""A run folder with only the backbone, in `model.safetensors`, and nothing private."""

import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from solo_ext.files import json_text
from solo_ext.runs.checkpoints import save_tensors
from solo_ext.runs.encoder import load_encoder
from solo_ext.runs.run import ARGS, ENVIRONMENT, METRICS, RECORDS, WEIGHTS, Run
from solo_ext.zoo.export import Product, Source

DTYPES = ("float16", "bfloat16", "float32")
# the last word of a key whose value names a place, a person or a secret
_PRIVATE = re.compile(
    r"(^|[._-])(path|dir|root|folder|file|checkpoint|extractor|url|entity|project|host|user|email|token|secret|password|key)$"
)
_PLACE = re.compile(r"~|/|\\\\|[A-Za-z]:[\\/]|\.\.[\\/]|[a-z0-9]+://")  # how the path of a machine begins
_INNER = re.compile(rf"(?<![\w./~-])(?:{_PLACE.pattern})[^\[\](){{}},'\"]*")  # one in a list or mapping


def public(content: Any, key: str = "") -> Any:
    """An args.json or environment.json without what identifies this machine or person: paths, accounts, secrets, host.

    A path in a command line keeps its last part, or what begins with the repository's `scripts`.
    """
    if isinstance(content, Mapping):
        return {key: public(value, key) for key, value in content.items() if not _is_private(key, value)}
    if isinstance(content, list | tuple) and key == "command":
        return [_public_word(str(word)) for word in content]
    if isinstance(content, list | tuple):
        return [public(item) for item in content if not _is_private("", item)]
    return content


def _is_private(key: str, value: Any) -> bool:
    return isinstance(value, str) and bool(_PRIVATE.search(str(key).lower()) or _PLACE.match(value))


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


def export(source: Source, folder: Path) -> Product:
    """`model.safetensors`, args.json, the record of the SHA-256, and the run's log and environment if there are any."""
    path, content = source.checkpoint.path, source.checkpoint.content
    run, weights = Run(path.parent), save_tensors(source.tensors)
    place = run.records.get(path.name) or {"epoch": content.get("epoch"), "step": content.get("global_step")}
    record = {**place, "sha256": hashlib.sha256(weights).hexdigest(), "size": len(weights)}
    (folder / WEIGHTS).write_bytes(weights)
    branch = {"branch": "teacher"} if source.teacher else {}
    contents = {ARGS: public(source.config) | branch, RECORDS: {WEIGHTS: record}}
    if run.environment:
        contents[ENVIRONMENT] = public(run.environment)
    for name, value in contents.items():
        (folder / name).write_text(json_text(value), encoding="utf-8")
    if (log := run.dir / METRICS).exists():
        (folder / METRICS).write_bytes(log.read_bytes())
    return Product(
        load_encoder(folder)[0],
        f"a run folder of {source.config['backbone']['name']}",
        have=source.tensors,
        want=list(source.backbone.state_dict()),
        load=(f"solo-ext knn --run {shlex.quote(str(source.out))}",),
    )
