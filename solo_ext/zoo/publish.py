"""`solo-ext zoo publish`: entries go to the Hugging Face Hub, from where `zoo download` takes them elsewhere."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from solo_ext.errors import CheckpointError
from solo_ext.zoo.hub import check_upload, upload
from solo_ext.zoo.index import INDEX, editing
from solo_ext.zoo.store import find


def publish(zoo: Path, repository: str, names: Sequence[str]) -> str:
    """Uploads entries of the zoo in the folder `zoo` in one commit, and enters repository and revision into its index.

    Args:
        repository: owner/name; it is made if need be, and gets `<dataset>/<name>/` for each entry.

    Returns:
        The URL of the commit's tree.

    Raises:
        ConfigError: `repository` is no such name, or there is no token.
        CheckpointError: no such entry, files that are not what the index says, an index that cannot be written, or the
            Hub cannot be reached or refuses; the index is as it was.
    """
    check_upload("--repo", repository)
    for path in (zoo, zoo / INDEX):
        if not os.access(path, os.W_OK):
            raise CheckpointError(f"{zoo / INDEX} cannot be written, so nothing is published")
    with editing(zoo) as known:
        for name in names:
            if not find(name, known).files:
                raise CheckpointError(f"'{name}' is a recipe without weights: there is nothing to publish")
        chosen = [known[name] for name in names]
        files = [file for entry in chosen for file in entry.files]
        for file in files:
            if file.read(zoo / file.path) is None:
                raise CheckpointError(f"{zoo / file.path} is missing or damaged, so nothing is published")
        paths = {file.path: zoo / file.path for file in files}
        message = f"Entries of solo-ext's zoo: {', '.join(names)}"
        url, revision = upload(repository, paths, message, "nothing is published")
        for entry in chosen:
            known[entry.name] = replace(entry, repository=url.repo_id, revision=revision)
    return f"{url}/tree/{revision}"
