"""The Hugging Face Hub; cache, resume, proxies, token and offline mode are huggingface_hub's."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from huggingface_hub import utils

from solo_ext import __version__
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import read_json
from solo_ext.runs.run import ARGS, RECORDS, WEIGHTS
from solo_ext.zoo.index import REPOSITORY, Entry, ZooFile

CONFIG = "config.json"  # timm's
_AGENT: dict[str, Any] = {"library_name": "solo_ext", "library_version": __version__}


def fetch(source: str) -> Path:
    """The weights of `hf://owner/name[@revision]` in the cache, with args.json beside them; no other file is read.

    Without a network, the cache is used. A CheckpointError says what is missing, or that `solo-ext export` did not
    write the repository.
    """
    match = re.fullmatch(rf"hf://({REPOSITORY})(?:@([\w./-]+))?", source)
    if not match or ".." in source:
        raise CheckpointError(f"'{source}' is not of the form hf://owner/name or hf://owner/name@revision")
    repository, revision = match.groups()
    patterns = [WEIGHTS, ARGS, RECORDS, CONFIG]
    with _explained(source):
        folder = Path(hf.snapshot_download(repository, revision=revision, allow_patterns=patterns, **_AGENT))
    record = (read_json(folder / RECORDS) or {}).get(WEIGHTS)
    missing = [name for name in (WEIGHTS, ARGS) if not (folder / name).is_file()]
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
        missing.append(f"SHA-256 of {WEIGHTS} in {RECORDS}")
    if missing:
        by_timm = "architecture" in (read_json(folder / CONFIG) or {})
        hint = f"; timm.create_model('hf-hub:{source[5:]}', pretrained=True) may load it" if by_timm else ""
        lacks = f"it has no {missing[0]}{hint}"
        raise CheckpointError(f"{source} is not what solo-ext export --to huggingface writes: {lacks}")
    return folder / WEIGHTS


def cache_path(entry: Entry, file: ZooFile) -> Path | None:
    """Where the cache has this file of `entry`, whatever its content."""
    path = entry.repository and hf.try_to_load_from_cache(entry.repository, file.path, revision=entry.revision)
    return Path(path) if isinstance(path, str) else None


def read(entry: Entry, file: ZooFile) -> tuple[Path, bytes]:
    """A file of a published `entry` in the cache, and its content, which has the size and SHA-256 of the index.

    A missing file is downloaded, a damaged one once more; if it still differs, it is removed: a CheckpointError.
    """
    assert entry.repository is not None, "only what was published is on the Hub"
    source = f"hf://{entry.repository}/{file.path}"
    with _explained(source):
        for _ in range(2):
            path = Path(hf.hf_hub_download(entry.repository, file.path, revision=entry.revision, **_AGENT))
            if entry.revision in path.parts and (content := file.read(path)) is not None:
                return path, content
            for name in (path.resolve(), path):  # the content, and the link to it
                name.unlink(missing_ok=True)
    raise CheckpointError(f"{source} is not the file of the index: its size, SHA-256 or revision differs")


def check_upload(option: str, repository: str) -> None:
    """Raises ConfigError if nothing can be uploaded to `repository`: it is not OWNER/NAME, or there is no token."""
    if not re.fullmatch(REPOSITORY, repository):
        raise ConfigError(f"{option} takes OWNER/NAME of a repository on the Hugging Face Hub, not '{repository}'")
    if not hf.get_token():
        raise ConfigError(f"{option} needs a token of the Hugging Face Hub: log in with hf auth login, or set HF_TOKEN")


def upload(repository: str, files: Mapping[str, bytes | Path], message: str, failure: str) -> tuple[hf.RepoUrl, str]:
    """Commits `files`, path -> content or a file on the disk, to a repository, which is created if need be.

    Returns the repository, whose text is its URL, and the hash of the commit. If the Hub cannot be reached or refuses,
    a CheckpointError begins with `failure`.
    """
    api = hf.HfApi(**_AGENT)
    with _explained(f"{failure}: {repository}"):
        operations = [hf.CommitOperationAdd(name, x if isinstance(x, bytes) else str(x)) for name, x in files.items()]
        url = api.create_repo(repository, exist_ok=True)
        return url, api.create_commit(url.repo_id, operations, commit_message=message).oid


@contextmanager
def _explained(subject: str) -> Iterator[None]:
    """Turns every failure into a CheckpointError that begins with `subject`."""
    try:
        yield
    except Exception as error:  # of the HTTP library, which differs between versions
        raise CheckpointError(f"{subject} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong with a repository, as the end of a sentence."""
    address = hf.constants.ENDPOINT
    match error:
        case utils.GatedRepoError():
            return "wants its terms to be accepted, on its page and logged in (hf auth login, or HF_TOKEN)"
        case utils.RepositoryNotFoundError():
            return "is not on the Hugging Face Hub, or is private and needs hf auth login or HF_TOKEN"
        case utils.RevisionNotFoundError():
            return "has no such revision"
        case utils.LocalEntryNotFoundError():
            why = "HF_HUB_OFFLINE is set" if hf.constants.HF_HUB_OFFLINE else f"{address} cannot be reached or fails"
            return f"is not in the cache ({hf.constants.HF_HUB_CACHE}), and {why}"
        case utils.HfHubHTTPError(response=response) if response is not None:
            detail = f" ({error.server_message})" if error.server_message else ""
            return f"is refused by {address}: status {response.status_code}{detail}"
    return f"fails: {(str(error) or type(error).__name__).splitlines()[0]}"
