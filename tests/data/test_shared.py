"""The files of a set are looked for by one process of a node."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from solo_ext.data import datasets, shared
from solo_ext.data.datasets import read_images
from solo_ext.data.images import read_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="of Linux")
TAKES = """if True:
    import json, sys
    from solo_ext.data import datasets, shared
    def read(*_):
        raise SystemExit("looked itself")
    datasets.read_folder = datasets.read_list = read
    shared.START = float(sys.argv[2])
    found = datasets.read_images(sys.argv[1], "data.train_path")
    found.targets[0] = found.targets[0]  # they are its own
    print(json.dumps([found.images.names, found.targets.tolist(), found.classes, str(found.images.root)]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for name in ("a/1.png", "a/ü 2.png", "bé/3.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "set" / os.fsdecode(b"a/\xff.png")).touch()
    monkeypatch.setenv(shared.NODE, "")  # so that it is taken away afterwards
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", shared.NODE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shared, "_SHOWN", {})
    yield tmp_path / "set"
    for memory in shared._SHOWN.values():
        os.close(memory)


def other(folder, patience=20, **environment):
    command = [sys.executable, "-c", TAKES, folder, str(patience)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_the_others_take_over_what_the_first_has_found(folder, kind):
    path = folder
    if kind == "list":
        path = folder.parent / "list.txt"
        path.write_bytes(b"".join(b"set/%s\n" % line for line in (b"a/1.png 1", b"a/\xff.png 0")))
    alone = read_images(path, "data.train_path")
    assert not shared._SHOWN  # without other processes
    shared.begin_node(2)
    for _ in range(2):  # the second time in place of the first
        first = read_images(path, "data.train_path")
    assert (first.images.paths == alone.images.paths).all() and (first.targets == alone.targets).all()
    assert first.targets.dtype == np.int64 and first.classes == alone.classes
    done = other(path, LOCAL_RANK="1")
    names, targets, classes, root = json.loads(done.stdout)
    assert (names, targets, root) == (alone.images.names, alone.targets.tolist(), str(alone.images.root))
    assert tuple(classes) == alone.classes
    assert "looked itself" in other(path, 0.1, LOCAL_RANK="1", **{shared.NODE: "another run"}).stderr
    assert "looked itself" in other(path, LOCAL_RANK="0").stderr  # the first of another run


def test_what_has_ended_is_not_taken_over(folder):
    """As after a requeue, whose processes have the same names."""
    shared.begin_node(2)
    read_images(folder, "data.train_path")
    [place] = shared._SHOWN
    where = json.loads(place.read_text())
    unused = os.open("/dev/null", os.O_RDONLY)
    for changed in ({"memory": 1 << 20}, {"process": 1 << 22}, {"memory": unused}):
        place.write_text(json.dumps(where | changed))
        assert "looked itself" in other(folder, 0.3, LOCAL_RANK="1").stderr
    os.close(unused)
    place.write_text("{")
    assert "looked itself" in other(folder, 0.3, LOCAL_RANK="1").stderr


def test_the_others_wait_while_the_first_looks(folder, monkeypatch):
    shared.begin_node(2)
    waiting = []

    def read(*arguments):
        waiting.append(
            subprocess.Popen(command, env=os.environ | {"LOCAL_RANK": "1"}, stdout=subprocess.PIPE, text=True)
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting[0].wait(15)  # longer than it takes to start and to give up
        return read_folder(*arguments)

    command = [sys.executable, "-c", TAKES, folder, "0.1"]
    monkeypatch.setattr(datasets, "read_folder", read)
    read_images(folder, "data.train_path")
    assert json.loads(waiting[0].communicate(timeout=20)[0])[0] == read_folder(folder, "").images.names


@pytest.mark.parametrize(
    ("environment", "node"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1", "MASTER_PORT": "2", "LOCAL_RANK": "3"},
            "a-1-2",
        ),
        ({"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "6", "SLURM_LOCALID": "7"}, "5-6"),
        ({}, None),
        ({"LOCAL_RANK": "0", shared.NODE: "of an earlier run"}, None),
        ({"LOCAL_RANK": "1", shared.NODE: "of who started it"}, "of who started it"),
    ],
)
def test_what_the_processes_of_a_node_have_in_common(folder, monkeypatch, environment, node):
    """None: the id of this process, which will start the others."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shared.begin_node(2)
    assert os.environ[shared.NODE] == (node or str(os.getpid()))
