"""Encoders on the Hugging Face Hub: `hf://owner/name[@revision]`, and `solo-ext export --push`."""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, snapshot_download
from huggingface_hub.utils import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from solo_ext import __version__
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import read_json
from solo_ext.runs.run import ARGS, RECORDS, WEIGHTS, Run
from solo_ext.zoo.export import RECORD as REPORT

CONFIG, CARD = "config.json", "README.md"
FILES = (WEIGHTS, ARGS, RECORDS, CONFIG)  # no other file of a repository is looked at
REPOSITORY = "OWNER/NAME"  # what a card says until it is pushed
_ID = r"[\w.-]+/[\w.-]+"
_AGENT = {"library_name": "solo_ext", "library_version": __version__}


def fetch(source: str) -> Path:
    """The weights of `hf://owner/name[@revision]` in huggingface_hub's cache, with args.json beside them.

    Cache, token and address are huggingface_hub's own (HF_HOME, HF_TOKEN, HF_ENDPOINT). Without network, what the
    cache has is taken.

    Raises:
        CheckpointError: no such repository or revision, no way to it, or not what `solo-ext export` writes.
    """
    match = re.fullmatch(rf"hf://({_ID})(?:@([\w./-]+))?", source)
    if not match or ".." in source:
        raise CheckpointError(f"'{source}' is not of the form hf://owner/name or hf://owner/name@revision")
    repository, revision = match.groups()
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES), **_AGENT))
    except Exception as error:  # of the HTTP library, which differs between versions
        raise CheckpointError(f"{source} {_reason(error)}") from error
    recorded = Run(folder).records.get(WEIGHTS, {}).get("sha256")
    missing = [name for name in FILES[:2] if not (folder / name).is_file()]
    if missing or not isinstance(recorded, str):
        lacks = missing[0] if missing else f"SHA-256 of {WEIGHTS} in {RECORDS}"
        timms = "architecture" in (read_json(folder / CONFIG) or {})
        hint = f"; timm.create_model('hf-hub:{source[5:]}', pretrained=True) may load it" if timms else ""
        raise CheckpointError(f"{source} is not what solo-ext export --to huggingface writes: it has no {lacks}{hint}")
    return folder / WEIGHTS


def check_push(repository: str) -> None:
    """Raises ConfigError if nothing can be pushed to `repository`: it is not OWNER/NAME, or there is no token."""
    if not re.fullmatch(_ID, repository):
        raise ConfigError(f"--push takes OWNER/NAME of a repository on the Hugging Face Hub, not '{repository}'")
    if not get_token():
        raise ConfigError("--push needs a token of the Hugging Face Hub: log in with hf auth login, or set HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Uploads what `solo-ext export --to huggingface` wrote into `folder`, in one commit, and returns the page's URL.

    Raises:
        CheckpointError: the Hub cannot be reached or refuses.
    """
    contents = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != REPORT}
    contents[CARD] = contents[CARD].replace(REPOSITORY.encode(), repository.encode())
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    api = HfApi(**_AGENT)
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.create_commit(url.repo_id, operations, commit_message="Encoder written by solo-ext export")
    except Exception as error:  # likewise
        raise CheckpointError(f"{folder} is not pushed: {repository} {_reason(error)}") from error
    return str(url)


def _reason(error: Exception) -> str:
    """What went wrong with a repository, as the end of a sentence."""
    if isinstance(error, GatedRepoError):
        return "wants its terms to be accepted, on its page and logged in (hf auth login, or HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return "is not on the Hugging Face Hub, or is private and needs hf auth login or HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, LocalEntryNotFoundError):
        return f"is not in the cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} cannot be reached or fails"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        said = f" ({error.server_message})" if getattr(error, "server_message", None) else ""
        return f"is refused by {constants.ENDPOINT}: status {error.response.status_code}{said}"
    return f"cannot be had: {(str(error) or type(error).__name__).splitlines()[0]}"
