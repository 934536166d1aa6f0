"""Where weights are: in a zoo's folder on disk, or on the Hugging Face Hub.

The Hub's cache, resume, proxies, token and offline mode are huggingface_hub's.
"""

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub as hf
from huggingface_hub import utils

import solo_ext
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import log, read_json
from solo_ext.runs.run import ARGS, RECORDS, WEIGHTS, Run
from solo_ext.runs.zoos import folders
from solo_ext.text import nearest
from solo_ext.zoo.index import REPOSITORY, Entry, ZooFile, read_index

if TYPE_CHECKING:
    from solo_ext.runs.checkpoints import Checkpoint

CONFIG = "config.json"  # timm's
_AGENT: dict[str, Any] = {"library_name": "solo_ext", "library_version": solo_ext.__version__}


def entries() -> dict[str, Entry]:
    """Name -> entry; one in $SOLO_EXT_ZOO takes precedence over one of the same name that came with the code."""
    return {name: entry for folder in reversed(folders()) for name, entry in read_index(folder).items()}


def find(name: str, choices: Mapping[str, Entry] | None = None) -> Entry:
    """The entry `name` of `choices`, by default `entries()`; if there is none, a CheckpointError names the nearest."""
    choices = entries() if choices is None else choices
    if name not in choices:
        raise CheckpointError(f"the zoo has no '{name}'{nearest(name, choices) or ' (solo-ext zoo list shows all)'}")
    return choices[name]


def fetch(entry: Entry) -> tuple[Path, bytes]:
    """The weights of `entry` and their content, with the run's other files beside them, all verified.

    They are used in place if a zoo on disk has them, and otherwise downloaded into the Hub's cache. A recipe, and
    files that are not what the index says, raise a CheckpointError.
    """
    entry.check_weights()
    if folder := _on_disk(entry):
        contents = {file.name: file.read(folder / file.name) for file in entry.files}
        damaged = next((folder / name for name, content in contents.items() if content is None), None)
        if damaged is None and (weights := contents[WEIGHTS]) is not None:
            return folder / WEIGHTS, weights
        if not entry.repository:
            raise CheckpointError(f"{damaged} is missing or damaged: it is not what the index says")
        log.warning("%s is missing or damaged; '%s' is taken from the Hugging Face Hub", damaged, entry.name)
    if not entry.repository:
        raise CheckpointError(f"the files of '{entry.name}' are not in {' or '.join(map(str, folders()))}")
    downloads = [_download(entry.repository, entry.revision, file) for file in entry.files]
    return next((path, content) for path, content in downloads if path.name == WEIGHTS)


def open_source(source: str | os.PathLike) -> "Checkpoint":
    """The checkpoint that `source`, as in `load_backbone`, names: read once, verified, downloaded if need be."""
    from solo_ext.runs.checkpoints import Checkpoint, decode, open_checkpoint  # with torch, which a list can do without

    name, path = str(source), Path(source).expanduser()
    if name.startswith("hf://"):
        return open_checkpoint(fetch_repository(name))
    if not isinstance(source, str) or path.name != source or path.exists():
        return open_checkpoint(path)
    zoo = entries()
    if name not in zoo:
        raise CheckpointError(f"there is no '{name}', neither here nor in the zoo{nearest(name, zoo)}")
    path, content = fetch(zoo[name])
    return Checkpoint(path, decode(path, io.BytesIO(content)), Run(path.parent).config)


def verify(entry: Entry) -> list[tuple[Path, str]]:
    """The place of each file of `entry`, and whether it is ok, missing or damaged; a recipe is a CheckpointError."""
    entry.check_weights()
    folder, states = _on_disk(entry), []
    for file in entry.files:
        cached = entry.repository and hf.try_to_load_from_cache(entry.repository, file.path, revision=entry.revision)
        path = folder / file.name if folder else Path(cached) if isinstance(cached, str) else None
        if path is None or not os.path.lexists(path):
            states.append((path or Path(file.path), "missing"))
        else:
            states.append((path, "damaged" if file.read(path) is None else "ok"))
    return states


def _on_disk(entry: Entry) -> Path | None:
    """The folder of `entry` in a zoo on disk."""
    return next((zoo / entry.folder for zoo in folders() if (zoo / entry.folder / WEIGHTS).is_file()), None)


def _download(repository: str, revision: str | None, file: ZooFile) -> tuple[Path, bytes]:
    """A file of a published entry in the cache, and its content, which has the size and SHA-256 of the index.

    A missing file is downloaded, a damaged one once more; if it still differs, it is removed: a CheckpointError.
    """
    source = f"hf://{repository}/{file.path}"
    with _explained(source):
        for _ in range(2):
            path = Path(hf.hf_hub_download(repository, file.path, revision=revision, **_AGENT))
            if revision in path.parts and (content := file.read(path)) is not None:
                return path, content
            for name in (path.resolve(), path):  # the content, and the link to it
                name.unlink(missing_ok=True)
    raise CheckpointError(f"{source} is not the file of the index: its size, SHA-256 or revision differs")


def fetch_repository(source: str) -> Path:
    """The weights of `hf://owner/name[@revision]` in the cache, with args.json beside them; no other file is read.

    A CheckpointError says what is missing, or that `solo-ext export` did not write the repository.
    """
    match = re.fullmatch(rf"hf://({REPOSITORY})(?:@([\w./-]+))?", source)
    if not match or ".." in source:
        raise CheckpointError(f"'{source}' is not of the form hf://owner/name or hf://owner/name@revision")
    patterns = [WEIGHTS, ARGS, RECORDS, CONFIG]
    with _explained(source):
        folder = Path(hf.snapshot_download(match[1], revision=match[2], allow_patterns=patterns, **_AGENT))
    missing = [name for name in (WEIGHTS, ARGS) if not (folder / name).is_file()]
    if not Run(folder).records.get(WEIGHTS, {}).get("sha256"):
        missing.append(f"SHA-256 of {WEIGHTS} in {RECORDS}")
    if missing:
        by_timm = "architecture" in (read_json(folder / CONFIG) or {})
        hint = f"; timm.create_model('hf-hub:{source[5:]}', pretrained=True) may load it" if by_timm else ""
        lacks = f"it has no {missing[0]}{hint}"
        raise CheckpointError(f"{source} is not what solo-ext export --to huggingface writes: {lacks}")
    return folder / WEIGHTS


def check_upload(option: str, repository: str) -> None:
    """Raises ConfigError if nothing can be uploaded to `repository`: it is not OWNER/NAME, or there is no token."""
    if not re.fullmatch(REPOSITORY, repository):
        raise ConfigError(f"{option} takes OWNER/NAME of a repository on the Hugging Face Hub, not '{repository}'")
    if not hf.get_token():
        raise ConfigError(f"{option} needs a token of the Hugging Face Hub: log in with hf auth login, or set HF_TOKEN")


def upload(repository: str, files: Mapping[str, bytes | Path], message: str, failure: str) -> tuple[hf.RepoUrl, str]:
    """Commits `files`, path -> content or a file on disk, to a repository, which is created if need be.

    Returns the repository's URL and the hash of the commit. After a failure, a CheckpointError begins with `failure`.
    """
    api = hf.HfApi(**_AGENT)
    with _explained(f"{failure}: {repository}"):
        operations = [hf.CommitOperationAdd(name, x if isinstance(x, bytes) else str(x)) for name, x in files.items()]
        url = api.create_repo(repository, exist_ok=True)
        return url, api.create_commit(url.repo_id, operations, commit_message=message).oid


@contextmanager
def _explained(subject: str) -> Iterator[None]:
    """Turns every failure into a CheckpointError that begins with `subject`, a repository or file."""
    address = hf.constants.ENDPOINT
    try:
        yield
    except Exception as error:  # of the HTTP library, which differs between versions
        match error:
            case utils.GatedRepoError():
                why = "wants its terms to be accepted, on its page and logged in (hf auth login, or HF_TOKEN)"
            case utils.RepositoryNotFoundError():
                why = "is not on the Hugging Face Hub, or is private and needs hf auth login or HF_TOKEN"
            case utils.RevisionNotFoundError():
                why = "has no such revision"
            case utils.LocalEntryNotFoundError():
                offline = hf.constants.HF_HUB_OFFLINE
                cause = "HF_HUB_OFFLINE is set" if offline else f"{address} cannot be reached or fails"
                why = f"is not in the cache ({hf.constants.HF_HUB_CACHE}), and {cause}"
            case utils.HfHubHTTPError(response=response) if response is not None:
                detail = f" ({error.server_message})" if error.server_message else ""
                why = f"is refused by {address}: status {response.status_code}{detail}"
            case _:
                why = f"fails: {(str(error) or type(error).__name__).splitlines()[0]}"
        raise CheckpointError(f"{subject} {why}") from error
