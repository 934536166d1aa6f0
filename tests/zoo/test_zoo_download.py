"""The zoo's files from servers that cut, lie and break: what `fetch` gives has the index's SHA-256."""

import os
import random
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from hub_server import TOKEN, whole

import solo_ext
from solo_ext.errors import CheckpointError
from solo_ext.runs import zoos
from solo_ext.zoo import store
from solo_ext.zoo.edit import publish
from solo_ext.zoo.index import Entry, ZooFile, read_index, write_index

NAME, FOLDER, REPOSITORY = "byol-a-r18", "a/byol-a-r18", "jane/zoo"
WEIGHTS = f"{FOLDER}/model.safetensors"
CONTENTS = {f"{FOLDER}/args.json": b"{}\n", WEIGHTS: random.Random(0).randbytes(300_000)}
SIZE = len(CONTENTS[WEIGHTS])
OTHER = random.Random(1).randbytes(SIZE)
HTML = b"<!doctype html><title>Please log in</title>"
CUT = 1 << 16


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A zoo of one's own; its entry's files are there."""
    folder = tmp_path / "zoo"
    (folder / FOLDER).mkdir(parents=True)
    for path, content in CONTENTS.items():
        (folder / path).write_bytes(content)
    files = [ZooFile(len(content), sha256(content).hexdigest(), path) for path, content in CONTENTS.items()]
    write_index(folder / "index.yaml", [Entry(NAME, "byol", "resnet18", "a", 1, files=files)])
    monkeypatch.setenv(zoos.ZOO, str(folder))
    return folder


@pytest.fixture
def published(zoo, hub, monkeypatch):
    """The zoo's folder, whose entry is on the Hub and nowhere else."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    publish(zoo, REPOSITORY, [NAME])
    for path in CONTENTS:
        (zoo / path).unlink()
    hub.seen.clear()
    return zoo


@pytest.fixture
def cache(published, tmp_path):
    """Where the library's cache will have the entry; whatever `fetch` calls good is compared with the truth."""
    return tmp_path / "hub" / "models--jane--zoo" / "snapshots" / read_index(published)[NAME].revision / FOLDER


def fetched(cache: Path) -> None:
    path, content = store.fetch(store.find(NAME))
    assert path == cache / "model.safetensors" and content == CONTENTS[WEIGHTS]
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == {
        Path(path).name: content for path, content in CONTENTS.items()
    }


def refused(message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        store.fetch(store.find(NAME))
    assert str(caught.value).isprintable()
    return str(caught.value)


def answers(*each, then=whole):
    """The first answers to GETs of the weights, and the one to all later ones; other files are sent as they are."""
    todo = list(each)

    def answer(request, content, n):
        (whole if content not in (CONTENTS[WEIGHTS], OTHER) else todo.pop(0) if todo else then)(request, content, n)

    return answer


def sends(content=None, **how):
    return lambda request, right, n: whole(request, right if content is None else content, **how)


def says(status: int, **headers):
    return lambda request, content, n: request.send({"error": "no"}, status, **headers)


def redirects(where: str):
    return lambda request, content, n: request.send(status=302, content=b"", Location=where.format(request.path))


def test_it_is_downloaded_once_and_works_offline(cache, hub, monkeypatch):
    fetched(cache)
    assert sorted(hub.downloads) == ["args.json", "model.safetensors"]
    hub.seen.clear()
    fetched(cache)
    assert not hub.seen
    hub.close()
    fetched(cache)
    (cache / "args.json").unlink()
    refused(
        rf"hf://jane/zoo/{FOLDER}/args.json is not in the cache \(.*\), and http://127.* cannot be reached or fails$"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("args.json is not in the cache .*, and HF_HUB_OFFLINE is set$")


GOOD = {  # the answers to GETs of the weights, and how many there are
    "at once": (answers(), 1),
    "cut once": (answers(sends(cut=CUT)), 2),
    "hangs up": (answers(sends(cut=0), sends(cut=0)), 3),
    "cuts, then ignores Range": (answers(sends(cut=CUT), then=sends(ranges=False)), 2),
    "cuts, then another file": (answers(sends(cut=CUT), sends(OTHER, ranges=False)), 3),
    "another file at first": (answers(sends(OTHER)), 2),
    "a web page at first": (answers(sends(HTML.ljust(SIZE))), 2),
    "429, then 503": (answers(says(429, Retry_After=0)), 2),
}


@pytest.mark.parametrize("name", GOOD)
def test_servers_that_can_be_used(name, cache, hub):
    hub.send_file, requests = GOOD[name]
    fetched(cache)
    assert hub.downloads.count("model.safetensors") == requests


NOT_IT = f"^hf://jane/zoo/{WEIGHTS} is not the file of the index: its size, SHA-256 or revision differs$"
FAILS = f"^hf://jane/zoo/{WEIGHTS} fails: "
BAD = {
    "a connection cut every 64 KiB": (answers(then=sends(cut=CUT)), FAILS + "peer closed connection"),
    "another file": (answers(then=sends(OTHER)), NOT_IT),
    "one flipped bit": (answers(then=sends(OTHER[:1] + CONTENTS[WEIGHTS][1:])), NOT_IT),
    "a web page of that size": (answers(then=sends(HTML.ljust(SIZE))), NOT_IT),
    "a web page": (answers(then=sends(HTML)), FAILS + "Consistency check failed"),
    "too short": (answers(then=sends(CONTENTS[WEIGHTS][:-1])), FAILS + "Consistency check failed"),
    "too long": (answers(then=sends(CONTENTS[WEIGHTS] + b"!")), FAILS + "Consistency check failed"),
    "another file after each cut": (answers(then=sends(OTHER, ranges=False)), NOT_IT),
    "404": (answers(then=says(404)), "is refused by http://127.* status 404"),
    "403": (answers(then=says(403)), "is refused by http://127.* status 403"),
    "500": (answers(then=says(500)), "is refused by http://127.* status 500"),
    "redirects to another file": (
        answers(then=redirects("/jane/zoo/resolve/main/other")),
        "fails|refused|not the file",
    ),
    "redirects in a circle": (answers(then=redirects("{}")), FAILS),
    "redirects to a disk": (answers(then=redirects("file:///etc/passwd")), FAILS),
    "no HTTP": (answers(then=lambda request, *_: request.wfile.write(OTHER)), FAILS),
}


@pytest.mark.parametrize("name", BAD)
def test_servers_that_cannot(name, cache, hub):
    hub.send_file, message = BAD[name]
    refused(message)
    assert not os.path.lexists(cache / "model.safetensors")
    hub.send_file = whole  # whatever is left does not hinder the next download
    fetched(cache)


def test_another_revision_than_the_index_says(cache, published, hub):
    hub.send_file = answers()
    hub.repos[REPOSITORY][WEIGHTS] = OTHER  # a later commit
    fetched(cache)
    hub.commits.clear()
    for file in cache.iterdir():
        file.unlink()
    refused("has no such revision$")


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "remove"])
def test_a_damaged_file_in_the_cache_is_fetched_again_once(spoil, cache, hub):
    fetched(cache)
    weights = cache / "model.safetensors"
    content = {"flip": OTHER, "cut": CONTENTS[WEIGHTS][:-1], "empty": b"", "remove": None}[spoil]

    def damage():
        weights.unlink() if content is None else weights.resolve().write_bytes(content)

    damage()
    assert [state for path, state in store.verify(store.find(NAME)) if path.name == weights.name] == [
        "missing" if content is None else "damaged"
    ]
    hub.seen.clear()
    fetched(cache)
    assert hub.downloads == ["model.safetensors"] or content is None
    hub.send_file = answers(then=sends(OTHER))
    damage()
    if content is not None:
        refused(NOT_IT)
        hub.close()
        refused("is not in the cache")


def test_a_damaged_file_of_the_zoo_comes_from_the_hub_or_is_refused(zoo, hub, monkeypatch, caplog):
    weights = zoo / WEIGHTS
    path, content = store.fetch(store.find(NAME))
    assert path == weights and content == CONTENTS[WEIGHTS] and not hub.seen
    weights.write_bytes(OTHER)
    assert refused("is missing or damaged: it is not what the index says$").startswith(str(weights))
    weights.write_bytes(content)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    publish(zoo, REPOSITORY, [NAME])
    assert store.fetch(store.find(NAME)) == (weights, content)
    (zoo / FOLDER / "args.json").write_bytes(b"{ }")
    path, again = store.fetch(store.find(NAME))
    assert again == content and path.parent != weights.parent and "args.json is missing or damaged" in caplog.text


def test_eight_processes_at_once(cache, hub):
    hub.send_file = answers(sends(cut=CUT))
    code = f"import sys; sys.stdin.read(); from solo_ext.zoo.store import fetch, find; print(fetch(find({NAME!r}))[0])"
    environment = {**os.environ, "PYTHONPATH": str(Path(solo_ext.__file__).parents[1])}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache.parents[4]), "HF_HUB_DISABLE_XET": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    eight = [subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes) for _ in range(8)]
    for process in eight:
        process.stdin.close()
    for process in eight:
        process.stdin = None
        out, err = process.communicate(timeout=120)
        assert out.strip() == str(cache / "model.safetensors"), err
    fetched(cache)
    assert hub.downloads.count("model.safetensors") == 2  # of one process
